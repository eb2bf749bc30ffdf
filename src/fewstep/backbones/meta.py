"""A teacher of fake (meta) tensors, to count what it needs.

Built from a pipeline's configurations alone, with the true shapes and no weights.
"""

import inspect
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from .base import Backbone
from .family import Family
from .kinds import Operations, Unfilled
from .load import at_size, backbone_of, damaged, locate, require_lora_files, source_of
from .lora import changes_of
from .parts import default_dtype, frozen, network_kind, own_dtype, part_kind, part_names
from .schedulers import EDM_SCHEDULERS
from .settings import read_settings
from .single_file import SUFFIX, Checkpoint, with_settings
from .sizes import Size
from .trial import small_shape
from .weights import PICKLES, UnfitError, weights_in

# Multistep solvers that also step through flow, whose shift they call otherwise.
MULTISTEP = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
WITHOUT_TABLE = (*EDM_SCHEDULERS, CMStochasticIterativeScheduler)


def meta_teacher(source: str | Path, dtype: torch.dtype = torch.float32, size: Size | None = None) -> Backbone:
    """Return the teacher that `load_teacher` loads, with fake (meta) tensors.

    No weights are read, downloaded or allocated; tokenizers are loaded. Raises ValueError as `load_teacher`
    does.
    """
    given = require_lora_files(source_of(source))
    place, family, checkpoint = locate(given)
    try:
        index = DiffusionPipeline.load_config(str(place))
        named = {n: called for n, called in part_names(family.pipeline, index).items() if n not in family.parts}
        if checkpoint is None and Path(place).is_dir():
            read_settings(Path(place), named)
            require_weights(family, Path(place), named)
        parts = components(family, place, named, dtype)
        told = inspect.signature(family.pipeline).parameters
        listed = {n: index[n] for n in told if n in index and n not in family.parts}
        absent = {n: None for n, value in listed.items() if is_part(value) and n not in parts}
        own = {n: value for n, value in listed.items() if not is_part(value)}
        pipe = frozen(family.pipeline(**own | absent | parts | dict(family.parts)), dtype)
        pipe.register_to_config(_name_or_path=str(place))
        if isinstance(checkpoint, Checkpoint):
            pipe = with_settings(pipe, checkpoint)
        backbone = backbone_of(family, pipe, given.names[0])
    except Exception as error:  # diffusers raises a different type for each kind of damage
        raise damaged(checkpoint or place, error) from error
    for lora, strength in given.loras:
        if Path(lora).expanduser().exists():  # nothing is downloaded for a plan
            changes_of(pipe, lora, strength)  # checked alone: fused LoRAs take no memory
    backbone = at_size(backbone, size)
    try:
        small_shape(backbone)
    except UnfitError as error:
        raise damaged(checkpoint or place, error) from error
    return backbone


def is_part(entry: object) -> bool:
    """Return whether an entry of an index is a part.

    A part is [library, class]; all else are settings.
    """
    return isinstance(entry, list | tuple) and all(e is None or isinstance(e, str) for e in entry)


def components(family: Family, place: str | Path, named: Mapping[str, str], dtype: torch.dtype) -> dict[str, Any]:
    """Return a pipeline's parts by name, networks with fake (meta) tensors.

    The parts have the classes that the family's pipeline asks for. `named` has the class names from the pipeline's
    folder.
    """
    made = dict[str, Any]()
    operations = Operations()
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # one mode for all parts: tensors of several modes do not mix
    for name, called in named.items():
        kind: Any = (
            network_kind(family.pipeline, name, called, family.kinds)
            or part_kind(family.pipeline, name, family.kinds)[0]
        )
        if issubclass(kind, ModelMixin):
            config = kind.load_config(str(place), subfolder=name)
            with mode, Unfilled(operations), default_dtype(own_dtype(kind, config, dtype)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of layers of odd sizes
                made[name] = kind.from_config(config)
        elif issubclass(kind, PreTrainedModel):
            config = kind.config_class.from_pretrained(str(place), subfolder=name, dtype=dtype)
            with mode, Unfilled(operations), default_dtype(dtype):
                made[name] = kind(config)
        else:  # all schedulers with a table of betas have the same process: DDIM's will do
            known = (*WITHOUT_TABLE, *(MULTISTEP if kind is FlowMatchEulerDiscreteScheduler else ()))
            told = next((s for s in known if s.__name__ == called), None)
            kind = told or (DDIMScheduler if issubclass(kind, (Enum, *WITHOUT_TABLE)) else kind)
            made[name] = kind.from_pretrained(str(place), subfolder=name)
    return made


def require_weights(family: Family, folder: Path, named: Mapping[str, str], bare: bool = True) -> None:
    """Check that the weight files of a pipeline's networks can be loaded.

    Only headers are read. With `bare`, a folder of configurations alone passes: a plan needs no more. Raises
    UnfitError where files are missing, damaged or pickled.
    """
    found = {name: network_kind(family.pipeline, name, called, family.kinds) for name, called in named.items()}
    kinds = {name: kind for name, kind in found.items() if kind is not None}
    files = [
        f
        for name in kinds
        for f in (folder / name).glob("*")
        if f.suffix in (SUFFIX, *PICKLES) or f.name.endswith(".index.json")
    ]
    for name, kind in kinds.items() if files or not bare else ():
        weights_in(kind, folder / name, folder)


def require_loadable(source: str | Path) -> None:
    """Check that a teacher's folder has weights that can be loaded.

    Only headers are read, and nothing of the hub's. Raises ValueError otherwise.
    """
    place, family, checkpoint = locate(require_lora_files(source_of(source)))
    if checkpoint is None and Path(place).is_dir():
        try:
            named = part_names(family.pipeline, DiffusionPipeline.load_config(str(place)))
            require_weights(family, Path(place), {n: c for n, c in named.items() if n not in family.parts}, bare=False)
        except Exception as error:  # as in `meta_teacher`
            raise damaged(place, error) from error
