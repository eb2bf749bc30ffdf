"""Presets: a method's name stands for a few settings.

Settings given together with a name take precedence.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ..roles.roles import RolesConfig
from .consistency import ConsistencyDistillation
from .distribution_matching import DistributionMatching
from .matching_settings import FakeScoreConfig, MatchConfig
from .method import Method
from .progressive import ProgressiveDistillation
from .trajectory_imitation import TrajectoryImitation

FULL = MatchConfig(state="clean", tau_range="full", tau_max=0.98)

# DMD2 as in TDM sec. 4.3 and app. F; the others from their papers.
PRESETS: dict[str, Method] = {
    m.name: m
    for m in (
        DistributionMatching(),
        DistributionMatching(name="tdm-unify", steps=(4, 2, 1)),
        DistributionMatching(name="tdm-fisher", match=MatchConfig(divergence="fisher")),
        DistributionMatching(
            name="dmd2",
            match=FULL,
            loss="l2",
            solver="renoise",
            fake=FakeScoreConfig(updates=10, share_noised_sample=False),
        ),
        DistributionMatching(name="diff-instruct", steps=1, match=FULL, loss="l2"),
        DistributionMatching(
            name="sid",
            match=MatchConfig(
                divergence="fisher", fisher_correction=1.0, state="clean", tau_range="full", tau_max=0.98
            ),
            solver="renoise",
        ),
        ConsistencyDistillation(),
        ProgressiveDistillation(),
        TrajectoryImitation(),
        TrajectoryImitation(name="pas", head="shared"),
        TrajectoryImitation(name="sfd", head="none"),
    )
}
METHODS: dict[str, type[Method]] = {kind.__name__: kind for kind in dict.fromkeys(type(m) for m in PRESETS.values())}

# Roles that a name also stands for: with other roles the method would be another method.
ROLES: dict[str, dict[str, int]] = {"pas": {"lora": True, "rank": 0}, "sfd": {"lora": False}}


def require_roles(name: str, roles: RolesConfig) -> None:
    """Check that the roles match the method's name.

    Raises ValueError otherwise.
    """
    for option, wanted in ROLES.get(name, {}).items():
        if (got := getattr(roles, option)) != wanted:
            raise ValueError(
                f"roles.{option}: got {str(got).lower()}, method {name} stands for {str(wanted).lower()}; "
                f"set roles.{option}={str(wanted).lower()}, or method.name=trajp-l with "
                f"method.head={PRESETS[name].head} to train a LoRA"
            )


def preset(name: str, **settings: Any) -> Method:
    """Return the method called `name` with changed settings.

    A mapping changes some settings of a block. Raises ValueError for an unknown name or setting.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"method.name: got {name!r}, allowed are {', '.join(PRESETS)}")
    known = PRESETS[name]
    settings = _blocks(known, settings, "method", name)
    return replace(known, **settings)


def _blocks(known: Any, settings: Mapping[str, Any], section: str, name: str) -> dict[str, Any]:
    """Return the settings with mappings merged into the preset's blocks."""
    names = [f.name for f in fields(known)]
    if unknown := [k for k in settings if k not in names]:
        raise ValueError(f"{section}.{unknown[0]}: method {name} has no such setting; it has {', '.join(names)}")
    made = {}
    for key, value in settings.items():
        block = getattr(known, key)
        nested = is_dataclass(block) and not isinstance(block, type) and isinstance(value, Mapping)
        made[key] = replace(block, **_blocks(block, value, f"{section}.{key}", name)) if nested else value
    return made
