"""Students with their cards: made from a run or from a folder, kept in a folder, put back on their base."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..backbones.apart import apart
from ..backbones.base import Backbone
from ..backbones.files import load_lora, load_network, load_vectors
from ..backbones.generate import device_of
from ..backbones.load import at_size, bundled, fingerprint, load_teacher, seen_from, source_of
from ..backbones.parts import LatentUNet, Piped
from ..begin import process_of, require_own
from ..export.card import FILE, StudentCard, read_card
from ..export.final import write_final
from ..methods.method import Method
from ..names import LONGEST, made_name
from ..roles.roles import Roles
from ..roles.step_condition import folded_bias, unfold, width
from ..roles.student import Student, plain_lora, with_lora, with_vectors, without_fold
from ..trajp.files import load_head
from ..trajp.head import kind_of
from .record import hardware


@dataclass(frozen=True)
class Made:
    """What a card says of how its student came about, besides what its networks and its method say."""

    base: str  # what `load_teacher` takes, or the name of a network of one's own
    base_hash: str
    iterations: int
    seconds: float
    called: str  # the method, or the methods of several stages
    data: str = "prompts alone"
    size: int = 0  # of its pictures, where it is another than the base's


def base_of(backbone: Backbone) -> str:
    """What a card calls this base."""
    return backbone.source or backbone.name if isinstance(backbone, Piped) else backbone.name


def size_of(backbone: Backbone) -> int:
    """Of its pictures, where it was set to another than its network's own; else 0."""
    return backbone.picture_size if isinstance(backbone, LatentUNet) and backbone.size else 0


def student_card(roles: Roles, method: Method, made: Made) -> StudentCard:
    """The card of the student in these roles."""
    backbone, counts = roles.backbone, method.counts
    weights = "full" if not roles.config.share else "lora" if roles.config.rank else "none"
    rank = roles.config.rank if weights == "lora" else None
    own = process_of(backbone)
    names = [made.base] if own else source_of(made.base).names
    ending = made_name(f"-{made.called}-{'-'.join(map(str, sorted(counts)))}step")
    own.setdefault("prediction", str(backbone.scheduler_config.get("prediction_type", "")))
    return StudentCard(
        name=made_name("-".join(names), ending, LONGEST - len(ending)), method=made.called, base=made.base, base_hash=made.base_hash,
        steps=counts, timesteps={str(k): method.times(backbone.schedule, k).tolist() for k in counts}, solver={str(k): method.solver for k in counts},
        weights=weights, head="" if roles.head is None else kind_of(roles.head), free_first=method.free_first, rank=rank, alpha=None if rank is None else float(rank),
        teacher_guidance=method.guidance, guidance_rescale=backbone.guidance_rescale, guidance_parallel=method.guidance_parallel, licence="apache-2.0" if made.base in bundled() else "other",
        iterations=made.iterations, train_seconds=made.seconds, hardware=hardware(), version=__version__, scales=method.conditioned if method.tells == "guidance" and roles.counts else (),
        dtype=str(next(backbone.module.parameters()).dtype).removeprefix("torch."), size=made.size, data=made.data, time_layer=backbone.time_layer if roles.counts else "",
        own_network=type(backbone.module).__name__ if "shape" in own else "", **own,
    )  # fmt: skip


@dataclass(frozen=True)
class LoadedStudent:
    """A student ready to sample, with its card; on modules of its own, so that no run on the same teacher changes it."""

    student: Student
    card: StudentCard
    base: Backbone | None = None  # what it was put on, as it was passed

    def save(self, folder: str | Path) -> Path:
        """Write it to `folder`, which `load_student`, `start=` and, for pipelines, the command line read. Returns `folder`.

        A student that is there already is replaced once the new one is whole. Raises ValueError where the folder holds anything else.
        """
        return save_student(self, Path(folder))


def save_student(loaded: LoadedStudent, folder: Path) -> Path:
    """`LoadedStudent.save`."""
    if folder.exists() and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: {folder} is there already and holds no student, which would replace it; choose another")
    card, student = loaded.card, loaded.student
    backbone, first = student.backbone, card.told[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if card.weights == "none":
        return write_final(folder, backbone, card, student.network, {}, {}, head=student.head)
    if card.weights == "lora":
        times = torch.tensor(card.timesteps[str(card.steps[0])][:-1], dtype=torch.float64)
        state, settings = plain_lora(student, first, times)
        return write_final(folder, backbone, card, student.network, state, settings, student.vectors, student.head)
    with folded_bias(student.network, card.time_layer, student.vectors[first]) if student.vectors else nullcontext():
        return write_final(folder, backbone, card, student.network, None, {}, student.vectors, student.head)


def put_together(
    card: StudentCard,
    backbone: Backbone,
    lora: Mapping[str, Tensor] | None,
    network: nn.Module | None,
    vectors: Mapping[float, Tensor],
    head: nn.Module | None,
) -> LoadedStudent:
    """A student from its parts, on modules of its own around its base's weights; a LoRA and a network that say no step count by themselves."""
    base, backbone = backbone, apart(backbone)
    if card.weights == "lora":
        assert card.rank is not None and card.alpha is not None and lora is not None
        student = with_lora(backbone, lora, card.rank, card.alpha)
    else:
        student = Student(backbone, backbone.module if network is None else network, (), "student")
    student = with_vectors(student, {k: vectors[k] for k in card.told}) if vectors else student
    return LoadedStudent(replace(student, head=head, free=card.free_first), card, base)


def load_student(
    folder: str | Path,
    base: str | Path | Backbone | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    other_weights: bool = False,
) -> LoadedStudent:
    """Read a student onto its base: by default the one its card names, in the card's dtype, on `device`. Raises ValueError with one line.

    Another base of the same architecture is allowed - that is how a LoRA meets a fine-tune - and keeps its own weights; warns where the one that
    the card names has changed. A network of one's own has to be passed as `base`, with the schedule, prediction, shape and conditions of the card; with other weights than those that the
    student was trained on only where `other_weights` says so.
    """
    folder = Path(folder)
    card = read_card(folder)
    named = seen_from(card.base, folder) if base is None else base
    if card.own_network and isinstance(named, str | Path):
        raise ValueError(
            f"student: {folder} was made from {card.base}, a network of one's own ({card.own_network}), which Python code has to bring: "
            f"fewstep.load_student({str(folder)!r}, base=fewstep.Denoiser(...))"
        )
    if isinstance(named, str | Path):
        named = load_teacher(named, dtype or getattr(torch, card.dtype), device, guidance_rescale=card.guidance_rescale)
    backbone = at_size(named, card.size or None)
    require_own(card, backbone, folder, other_weights)
    vectors = load_vectors(folder, card.told, width(backbone.module, card.time_layer)) if card.time_layer else {}
    head = load_head(folder, backbone.schedule).to(device_of(backbone.module)) if card.head else None
    lora, network = None, None
    if card.weights == "full":
        network = load_network(folder, backbone.module)
        if vectors:
            unfold(network, card.time_layer, vectors[card.told[0]])
    elif card.weights == "lora":
        state = load_lora(folder)
        lora = without_fold(state, card.time_layer) if vectors else state
    loaded = put_together(card, backbone, lora, network, vectors, head)
    if base is None and (note := base_note(loaded)):
        warnings.warn(note, stacklevel=2)
    return loaded


def base_note(loaded: LoadedStudent) -> str:
    """Say where a student's base has other weights than the one that it was trained on; the empty text where it is the same."""
    card, backbone = loaded.card, loaded.student.backbone if loaded.base is None else loaded.base
    if not card.base_hash or (found := fingerprint(backbone.module, through=getattr(torch, card.dtype))) == card.base_hash:
        return ""
    return f"the base {backbone.name} has other weights (SHA-256 {found}...) than the one this student was trained on ({card.base_hash}...)"


def student_folder(source: str | Path) -> Path | None:
    """The student's folder when `source` is one, or a run that has one; else None."""
    return next((p for p in (Path(source), Path(source) / "final") if (p / FILE).is_file()), None)
