"""Bytes that the processes of a run send in an iteration.

A ring of n processes that gathers, or reduces and scatters, B bytes sends `B (n - 1) / n` from each process; a sum that
all processes need is both, twice as much.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """How processes share a run.

    Each of `replicas` holds all weights, spread over `shards` processes. Without sharding there is one shard. `context`
    neighbours share the tokens of each sample.
    """

    replicas: int
    shards: int
    context: int = 1

    @property
    def processes(self) -> int:
        return self.replicas * self.shards


@dataclass(frozen=True)
class Work:
    """What one process computes in an iteration, in bytes and network passes."""

    blocks: int  # bytes of the blocks of one network, in the type in which they are fetched
    forward: int  # network calls
    backward: int  # backward passes through a network
    gradients: int  # bytes of all gradients that belong to blocks
    sums: int  # how often an iteration sums these within a replica: once, or for copies once a batch
    whole: int  # bytes of gradients of what every process has whole
    strays: int = 0  # bytes of blocks that are fetched in vain
    tokens: int = 0  # bytes of queries, keys, values and outputs of every attention that samples share, in all passes


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in an iteration, by receivers."""

    within: float  # of its replica
    across: float  # of other replicas
    everywhere: float
    tokens: float = 0.0  # among those that share samples

    @property
    def total(self) -> float:
        return self.within + self.across + self.everywhere + self.tokens


def traffic(work: Work, mesh: Mesh) -> Traffic:
    """Return the bytes that one process sends in an iteration.

    Blocks are fetched in every pass. Torch fetches the next block early: at the end of a backward pass it takes the
    last block of an earlier call without gradient for the next one, which is a stray. Gradients of blocks are summed
    within the replica and then, a part in each process, over the replicas. Without sharding, all gradients are summed
    in all processes. Of the tokens of an attention a process has one part, and sends all of it but what stays in its
    own heads.
    """
    if mesh.shards == 1:
        return Traffic(0.0, 0.0, _sum(work.gradients + work.whole, mesh.processes))
    fetched = work.blocks * (work.forward + work.backward) + work.strays
    return Traffic(
        _ring(fetched + work.gradients * work.sums, mesh.shards),
        _sum(work.gradients / mesh.shards, mesh.replicas),
        _sum(work.whole, mesh.processes),
        _ring(work.tokens / mesh.context, mesh.context),
    )


def _ring(size: float, count: int) -> float:
    return size * (count - 1) / count


def _sum(size: float, count: int) -> float:
    return 2 * _ring(size, count)
