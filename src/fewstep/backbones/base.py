"""What the rest of fewstep may ask of a model. The only protocol that a new backbone must satisfy."""

import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.guidance import Guidance, guide
from ..core.prediction import Row, Split, edm_inputs, row_named, share, split
from ..core.schedule import Schedule, expand
from ..core.solvers import Denoise
from .conditions import made_conditions, require_same_shape
from .modules import dtype_of, require_module, time_dtype

LEAST_SHARE = (
    1e-3  # of the data in what a network says at the noisiest time: below it a clean estimate is a thousand times the network's error
)
LARGEST_STATE = 2**28  # numbers
Cond = Mapping[str, Tensor]  # every tensor is batch first: [B, ...]


class Backbone(Protocol):
    """A pretrained denoiser with its process and its way to and from what a person sees.

    `module` is the frozen network; `predict` runs any network of its architecture (the student, the fake score), so the
    quirks of a family stay in its own file. `shape` is that of one state: latents [C, H, W], images, or points [D].
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
        """The diffusers scheduler's settings, for export; empty where the model is no diffusers pipeline."""
        ...

    @property
    def encoders(self) -> Sequence[nn.Module]:
        """The networks that `encode` goes through."""
        ...

    @property
    def time_layer(self) -> str:
        """The linear layer inside `module` whose output is the time embedding, where a step count can enter; empty if there is none."""
        ...

    @property
    def feature_layers(self) -> tuple[str, ...]:
        """Layers inside `module`, in the order in which they run, whose outputs [B, C, ...] or [B, N, C] tell pictures apart; may be empty."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that states decode to; 0 where they are no pictures."""
        ...

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Raw network output m = a x0 + b eps, [B, ...] in float32. x [B, ...], t [B] float64 on the schedule's times."""
        ...

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditions of these prompts, each tensor [len(prompts), ...]; the empty prompt is the unconditional one."""
        ...

    def encode_images(self, pictures: Tensor) -> Tensor:
        """Clean states [B, ...] of pictures [B, 3, H, W] in [0, 1]: the inverse of `decode`, of real data for SFT and GAN."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] from clean states [B, ...]; points and other data come back as they are."""
        ...


def denoiser(backbone: Backbone, module: nn.Module, cond: Cond) -> Denoise:
    """`(x, t) -> (x0, eps)` of one network under fixed conditions, without guidance."""

    def denoise(x: Tensor, t: Tensor) -> Split:
        return _split(backbone, backbone.predict(module, x, t, cond), x, t)

    return denoise


def nfe_per_step(cond: Cond, guidance: Guidance) -> int:
    """Return the network evaluations in one step of a guided model: 2, or 1 without conditions or guidance."""
    return 2 if cond and guidance.active else 1


def guided(backbone: Backbone, module: nn.Module, cond: Cond, null: Cond, guidance: Guidance) -> Denoise:
    """Return `(x, t) -> (x0, eps)` of one network under guidance, both halves in one batched call.

    A batch for which guidance has stopped, and a model without conditions or guidance, is one half only.
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
    """Return conditions of prompts, and of the empty one. Raises ValueError where they are not of one shape, which batches need."""
    cond, null = backbone.encode(prompts), backbone.encode([""])
    require_same_shape(cond, null)
    return cond, null


def speechless(schedule: Schedule, row: Row) -> str:
    """Why the clean estimate at the noisiest time is lost; empty where it is not. Networks that predict eps need some signal there."""
    end = torch.tensor([schedule.t_max], dtype=torch.float64)
    left = float(share(schedule.alpha(end), schedule.sigma(end), row))
    return (
        ""
        if left >= LEAST_SHARE
        else f"predicts noise, and at its noisiest time ({schedule.t_max:g}) the schedule leaves {left:.1g} of the picture, so that nothing is said of it"
    )


def _split(backbone: Backbone, m: Tensor, x: Tensor, t: Tensor) -> Split:
    alpha, sigma = expand(backbone.schedule.alpha(t), x), expand(backbone.schedule.sigma(t), x)
    return split(m, x, alpha, sigma, backbone.row)


def rows(cond: Cond, index: slice | Tensor) -> Cond:
    """The conditions of some rows of the batch."""
    return {k: v[index] for k, v in cond.items()}


@dataclass(frozen=True)
class Denoiser:
    """Any torch network of one's own: `module(x, t)` or, with conditions, `module(x, t, **cond)`.

    `prediction` names the row (`x0, eps, v, flow, edm`); `shape` is that of one state. `conditions` maps a prompt to the
    keyword arguments of the network; without it the model is unconditional and prompts are ignored. `time_layer` is the full
    name of the linear layer whose output is the time embedding: students of several step counts are told theirs there.
    States come in the type of most of the network's weights, times in float32 (float64 if the network is): half precision has no 999.
    `feature_layers` are those whose outputs a discriminator may read.

    `edm` is the raw F of EDM's `D = c_skip x + c_out F` for data of standard deviation `sigma_data`. With `precondition` the network is called
    as `F(c_in x, c_noise)`, all of EDM's preconditioning being done for it; without, it is called as all others, and scales its inputs itself.
    Raises ValueError where these two do not go with the prediction, or `edm` does not with the schedule.
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
                f"schedule: got {'the class' if isinstance(self.schedule, type) else 'a'} {kind.__name__}, allowed are VP(alphas_cumprod), "
                "Flow() and EDM() of fewstep.core.schedule, or one's own of that protocol"
            )
        object.__setattr__(self, "shape", _sizes(self.shape))
        if self.conditions is not None and (not callable(self.conditions) or isinstance(self.conditions, type)):
            got = f"the class {self.conditions.__name__}" if isinstance(self.conditions, type) else f"a {type(self.conditions).__name__}"
            raise ValueError(f"conditions: got {got}, allowed is a function from a list of prompts to a dictionary of tensors")
        if not isinstance(self.time_layer, str):
            raise ValueError(f"time_layer: got {self.time_layer!r}, allowed is the name of a layer; leave it out for none")
        if not isinstance(self.feature_layers, list | tuple):
            raise ValueError(f"feature_layers: got {self.feature_layers!r}, allowed is a tuple of names of layers; leave it out for none")
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))
        self._require_layers("time_layer", [self.time_layer] if self.time_layer else [])
        self._require_layers("feature_layers", self.feature_layers)
        if isinstance(self.sigma_data, bool) or not isinstance(self.sigma_data, int | float) or not 0 < self.sigma_data < math.inf:
            raise ValueError(
                f"sigma_data: got {self.sigma_data!r}, allowed are positive numbers; take that of the network's training, often 0.5"
            )
        row_named(self.prediction)
        if self.prediction != "edm" and (self.precondition or self.sigma_data != 0.5):
            option = "precondition" if self.precondition else "sigma_data"
            raise ValueError(f"{option}: is for prediction='edm' alone, got {self.prediction!r}; leave it out, or choose 'edm'")
        if self.prediction == "edm" and float(self.schedule.alpha(torch.tensor([self.schedule.t_max]))) != 1:
            raise ValueError(
                f"prediction: 'edm' is for data that noise is added to, {type(self.schedule).__name__} scales them; pass schedule=EDM()"
            )
        if why := speechless(self.schedule, self.row):
            raise ValueError(
                f"prediction: a network of {self.prediction!r} {why}; pass schedule=VP(alphas_cumprod[:N]) that ends earlier, or 'v' where it predicts that"
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
                    f"time_layer: {name!r} is a {type(layers[name]).__name__}, allowed is the linear layer whose output is the time embedding"
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

    def encode_images(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, x: Tensor) -> Tensor:
        return x


def _sizes(shape: object) -> tuple[int, ...]:
    """Return the sizes of one state. Raises ValueError where they are none."""
    cure = f"allowed are the sizes of one state without the batch, e.g. (2,) or (3, 32, 32), of {LARGEST_STATE:,} numbers at most"
    try:
        sizes = tuple(operator.index(n) for n in shape if not isinstance(n, bool))  # type: ignore[attr-defined]
    except TypeError as error:
        raise ValueError(f"shape: got {shape!r}, {cure}") from error
    if not sizes or min(sizes) < 1 or math.prod(sizes) > LARGEST_STATE or len(sizes) != len(shape):  # type: ignore[arg-type]
        raise ValueError(f"shape: got {shape!r}, {cure}")
    return sizes


class Conditions(Protocol):
    """Prompts to conditions, each tensor [len(prompts), ...]."""

    def __call__(self, prompts: Sequence[str]) -> Cond: ...
