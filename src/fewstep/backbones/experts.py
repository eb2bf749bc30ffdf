"""Two networks that share the path from noise to data.

Each sample goes to the network of its time. In fewstep such a pair is one network. Its layers are
`transformer.X` and `transformer_2.X`, and a LoRA of it is one LoRA for each. Files have the two apart, as
diffusers' pipelines do.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PARTS = ("transformer", "transformer_2")  # of high and of low noise, as pipelines call them
Kind = TypeVar("Kind", bound=DiffusionPipeline)
NEAR = 1e-3  # thousandths of the path: a time that is rounded to single precision stays on its side


class Experts(ModelMixin, ConfigMixin, CacheMixin):
    """A transformer of diffusers for high noise and another for low noise.

    `boundary` is the time, in the units of the networks' argument `timestep`, from which on the first network
    is called. Configuration and class attributes are those of the first.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True

    def __init__(self, transformer: ModelMixin, transformer_2: ModelMixin, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary
        self._no_split_modules = transformer._no_split_modules
        self._keep_in_fp32_modules = transformer._keep_in_fp32_modules
        self.register_to_config(**{k: v for k, v in transformer.config.items() if not k.startswith("_")})

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Call the networks, each on its own rows of the batch.

        Returns a tuple of one tensor [B, ...].
            hidden_states [B, ...], timestep [B], encoder_hidden_states [B, L, D]. `return_dict` is not read.
        """
        high = timestep >= self.boundary - NEAR
        if isinstance(high, FakeTensor):  # a memory plan, in which both sides take the same
            high = torch.ones(len(high), dtype=torch.bool)
        if bool(high.all()) or not bool(high.any()):
            network = self.transformer if bool(high[0]) else self.transformer_2
            return self._of(network, slice(None), hidden_states, timestep, encoder_hidden_states, attention_kwargs)
        rows = high.nonzero()[:, 0], (~high).nonzero()[:, 0]
        networks = (self.transformer, self.transformer_2)
        found = [
            self._of(network, index, hidden_states, timestep, encoder_hidden_states, attention_kwargs)[0]
            for network, index in zip(networks, rows, strict=True)
        ]
        back = torch.cat(rows).argsort()
        return (torch.cat(found)[back],)

    def _of(
        self,
        network: nn.Module,
        rows: Any,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        options: dict[str, Any] | None,
    ) -> tuple[Tensor]:
        return (network(x[rows], t[rows], text[rows], attention_kwargs=options, return_dict=False)[0],)


def experts_of(network: nn.Module) -> list[nn.Module]:
    """Return a pair's networks, or the network itself."""
    return [network.transformer, network.transformer_2] if isinstance(network, Experts) else [network]


def split_state(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield each network's own tensors, under their names inside the network."""
    for part in PARTS:
        yield {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}


def joined(pipe: Kind) -> Kind:
    """Return the pipeline with its two networks as one.

    A pipeline of one network comes back unchanged.
    The pipeline's `boundary_ratio` is the boundary of the pair.
    """
    if getattr(pipe, PARTS[1], None) is None:
        return pipe
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    pair = Experts(pipe.transformer, pipe.transformer_2, boundary)
    return _rebuilt(pipe, {PARTS[0]: pair, PARTS[1]: None, "boundary_ratio": None})


def parted(pipe: Kind) -> Kind:
    """Undo `joined`: return the pipeline with two networks."""
    pair = pipe.components.get(PARTS[0])
    if not isinstance(pair, Experts):
        return pipe
    ratio = pair.boundary / pipe.scheduler.config.num_train_timesteps
    return _rebuilt(pipe, {**dict(zip(PARTS, experts_of(pair), strict=True)), "boundary_ratio": ratio})


def _rebuilt(pipe: Kind, changes: Mapping[str, Any]) -> Kind:
    settings = {k: v for k, v in pipe.config.items() if not k.startswith("_") and k not in pipe.components}
    made = type(pipe)(**{**settings, **pipe.components, **changes})
    made.register_to_config(_name_or_path=pipe.name_or_path)
    made.set_progress_bar_config(disable=True)
    return made
