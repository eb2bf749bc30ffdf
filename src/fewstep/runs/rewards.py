"""The reward of a run, by its name or as a function.

To add a differentiable reward, add a row to `objectives.rewards.REWARDS`. A metric that scores images is a reward
already.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..evaluation.environments import ENVIRONMENTS, environment_scorer
from ..evaluation.scorer import Scorer
from ..methods.distribution_matching import DistributionMatching
from ..methods.matching_settings import RewardConfig
from ..methods.method import Method
from ..objectives.rewards import REWARDS, Reward
from ..report.video import write_mp4


def require_reward(method: Method, given: Reward | None) -> None:
    """Check that a method has the reward that it needs.

    One that needs none has none. Nothing is loaded. Raises ValueError.
    """
    if not isinstance(method, DistributionMatching) or not method.needs.reward:
        if given is not None:
            raise ValueError(
                f"reward: got one, but method {method.name} takes none; set method.reward.weight above 0, "
                "or leave it out"
            )
        return
    _require_named(method.reward, given)


def judges() -> dict[str, Callable[[], Scorer]]:
    """Return what loads each metric that scores images."""
    from ..evaluation.scorers import SCORERS  # imports transformers' models

    found = dict[str, Callable[[], Scorer]](SCORERS)
    apart = (key for key, known in ENVIRONMENTS.items() if not known.clips and not known.of)
    return found | {key: partial(environment_scorer, key, write_mp4) for key in apart}


def _require_named(config: RewardConfig, given: Reward | None) -> None:
    if given is not None:
        if not callable(given):
            raise ValueError(f"reward: got {given!r}, allowed is a function of images and prompts, or None")
        if config.scorer:
            raise ValueError(f"method.reward.scorer: got {config.scorer} next to a function; leave one of them out")
    elif config.scorer not in (names := (*REWARDS, *judges())):
        raise ValueError(
            f"method.reward.scorer: got {config.scorer!r}, allowed are {', '.join(names)}; or pass a function in "
            "Python, distill(..., reward=...)"
        )
    elif config.by == "gradient" and config.scorer not in REWARDS:
        raise ValueError(
            f"method.reward.by: got gradient with method.reward.scorer={config.scorer}, which has none here; "
            "set method.reward.by=preference"
        )


def reward_of(method: Method, given: Reward | None) -> Reward | None:
    """Return the reward of a run, loaded.

    None where the method takes none.

    Raises ValueError where there is none, and where weights or an environment are missing.
    """
    require_reward(method, given)
    if given is not None or not isinstance(method, DistributionMatching) or not method.needs.reward:
        return given
    name = method.reward.scorer
    if name in REWARDS:
        return REWARDS[name]
    return judged_by(judges()[name]())


def judged_by(scorer: Scorer) -> Reward:
    """Return a metric's scores as a reward, without gradient."""

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            found = scorer.score(images.detach().float(), prompts)
        return found.clone()  # an ordinary tensor, also of a scorer in inference mode

    return reward
