"""Conditions of many prompts without the zeros at their ends.

Padding is most of what an encoder returns. A row of zeros at the end of a prompt's condition is not stored, and
comes back when the condition is read: bit for bit the same tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A condition of N prompts, without the zeros at their ends.

    The condition is [N, ...]. The rows of prompt i are the `lengths[i]` rows of `parts[at[i]]` from
    `begins[i]`; `shape` is that of one prompt's condition, rows first. An index gives the condition as a
    tensor.
    """

    parts: tuple[Tensor, ...]  # [rows, ...] each
    at: Tensor  # [N]
    begins: Tensor  # [N]
    lengths: Tensor  # [N]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        if isinstance(index, int):
            return self[torch.tensor([range(len(self))[index]])][0]
        places = [v[index].tolist() for v in (self.at, self.begins, self.lengths)]
        found = self.parts[0].new_zeros(len(places[0]), *(self.shape or (1,)))
        for row, at, begin, length in zip(found, *places, strict=True):
            row[:length] = self.parts[at][begin : begin + length]
        return found.reshape(len(found), *self.shape)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the condition."""
        return self.parts[0].dtype

    def take(self, index: Tensor) -> "Packed":
        """Return the conditions of prompts `index [M]`, which share rows."""
        return replace(self, at=self.at[index], begins=self.begins[index], lengths=self.lengths[index])


def pack(condition: Tensor) -> tuple[Tensor, Tensor]:
    """Return a condition's rows without each prompt's last zeros, and their counts.

    `condition` is [n, rows, ...]; the rows left are [sum of lengths, ...], and the lengths are [n]. Zeros are
    told by their bits: minus zero stays.
    """
    whole = condition.contiguous()
    rows = whole.reshape(len(whole), *(whole.shape[1:] or (1,)))
    some = rows.reshape(*rows.shape[:2], -1).view(torch.uint8).any(-1)
    places = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    lengths = (some * places).amax(1)
    return rows[places <= lengths[:, None]], lengths


def packed(parts: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Packed:
    """Join what `pack` made of the parts of a list."""
    lengths = torch.cat([counts for _, counts in parts])
    begins = torch.cat([counts.cumsum(0) - counts for _, counts in parts])
    at = torch.cat([torch.full_like(counts, i) for i, (_, counts) in enumerate(parts)])
    return Packed(tuple(rows for rows, _ in parts), at, begins, lengths, shape)


def packed_bytes(conditions: Mapping[str, Tensor]) -> int:
    """Return the bytes that conditions take without the zeros at their ends."""
    return sum(rows.nbytes + counts.nbytes for rows, counts in map(pack, conditions.values()))
