"""Plan Wan-14B at 81 frames of 1280x720 on many cards, on paper.

    python benchmarks/scale.py                 # about a minute; writes benchmarks/scale.md and .json

No card is used. Weights are those of diffusers' network at true size, on meta tensors. Temporary bytes are counted as
`fewstep plan` counts them, on networks of 2 and 4 blocks with true width and length, and go on in a straight line to 40
blocks: with checkpointing each block adds its own input. Cards that share the tokens of a sample (`context`) share
these bytes and the computation. An iteration is TDM's in 4 steps with batch 1 and checkpointing: 4 network calls of the
student, 2 of the teacher in one pass, 1 of the fake score, 2 backward passes. A call costs the multiplications of a
block once, a backward pass three times (the block is computed again). Bytes that a card sends follow
`fewstep.training.traffic`, which `tests/training/test_several.py` checks against the bytes that small runs hand to the
collectives. Seconds assume the rates below: a run whose communication overlaps all of its computation takes the longest
of the three, one that overlaps nothing their sum.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.backbones.base import Denoiser
from fewstep.backbones.parts import blocks_of, default_dtype
from fewstep.core.schedule import Flow
from fewstep.data.prompts import Embeddings
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig
from fewstep.training.memory import training_bytes
from fewstep.training.traffic import Mesh, Work, traffic
from records import Facts, Record, about, commits, markdown, new_record, torch_of, versions, wrapped, write_record

SHAPE, TOKENS, TEXT, WIDTH, BLOCKS = (16, 21, 90, 160), 21 * 45 * 80, 512, 5120, 40  # 81 frames of 1280x720
STEPS, CALLS, FORWARD, BACKWARD = 4, 7, 6, 2  # the guided teacher is two calls in one pass
WITHIN, ACROSS, FLOPS = 450e9, 50e9, 400e12
RATES = (
    "A card sends 450 GB/s within a machine of 8 (NVLink 4), 50 GB/s to other machines (400 Gb/s InfiniBand a card), "
    "and multiplies at 400 TFLOP/s in bf16 (40 % of an H100's)"
)
MESHES = [
    Mesh(1, 8), Mesh(1, 8, 8), Mesh(8, 8, 8), Mesh(1, 64, 8), Mesh(64, 8, 8), Mesh(8, 64, 8),
]  # fmt: skip


class Network(WanTransformer3DModel):
    """Wan as fewstep calls a network of one's own."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, t, text, return_dict=False)[0]


@dataclass(frozen=True)
class Arrangement:
    """What is trained, and the type of the base's weights."""

    roles: RolesConfig
    dtype: torch.dtype


ARRANGEMENTS = {
    "LoRA of rank 32": Arrangement(RolesConfig(rank=32, checkpointing=True), torch.bfloat16),
    "all weights": Arrangement(RolesConfig(lora=False, checkpointing=True), torch.float32),
}


def network(blocks: int, dtype: torch.dtype) -> Denoiser:
    """Return Wan-14B with so many blocks, of meta tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(dtype):
        module = Network(
            patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=blocks, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
        )  # fmt: skip
    return Denoiser(module.requires_grad_(False).eval(), Flow(), SHAPE, "flow", texts)


def texts(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return texts of 512 tokens."""
    return {"text": torch.zeros(len(prompts), TEXT, 4096, dtype=torch.bfloat16)}


def work_bytes(blocks: int, how: Arrangement) -> int:
    """Return the temporary bytes of an iteration in networks of so many blocks."""
    backbone, method = network(blocks, how.dtype), DistributionMatching(steps=STEPS)
    data = Embeddings(texts(["", ""]), texts([""]), ["", ""], 0, "")
    config = TrainConfig(iterations=1, batch=1, lr=1e-4, fake_lr=1e-4, precision="bf16")
    times = method.times(backbone.schedule)
    return training_bytes(backbone, lambda: make_roles(backbone, how.roles), method, times, config, data).work


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights that an arrangement holds."""

    roles: Roles

    @property
    def inside(self) -> set[int]:
        """Identities of the parameters of blocks, which are sharded."""
        networks = {id(n): n for n in self.roles.networks.values()}.values()
        return {id(p) for n in networks for b in blocks_of(n) for p in b.parameters()}

    def held(self) -> tuple[int, int]:
        """Return bytes of weights, gradients, moments and average: sharded, and whole in every process."""
        inside, networks = self.inside, {id(n): n for n in self.roles.networks.values()}.values()
        weights = {id(p): p for n in networks for p in n.parameters()}
        trained = [p for own in self.roles.trained.values() for p in own.values()]
        average = list(self.roles.trained["student"].values())
        # Gradients and two moments of each trained weight, an average of the student's.
        tensors = [*weights.values(), *trained * 3, *average]
        sharded = sum(p.nbytes for p in tensors if id(p) in inside)
        return sharded, sum(p.nbytes for p in tensors) - sharded

    def fetched(self) -> int:
        """Return bytes of the blocks of one network in bf16."""
        return sum(2 * p.numel() for b in blocks_of(self.roles.networks["student"]) for p in b.parameters())

    def gradients(self) -> tuple[int, int]:
        """Return bytes of gradients of blocks, and of what is whole."""
        inside, trained = self.inside, [p for own in self.roles.trained.values() for p in own.values()]
        blocks = sum(p.nbytes for p in trained if id(p) in inside)
        return blocks, sum(p.nbytes for p in trained) - blocks


def flops(module: nn.Module) -> float:
    """Return the floating point operations of one network call.

    A token passes every matrix of a block, but texts alone those of keys and values in cross-attention. In
    self-attention every token meets every other one, twice.
    """
    total = 0.0
    for block in blocks_of(module):
        matrices = {n: p.numel() for n, p in block.named_parameters() if p.ndim == 2 and "lora" not in n}
        of_text = sum(size for n, size in matrices.items() if "attn2.to_k" in n or "attn2.to_v" in n)
        total += 2 * (sum(matrices.values()) - of_text) * TOKENS + 2 * of_text * TEXT
        total += 4 * WIDTH * TOKENS * (TOKENS + TEXT)
    return total


def rows_of(name: str, how: Arrangement) -> list[Facts]:
    """Return a row for each mesh."""
    two, four = work_bytes(2, how), work_bytes(4, how)
    temporary = two + (four - two) // 2 * (BLOCKS - 2)
    roles = make_roles(network(BLOCKS, how.dtype), how.roles)
    sizes, calls = Sizes(roles), flops(roles.networks["teacher"]) * (CALLS + 3 * BACKWARD)
    (sharded, whole), (of_blocks, of_whole) = sizes.held(), sizes.gradients()
    largest = max(sum(2 * p.numel() for p in b.parameters()) for b in blocks_of(roles.networks["student"]))
    made = []
    for mesh in MESHES:
        strays = sizes.fetched() // BLOCKS * (BACKWARD if how.roles.lora else 1)
        # Queries, keys, values and outputs in bf16; a backward pass computes a block again and sends all of it back.
        tokens = 4 * TOKENS * WIDTH * 2 * BLOCKS * (CALLS + 2 * BACKWARD) if mesh.context > 1 else 0
        sent = traffic(Work(sizes.fetched(), FORWARD, BACKWARD, of_blocks, 1, of_whole, strays, tokens), mesh)
        slow = 0.0 if mesh.shards <= 8 else sent.within  # a ring is as fast as its slowest link
        seconds = {
            "compute": calls / FLOPS / mesh.context,
            "within": (sent.within - slow + sent.tokens) / WITHIN,
            "across": (slow + sent.across + (sent.everywhere if mesh.processes > 8 else 0)) / ACROSS,
        }
        held, shared = sharded / mesh.shards + whole, temporary / mesh.context
        made.append({
            "what": name, "cards": mesh.processes, "replicas": mesh.replicas, "shards": mesh.shards,
            "context": mesh.context, "samples": mesh.processes // mesh.context, "held": held, "temporary": shared,
            "blocks": 2 * largest, "total": held + shared + 2 * largest, "sent_within": sent.within,
            "sent_tokens": sent.tokens, "sent_across": sent.across, "sent_everywhere": sent.everywhere,
            "flops": calls, "seconds": seconds, "versions": versions(),
        })  # fmt: skip
    return made


MOVED = [
    "trained", "cards", "replicas x shards", "context", "samples", "blocks", "tokens", "across replicas", "everywhere",
    "computing", "within a machine", "between machines", "an iteration",
]  # fmt: skip


def page(record: Record) -> str:
    """Return the page of a record."""
    memory, moved = [], []
    for r in record.rows:
        which = [r["what"], r["cards"], f"{r['replicas']} x {r['shards']}", r["context"]]
        memory.append([*which, *(f"{r[k] / 2**30:.1f}" for k in ("held", "temporary", "blocks", "total"))])
        sent = [f"{r[f'sent_{k}'] / 1e9:.1f}" for k in ("within", "tokens", "across", "everywhere")]
        times = [f"{r['seconds'][k]:.1f}" for k in ("compute", "within", "across")]
        both = f"{max(r['seconds'].values()):.0f} to {sum(r['seconds'].values()):.0f}"
        moved.append([*which, r["samples"], *sent, *times, both])
    where = ", ".join(part for part in (f"`{record.command}`", commits(record), torch_of(record)) if part)
    return f"""# Wan-14B on many cards, on paper

{about(__doc__)}

{wrapped(f"{where}. {RATES}.")}

GiB on a card. `held`: this card's part of weights, gradients, moments and average. `blocks`: the block that computes
and the one that is fetched.

{markdown(["trained", "cards", "replicas x shards", "context", "held", "temporary", "blocks", "in all"], memory)}

GB that a card sends in an iteration of one batch of 1, and seconds. `context` cards share a sample.

{markdown(MOVED, moved)}
"""


def main() -> None:
    """Count and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    rows = [row for name, how in ARRANGEMENTS.items() for row in rows_of(name, how)]
    record = new_record("scale", "python benchmarks/scale.py", rows, None, {"rates": RATES, "shape": list(SHAPE)})
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
