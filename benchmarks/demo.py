"""What `make demo` gives: the rows of its evaluation, the teacher's at every student's cost among them, and what the training took.

Run it in the tree that made the run: `fewstep distill demo && python benchmarks/demo.py --run runs/demo`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fewstep.atomic import write_bytes, write_json
from origin import commit, hardware


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as README has them, without their times, which are those of whatever else a machine did; a guidance of 1 is none."""
    lines = [
        "| model | steps | guidance | network calls | FD to real | retrieval top-1 / top-5 | diversity |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        guidance = f"{r['guidance']:g}" if r["guidance"] > 1 else "none"
        retrieval = f"{100 * r['retrieval_top1']:.1f} % / {100 * r['retrieval_top5']:.1f} %"
        cells = [
            r["model"],
            r["steps"],
            guidance,
            r["nfe"],
            f"{r['fd_real']:.1f}",
            retrieval,
            f"{r['diversity_ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--to", type=Path, default=Path("benchmarks"), help="where demo.json and demo.md go")
    a = parser.parse_args()
    evaluation, card = (
        json.loads((a.run / "final" / name).read_text(encoding="utf-8")) for name in ("eval.json", "fewstep.json")
    )
    minutes, floor = card["train_seconds"] / 60, evaluation["fd_floor"]
    made = {
        "hardware": hardware(),
        "commit": commit(),
        "seeds": [0],
        "command": "fewstep distill demo",
        "train_seconds": card["train_seconds"],
    }
    write_json(
        a.to / "demo.json", {"protocol": evaluation["protocol"], "fd_floor": floor, "rows": evaluation["rows"], **made}
    )
    text = [
        "# The demo",
        "",
        f"`{made['command']}`, {made['hardware']}, commit {made['commit']}, one seed: {card['iterations']} iterations in {minutes:.1f} minutes by the clock. "
        f"Protocol `{evaluation['protocol']}`: {evaluation['rows'][0]['n']} pictures a row, as many real ones have an FD of {floor:.1f}; differences below 0.5 are noise. Diversity is relative to the teacher's.",
        "",
        "The teacher is measured in all that it draws at a student's cost: so many unguided steps, or half as many guided ones. The better of the two is what a student has to beat.",
        "",
        *table(evaluation["rows"]),
        "",
    ]
    write_bytes(a.to / "demo.md", "\n".join(text).encode())


if __name__ == "__main__":
    main()
