"""A quantized frozen base network.

`w ~ scale level[code]` in blocks of 64 weights: a layer's weights are small integers (codes) with one scale
per block, decoded at every use. int8 has the levels -127 ... 127; nf4 has the 16 levels of QLoRA (Dettmers et
al., arXiv 2305.14314, app. E), two codes per byte. Activations keep their dtype and carry gradients; only the
codes and scales of the weights are stored.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.grad import conv2d_input

from ..backbones.base import Backbone
from ..backbones.parts import kept_single

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK = 64
# Channels. Layers this narrow on one side (input and output layers) would cause half of the error and save
# no memory.
NARROW = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedWeight(nn.Module):
    """A frozen quantized weight.

    A call decodes the weight in the original shape and dtype. Codes and scales are buffers, so no optimizer
    trains them. For a weight of N numbers, `codes` are [N / 64, 64], or [N / 64, 32] bytes of nf4, and
    `scale` is [N / 64, 1] in the weight's dtype.
    """

    codes: Tensor
    scale: Tensor
    pairs: Tensor | None

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        super().__init__()
        blocks = weight.detach().reshape(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 1)
        scale = torch.where(scale > 0, scale, 1)
        values = (
            blocks.float() / scale.float()
        )  # divide by the stored scale, so that the scale's own rounding adds no error
        if kind == "int8":
            codes, pairs = values.round().clamp(-127, 127).to(torch.int8), None
        else:
            levels = torch.tensor(NF4, device=weight.device)
            nearest = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
            codes = 16 * nearest[:, ::2] + nearest[:, 1::2]
            pairs = torch.cartesian_prod(levels, levels).to(scale)  # byte -> two levels
        self.shape = weight.shape
        # PEFT looks at a weight eleven times, and decoding fake tensors takes long.
        self.hollow = weight.detach() if isinstance(weight, FakeTensor) else None
        for name, tensor in (("codes", codes), ("scale", scale), ("pairs", pairs)):
            self.register_buffer(name, tensor)

    def forward(self) -> Tensor:
        blocks = self.codes if self.pairs is None else F.embedding(self.codes.int(), self.pairs).flatten(1)
        return (blocks * self.scale).view(self.shape)

    def like(self, weight: FakeTensor) -> "QuantizedWeight":
        """Return the same of another fake (meta) weight of this shape."""
        made = copy(self)
        made._buffers = {name: t if t is None else torch.empty_like(t) for name, t in self._buffers.items()}
        made.hollow = weight.detach()
        return made

    def inspected(self) -> Tensor:
        """Return the decoded weight; a fake (meta) one as it was."""
        return self() if self.hollow is None else self.hollow


class DequantizeMatmul(torch.autograd.Function):
    """A product with a quantized weight that stores no decoded weight.

    The forward pass is `run(x, w)`, linear in x. The gradient is `back(x's shape, gradient, w)`: the weight
    is decoded again for the gradient.
    """

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
    """Cast a layer's input as autocast does, where autocast is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class QuantisedLinear(nn.Linear):
    """A linear layer with a quantized weight.

    `packed` is the quantized weight; `weight` is a decoded copy for inspection.
    """

    packed: QuantizedWeight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.packed.inspected()

    def forward(self, x: Tensor) -> Tensor:
        return DequantizeMatmul.apply(
            cast(x), self.packed, lambda x, w: F.linear(x, w, self.bias), lambda _, g, w: g @ w
        )


class QuantisedConv2d(nn.Conv2d):
    """A convolution with a quantized weight.

    `packed` is the quantized weight; `weight` is a decoded copy for inspection.
    """

    packed: QuantizedWeight

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """Return a plain convolution for calls with sizes.

        PEFT makes adapters of the class of the adapted layer; adapters are plain convolutions. Copies are
        made without sizes.
        """
        return nn.Conv2d(*sizes, **options) if sizes else super().__new__(cls)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.packed.inspected()

    def forward(self, x: Tensor) -> Tensor:
        def back(shape: Sequence[int], g: Tensor, w: Tensor) -> Tensor:
            return conv2d_input(shape, w, g, self.stride, self.padding, self.dilation, self.groups)

        return DequantizeMatmul.apply(cast(x), self.packed, lambda x, w: self._conv_forward(x, w, self.bias), back)


def quantize(backbone: Backbone, kind: Kind | None) -> None:
    """Quantize the weights of the backbone's network in place.

    The change is permanent. A network that is quantized as `kind` already, and a `kind` of None, change
    nothing.

    The time embedding is not quantized: the time embedding is small, and the student's step count enters
    there. Narrow layers are not quantized either. Raises ValueError if the network is quantized otherwise, or
    if no layer is wide enough.
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
    hollow = dict[object, QuantizedWeight]()
    for layer in layers:
        weight = layer.weight
        if isinstance(weight, FakeTensor):
            if (shape := (weight.shape, weight.dtype)) not in hollow:
                hollow[shape] = QuantizedWeight(weight, kind)
            packed = hollow[shape].like(weight)
        else:
            packed = QuantizedWeight(weight, kind)
        del layer.weight
        layer.packed = packed
        # Change the layer's class in place, as torch's own parametrisations do: hooks and settings stay.
        layer.__class__ = QuantisedLinear if isinstance(layer, nn.Linear) else QuantisedConv2d


def layers_of(backbone: Backbone) -> list[nn.Linear | nn.Conv2d]:
    """Return the layers of a backbone that can be quantized.

    Without the time embedding, and without what diffusers keeps in single precision.
    """
    time = backbone.time_layer.rpartition(".")[0] or backbone.time_layer
    single = kept_single(backbone.module)
    return [
        m
        for n, m in backbone.module.named_modules()
        if _fits(m) and not (time and f"{n}.".startswith(f"{time}.")) and single.isdisjoint(n.split("."))
    ]


def kind_of(module: nn.Module) -> Kind | None:
    """Return the quantization of a network, or None."""
    packed = next((m for m in module.modules() if isinstance(m, QuantizedWeight)), None)
    return None if packed is None else "int8" if packed.pairs is None else "nf4"


def weight_count(module: nn.Module) -> int:
    """Return the number of a network's own weights.

    Adapters do not count; a quantized weight counts as the numbers that the weight encodes.
    """
    own = sum(p.numel() for n, p in module.named_parameters() if "lora_" not in n)
    return own + sum(m.shape.numel() for m in module.modules() if isinstance(m, QuantizedWeight))


def _fits(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Return whether a layer can be quantized.

    The layer is a plain layer, whose weight no other code reads; the layer is wide, and the weight divides
    into whole blocks.
    """
    if type(layer) is nn.Linear:
        width = min(layer.in_features, layer.out_features)
    elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        width = min(layer.in_channels, layer.out_channels)
    else:
        return False
    return width > NARROW and layer.weight.numel() % BLOCK == 0
