"""A frozen base in fewer bits: the weights of its layers as small numbers and a scale for each block, decoded wherever they are used.

`w ~ scale level[code]` in blocks of 64 weights. int8 has the levels -127 ... 127; nf4 the 16 of QLoRA (Dettmers et al., arXiv 2305.14314,
app. E), two codes a byte. Activations keep their type and gradients go through them; of weights nothing but the codes is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from ..backbones.base import Backbone

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK = 64
NARROW = (
    64  # channels: layers with no more on one side, by which states come and go, cost half of the error and no memory
)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedWeight(nn.Module):
    """A frozen weight; called, it is decoded in its own shape and type. What it holds are buffers, so that no optimiser finds codes to train.

    `codes` [N / 64, 64], or [N / 64, 32] bytes of nf4, and `scale` [N / 64, 1] in the weight's type, for its N numbers.
    """

    codes: Tensor
    scale: Tensor
    pairs: Tensor | None

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        super().__init__()
        blocks = weight.detach().reshape(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 1)
        scale = torch.where(scale > 0, scale, 1)
        values = blocks.float() / scale.float()  # by the scale as it is kept: its own rounding costs nothing
        if kind == "int8":
            codes, pairs = values.round().clamp(-127, 127).to(torch.int8), None
        else:
            levels = torch.tensor(NF4, device=weight.device)
            nearest = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
            codes = 16 * nearest[:, ::2] + nearest[:, 1::2]
            pairs = torch.cartesian_prod(levels, levels).to(scale)  # what a byte stands for
        self.shape = weight.shape
        for name, tensor in (("codes", codes), ("scale", scale), ("pairs", pairs)):
            self.register_buffer(name, tensor)

    def forward(self) -> Tensor:
        blocks = self.codes if self.pairs is None else F.embedding(self.codes.int(), self.pairs).flatten(1)
        return (blocks * self.scale).view(self.shape)


class DequantizeMatmul(torch.autograd.Function):
    """`run(x, w)`, linear in x. For its gradient, `back(x's shape, gradient, w)`, the weight is decoded again instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: QuantizedWeight,
        run: Callable[[Tensor, Tensor], Tensor],
        back: Callable[..., Tensor],
    ) -> Tensor:
        ctx.packed, ctx.back, ctx.shape = packed, back, x.shape
        return run(x, packed().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (g,) = gradients
        return ctx.back(ctx.shape, g, ctx.packed().to(g.dtype)), None, None, None


def cast(x: Tensor) -> Tensor:
    """As autocast has it for a layer's input, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is `packed`; `weight` is a copy to look at."""

    packed: QuantizedWeight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.packed()

    def forward(self, x: Tensor) -> Tensor:
        return DequantizeMatmul.apply(
            cast(x), self.packed, lambda x, w: F.linear(x, w, self.bias), lambda _, g, w: g @ w
        )


class QuantisedConv2d(nn.Conv2d):
    """A convolution whose weight is `packed`; `weight` is a copy to look at."""

    packed: QuantizedWeight

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """PEFT makes adapters of their layer's class: those are plain ones. Copies come here without sizes."""
        return nn.Conv2d(*sizes, **options) if sizes else super().__new__(cls)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.packed()

    def forward(self, x: Tensor) -> Tensor:
        def back(shape: Sequence[int], g: Tensor, w: Tensor) -> Tensor:
            return conv2d_input(shape, w, g, self.stride, self.padding, self.dilation, self.groups)

        return DequantizeMatmul.apply(cast(x), self.packed, lambda x, w: self._conv_forward(x, w, self.bias), back)


def quantize(backbone: Backbone, kind: Kind | None) -> None:
    """Round the weights of the backbone's own network, in place and for good; nothing happens where they are so already, or for None.

    Its time embedding stays what it was: it is small, and where a student is told its step count. So do narrow layers. Raises ValueError
    where they are rounded otherwise, and where no layer is wide enough.
    """
    if (own := kind_of(backbone.module)) is not None and own != kind:
        raise ValueError(
            f"roles.quantize: got {kind or 'null'}, this teacher's weights are in {own} already; load the teacher again"
        )
    if kind is None or own is not None:
        return
    if not (layers := layers_of(backbone)):
        raise ValueError(
            f"roles.quantize: got {kind}, this network has no layer of more than {NARROW} channels; set it to null"
        )
    for layer in layers:
        packed = QuantizedWeight(layer.weight, kind)
        del layer.weight
        layer.packed = packed
        # The same layer of another class, as torch's own parametrisations have it: hooks and settings stay.
        layer.__class__ = QuantisedLinear if isinstance(layer, nn.Linear) else QuantisedConv2d


def layers_of(backbone: Backbone) -> list[nn.Linear | nn.Conv2d]:
    """Those that can be rounded."""
    time = backbone.time_layer.rpartition(".")[0] or backbone.time_layer
    return [m for n, m in backbone.module.named_modules() if _fits(m) and not (time and f"{n}.".startswith(f"{time}."))]


def kind_of(module: nn.Module) -> Kind | None:
    """What a network's weights are rounded to; None for weights as they are."""
    packed = next((m for m in module.modules() if isinstance(m, QuantizedWeight)), None)
    return None if packed is None else "int8" if packed.pairs is None else "nf4"


def weight_count(module: nn.Module) -> int:
    """How many weights a network has of its own: adapters left out, rounded ones counted as the numbers that they stand for."""
    own = sum(p.numel() for n, p in module.named_parameters() if "lora_" not in n)
    return own + sum(m.shape.numel() for m in module.modules() if isinstance(m, QuantizedWeight))


def _fits(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether it is a plain layer, whose weight nobody reads past it, of a wide one's whole blocks."""
    if type(layer) is nn.Linear:
        width = min(layer.in_features, layer.out_features)
    elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        width = min(layer.in_channels, layer.out_channels)
    else:
        return False
    return width > NARROW and layer.weight.numel() % BLOCK == 0
