"""How a network's outputs are read, as data.

A model's weights do not say what the network predicts and on which schedule. The same weights with another
prediction or schedule are another model.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..core.indices import evenly_spaced
from ..core.prediction import ROWS, Row, edm_row
from ..core.schedule import EDM, VP, Flow, Schedule
from .base import Backbone

PROBES = 17  # times at which a custom schedule is sampled
SHOWN = 6  # longest list that is printed in full

PROBED = 16  # prompts whose conditions are compared
LEVELS = 33  # levels of a schedule's table that are kept


def process_data(backbone: Backbone, most: int | None = None) -> dict[str, Any]:
    """Return a backbone's `prediction`, `sigma_data` and `schedule`, ready for JSON.

    `sigma_data` is 0 where the prediction has none. A table of more than `most` levels is thinned evenly to
    `most`, which is enough to distinguish tables.
    """
    prediction, sigma_data = prediction_of(backbone.row)
    return {"prediction": prediction, "sigma_data": sigma_data, "schedule": schedule_data(backbone.schedule, most)}


def prediction_of(row: Row) -> tuple[str, float]:
    """Return the name of a prediction row and its `sigma_data`.

    `sigma_data` is 0 where the row has none. Rows are compared at two noise levels: alpha 0.6 with sigma 0.8,
    and alpha 1 with sigma 2. EDM's `F` has `a / b = -sigma / sigma_data^2`, which gives `sigma_data`. An
    unknown row is named by its numbers.
    """
    for name, known in ROWS.items():
        if name != "edm" and _same(_at(row), _at(known)):
            return name, 0.0
    a, b = (float(v) for v in row(torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)))
    if b and -2 * b / a > 0:
        sigma_data = math.sqrt(-2 * b / a)
        for name, sign in (("edm", 1.0), ("-edm", -1.0)):
            if _same(_at(row), _at(edm_row(sigma_data, sign))):
                return name, round(sigma_data, 6)
    return f"row {', '.join(f'{v:.4g}' for v in _at(row))}", 0.0


def _at(row: Row) -> list[float]:
    alpha, sigma = torch.tensor([[0.6, 1.0], [0.8, 2.0]], dtype=torch.float64)
    return torch.cat([v.expand(2) for v in row(alpha, sigma)]).tolist()


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-6) for x, y in zip(a, b, strict=True))


def schedule_data(schedule: Schedule, most: int | None = None) -> dict[str, Any]:
    """Return the kind of a schedule with its table or parameters.

    A custom schedule is sampled: alpha and sigma at `PROBES` times.
    """
    if isinstance(schedule, VP):
        table = schedule.alpha_bar.double().cpu()
        kept = table if most is None else table[evenly_spaced(len(table), most)]
        return {"kind": "VP", "levels": len(table), "alpha_bar": kept.tolist()}
    if isinstance(schedule, EDM | Flow):
        return {"kind": type(schedule).__name__, **asdict(schedule)}
    times = schedule.at(torch.linspace(0, 1, PROBES, dtype=torch.float64))
    sampled = {name: _numbers(of(times)) for name, of in (("alpha", schedule.alpha), ("sigma", schedule.sigma))}
    return {"kind": type(schedule).__name__, "times": _numbers(times), **sampled}


def _numbers(values: Tensor) -> list[float]:
    return [round(v, 8) for v in values.tolist()]


def probe(cond: Mapping[str, Tensor], rows: int = PROBED) -> dict[str, Any]:
    """Summarise conditions in a few numbers.

    The shape of each tensor, and four projections of its first rows, of unit variance. For mappings from
    prompts that have no weights to compare. cond: tensors [N, ...].
    """
    found = {}
    for name, tensor in sorted(cond.items()):
        x = tensor[:rows].double().cpu().flatten()
        along = torch.arange(1, len(x) + 1, dtype=torch.float64)
        size = float(x.square().sum().sqrt()) or 1.0
        says = [round(float((x * torch.cos(along * 0.7 * (k + 1) + k)).sum()) / size, 2) for k in range(4)]
        found[name] = {"shape": list(tensor.shape[1:]), "says": says}
    return found


def mapping_of(backbone: Backbone, prompts: Sequence[str], count: int = PROBED) -> str:
    """Hash what a mapping without weights gives for some prompts.

    The hash distinguishes custom conditions. Empty for a backbone with encoders, whose weights are compared,
    and without conditions.
    """
    if backbone.encoders:
        return ""
    asked = [prompts[i] for i in evenly_spaced(len(prompts), count)]
    with torch.no_grad():
        says = probe(backbone.encode(asked), count)
    return hashlib.sha256(json.dumps(says).encode()).hexdigest()[:8] if says else ""


def differences(before: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> list[str]:
    """Return `name before -> now` for every setting that differs.

    Nested settings have dotted names. Numbers are equal to 1 in 10,000: machines and file formats round. Two
    mappings of another `kind` differ in `kind` alone.
    """
    if "kind" in before and "kind" in now and before["kind"] != now["kind"]:
        return [f"{under or 'kind'} {before['kind']} -> {now['kind']}"]
    found = []
    for key in [*now, *(k for k in before if k not in now)]:
        name, a, b = f"{under}.{key}" if under else str(key), before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, name)
        elif not _equal(a, b, 0.025 if key == "says" else 1e-6):
            found.append(f"{name} {_short(a)} -> {_short(b)}")
    return found


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if (
        isinstance(a, float | int)
        and isinstance(b, float | int)
        and not isinstance(a, bool)
        and not isinstance(b, bool)
    ):
        return math.isclose(
            a,
            b,
            rel_tol=1e-4 if isinstance(a, float) or isinstance(b, float) else 0,
            abs_tol=0 if a == b else tolerance,
        )
    return bool(a == b)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > SHOWN:
        return f"({len(value)} numbers from {_short(value[0])} to {_short(value[-1])})"
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else repr(value)
        if isinstance(value, str) and not value
        else str(value)
    )
