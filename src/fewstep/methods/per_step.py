"""Trainings that may give each step weights of its own."""

from ..roles.roles import RolesConfig
from .method import Method


def require_per_step(method: Method, roles: RolesConfig, sharded: bool = False, place: str = "method") -> None:
    """Check that each step can have weights of its own, where asked.

    The method has one step count with fixed times, and every sample of the student's loss belongs to one step. `place`
    is where the recipe has the method. Raises ValueError otherwise.
    """
    if not roles.per_step:
        return
    if (found := method.against_per_step) is not None:
        option, got, needs, cure = found
        raise ValueError(
            f"{place}.{option}: got {got} with roles.per_step=true, which needs {needs}; {cure}, "
            "or set roles.per_step=false"
        )
    if sharded:
        raise ValueError(
            "train.shard: got true with roles.per_step=true, where a process calls the weights of its own samples' "
            "steps, and sharded weights need all processes; set one of them to false"
        )


def require_same_steps(first: Method, then: Method, roles: RolesConfig) -> None:
    """Check that two stages have as many sets of weights.

    Raises ValueError otherwise.
    """
    if roles.per_step and first.counts != then.counts:
        raise ValueError(
            f"warm_start.method.steps: got {first.counts[0]} with method.steps={then.counts[0]} and "
            "roles.per_step=true, whose weights of each step go on; set both to one number, or roles.per_step=false"
        )
