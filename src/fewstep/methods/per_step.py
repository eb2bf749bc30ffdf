"""Trainings that may give each step weights of its own."""

from ..roles.roles import RolesConfig
from .method import Method


def require_per_step(method: Method, roles: RolesConfig, sharded: bool = False) -> None:
    """Check that each step can have weights of its own, where asked.

    The method has one step count with fixed times, and every sample of the student's loss belongs to one step.
    Raises ValueError otherwise.
    """
    if not roles.per_step:
        return
    if (found := method.against_per_step) is not None:
        option, got, cure = found
        raise ValueError(
            f"method.{option}: got {got} with roles.per_step=true, which needs one step count with fixed times, all of "
            f"them trained by distribution matching; {cure}, or set roles.per_step=false"
        )
    if sharded:
        raise ValueError(
            "train.shard: got true with roles.per_step=true, where a process calls the weights of its own samples' "
            "steps, and sharded weights need all processes; set one of them to false"
        )
