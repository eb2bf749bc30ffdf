"""The paper's tables as one command, for whoever has the hub and a card.

    python benchmarks/table1.py --base sd15 --prompts prompts.txt        # table 1; sdxl too, and pixart, sd35: table 3
    python benchmarks/table1.py --video cogvideox --prompts prompts.txt  # table 4, by VBench's dimensions

Trains a student with the shipped recipe, or takes --student RUN, and measures it beside its teacher and public
students: HPSv2.1 on its four styles, aesthetic score and CLIP score; of videos twelve of VBench's dimensions, in an
environment of its own (`fewstep evaluate --install vbench`), and with `--metrics vbench,vbench_actions,vbench_objects`
its four with detectron2. VBench's totals are its own program's.
With --teacher, --protocol and --metrics any pipeline is measured; the tests run it on tiny ones.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from fewstep.cli.distill import run_distill
from fewstep.cli.evaluate import EVALUATION, More, evaluate_student, prompts_in
from fewstep.cli.extra import extra_of
from fewstep.evaluation.metrics import METRICS
from fewstep.student.folder import require_folder
from records import Record, about, markdown, new_record, provenance, wrapped, write_record


@dataclass(frozen=True)
class Base:
    """A base of the paper: its recipe, its rivals and its protocol."""

    recipe: str
    against: tuple[str, ...] = ()
    protocol: str = "hpsv2"
    metrics: tuple[str, ...] = ("hpsv21", "aesthetic", "clip_score")


BASES = {
    "sd15": Base("sd15-tdm4-lora", against=("lcm-lora", "hyper-sd", "tcd")),
    "sdxl": Base("sdxl-tdm4-lora", against=("lcm-lora", "hyper-sd", "tcd", "sdxl-lightning", "dmd2", "sdxl-turbo")),
    "pixart": Base("pixart-tdm4-lora"),
    "sd35": Base("sd35m-tdm4-lora"),
    "cogvideox": Base("cogvideox-tdm4-lora", against=("tdm",), protocol="vbench", metrics=("vbench", "vbench_actions")),
}
LEADING = ("model", "steps", "guidance", "nfe")


def page(record: Record) -> str:
    """Return the page of a record: a line for each row, each number with its interval."""
    keys = [m for m in METRICS.values() if any(row.get(m.key) is not None for row in record.rows) and m.kind != "cost"]
    keys = [m for m in keys if m.printed]

    def cell(row: dict[str, object], key: str) -> str:
        value, ends = row.get(key), row.get("intervals", {}).get(key)  # type: ignore[attr-defined]
        if not isinstance(value, int | float):
            return "–"
        return f"{value:.3g}" + (f" ({ends[0]:.3g} to {ends[1]:.3g})" if ends else "")

    lines = [[*(row[k] for k in LEADING), *(cell(row, m.key) for m in keys)] for row in record.rows]
    common = record.common
    what = f"""{provenance(record)}. Protocol `{common["protocol"]}`, {record.rows[0]["n"]} images a row,
        prompts: {common["prompts"]["source"]}. In brackets 95 % intervals over prompts."""
    wins = [
        f"- {record.rows[p['row']]['model']} beats {record.rows[p['against']]['model']} in {p['metric']} at "
        f"{100 * p['wins']:.0f} % of the images "
        f"({100 * p['wins_interval'][0]:.0f} to {100 * p['wins_interval'][1]:.0f} %)"
        for p in common["paired"]
    ]
    return "\n".join(
        [
            f"# Table of {common['base']}",
            "",
            wrapped(what),
            "",
            about(__doc__),
            "",
            markdown([*LEADING, *(m.heading for m in keys)], lines),
            "",
            *wins,
            "",
        ]
    )


def main() -> None:
    """Train where there is no student yet, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--base", choices=[name for name in BASES if name != "cogvideox"])
    which.add_argument("--video", choices=["cogvideox"])
    parser.add_argument("--prompts", default=None, help="prompts to train on")
    parser.add_argument("--student", default=None, help="a run that is there already")
    parser.add_argument("--teacher", default=None, help="in place of the recipe's")
    parser.add_argument("--protocol", default=None)
    parser.add_argument("--protocol-prompts", default=None, help="the file of a list that does not ship")
    parser.add_argument("--metrics", default=None, help="with commas between; empty for the core alone")
    parser.add_argument("--against", default=None, help="with commas between; empty for none")
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe")
    parser.add_argument("--run", type=Path, default=None, help="folder of the training")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    name = a.base or a.video
    base, run = BASES[name], Path(a.student) if a.student else a.run or Path("runs") / f"table-{name}"

    def listed(text: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
        return usual if text is None else tuple(word for word in text.split(",") if word)

    metrics = listed(a.metrics, base.metrics)
    if a.student is None:
        extra_of(metrics, None)  # what they lack is said before hours of training
        given = {"prompts.source": a.prompts or "prompts.txt"}
        run_distill(base.recipe, a.set, run, False, [], given | ({"teacher": a.teacher} if a.teacher else {}))

    protocol, folder = a.protocol or base.protocol, require_folder(str(run), "student")
    asked = None if a.protocol_prompts is None else prompts_in(a.protocol_prompts, protocol)
    more = More(metrics, None, listed(a.against, base.against))
    result = evaluate_student(folder, protocol, folder / EVALUATION, None, asked, more=more)
    common = {key: result[key] for key in ("protocol", "distance", "prompts", "paired", "findings", "weights_sha256")}
    command = f"python benchmarks/table1.py {'--video' if a.video else '--base'} {name}"
    record = new_record(f"table-{name}", command, result["rows"], [0], {"base": name, **common})
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
