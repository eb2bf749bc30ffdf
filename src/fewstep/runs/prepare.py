"""What every run does before its first iteration.

Prompts are embedded, data is made or read, and the networks are built. Python and recipes share this code.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

from torch import Tensor

from ..backbones.base import Backbone
from ..backbones.encoders import encoding_on, is_deferred, load_deferred
from ..backbones.generate import device_of
from ..backbones.load import fingerprint, fingerprints
from ..backbones.parts import DiffusersBackbone
from ..backbones.process import mapping_of
from ..backbones.schedulers import student_scheduler
from ..config_fields import COUNT, check_fields
from ..core import timegrid
from ..data.images import ImageData, encode_images_of
from ..data.prompts import Embeddings, embed
from ..data.teacher_images import TEACHER_IMAGES, TEACHER_STEPS, teacher_images
from ..data.trajectories import (
    OF_STUDENT,
    TRAJECTORIES,
    Trajectories,
    TrajectoryConfig,
    generate_trajectories,
    guided_teacher,
    run_to_completion,
    trajectory_bytes,
)
from ..methods.method import Method
from ..objectives.rewards import Reward
from ..processes import distributed_errors, is_first, this_process
from ..report.words import plural, size
from ..roles.roles import Roles, RolesConfig
from ..roles.sharding import empty
from ..training.loop import TrainConfig
from ..training.saving import CheckpointSize, checkpoint_size
from ..words import speaks_python
from .encoder_record import EncoderRecord, encoder_files
from .init import roles_for
from .rewards import reward_of
from .trajectory_sources import student_source, trajectory_times

EMBEDDINGS = "embeddings"  # the folder of a run for what was encoded


@speaks_python("images")
@dataclass(frozen=True)
class ImageSource:
    """Images that a method starts from.

    `source` is a folder of captioned images, webdataset shards, or `teacher`, which samples `count` images
    in `steps` steps.
    """

    source: str
    count: Annotated[int, COUNT] = TEACHER_IMAGES
    steps: Annotated[int, COUNT] = TEACHER_STEPS
    seed: int | None = None  # the training's by default

    def __post_init__(self) -> None:
        check_fields(self, "images")


@dataclass(frozen=True)
class RunSpec:
    """One training: method, settings, data and initial student."""

    method: Method
    train: TrainConfig
    roles: RolesConfig
    prompts: list[str]
    images: ImageSource | None = None
    trajectories: TrajectoryConfig | None = None
    init_from: Path | None = None
    reward: Reward | None = None  # a function; None: the one that the method names

    @property
    def data(self) -> str:
        """What a model card says about the training data."""
        return data_words(None if self.images is None else self.images.source, self.roles, any(self.prompts))


def data_words(images: str | None, roles: RolesConfig, prompted: bool = True) -> str:
    """Return what a model card says about the training data.

    The text also names the quantization of a teacher whose weights were not quite those of the base.
    """
    text = "prompts alone" if prompted else "its teacher alone"
    if images is not None:
        text = "prompts and images sampled from the teacher" if images == "teacher" else "captioned images"
    return f"{text}, next to its base in {roles.quantize}" if roles.quantize else text


class Progress(Protocol):
    """Where a run shows its progress."""

    def say(self, text: str) -> None:
        """Show one line."""

    def meter(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show how many of `total` are done.

        The context manager yields a function that takes the number done.
        """

    def writing(self, path: Path, size: int) -> None:
        """Show that a file of `size` bytes will be written."""


class Lines:
    """Progress as lines on the standard error.

    Lines come from time to time, and only for what takes long.
    """

    PATIENCE = 10.0  # seconds between two lines

    def say(self, text: str) -> None:
        """Write one line."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    @contextmanager
    def meter(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Write from time to time how many of `total` are done."""
        began = last = time.monotonic()

        def seen(done: int) -> None:
            nonlocal last
            if done and (now := time.monotonic()) - last >= self.PATIENCE:
                last = now
                self.say(f"{title}: {done:,} of {total:,}, {(now - began) / done * (total - done):.0f} s left")

        yield seen

    def writing(self, path: Path, size: int) -> None:
        """Write nothing."""


@dataclass(frozen=True)
class Prepared:
    """A training that is ready to start."""

    roles: Roles
    data: Embeddings
    images: ImageData | None
    trajectories: Trajectories | None


def require_exportable(teacher: Backbone, method: Method) -> None:
    """Check before the training that its student can be written.

    Raises ValueError where no scheduler takes the student's times and solver, or where the state of a
    network of one's own holds anything but tensors.
    """
    if isinstance(teacher, DiffusersBackbone):
        even = all(timegrid.even(teacher.schedule, method.times(teacher.schedule, k)) for k in method.counts)
        student_scheduler(teacher.scheduler_config, method.counts, method.sampler, even)
    elif odd := next((k for k, v in teacher.module.state_dict().items() if not isinstance(v, Tensor)), None):
        raise ValueError(
            f"teacher: {odd} in the state of its network is no tensor, "
            "so that no student of it can be written; make it a buffer"
        )


def identity_of(teacher: Backbone, prompts: list[str], cache: Path | None = None) -> str:
    """Name a network together with its encoders.

    Weights are named by their hash. Conditions without weights are named by their values for some prompts.
    Encoders that are not loaded have the name that a cache keeps for their files, or are loaded.
    """
    own = None if cache is None else EncoderRecord.read(cache)
    if any(map(is_deferred, teacher.encoders)):
        if own is not None and own.denoiser == fingerprint(teacher.module):
            return own.identity
        load_deferred(teacher)
    hashes, mapping = fingerprints(teacher.module, *teacher.encoders), mapping_of(teacher, prompts)
    identity = f"{hashes[-1]}-{mapping}" if mapping else hashes[-1]
    folder = teacher.pipe.name_or_path if isinstance(teacher, DiffusersBackbone) else None
    if cache is not None and folder and is_first():
        EncoderRecord(encoder_files(Path(folder)), hashes[0], identity).write(cache)
    return identity


def prepare(
    teacher: Backbone,
    spec: RunSpec,
    run: Path | None,
    place: Path | None,
    progress: Progress,
    more: Callable[[str], None] = lambda identity: None,
) -> Prepared:
    """Prepare a training in the folder `run`.

    What is encoded and generated lies in `place`, which several stages share. `more` is called with the
    teacher's identity while encoders may work on the device. Afterwards the encoders are on the CPU, where they
    still serve, slowly. All processes call this function together.

    Raises ValueError for a training that cannot end well.
    """
    method = spec.method
    spec.train.on(this_process().num_processes)  # refuse before the first encoding
    require_exportable(teacher, method)
    reward = reward_of(method, spec.reward)
    cache = None if place is None else place / EMBEDDINGS
    identity = identity_of(teacher, spec.prompts, cache)
    with encoding_on(teacher, device_of(teacher.module)):
        with distributed_errors():
            data = embed(teacher, spec.prompts, cache, identity, keep=progress.writing, together=True)
        with this_process().main_process_first():  # the other processes find what the first one makes
            more(identity)
    with this_process().main_process_first():
        images = None if spec.images is None else _images(teacher, spec, spec.images, data, cache, identity, progress)
    trajectories = None
    if method.needs.trajectories:
        with distributed_errors():
            trajectories = generate(
                teacher, method, data, spec.trajectories or TrajectoryConfig(), place, identity, progress
            )
    sharded = spec.train.shard and this_process().num_processes > 1
    if sharded and is_first():
        teacher.module.cpu()  # the network and its copies come back to the device in parts
    elif sharded:
        for network in (teacher.module, *teacher.encoders):  # the parts come from the first process
            empty(network)
    on_meta = sharded and spec.init_from is None
    roles = roles_for(teacher, method, spec.roles, spec.train.seed, trajectories, spec.init_from, progress.say, on_meta)
    roles = replace(roles, reward=reward)
    if run is not None:
        progress.say(checkpoint_words(checkpoint_size(roles, spec.train)))
    return Prepared(roles, data, images, trajectories)


def checkpoint_words(checkpoint: CheckpointSize) -> str:
    """Return the size and the count of a run's checkpoints in words."""
    return (
        f"{plural(checkpoint.count, 'checkpoint')} of {size(checkpoint.each)}, of which the newest "
        f"{min(checkpoint.keep, checkpoint.count)} stay (train.keep); {size(checkpoint.most)} on the disk at most"
    )


def _images(
    teacher: Backbone,
    spec: RunSpec,
    wanted: ImageSource,
    data: Embeddings,
    cache: Path | None,
    identity: str,
    progress: Progress,
) -> ImageData:
    """Return the images that the method starts from, encoded."""
    if wanted.source != "teacher":
        return encode_images_of(
            teacher, wanted.source, cache, identity, found=lambda found: progress.say(found.line), keep=progress.writing
        )
    seed = spec.train.seed if wanted.seed is None else wanted.seed
    with progress.meter("teacher's images", wanted.count) as seen:
        return teacher_images(teacher, data, wanted.count, wanted.steps, spec.method.guidance, cache, seed, show=seen)


def generate(
    teacher: Backbone,
    method: Method,
    data: Embeddings,
    config: TrajectoryConfig,
    run: Path | None,
    identity: str,
    progress: Progress,
) -> Trajectories:
    """Return trajectories of the teacher, or of a student.

    Trajectories that are in their folder already are reused. The NFE and the bytes are shown before anything
    is generated.
    """
    times = trajectory_times(method, teacher)
    own = None if run is None else run / (OF_STUDENT if config.student else TRAJECTORIES)
    place = own if config.folder is None else Path(config.folder)
    if config.student:
        source = student_source(teacher, config.student, times)
    else:
        source = guided_teacher(teacher, data.unconditional(device_of(teacher.module)), config, times, method.guidance)
    who = "teacher" if config.student is None else f"student in {config.student}"
    needed = size(trajectory_bytes(config.count, teacher.shape, len(source.places), len(source.grid)))
    kept = (
        f"{needed}; existing ones in {place} are reused"
        if place is not None
        else "they are not kept: TrajectoryConfig(folder=...) or out keeps them"
    )
    progress.say(
        f"generating {config.count:,} trajectories of the {who} ({source.nfe} NFE each, "
        f"{config.count * source.nfe:,} in total); {kept}"
    )
    with progress.meter("trajectories", config.count) as seen:
        return run_to_completion(generate_trajectories(teacher, data, config, times, source, place, identity), seen)
