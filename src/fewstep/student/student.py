"""A student: its card, its base and its weights.

A student is read from a folder or made from a run, sampled, and written to a folder.
"""

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..backbones.apart import apart
from ..backbones.base import Backbone, Cond, denoiser, tell
from ..backbones.generate import device_of, trajectory
from ..backbones.load import at_size, bundled, fingerprint, load_teacher, seen_from, source_of
from ..backbones.modules import dtype_of
from ..backbones.parts import DiffusersBackbone
from ..backbones.sizes import Size
from ..core import timegrid
from ..core.prediction import Split
from ..core.solvers import Denoise, State, with_analytic_first_step
from ..heads.head import Head, kind_of, require_steps
from ..methods.method import Method
from ..names import LONGEST, made_name, require_path
from ..notebook import as_html, png_of
from ..roles import step_condition
from ..roles.adapters import Adapter, attach_adapter, merge, plain_state
from ..roles.per_step import by_step
from ..roles.roles import Roles, copied
from ..roles.step_condition import StepCondition
from .base import process_of, require_own
from .card import StudentCard, card_nfe, first_times
from .folder import Parts, holds_student, preview_of, read_card, read_parts, require_folder, write_parts


@dataclass(frozen=True)
class Origin:
    """How a student came about, besides its networks and its method."""

    base: str  # what `load_teacher` takes, or a Denoiser's name
    base_hash: str
    iterations: int
    seconds: float
    called: str  # the method, or the methods of several stages
    hardware: str = ""
    data: str = "prompts alone"
    size: Size = 0  # of the images or videos, where not the base's
    dtype: str = ""  # of the base's weights, the network's by default


def base_of(backbone: Backbone) -> str:
    """Return what a card calls this base."""
    return backbone.source or backbone.name if isinstance(backbone, DiffusersBackbone) else backbone.name


def size_of(backbone: Backbone) -> Size:
    """Return the size of a base's images, where it was set.

    0 where the size is the network's own.
    """
    return backbone.own_size if isinstance(backbone, DiffusersBackbone) else 0


def student_card(roles: Roles, method: Method, origin: Origin) -> StudentCard:
    """Return the card of the student in these roles."""
    backbone, counts = roles.backbone, method.counts
    weights = "full" if not roles.config.lora else "lora" if roles.config.rank else "none"
    rank = roles.config.rank if weights == "lora" else None
    own = process_of(backbone)
    names = [origin.base] if own else source_of(origin.base).names
    ending = made_name(f"-{origin.called}-{'-'.join(map(str, sorted(counts)))}step")
    own.setdefault("prediction", str(backbone.scheduler_config.get("prediction_type", "")))
    conditioned = bool(roles.condition_values)
    return StudentCard(
        name=made_name("-".join(names), ending, LONGEST - len(ending)),
        method=origin.called,
        base=origin.base,
        base_hash=origin.base_hash,
        steps=counts,
        timesteps={str(k): method.times(backbone.schedule, k).tolist() for k in counts},
        solver={str(k): method.sampler for k in counts},
        weights=weights,
        head="" if roles.head is None else kind_of(roles.head),
        analytic_first_step=method.analytic_first_step,
        rank=rank,
        alpha=None if rank is None else float(rank),
        guidance=method.guidance,
        guidance_scales=method.condition_values if method.condition_on == "guidance" and conditioned else (),
        licence="apache-2.0" if origin.base in bundled() else "other",
        iterations=origin.iterations,
        train_seconds=origin.seconds,
        hardware=origin.hardware,
        version=__version__,
        dtype=origin.dtype or str(dtype_of(backbone.module)).removeprefix("torch."),
        size=origin.size,
        data=origin.data,
        time_layer=backbone.time_layer if conditioned else "",
        per_step=roles.step_times is not None,
        own_network=type(backbone.module).__name__ if "shape" in own else "",
        **own,
    )


@dataclass(frozen=True)
class Student:
    """A student that is ready to sample.

    Read a student with `Student.read`; `Student.of` shows that of a run. `adapter` is the student's LoRA in
    `network`, None for a student with weights of its own. For each condition value, `condition` adds one of
    `vectors` to the time embedding.
    """

    card: StudentCard
    backbone: Backbone
    network: nn.Module
    adapter: Adapter | None = None
    vectors: dict[float, Tensor] = field(default_factory=dict)
    condition: StepCondition | None = None
    head: nn.Module | None = None  # a `core.solvers.Correction`
    base: Backbone | None = None  # the base as passed
    # The one condition value that the student is written for; None: the card's first, with all vectors.
    only: float | None = None
    folder: Path | None = None  # where it was read
    # Of each step after the first the student with its weights, where each step has weights of its own.
    later: tuple["Student", ...] = ()

    def __repr__(self) -> str:
        """Say what a person wants to know: method, base, steps and NFE."""
        card = self.card
        served = ", ".join(f"{k} steps ({card_nfe(card, k)} NFE)" for k in card.steps)
        weights = f"LoRA of rank {card.rank}" if card.weights == "lora" else f"weights: {card.weights}"
        weights += " for each step" * card.per_step
        return f"Student({card.name}: {card.method} of {card.base}, {served}, {weights})"

    def _repr_html_(self) -> str:
        """Show the student in a notebook.

        With the preview of its run, where there is one. No network is run.
        """
        return as_html(repr(self), None if self.folder is None else png_of(preview_of(self.folder, self.card)))

    @staticmethod
    def read(
        source: str | Path,
        base: str | Path | Backbone | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        other_weights: bool = False,
    ) -> "Student":
        """Read a student from a run or its `final/` onto its base.

        By default the base is the one that the card names, in the card's dtype. Another base of the same
        architecture is allowed - that is how a LoRA meets a fine-tune - and keeps its own weights. Warns if
        the base that the card names has changed.

        A network of one's own has to be passed as `base`, with the schedule, prediction, shape and
        conditions of the card. The network may have other weights than those that the student was trained on
        only if `other_weights`.

        Raises ValueError with one line.
        """
        folder = require_folder(source, "student")
        card = read_card(folder)
        named = seen_from(card.base, folder) if base is None else base
        if card.own_network and isinstance(named, str | Path):
            raise ValueError(
                f"student: {folder} was made from {card.base}, "
                f"a network of one's own ({card.own_network}), which Python code has to bring: "
                f"fewstep.load_student({str(folder)!r}, base=fewstep.Denoiser(...)); "
                "fewstep.sample, fewstep.evaluate and fewstep.export_student take the result"
            )
        if isinstance(named, str | Path):
            named = load_teacher(named, dtype or getattr(torch, card.dtype), device)
        backbone = at_size(named, card.size or None)
        require_own(card, backbone, folder, other_weights)
        found = replace(Student.from_parts(read_parts(folder, backbone), backbone), folder=folder)
        if base is None and (note := found.base_note()):
            warnings.warn(note, stacklevel=2)
        return found

    @staticmethod
    def from_parts(parts: Parts, base: Backbone) -> "Student":
        """Put a student together on modules of its own.

        The modules are around the weights of `base`.
        """
        found = Student._on(parts, apart(base), base)
        later = tuple(Student._on(own, found.backbone, base) for own in parts.later)
        return replace(found, later=later)

    @staticmethod
    def _on(parts: Parts, backbone: Backbone, base: Backbone) -> "Student":
        """Put one set of weights on the student's own modules."""
        card, adapter = parts.card, None
        network = backbone.module if parts.network is None else parts.network
        if card.weights == "lora":
            assert card.rank is not None and card.alpha is not None and parts.lora is not None
            adapter = attach_adapter(backbone.module, parts.lora, card.rank, card.alpha)
            network.requires_grad_(False).eval()
        device = device_of(network)
        vectors = {k: parts.vectors[k].to(device) for k in card.condition_values} if parts.vectors else {}
        condition = step_condition.attach(network, backbone.time_layer) if vectors else None
        head = None if parts.head is None else parts.head.to(device)
        return Student(card, backbone, network, adapter, vectors, condition, head, base)

    @staticmethod
    def of(roles: Roles, method: Method, origin: Origin) -> "Student":
        """Return the student of a run as it is now.

        The student is on the run's own modules, and valid for as long as these stay as they are.
        """
        shared = roles.config.lora and roles.config.rank
        card = student_card(roles, method, origin)
        found, *later = [
            Student(
                card,
                roles.backbone,
                roles.networks[name],
                Adapter(roles.layers, name) if shared else None,
                roles.vectors(),
                roles.conditions.get("student"),
                roles.head,
            )
            for name in roles.step_names
        ]
        return replace(found, later=tuple(later))

    def snapshot(self, base: Backbone) -> "Student":
        """Copy the student onto modules of its own.

        The modules are around the weights of `base`. The copy stays as it is, whatever is trained
        afterwards.
        """
        first, *later = [one._copied(base) for one in (self, *self.later)]
        vectors = {k: v.detach().clone() for k, v in self.vectors.items()}
        head = None if self.head is None else copy.deepcopy(self.head).requires_grad_(False)
        return Student.from_parts(replace(first, vectors=vectors, head=head, later=later), base)

    def _copied(self, base: Backbone) -> Parts:
        """Copy one set of a student's weights."""
        lora = None if self.adapter is None else plain_state(self.network, self.adapter.name)[0]
        network = None
        if self.card.weights == "full":
            network = copied(base.module).requires_grad_(False).eval()
            network.load_state_dict(self.network.state_dict())
        return Parts(_plain(self.card), lora, {}, network)

    def denoise(self, cond: Cond, condition: float | None = None) -> Denoise:
        """Return `(x, t) -> (x0, eps)`, conditioned on a value.

        By default the value is the first. Guidance is baked in: none is applied. Where each step has weights of its
        own, a sample has those of its time.
        """
        if self.later:
            each = (replace(self, later=()), *self.later)
            return by_step(lambda k, own: each[k].denoise(own), cond, self.times(self.card.steps[0]))
        inner = denoiser(self.backbone, self.network, tell(cond, self.card.guidance.scale))

        def network(x: Tensor, t: Tensor) -> Split:
            if self.adapter is not None:
                self.adapter.switch(True)
            if self.condition is not None:
                self.condition.active = step_condition.nearest(
                    self.vectors, self.value if self.only is not None or condition is None else condition
                )
            try:
                return inner(x, t)
            finally:
                if self.adapter is not None:
                    self.adapter.switch(False)
                if self.condition is not None:
                    self.condition.active = None

        return with_analytic_first_step(network, self.backbone.schedule) if self.card.analytic_first_step else network

    @property
    def value(self) -> float:
        """The condition value that the weights are written for."""
        return self.card.condition_values[0] if self.only is None else self.only

    def times(self, steps: int) -> Tensor:
        """Return the time grid of a step count.

        The grid is that of the training, or a uniform grid for a step count that was not trained.
        """
        known, schedule = self.card.timesteps.get(str(steps)), self.backbone.schedule
        return (
            timegrid.uniform(schedule, steps)
            if known is None
            else timegrid.check(schedule, torch.tensor(known, dtype=torch.float64))
        )

    def solver(self, steps: int) -> str:
        """Return the name of the solver for this step count."""
        return self.card.solver.get(str(steps), self.card.solver[str(self.card.steps[0])])

    def sample_trajectory(
        self,
        cond: Cond,
        seeds: list[int],
        steps: int,
        guidance: float | None,
        solver: str | None,
        condition: int | None,
    ) -> list[State]:
        """Return all states from these seeds, without gradient."""
        require_steps_of(self.head, steps)
        value = guidance if self.card.guidance_scales else steps if condition is None else condition
        return trajectory(
            self.backbone, self.denoise(cond, value), seeds, self.times(steps), solver or self.solver(steps), self.head
        )

    def single(self, steps: int, guidance: float | None = None) -> "Student":
        """Return the student of one step count and one guidance scale.

        The files of this student need nothing else.
        """
        card, conditioned = self.card, bool(self.vectors)
        scales = card.guidance_scales
        baked = replace(card.guidance, scale=scales[0] if guidance is None else guidance) if scales else card.guidance
        name = card.name.replace("-".join(map(str, sorted(card.steps))) + "step", f"{steps}step")
        name += f"-guidance{baked.scale:g}" if scales else ""
        key = str(steps)
        only = replace(
            _plain(card),
            name=made_name(name),
            steps=(steps,),
            timesteps={key: card.timesteps[key]},
            solver={key: card.solver[key]},
            time_layer="",
            guidance_scales=(),
            guidance=baked,
        )
        return replace(
            self, folder=None, card=only, only=(baked.scale if scales else float(steps)) if conditioned else None
        )

    def merged(self) -> "Student":
        """Return the same student as one network without LoRA.

        Where the student is written for one condition value, the network absorbs the condition, too. Raises ValueError
        where each step has weights of its own.
        """
        if self.later:
            raise ValueError(
                f"student: each of its {self.card.steps[0]} steps has weights of its own, which are no one network; "
                "keep it as it is"
            )
        network = copy.deepcopy(self.network)
        if self.adapter is not None:
            merge(network, self.adapter.name)
        if self.vectors and self.only is not None:
            step_condition.fold(self.backbone, network, self.vectors[self.only], first_times(self.card))
            return replace(
                self, card=whole(self.card), network=network, adapter=None, vectors={}, condition=None, only=None
            )
        condition = None if not self.vectors else step_condition.attach(network, self.backbone.time_layer)
        return replace(self, card=whole(self.card), network=network, adapter=None, condition=condition)

    def write(self, folder: str | Path) -> Path:
        """Write the student to a folder, and return `folder`.

        `Student.read`, `init_from` and, for pipelines, the command line read the folder. A student that is
        there already is replaced once the new student is whole. Raises OSError if the folder holds anything
        but a student.
        """
        folder, card, saved = Path(folder), _plain(self.card), {} if self.only is not None else self.vectors
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self.later:
            first, *later = [one._parts() for one in (self, *self.later)]
            return write_parts(folder, self.backbone, replace(first, card=card, later=later))
        if self.adapter is not None:
            state, settings = plain_state(self.network, self.adapter.name)
            if self.vectors:
                state |= self._condition_lora(card.rank or 1)
                settings["target_modules"] = sorted({*settings["target_modules"], self.backbone.time_layer})
            return write_parts(folder, self.backbone, Parts(card, state, settings, None, saved, self.head))
        if card.weights == "none":
            return write_parts(folder, self.backbone, Parts(card, head=self.head))
        with (
            step_condition.folded(self.backbone, self.network, self.vectors[self.value], first_times(self.card))
            if self.vectors
            else nullcontext()
        ):
            return write_parts(folder, self.backbone, Parts(card, None, {}, self.network, saved, self.head))

    def _parts(self) -> Parts:
        """Return one set of a student's weights as a folder holds it."""
        if self.adapter is None:
            return Parts(self.card, network=self.network)
        return Parts(self.card, *plain_state(self.network, self.adapter.name))

    def save(self, folder: str | Path) -> Path:
        """Write the student as `write` does.

        Raises ValueError if the folder holds anything but a student.
        """
        folder = require_path(folder, "folder")
        if folder.exists() and not holds_student(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"folder: {folder} is there already and holds no student, which would replace it; choose another"
            )
        return self.write(folder)

    def _condition_lora(self, rank: int) -> dict[str, Tensor]:
        """Return a condition value as a LoRA of the time layer.

        The value is the one that the files are written for.
        """
        assert self.adapter is not None
        vector, times = self.vectors[self.value], first_times(self.card)
        self.adapter.switch(True)
        try:
            return step_condition.folded_lora(self.backbone, self.network, vector, times, rank, rank)
        finally:
            self.adapter.switch(False)

    def base_note(self, found: str = "") -> str:
        """Say if the base's weights differ from those of the training.

        Empty if the weights are the same. `found` is the base's fingerprint, where it is known.
        """
        card, backbone = self.card, self.backbone if self.base is None else self.base
        if not card.base_hash:
            return ""
        found = found or fingerprint(backbone.module, through=getattr(torch, card.dtype))
        if found == card.base_hash:
            return ""
        return (
            f"the base {backbone.name} has other weights (SHA-256 {found}...) "
            f"than the one this student was trained on ({card.base_hash}...)"
        )


def _plain(card: StudentCard) -> StudentCard:
    """Return the card with alpha equal to the rank.

    `plain_state` converts a LoRA of any other alpha to this one.
    """
    return replace(card, alpha=None if card.rank is None else float(card.rank))


def whole(card: StudentCard) -> StudentCard:
    """Return the card of the same student with weights of its own."""
    return replace(card, weights="full", rank=None, alpha=None)


def require_steps_of(head: nn.Module | None, steps: int, option: str = "steps") -> None:
    """Check that a student's head serves so many steps.

    Raises ValueError otherwise.
    """
    if isinstance(head, Head):
        cure = "take as many or fewer, or train a student for more (method.steps)"
        require_steps(kind_of(head), head.counts, steps, option, cure)
