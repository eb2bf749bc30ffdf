"""The backbone protocol: all that fewstep calls on a model.

A new backbone satisfies this protocol and no other.
"""

import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..core.guidance import Guidance, guide
from ..core.prediction import Row, Split, edm_inputs, row_named, share, split
from ..core.schedule import Schedule, expand
from ..core.solvers import Denoise
from .conditions import made_conditions, require_same_shape
from .modules import dtype_of, require_module, time_dtype

# Least share of the data in a network's output at the noisiest time. At this share the error of the clean
# estimate is 1000 times the network's error.
LEAST_SHARE = 1e-3
LARGEST_STATE = 2**28  # numbers
Cond = Mapping[str, Tensor]  # every tensor is batch first: [B, ...]


@runtime_checkable
class Backbone(Protocol):
    """A pretrained denoiser with its process, conditions and decoder.

    `module` is the frozen network. `predict` runs any network of the same architecture (the student, the
    fake score), so the quirks of a family stay in the family's own file. `shape` is the shape of one state:
    latents [C, H, W], images, or points [D].
    """

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def row(self) -> Row: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Settings of the diffusers scheduler, for export.

        Empty where the model is no diffusers pipeline.
        """
        ...

    @property
    def encoders(self) -> Sequence[nn.Module]:
        """Networks that `encode` runs."""
        ...

    @property
    def time_layer(self) -> str:
        """Name of the linear layer whose output is the time embedding.

        The layer is inside `module`. A step count can enter there. Empty if the network has no such layer.
        """
        ...

    @property
    def feature_layers(self) -> tuple[str, ...]:
        """Names of the layers whose outputs a discriminator reads.

        The layers are inside `module`, in the order in which they run. Their outputs, [B, C, ...] or
        [B, N, C], distinguish images. May be empty.
        """
        ...

    @property
    def image_size(self) -> int:
        """Height and width of decoded images, in pixels.

        0 where states do not decode to images.
        """
        ...

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the raw network output m = a x0 + b eps.

        x [B, ...], t [B] float64 on the schedule's times. The output is [B, ...] in float32.
        """
        ...

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Encode prompts as conditions, each tensor [len(prompts), ...].

        The empty prompt gives the unconditional conditions.
        """
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as clean states.

        Returns states [B, ...]: the inverse of `decode`, for the real data of SFT and GAN.
        """
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Decode clean states [B, ...] to images.

        Images are [B, 3, H, W] in [0, 1]. Points and other data come back unchanged.
        """
        ...


def denoiser(backbone: Backbone, module: nn.Module, cond: Cond) -> Denoise:
    """Return `(x, t) -> (x0, eps)` of one network, without guidance.

    The conditions are fixed.
    """

    def denoise(x: Tensor, t: Tensor) -> Split:
        return _split(backbone, backbone.predict(module, x, t, cond), x, t)

    return denoise


def nfe_per_step(cond: Cond, guidance: Guidance) -> int:
    """Return the network evaluations of one step under guidance.

    2, or 1 without conditions or without guidance.
    """
    return 2 if cond and guidance.active else 1


def guided(backbone: Backbone, module: nn.Module, cond: Cond, null: Cond, guidance: Guidance) -> Denoise:
    """Return `(x, t) -> (x0, eps)` of one network under guidance.

    One batched call evaluates the conditional and the unconditional half. The conditional half alone is
    evaluated for a batch in which guidance has stopped for all samples, and without conditions or guidance.
    """
    plain = denoiser(backbone, module, cond)
    if nfe_per_step(cond, guidance) == 1:
        return plain

    def denoise(x: Tensor, t: Tensor) -> Split:
        if guidance.stop and bool(guidance.stopped(backbone.schedule, t).all()):
            return plain(x, t)
        both = {k: torch.cat([null[k].expand_as(v), v]) for k, v in cond.items()}
        m_null, m_cond = backbone.predict(module, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return _split(backbone, guide(guidance, backbone.schedule, backbone.row, m_cond, m_null, x, t), x, t)

    return denoise


def encoded(backbone: Backbone, prompts: Sequence[str]) -> tuple[Cond, Cond]:
    """Return conditions of prompts, and of the empty prompt.

    Raises ValueError where the conditions are not of one shape, which batches need.
    """
    cond, null = backbone.encode(prompts), backbone.encode([""])
    require_same_shape(cond, null)
    return cond, null


def speechless(schedule: Schedule, row: Row) -> str:
    """Say why the clean estimate at the noisiest time is lost.

    Empty where the estimate is usable: data make up at least `LEAST_SHARE` of the network's output.
    Networks that predict eps need some signal at the noisiest time.
    """
    end = torch.tensor([schedule.t_max], dtype=torch.float64)
    left = float(share(schedule.alpha(end), schedule.sigma(end), row))
    return (
        ""
        if left >= LEAST_SHARE
        else f"predicts noise, and at its noisiest time ({schedule.t_max:g}) the schedule leaves {left:.1g} "
        "of the image, so that nothing is said of it"
    )


def _split(backbone: Backbone, m: Tensor, x: Tensor, t: Tensor) -> Split:
    alpha, sigma = expand(backbone.schedule.alpha(t), x), expand(backbone.schedule.sigma(t), x)
    return split(m, x, alpha, sigma, backbone.row)


def rows(cond: Cond, index: slice | Tensor) -> Cond:
    """Return the conditions of some rows of the batch."""
    return {k: v[index] for k, v in cond.items()}


@dataclass(frozen=True)
class Denoiser:
    """Any torch network as a backbone.

    The network is called as `module(x, t)` or, with conditions, as `module(x, t, **cond)`. States x have the
    dtype of most of the network's weights. Times t are float32, or float64 if the network is: half precision
    does not have the number 999.

    `prediction` names the row: `x0`, `eps`, `v`, `flow` or `edm`. `shape` is the shape of one state.
    `conditions` maps prompts to the network's keyword arguments; without `conditions` the model is
    unconditional and ignores prompts. `time_layer` is the full name of the linear layer whose output is the
    time embedding: a student of several step counts is conditioned on its step count there.
    `feature_layers` are the layers whose outputs a discriminator may read.

    `edm` is the raw F of EDM's `D = c_skip x + c_out F` (arXiv 2206.00364) for data of standard deviation
    `sigma_data`. With `precondition`, fewstep does EDM's input preconditioning and calls the network as
    `F(c_in x, c_noise)`. Without, the network is called as all others are and scales its inputs itself.

    Raises ValueError for fields of another type or range, for layers that the network does not have, where
    `sigma_data` or `precondition` is set for another prediction than `edm`, where `edm` meets a schedule
    that scales data, and where the prediction loses the clean estimate at the noisiest time.
    """

    module: nn.Module
    schedule: Schedule
    shape: tuple[int, ...]
    prediction: str = "eps"
    conditions: "Conditions | None" = None
    name: str = "own-network"
    time_layer: str = ""
    feature_layers: tuple[str, ...] = ()
    sigma_data: float = 0.5
    precondition: bool = False

    def __post_init__(self) -> None:
        require_module(self.module)
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name: got {self.name!r}, allowed is a text, by which students know their base")
        if not isinstance(self.schedule, Schedule) or isinstance(self.schedule, type):
            kind = self.schedule if isinstance(self.schedule, type) else type(self.schedule)
            raise ValueError(
                f"schedule: got {'the class' if isinstance(self.schedule, type) else 'a'} {kind.__name__}, allowed are "
                "VP(alphas_cumprod), Flow() and EDM() of fewstep.core.schedule, or one's own of that protocol"
            )
        object.__setattr__(self, "shape", _sizes(self.shape))
        if self.conditions is not None and (not callable(self.conditions) or isinstance(self.conditions, type)):
            got = (
                f"the class {self.conditions.__name__}"
                if isinstance(self.conditions, type)
                else f"a {type(self.conditions).__name__}"
            )
            raise ValueError(
                f"conditions: got {got}, allowed is a function from a list of prompts to a dictionary of tensors"
            )
        if not isinstance(self.time_layer, str):
            raise ValueError(
                f"time_layer: got {self.time_layer!r}, allowed is the name of a layer; leave it out for none"
            )
        if not isinstance(self.feature_layers, list | tuple):
            raise ValueError(
                f"feature_layers: got {self.feature_layers!r}, allowed is a tuple of names of layers; "
                "leave it out for none"
            )
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))
        self._require_layers("time_layer", [self.time_layer] if self.time_layer else [])
        self._require_layers("feature_layers", self.feature_layers)
        number = isinstance(self.sigma_data, int | float) and not isinstance(self.sigma_data, bool)
        if not number or not 0 < self.sigma_data < math.inf:
            raise ValueError(
                f"sigma_data: got {f'{self.sigma_data:g}' if number else repr(self.sigma_data)}, allowed are "
                "positive numbers; take that of the network's training, often 0.5"
            )
        row_named(self.prediction)
        if self.prediction != "edm" and (self.precondition or self.sigma_data != 0.5):
            option = "precondition" if self.precondition else "sigma_data"
            raise ValueError(
                f"{option}: is for prediction='edm' alone, got {self.prediction!r}; leave it out, or choose 'edm'"
            )
        if self.prediction == "edm" and float(self.schedule.alpha(torch.tensor([self.schedule.t_max]))) != 1:
            raise ValueError(
                "prediction: 'edm' is for data that noise is added to, "
                f"{type(self.schedule).__name__} scales them; pass schedule=EDM()"
            )
        if why := speechless(self.schedule, self.row):
            raise ValueError(
                f"prediction: a network of {self.prediction!r} {why}; "
                "pass schedule=VP(alphas_cumprod[:N]) that ends earlier, or 'v' where it predicts that"
            )

    def _require_layers(self, option: str, names: Sequence[str]) -> None:
        layers = dict(self.module.named_modules())
        for name in names:
            if name not in layers:
                near = difflib.get_close_matches(name, layers, 1)
                cure = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(list(layers)[1:6])}, ..."
                raise ValueError(f"{option}: the network has no layer {name!r}; {cure}")
            if option == "time_layer" and not isinstance(layers[name], nn.Linear):
                raise ValueError(
                    f"time_layer: {name!r} is a {type(layers[name]).__name__}, "
                    "allowed is the linear layer whose output is the time embedding"
                )

    @property
    def row(self) -> Row:
        return row_named(self.prediction, self.sigma_data)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return {}

    @property
    def image_size(self) -> int:
        return self.shape[-1] if len(self.shape) == 3 else 0

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return [self.conditions] if isinstance(self.conditions, nn.Module) else []

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.precondition:
            x, t = edm_inputs(x, t, self.sigma_data)
        x, t = x.to(dtype_of(module)), t.to(time_dtype(module))
        return module(x, t, **cond).float() if cond else module(x, t).float()

    def encode(self, prompts: Sequence[str]) -> Cond:
        return {} if self.conditions is None else made_conditions(self.conditions, prompts)

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        return x


def _sizes(shape: object) -> tuple[int, ...]:
    """Return the sizes of one state. Raises ValueError where they are none."""
    cure = (
        "allowed are the sizes of one state without the batch, e.g. (2,) or (3, 32, 32), "
        f"of {LARGEST_STATE:,} numbers at most"
    )
    try:
        sizes = tuple(operator.index(n) for n in shape if not isinstance(n, bool))  # type: ignore[attr-defined]
    except TypeError as error:
        raise ValueError(f"shape: got {shape!r}, {cure}") from error
    odd = not sizes or min(sizes) < 1 or math.prod(sizes) > LARGEST_STATE
    if odd or len(sizes) != len(shape):  # type: ignore[arg-type]
        raise ValueError(f"shape: got {shape!r}, {cure}")
    return sizes


class Conditions(Protocol):
    """A function from prompts to conditions.

    Each tensor is [len(prompts), ...].
    """

    def __call__(self, prompts: Sequence[str]) -> Cond: ...
