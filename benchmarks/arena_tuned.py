"""Fine-tune a poor teacher on good images first, or add an adversarial term on them: TDM's tables 1 and 3.

    python benchmarks/arena_tuned.py --data FOLDER    # writes benchmarks/arena_tuned.md and .json

The poor teacher is the arena's network (`arena.py`), trained on blurred images. The good set are 1,000 sharp ones. TDM
in 4 steps trains all weights for equal CPU seconds, by three ways: alone; after a fine-tune of the teacher on the good
set, which takes a third of the seconds; and with an adversarial term on the same set all the time. Both ways to use the
set are tuned with seed 0: four rates of the fine-tune, six weights of the term. Distances are the arena's, to sharp
test images; iterations follow from paces that are measured in turns.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from arena import (
    GAN,
    GUIDANCE,
    SEEDS,
    Arena,
    Cell,
    Racer,
    arena_measure,
    guided_teacher,
    measured,
    method_of,
    paces,
    shown,
    training,
)
from arena_teacher import FIT, Clothes, classifier, clothes, measures, painter, states_of, teacher_of
from fewstep.backbones.base import Backbone, Cond
from fewstep.backbones.load import fingerprint
from fewstep.core import timegrid
from fewstep.core.solvers import Denoise
from fewstep.data.prompts import embed
from fewstep.roles.roles import RolesConfig
from fewstep.training.finetune import finetune
from fewstep.training.fit import FitConfig
from fewstep.zoo.pixel_data import FASHION
from records import (
    CLOCK,
    Facts,
    Record,
    about,
    markdown,
    new_record,
    origin,
    provenance,
    stored_rows,
    wrapped,
    write_record,
)

GOOD, RATE, SHARE = 1000, 3e-5, 1 / 3  # images; TDM's rate in the arena; of the seconds, for a fine-tune
RATES, WEIGHTS = (1e-4, 3e-4, 1e-3, 3e-3), (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
ALONE, TERM, FIRST = "TDM alone", "TDM with an adversarial term", "fine-tune, then TDM"


@dataclass(frozen=True)
class Way:
    """A way to train: its name and the one number that is tuned."""

    name: str
    number: float = 0.0

    @property
    def racer(self) -> Racer:
        """TDM, with the adversarial term if this way has it."""
        term = {"gan": {**GAN, "weight": self.number}} if self.name == TERM else {}
        return Racer(self.name, {"name": "tdm", **term}, RATE, (4,), "real" if term else "")


def blurred(data: Clothes) -> Clothes:
    """Return images as means of 3x3 pixels."""
    return Clothes(F.avg_pool2d(F.pad(data.images, (1, 1, 1, 1), mode="replicate"), 3, 1), data.labels)


def made(a: argparse.Namespace) -> Arena:
    """Return the arena with the poor teacher and the good set."""
    train, test, run = clothes(a.data, "train"), clothes(a.data, "t10k"), a.out / "poor"
    if not (run / "teacher.safetensors").exists():
        for _ in painter(blurred(train), run):
            pass
    teacher, net = teacher_of(run), classifier(train, a.out / "classifier.safetensors")
    data = embed(teacher, list(FASHION), None, fingerprint(teacher.module))
    good = states_of(teacher, Clothes(train.images[:GOOD], train.labels[:GOOD]))
    return Arena(teacher, measures(net, test), data, good, {}, a)


def tuned(arena: Arena, rate: float, steps: int, seed: int) -> Backbone:
    """Return the poor teacher, fine-tuned on the good set."""
    teacher = teacher_of(arena.a.out / "poor")
    config = FitConfig(steps=steps, batch=FIT.batch, lr=rate, warmup=20, decay=steps // 2, ema=0.99)
    with tempfile.TemporaryDirectory() as folder:
        for _ in finetune(teacher, arena.real, RolesConfig(lora=False), config, Path(folder), seed):
            pass
    return teacher


def guided_measure(arena: Arena, teacher: Backbone, seed: int) -> dict[str, float]:
    """Measure a teacher in 50 guided steps."""
    null = teacher.encode([""])

    def call(cond: Cond) -> Denoise:
        return guided_teacher(teacher, cond, null, GUIDANCE)

    return arena_measure(arena, call, timegrid.uniform(teacher.schedule, 50), "ddim", seed)


def trained(arena: Arena, way: Way, seed: int, pace: dict[str, float]) -> Facts:
    """Train a student one way and measure it, with the teacher that it learnt from."""
    began, teacher, share = CLOCK(), arena.teacher, 1.0
    if way.name == FIRST:
        teacher, share = tuned(arena, way.number, int(SHARE * arena.a.seconds / pace[FIRST]), seed), 1 - SHARE
    with_it, method = replace(arena, teacher=teacher), method_of(way.racer, 4)
    iterations = int(share * arena.a.seconds / pace[TERM if way.name == TERM else ALONE])
    *_, roles = training(with_it, way.racer, method, Cell("tdm", 4, RATE, seed), iterations)
    seconds = CLOCK() - began
    with roles.averaged(), torch.no_grad():
        found = measured(with_it, method, roles, 4, Cell("tdm", 4, RATE, seed + 10))  # 10: no picture
    return {
        "way": way.name,
        "number": way.number,
        "seed": seed,
        "iterations": iterations,
        "seconds": seconds,
        "measured": found,
        "teacher": guided_measure(with_it, teacher, seed),
        **origin(),
    }


def paced(arena: Arena) -> dict[str, float]:
    """Return the CPU seconds of an iteration of every way, and of a fine-tune's step."""
    known = paces(arena, [("tdm", 4), ("gan-real", 4)])
    took = []
    for _ in range(3):
        began = CLOCK()
        tuned(arena, RATES[0], 40, 0)
        took.append((CLOCK() - began) / 40)
    return {ALONE: known["tdm-4"], TERM: known["gan-real-4"], FIRST: statistics.median(took)}


def best(name: str, rows: Sequence[Facts]) -> Way:
    """Return a way with the number that had the lowest distance."""
    own = [r for r in rows if (r["way"], r["seed"]) == (name, 0)]
    return Way(name, min(own, key=lambda r: float(r["measured"]["fd"]))["number"])


def ways(rows: Sequence[Facts]) -> Iterator[tuple[Way, int]]:
    """Return what is trained, the search first; `rows` are those that are there by then."""
    yield from ((Way(FIRST, rate), 0) for rate in RATES)
    yield from ((Way(TERM, weight), 0) for weight in WEIGHTS)
    for seed in SEEDS:
        yield Way(ALONE), seed
        for name in (FIRST, TERM):
            yield best(name, rows), seed


def page(record: Record) -> str:
    """Return the page of a record."""
    head = ["way", "fd", "accuracy", "precision", "recall", "diversity", "teacher's fd, 50 steps", "CPU s", "seeds"]
    lines, tried = [], []
    for name in (FIRST, TERM, ALONE):
        way = best(name, record.rows)
        own = [r for r in record.rows if (r["way"], r["number"]) == (name, way.number)]
        teachers = shown([r["teacher"] for r in own])[0]
        took = f"{statistics.mean(r['seconds'] for r in own):.1f}"
        lines.append([name, *shown([r["measured"] for r in own]), teachers, took, len(own)])
        found = {r["number"]: r["measured"]["fd"] for r in record.rows if (r["way"], r["seed"]) == (name, 0)}
        tried += [[name, f"{number:g}", f"{fd:.2f}"] for number, fd in found.items() if number]
    title = f"# A poor teacher and a good set of images\n\n{about(__doc__)}\n\n{wrapped(provenance(record))}"
    search = markdown(["way", "rate or weight", "fd, seed 0"], tried)
    return f"{title}\n\n{markdown(head, lines)}\n\n## What was tried\n\n{search}\n"


def main() -> None:
    """Train, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--seconds", type=float, default=30.0, help="CPU seconds of a training")
    parser.add_argument("--out", type=Path, default=Path("runs/arena"), help="where arena.py keeps its classifier")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows, arena = stored_rows(a.to / "arena_tuned.json"), made(a)
    pace = paced(arena)
    for way, seed in ways(rows):
        if any((r["way"], r["number"], r["seed"]) == (way.name, way.number, seed) for r in rows):
            continue
        rows.append(json.loads(json.dumps(trained(arena, way, seed, pace))))
        print(rows[-1], flush=True)
        if {ALONE, TERM, FIRST} <= {r["way"] for r in rows}:
            common = {"seconds": a.seconds, "pace": pace, "good": GOOD}
            record = new_record("arena_tuned", "python benchmarks/arena_tuned.py --data FOLDER", rows, SEEDS, common)
            write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
