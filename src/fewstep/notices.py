"""Notices of other libraries that are not for fewstep's users.

Libraries warn at import and on loading of their own deprecations, and of packages that nobody needs.
"""

import logging
import warnings

ABSENT = "requires torchvision (not installed)"  # of image processors that no teacher uses for sampling
NO_KEYS = "No LoRA keys associated to"  # of text encoders, which no student changes


def mute_others() -> None:
    """Keep these few notices off the screen, and no others.

    Call before the libraries are imported.
    """
    # diffusers imports bitsandbytes wherever it is installed, used or not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers.utils.import_utils").addFilter(_for_users)
    logging.getLogger("diffusers.loaders.lora_base").addFilter(_for_users)
    # diffusers' old spellings, and its remarks on schedulers' configurations.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers\.")
    # The hub's remark on an argument that diffusers passes.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    # peft's, where each step has a LoRA of its own.
    warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)


def _for_users(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in (ABSENT, NO_KEYS))
