"""What other libraries say at import and on loading that is not for whoever uses this one: deprecations of theirs, packages that nobody needs here."""

import logging
import warnings

ABSENT = "requires torchvision (not installed)"  # of image processors that no teacher's drawing uses


def mute_others() -> None:
    """Keep these few notices off the screen, and nothing else; to be called before the libraries are imported."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # diffusers imports it wherever it is installed, used or not
    logging.getLogger("transformers.utils.import_utils").addFilter(_for_users)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"diffusers\."
    )  # whole configurations of schedulers, old spellings
    warnings.filterwarnings(
        "ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning
    )  # diffusers' to the hub


def _for_users(record: logging.LogRecord) -> bool:
    return ABSENT not in record.getMessage()
