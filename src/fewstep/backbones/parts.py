"""What the pipelines of several families have in common.

Prediction types, autoencoders, layers for a discriminator, loading.
"""

import inspect
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar, get_args, get_type_hints

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.prediction import Row, edm_row, row_named
from ..core.schedule import Schedule
from .autoencoders import images_of, latents_of, scale_of
from .experts import Experts, experts_of
from .modules import dtype_of
from .schedulers import EDM_SIGNS, plain_config
from .settings import LARGEST, read_settings, side
from .sizes import Size, VideoSize, video_size
from .weights import UnfitError, load_network

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names -> rows
# Names of the last layer in U-Nets and transformers.
OUTPUTS = ("conv_out", "proj_out", "final_layer.linear", "all_final_layer.2-1.linear")
# Pixels that go through an autoencoder at once, 64 images of 64x64 or one of 512x512: the autoencoder then
# needs less memory than the denoiser.
PIXELS = 2**18
SMALL_PATCHES = 8  # along each side of a small state of a transformer

INDEX_CURE = "pass the folder that save_pretrained wrote"
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


@dataclass(frozen=True)
class DiffusersBackbone(ABC):
    """A backbone around a diffusers pipeline.

    A family adds what is its own, and overrides nothing.
    """

    pipe: DiffusionPipeline
    name: str
    schedule: Schedule
    source: str = field(default="", kw_only=True)  # argument of `load_teacher`, by which a student names its base

    @property
    def module(self) -> nn.Module:
        """The network that is distilled."""
        return denoiser_of(self.pipe)

    @property
    def row(self) -> Row:
        """The row of the scheduler's prediction type.

        EDM's row for a scheduler with `sigma_data`. The flow row for a scheduler that names no prediction
        type.
        """
        config = self.scheduler_config
        if "sigma_data" in config:
            return edm_row(config["sigma_data"], EDM_SIGNS[config["prediction_type"]])
        return row_named("flow" if "prediction_type" not in config else PREDICTIONS[config["prediction_type"]])

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Settings of the pipeline's scheduler, see `schedulers.plain_config`."""
        return plain_config(self.pipe.scheduler.config)

    @property
    def own_size(self) -> Size:
        """The size that was set; 0 for the model's own."""
        return 0

    @property
    def drawn_size(self) -> Size:
        """The size of what `decode` gives, for other programs."""
        return 0

    @property
    def guidance_patch(self) -> int:
        return 0

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told the guidance scale."""
        return embeds_guidance(self.module)


@dataclass(frozen=True)
class Latent(DiffusersBackbone):
    """A backbone whose states are latents of an image autoencoder.

    The latents [C, h, w] are scaled.
    """

    @property
    def pixels(self) -> int:
        """Height and width of a state's position, in pixels."""
        return int(self.pipe.vae_scale_factor)

    @property
    def image_size(self) -> int:
        return self.shape[-1] * self.pixels

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    def drawn_size(self) -> Size:
        return self.image_size

    @property
    def chunk(self) -> int:
        """Number of images that go through the autoencoder at once."""
        return max(1, PIXELS // self.image_size**2)

    def latent_scale(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return `(shift, scale)` of states `(z - shift) scale` for latents z.

        See `autoencoders.scale_of`.
        """
        return scale_of(self.pipe.vae, like)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as scaled latents.

        Means of the autoencoder's posterior, in float32.
        """
        vae = self.pipe.vae
        with torch.no_grad():
            means = [latents_of(vae, 2 * x - 1) for x in images.to(vae.device, vae.dtype).split(self.chunk)]
        z = torch.cat(means).float()
        shift, scale = self.latent_scale(z)
        return (z - shift) * scale

    def decode(self, x: Tensor) -> Tensor:
        """Decode scaled latents to images [B, 3, H, W] in [0, 1].

        Images are float32.
        """
        vae = self.pipe.vae
        shift, scale = self.latent_scale(x)
        z = x.float() / scale + shift
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):  # a reward's gradient passes
            images = torch.cat([images_of(vae, part) for part in z.to(vae.dtype).split(self.chunk)])
        return (images.float() / 2 + 0.5).clamp(0, 1)


class SizeConditioned(ABC):
    """A backbone that is told the size of the images."""

    @abstractmethod
    def size_conditions(self, count: int) -> dict[str, Tensor]:
        """Return the conditions that say the size.

        They are the same for all `count` prompts: tensors [count, ...] on the denoiser's device.
        """


@dataclass(frozen=True)
class Sized(Latent):
    """A latent backbone of any size."""

    size: int = 0  # height and width of the states; 0: the size that the network was made for

    def at(self, size: int) -> Self:
        """Return the same model for states of `size` x `size`."""
        return replace(self, size=size)

    @property
    def own_size(self) -> Size:
        return self.image_size if self.size else 0

    @property
    def largest(self) -> int:
        """Largest height and width of states."""
        return LARGEST

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Number of which the height and width of states are multiples."""

    @property
    @abstractmethod
    def small(self) -> int:
        """Height and width of small states, which the network takes without loss."""


@dataclass(frozen=True)
class LatentVideo(DiffusersBackbone):
    """A backbone whose states are scaled latents of a video autoencoder.

    A family whose frames are not 8 a second says so.
    """

    @property
    def fps(self) -> int:
        """Frames a second of the videos that the model was made for."""
        return 8

    @property
    def image_size(self) -> int:
        return 0  # a state is a video

    def encode_images(self, images: Tensor) -> Tensor:
        """Refuse images. Raises ValueError."""
        raise ValueError(
            f"data: {self.name} makes videos, which are not learned from images; leave data and method.gan out"
        )


@dataclass(frozen=True)
class SizedVideo(LatentVideo, ABC):
    """A video backbone of any size.

    `size` is `WIDTHxHEIGHTxFRAMES`; empty for the pipeline's own.
    """

    size: str = ""

    @property
    def own_size(self) -> Size:
        return self.size or 0

    @property
    def drawn_size(self) -> Size:
        return str(self.video)

    @property
    def video(self) -> VideoSize:
        """Width, height and frames of a video."""
        return video_size(self.size) if self.size else self.usual

    @property
    @abstractmethod
    def usual(self) -> VideoSize:
        """The size that the pipeline draws by itself."""
        ...

    @property
    @abstractmethod
    def unit(self) -> tuple[int, int, int]:
        """What width, height and (frames - 1) are multiples of."""
        ...

    @property
    @abstractmethod
    def largest(self) -> VideoSize:
        """The largest width, height and frames that the network has positions for."""
        ...


@dataclass(frozen=True)
class WithUNet(DiffusersBackbone):
    """A backbone with a U-Net of diffusers."""

    @property
    def time_layer(self) -> str:
        return "time_embedding.linear_2"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return unet_features(self.pipe.unet)


@dataclass(frozen=True)
class LatentUNet(WithUNet, Sized):
    """A latent backbone with a U-Net."""

    @property
    def shape(self) -> tuple[int, ...]:
        config = self.pipe.unet.config
        size = side("unet", config.sample_size, self.size)
        return (config.in_channels, size, size)

    @property
    def multiple(self) -> int:
        return int(2 ** (len(self.pipe.unet.config.block_out_channels) - 1))

    @property
    def small(self) -> int:
        return int(2 ** (len(self.pipe.unet.config.block_out_channels) + 1))


@dataclass(frozen=True)
class LatentTransformer(Sized):
    """A latent backbone with a transformer.

    The transformer has positions for patches of any size.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        config = self.pipe.transformer.config
        size = side("transformer", config.sample_size, self.size)
        return (config.in_channels, size, size)

    @property
    def multiple(self) -> int:
        return int(self.pipe.transformer.config.patch_size)

    @property
    def small(self) -> int:
        return SMALL_PATCHES * self.multiple


Defer = Callable[[type[nn.Module], Path, str, torch.dtype], nn.Module | None]


def load_pipeline(
    kind: type[Pipeline],
    source: str | Path,
    dtype: torch.dtype,
    parts: Mapping[str, Any] = MappingProxyType({}),
    kinds: Mapping[str, type] = MappingProxyType({}),
    defer: Defer = lambda *_: None,
) -> Pipeline:
    """Load a frozen pipeline from a folder or a hub id.

    `parts` replace those of the folder, and `kinds` are classes of parts that the pipeline does not say, or that are
    read otherwise.
    `defer(kind, folder, name, dtype)` may return a network that is loaded later. Every weight of the networks is
    accounted for. Raises UnfitError (see `weights.load_network`), and whatever diffusers raises for what is no
    network.
    """
    folder = Path(source) if Path(source).is_dir() else fetched(kind, str(source), parts)
    named = part_names(kind, kind.load_config(folder))
    read_settings(folder, named)
    networks = {n: network_kind(kind, n, called, kinds) for n, called in named.items() if n not in parts}
    loaded = {
        n: later if (later := defer(k, folder, n, dtype)) is not None else load_part(k, folder, n, dtype)
        for n, k in networks.items()
        if k is not None
    }
    others: dict[str, Any] = {n: kinds[n] for n, network in networks.items() if network is None and n in kinds}
    read = {n: own.from_pretrained(str(folder), subfolder=n) for n, own in others.items()}
    return frozen(kind.from_pretrained(folder, dtype=dtype, local_files_only=True, **loaded, **read, **parts), dtype)


def fetched(kind: type[DiffusionPipeline], source: str, parts: Mapping[str, Any]) -> Path:
    """Return the hub's cached folder of a pipeline, downloaded where missing.

    Files in full precision, or else in half.
    """
    try:
        return Path(kind.download(source, use_safetensors=True, **parts))
    except (OSError, ValueError) as error:
        try:
            return Path(kind.download(source, use_safetensors=True, variant="fp16", **parts))
        except (OSError, ValueError):
            raise error from None


def part_names(pipeline: type[DiffusionPipeline], index: Mapping[str, Any]) -> dict[str, str]:
    """Return the class names of the parts in a `model_index.json`.

    Raises UnfitError where the index is damaged or lacks a part.
    """
    told = inspect.signature(pipeline.__init__).parameters
    needed = {n for n, p in told.items() if p.default is p.empty} - {"self"}
    parts, named = needed | set(pipeline._optional_components), dict[str, str]()
    for name, entry in index.items():
        if name.startswith("_") or (name in told and name not in parts):  # settings of the pipeline itself
            continue
        pair = entry if isinstance(entry, list | tuple) else ()
        if name not in parts or len(pair) != 2 or not all(part is None or isinstance(part, str) for part in pair):
            raise UnfitError(
                f"model_index.json says {name!r} {json.dumps(entry)[:60]}, which is no part of a {pipeline.__name__}",
                INDEX_CURE,
            )
        if pair[0] is not None and pair[1] is not None:
            named[name] = pair[1]
    if lacking := sorted(needed - set(index) - set(pipeline._optional_components)):
        raise UnfitError(f"model_index.json names no {lacking[0]}", INDEX_CURE)
    return named


def part_kind(
    pipeline: type[DiffusionPipeline], name: str, kinds: Mapping[str, type] = MappingProxyType({})
) -> tuple[type, ...]:
    """Return the classes that a pipeline allows for a part.

    `kinds` come before what the pipeline's annotation says. Raises UnfitError where the pipeline has no such
    part.
    """
    if name in kinds:
        return (kinds[name],)
    hints = get_type_hints(pipeline.__init__)
    if name not in hints:
        raise UnfitError(
            f"model_index.json names a part {name!r}, which a {pipeline.__name__} does not have",
            "pass the folder that save_pretrained wrote",
        )
    return tuple(k for k in (*get_args(hints[name]), hints[name]) if isinstance(k, type) and k is not type(None))


def network_kind(
    pipeline: type[DiffusionPipeline],
    name: str,
    called: str,
    of: Mapping[str, type] = MappingProxyType({}),
) -> type[nn.Module] | None:
    """Return the class of a pipeline's network; None for other parts.

    Raises UnfitError where the folder names another class than the pipeline allows.
    """
    kinds = [k for k in part_kind(pipeline, name, of) if issubclass(k, ModelMixin | PreTrainedModel)]
    if not kinds:
        return None
    if (found := next((k for k in kinds if k.__name__ == called), None)) is None:
        raise UnfitError(
            f"its {name} is a {called}, allowed in a {pipeline.__name__} are {', '.join(k.__name__ for k in kinds)}",
            "wrap your own network in fewstep.Denoiser",
        )
    return found


def load_part(kind: type[nn.Module], folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """Load one network of a pipeline's folder, in its `own_dtype`.

    Raises UnfitError.
    """
    place = folder / name
    loader: Any = kind
    config = loader.load_config(place) if issubclass(kind, ModelMixin) and (place / "config.json").is_file() else {}
    network: nn.Module = load_network(kind, place, own_dtype(kind, config, dtype), folder)
    return network


def frozen(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    """Freeze a pipeline's networks, in eval mode and in their `own_dtype`.

    Progress bars are off. Returns `pipe`.
    """
    pipe.set_progress_bar_config(disable=True)
    for part in networks(pipe):
        part.requires_grad_(False).eval()
        wanted = own_dtype(type(part), part.config, dtype)
        if dtype_of(part) != wanted:  # libraries keep a few weights in single precision
            part.to(dtype=wanted)
    return pipe


class SingleConv2d(nn.Conv2d):
    """A convolution that computes in float32 while `single` is set.

    Autocast around the layer then has no effect.
    """

    single = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.single:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class SingleLinear(nn.Linear):
    """A linear layer that computes in float32 while `single` is set.

    Autocast around the layer then has no effect.
    """

    single = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.single:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(
                x.float(), self.weight.float(), None if self.bias is None else self.bias.float()
            )


def able_to_single(network: nn.Module) -> nn.Module:
    """Make a network's last layer able to compute in float32.

    For `single_output`. Weights, hooks and names stay. Returns the same network.
    """
    for layer in _last_layers(network):
        if type(layer) in (nn.Conv2d, nn.Linear):
            layer.__class__ = SingleConv2d if isinstance(layer, nn.Conv2d) else SingleLinear
    return network


def _last_layers(network: nn.Module) -> list[nn.Module]:
    found = (_inside(part, name.split(".")) for part in experts_of(network) for name in OUTPUTS)
    return [layer for layer in found if layer is not None]


def _inside(network: nn.Module | None, path: Sequence[str]) -> nn.Module | None:
    """Return the module at a path inside a network, or None."""
    for name in path:
        network = None if network is None else dict(network.named_children()).get(name)
    return network


@contextmanager
def single_output(network: nn.Module) -> Iterator[None]:
    """Compute the network's last layer in float32 inside the block.

    Only after `able_to_single`. For an eps network, the error of the clean estimate at the noisiest time is
    sigma / alpha times the error of the output. Rounding the output to bfloat16, an error of about 0.001 of
    the output, is 0.015 of x0's unit at Stable Diffusion's last time and 0.16 at PixArt's, and guidance
    multiplies the error.
    """
    # `modules`, since the layer may be inside an adapter.
    parts = [m for layer in _last_layers(network) for m in layer.modules()]
    layers = [m for m in parts if isinstance(m, SingleConv2d | SingleLinear)]
    for layer in layers:
        layer.single = True
    try:
        yield
    finally:
        for layer in layers:
            layer.single = False


def own_dtype(kind: type[nn.Module], config: Any, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or float32 where float16 would overflow.

    Autoencoders such as SDXL's overflow in float16.
    """
    return (
        torch.float32
        if dtype == torch.float16
        and issubclass(kind, AutoencoderKL | AutoencoderKLWan)
        and config.get("force_upcast", True)
        else dtype
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create networks of this dtype inside the block.

    Fake (meta) tensors cannot be converted in place.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def kept_single(network: nn.Module) -> frozenset[str]:
    """Return parts of names of layers that stay in single precision.

    diffusers keeps these layers so, whatever the dtype of the others.
    """
    return frozenset((network._keep_in_fp32_modules or ()) if isinstance(network, ModelMixin) else ())


def networks(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Return all networks of a pipeline."""
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """Return the network that is distilled: the U-Net or the transformer."""
    return pipe.unet if "unet" in pipe.components else pipe.transformer


def embeds_guidance(network: nn.Module) -> bool:
    """Return whether a network is told the guidance scale."""
    return any(bool(part.config.get("guidance_embeds")) for part in experts_of(network) if isinstance(part, ModelMixin))


def on(network: nn.Module, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move conditions to the network's device.

    The encoders may be on another one.
    """
    device = next(network.parameters()).device
    return {k: v.to(device) for k, v in cond.items()}


def set_checkpointing(network: nn.Module, run: Callable[..., Any] | None) -> None:
    """Set how the blocks of a diffusers network are computed.

    With gradients on, `run(block, *inputs)` computes each block; with None the blocks compute themselves.
    Raises ValueError for a network that has no such blocks.
    """
    if isinstance(network, ModelMixin) and network._supports_gradient_checkpointing:
        if run is None:
            network.disable_gradient_checkpointing()
        else:
            network.enable_gradient_checkpointing(run)
    elif run is not None:
        raise ValueError(
            f"roles.checkpointing: a {type(network).__name__} has no blocks to check; "
            "set it to false, or lower train.batch to save memory"
        )


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks in which a network's weights are sharded.

    Inner blocks first; see `_blocks`. Raises ValueError where there are none, and for a pair of networks.
    """
    if isinstance(network, Experts):
        raise ValueError(
            "train.shard: of two networks a process calls the one of its samples' times, and sharded blocks need all "
            "processes at once; set it to false (roles.quantize=int8 makes room)"
        )
    if not (found := _blocks(network)):
        raise ValueError(
            f"train.shard: a {type(network).__name__} has no blocks (the elements of an nn.ModuleList) "
            "to spread; set it to false"
        )
    return found[::-1]


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the innermost blocks of the classes that a network repeats.

    Blocks of one class are compiled once. Empty where no class occurs twice.
    """
    innermost = innermost_blocks(network)
    counts = Counter(type(b) for b in innermost)
    return [b for b in innermost if counts[type(b)] > 1]


def innermost_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network that have no blocks inside."""
    found = _blocks(network)
    known = {id(b) for b in found}
    return [b for b in found if not any(id(part) in known for part in b.modules() if part is not b)]


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the modules that diffusers keeps together, outer blocks first.

    Otherwise the elements of the outermost module lists.
    """
    kinds = (network._no_split_modules or ()) if isinstance(network, ModelMixin) else ()
    found = [m for m in network.modules() if type(m).__name__ in kinds and m is not network]
    if not found:
        lists = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.ModuleList)]
        outer = [m for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
        found = [block for m in outer for block in m if next(block.parameters(), None) is not None]
    return found


def unet_features(unet: nn.Module) -> tuple[str, ...]:
    """Name the last resnet of every down level, and the middle."""
    levels = unet.get_submodule("down_blocks")
    assert isinstance(levels, nn.ModuleList)
    last = [
        f"down_blocks.{i}.resnets.{len(level.get_submodule('resnets')) - 1}"  # type: ignore[arg-type]
        for i, level in enumerate(levels)
    ]
    return (*last, "mid_block")


def transformer_features(
    blocks: Sequence[nn.Module], part: str = "", called: str = "transformer_blocks"
) -> tuple[str, ...]:
    """Name up to four blocks of a transformer.

    `part` is a layer's name inside each block, if not the block itself; `called` is the name of the list of
    blocks. The blocks are spread evenly through the first three quarters.
    """
    count = len(blocks)
    places = sorted({round(count * share / 4) for share in (0.75, 1.5, 2.25, 3)} & set(range(count)))
    return tuple(f"{called}.{i}{part}" for i in places or [0])
