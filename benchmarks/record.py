"""Write a benchmark record: enough to run it again, and its numbers beside their baseline. Measures nothing."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from rubric_data.errors import UserError
from rubric_data.files import commit, write_json
from rubric_data.records import content_hash

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "numpy")


def spread(samples: Sequence[float]) -> dict[str, float | int]:
    """Median of ``samples`` with its spread: quartiles and range. Raises ValueError on none, NaN or infinity."""
    values = np.asarray(samples, float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"samples must be finite and at least one, got {list(samples)}")
    low, q1, median, q3, high = (float(value) for value in np.percentile(values, [0, 25, 50, 75, 100]))
    return {"n": values.size, "median": median, "q1": q1, "q3": q3, "min": low, "max": high}


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Means over each ``width`` neighbours, (len - width + 1,)."""
    return np.convolve(np.asarray(values, float), np.ones(width) / width, "valid")


def write_record(
    name: str,
    *,
    unit: str,
    samples: Sequence[float],
    baseline: str,
    baseline_samples: Sequence[float],
    config: Mapping[str, Any],
    data: str | Path | None = None,
    notes: str = "",
    results: Path = RESULTS,
) -> Path:
    """Write ``results``/``name``.json and return its path; an earlier record of that name is replaced.

    ``samples`` are repeated measurements in ``unit``, ``baseline_samples`` those of the thing named ``baseline``
    in the same process; the ratio is that of the medians. ``data`` is the file that was read, hashed into the
    record. Raises UserError outside a git checkout: a record without a commit cannot be run again.
    """
    ours, theirs = spread(samples), spread(baseline_samples)
    record = {
        "name": name,
        **circumstances(config),
        "data": None if data is None else {"path": os.path.relpath(data, ROOT), "sha256": _file_hash(Path(data))},
        "unit": unit,
        "result": ours,
        "baseline": {"name": baseline, **theirs},
        "ratio": ours["median"] / theirs["median"],
        "notes": notes,
    }
    path = results / f"{name}.json"
    write_json(path, record)
    return path


def write_findings(
    name: str, config: Mapping[str, Any], findings: Mapping[str, Any], *, origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the record ``name`` of an experiment and return it: `circumstances`, then ``findings`` by their keys.

    Raises UserError outside a git checkout, as `write_record` does.
    """
    record = {"name": name, **circumstances(config, origin), **findings}
    write_json(RESULTS / f"{name}.json", record)
    return record


def quoted(page: str, name: str, text: str) -> str:
    """``page`` with what stands between its markers ``<!-- name:begin -->`` and ``<!-- name:end -->`` replaced."""
    begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """One benchmark's records, each with a ``target`` in its config, as a Markdown table: medians, our quartiles."""
    lines = ["| claim | unit | ours | the other | ratio | target |", "| --- | --- | --- | --- | --- | --- |"]
    for record in records:
        first, second = record["result"], record["baseline"]
        cells = (
            f"`{record['name'].partition('-')[2]}`",
            record["unit"],
            f"{first['median']:.4g} [{first['q1']:.4g} {first['q3']:.4g}]",
            f"{second['median']:.4g} ({second['name']})",
            f"{record['ratio']:.2f}",
            record["config"]["target"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def circumstances(config: Mapping[str, Any], origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What every record says of its making: when, command, commit, configuration, machine, versions.

    ``origin``: commit and dirty flag of the run that is recorded, where that was another process.
    """
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        **(checked_out() if origin is None else origin),
        "config": dict(config),
        "config_hash": content_hash(dict(config))[:16],
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
    }


def command() -> str:
    """The command line of this process, as it can be typed again from the repository root."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name] if module else [os.path.relpath(sys.argv[0], ROOT)]
    return shlex.join(["python", *program, *sys.argv[1:]])


def checked_out() -> dict[str, str | bool]:
    """The commit that is checked out, and whether tracked files differ from it. Raises UserError outside a checkout."""
    found = commit(ROOT)
    if found is None:
        raise UserError(f"{ROOT}: no commit can be read; run benchmarks in a git checkout")
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code: processor, cores, threads, memory, GPU."""
    torch = sys.modules.get("torch")  # a benchmark that does not use torch need not load it
    has_gpu = torch is not None and torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads() if torch is not None else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch is not None and has_gpu else None,
        "load_average": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
