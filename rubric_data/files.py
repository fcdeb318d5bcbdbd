"""Files and run folders: atomic writes, refusal to overwrite. Knows nothing of what is written."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rubric_data.errors import UserError

CONFIG_NAME = "config.json"  # the resolved configuration, written into every run folder
ORIGIN_NAME = "origin.json"  # beside it: the command, and the commit where there is one
JSON_DECIMALS = 6  # of every number in a report
_ROOT = Path(__file__).resolve().parent.parent  # of the checkout, if this is one
_UMASK = os.umask(0)  # asked once, here: asking changes it for a moment, for all threads
os.umask(_UMASK)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; it replaces ``path`` only if the block succeeds.

    Raises UserError if the folder cannot be written, or if ``path`` is itself one.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot write here ({error.strerror}); choose another output folder") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` atomically as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON. Raises ValueError on NaN or infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_number(value: float) -> float | None:
    """``value`` as a report has it: rounded, and null where undefined (NaN)."""
    return None if math.isnan(value) else round(float(value), JSON_DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0


def commit(root: Path = _ROOT) -> dict[str, str | bool] | None:
    """The commit checked out at ``root`` and whether tracked files differ from it; None if that is no checkout.

    Records in benchmarks/results and the README that quotes them do not count as differing.
    """
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!README.md")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise UserError if the file ``output`` is there and may not be replaced."""
    if os.path.exists(output) and not overwrite:  # not `Path.exists`, which raises on a name that is too long
        raise UserError(f"{output}: exists already; choose another --output, or add --overwrite true")


def start_run(
    output: str | Path, config: dict[str, Any], *, resume: bool | None = None, free: Collection[str] = ()
) -> Path:
    """Create the folder of one run and store its resolved configuration and its origin in it.

    A folder that already holds a run is refused, unless ``resume`` is true and the stored configuration is the same
    but for ``resume`` itself and the keys in ``free`` (dotted in sections); None says that this kind of run cannot be
    resumed. Raises UserError otherwise.
    """
    folder = Path(output)
    stored = folder / CONFIG_NAME
    settled = json.loads(json.dumps({key: value for key, value in config.items() if key != "resume"}))
    if os.path.exists(stored):
        if not resume:
            otherwise = "" if resume is None else ", or add --resume true to go on"
            raise UserError(f"{folder}: holds a run already; choose another --output{otherwise}")
        before = json.loads(stored.read_text(encoding="utf-8"))
        old, new = flat(before), flat(settled)
        changed = sorted(key for key in {*old, *new}.difference(free) if old.get(key) != new.get(key))
        if changed:
            told = ", ".join(f"{key} is {new.get(key)!r:.60} and was {old.get(key)!r:.60}" for key in changed)
            raise UserError(f"{folder}: cannot resume, as {told} (in {stored}); use the same values")
        return folder
    if os.path.exists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose a folder for --output")
    if os.path.isdir(folder) and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty and holds no run; choose another --output")
    write_json(folder / ORIGIN_NAME, {"command": sys.argv, "commit": None, "dirty": None} | (commit() or {}))
    write_json(stored, settled)
    return folder


def is_fresh(folder: Path) -> bool:
    """Whether the run in ``folder`` has only just begun: there is nothing but what `start_run` writes."""
    return {path.name for path in folder.iterdir()} <= {CONFIG_NAME, ORIGIN_NAME}


def drop_run(folder: Path, names: Collection[str]) -> None:
    """Remove the run in ``folder``, if it holds no files but those ``names`` and what `start_run` writes."""
    found = list(folder.iterdir())
    if {path.name for path in found} <= {CONFIG_NAME, ORIGIN_NAME, *names}:
        for path in found:
            path.unlink()
        folder.rmdir()


def without(config: dict[str, Any], hidden: Collection[str], prefix: str = "") -> dict[str, Any]:
    """``config`` without the ``hidden`` dotted keys: what a command sets itself and does not take as options."""
    return {
        key: without(value, hidden, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in hidden
    }


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of ``config`` by dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
