"""Measure how long `fewstep plan` takes for the shipped recipes.

    python benchmarks/plan.py                              # all recipes; writes benchmarks/plan.md and .json
    python benchmarks/plan.py --only sd15-tdm4-lora        # this recipe, and keeps the others
    python benchmarks/plan.py --src OTHER/src --as before  # measures another checkout next to this one

Each plan is a command of its own, on folders of configurations at true size, without weights. Seconds are CPU seconds
of the command, its imports included: other processes share the machine. `imports` are those of the imports alone.
Qwen-Image is planned for a card of 24 GiB, which also searches for settings.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import configurations
from fewstep.recipes_path import recipe_names
from records import Facts, Record, about, markdown, new_record, origin, provenance, stored_rows, wrapped, write_record

ROOT = Path(__file__).resolve().parent.parent
SEARCHED = {"qwenimage-tdm4-lora": "24GiB"}  # recipes that are planned for a card
IMPORTS = "imports"
COMMAND = "from fewstep.cli.main import run; run()"  # in older checkouts too, which `python -m fewstep` is not


def planned() -> dict[str, str]:
    """Return the recipes whose teachers have configurations here, with the names of these."""
    found = {}
    for recipe in recipe_names():
        names = [n for n in configurations.PIPELINES if recipe.startswith(f"{n}-")]
        if names:
            found[recipe] = max(names, key=len)
    return found


def seconds(command: list[str], source: Path) -> tuple[float, float, str]:
    """Return the CPU seconds and seconds of a command, and what it says."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - began, done.stdout


def row(recipe: str, named: str, source: Path, folder: Path) -> Facts:
    """Return one row."""
    card = SEARCHED.get(recipe, "")
    command = [sys.executable, "-c", "import fewstep.cli.plan"]
    if recipe != IMPORTS:
        teacher = configurations.write(configurations_of(recipe), folder)
        command[2:] = [COMMAND, "plan", recipe, "--teacher", str(teacher), *(["--memory", card] if card else [])]
    cpu, wall, said = seconds(command, source)
    needed = [line.strip(" │").split("│")[-1].strip() for line in said.splitlines() if "needed (" in line]
    found = {"recipe": recipe, "as": named, "card": card, "cpu": cpu, "wall": wall, "needed": needed}
    return {**found, **origin_of(source)}


def origin_of(source: Path) -> dict[str, Facts]:
    """Return hardware and versions of a row, with the commit of the checkout that was measured."""
    found = origin()
    of = ["git", "-C", str(source), "rev-parse", "--short=7", "HEAD"]
    said = subprocess.run(of, capture_output=True, text=True, check=False).stdout.strip()
    return {**found, "versions": {**found["versions"], **({"commit": said} if said else {})}}


def configurations_of(recipe: str) -> str:
    """Return the name of a recipe's configurations."""
    return planned()[recipe]


def page(record: Record) -> str:
    """Return the page of a record."""
    of = {(r["recipe"], r["as"]): r for r in record.rows}
    lines = []
    for recipe in dict.fromkeys(r["recipe"] for r in record.rows):
        found = [of.get((recipe, name)) for name in ("before", "now")]
        card = next((f" --memory {r['card']}" for r in found if r is not None and r["card"]), "")
        needed = next((", ".join(r["needed"]) for r in reversed(found) if r is not None), "")
        clock = "" if found[1] is None else f"{found[1]['wall']:.1f}"
        lines.append([recipe + card, *("" if r is None else f"{r['cpu']:.1f}" for r in found), clock, needed])
    return f"""# How long a plan takes

{about(__doc__)}

{wrapped(provenance(record))}

{markdown(["recipe", "CPU seconds before", "now", "by the clock", "needed, the largest part"], lines)}
"""


def main() -> None:
    """Measure recipes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = [IMPORTS, *planned()]
    parser.add_argument("--only", nargs="*", choices=recipes, default=recipes)
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="of the checkout that is measured")
    parser.add_argument("--as", dest="named", choices=("before", "now"), default="now")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    rows = stored_rows(a.to / "plan.json")
    for recipe in a.only:
        with tempfile.TemporaryDirectory() as folder:
            made = row(recipe, a.named, a.src, Path(folder))
        print(made, flush=True)
        rows = [r for r in rows if (r["recipe"], r["as"]) != (recipe, a.named)] + [made]
        rows.sort(key=lambda r: recipes.index(r["recipe"]))
        record = new_record("plan", "python benchmarks/plan.py", rows, None, {})
        write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
