"""What a method's name stands for: a few settings of `Matching`, `Imitation` or `PathImitation`. Settings given beside a name win."""

from dataclasses import replace
from typing import Any

from ..roles.roles import RolesConfig
from .imitation import Imitation
from .matching import Matching
from .paths import PathImitation

# DMD2 as in TDM sec. 4.3 and app. F; the others from their papers.
PRESETS: dict[str, Matching | Imitation | PathImitation] = {
    m.name: m
    for m in (
        Matching(),
        Matching(steps=(4, 2, 1), name="tdm-unify"),
        Matching(divergence="fisher", name="tdm-fisher"),
        Matching(match="clean", solver="renoise", tau="whole", tau_max=0.98, fake_updates=10, loss="l2", share_draw=False, name="dmd2"),
        Matching(steps=1, match="clean", tau="whole", tau_max=0.98, loss="l2", name="diff-instruct"),
        Matching(divergence="fisher", fisher_correction=1.0, match="clean", solver="renoise", tau="whole", tau_max=0.98, name="sid"),
        Imitation(),
        Imitation(target="progressive", loss="l2", solver="ddim", name="progressive"),
        PathImitation(),
        PathImitation(head="shared", name="pas"),
        PathImitation(head="none", name="sfd"),
    )
}

# Roles that a name stands for as well; with others it would be another method.
ROLES: dict[str, dict[str, int]] = {"pas": {"share": True, "rank": 0}, "sfd": {"share": False}}


def require_roles(name: str, roles: RolesConfig) -> None:
    """Raises ValueError where a method's name stands for other roles than these."""
    for option, wanted in ROLES.get(name, {}).items():
        if (got := getattr(roles, option)) != wanted:
            raise ValueError(
                f"roles.{option}: got {str(got).lower()}, method {name} stands for {str(wanted).lower()}; "
                f"set roles.{option}={str(wanted).lower()}, or method.name=trajp-l with method.head={PRESETS[name].head} to train a LoRA"
            )


def preset(name: str, **settings: Any) -> Matching | Imitation | PathImitation:
    """The method called `name` with `settings` changed. Raises ValueError listing the known names."""
    if name not in PRESETS:
        raise ValueError(f"method.name: got {name!r}, allowed are {', '.join(PRESETS)}")
    known = PRESETS[name]
    if unknown := [k for k in settings if k not in known.__dataclass_fields__]:
        raise ValueError(f"method.{unknown[0]}: method {name} has no such setting; it has {', '.join(known.__dataclass_fields__)}")
    return replace(known, **settings)
