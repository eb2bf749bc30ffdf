"""Collect the demo's numbers from a finished run.

    fewstep distill demo && python benchmarks/demo.py --run runs/demo    # writes benchmarks/demo.md and .json

The teacher is sampled at the student's cost in two ways: in as many unguided steps, and in half as many guided ones.
The student has to beat the better of the two.
"""

import argparse
import json
from pathlib import Path

from records import Record, about, markdown, new_record, provenance, wrapped, write_record


def page(record: Record) -> str:
    """Return the page of a record, without times: these are of whatever else the machine did."""
    common, head = record.common, ["model", "steps", "guidance", "NFE", "FD to real"]
    lines = [
        [
            r["model"],
            r["steps"],
            f"{r['guidance']:g}" if r["guidance"] > 1 else "none",
            r["nfe"],
            f"{r['fd_real']:.1f}",
            f"{100 * r['retrieval_top1']:.1f} % / {100 * r['retrieval_top5']:.1f} %",
            f"{r['diversity_ratio']:.2f}",
        ]
        for r in record.rows
    ]
    what = f"""{provenance(record)}, one seed: {common["iterations"]} iterations in
        {common["train_seconds"] / 60:.1f} minutes by the clock. Protocol `{common["protocol"]}`: every row has
        {record.rows[0]["n"]} images. As many real images have an FD of {common["fd_floor"]:.1f}; differences
        below 0.5 are noise. Diversity is relative to the teacher's."""
    return f"""# The demo

{wrapped(what)}

{about(__doc__)}

{markdown([*head, "retrieval top-1 / top-5", "diversity"], lines)}
"""


def main() -> None:
    """Read the run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    evaluation, card = (
        json.loads((a.run / "final" / name).read_text(encoding="utf-8")) for name in ("eval.json", "fewstep.json")
    )
    common = {key: evaluation[key] for key in ("protocol", "fd_floor")}
    common |= {key: card[key] for key in ("iterations", "train_seconds")}
    record = new_record("demo", "fewstep distill demo", evaluation["rows"], [0], common)
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
