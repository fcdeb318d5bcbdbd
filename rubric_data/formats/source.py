"""Rows from anywhere: a .jsonl, .json, .parquet or .yaml file, or a dataset of the Hugging Face hub. Knows no format.

Single files are read here and not by `datasets.load_dataset`: that one asks a server to count the download even of
a local file, guesses one type for each column (a date becomes a timestamp), and cannot say which line is at fault.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rubric_data.errors import UserError
from rubric_data.formats.base import Placed
from rubric_data.io import check_characters, read_lines, read_table

Unfold = Callable[[dict[str, Any], str], list[Placed]]

_DOCUMENTS = (".json", ".yaml", ".yml")
_FILES = (".jsonl", ".parquet", *_DOCUMENTS)
_NEVER_HUB = (*_FILES, ".arrow", ".csv", ".gz", ".tsv", ".txt", ".zip")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_dataset(name: str) -> bool:
    """Whether ``name`` is for `datasets`: a folder in the layout of the hub, or an owner/name that is no local path."""
    path = Path(name)
    if os.path.exists(path):
        return path.is_dir()
    local = path.suffix in _NEVER_HUB or os.path.exists(path.parent) or not _HUB_ID.fullmatch(name)
    return not local


def read_rows(
    name: str, *, unfold: Unfold | None = None, subset: str | None = None, hub_split: str | None = None
) -> Iterator[Placed]:
    """Every row of ``name``, with its place for messages.

    ``unfold`` takes the rows out of a document (.json, .yaml) that is one object and no list. ``subset`` and
    ``hub_split`` choose among those of a dataset; all splits are read by default. A local path never goes to the
    network. Raises UserError if there are no rows, or they cannot be read.
    """
    if is_dataset(name):
        yield from _from_datasets(name, subset, hub_split)
        return
    for option, value in (("subset", subset), ("hub_split", hub_split)):
        if value is not None:
            raise UserError(f"{option}: {name} is a file and has none; leave it out")
    path = Path(name)
    if not os.path.isfile(path):
        raise UserError(f"{name}: no such file; give one, or a dataset of the hub as owner/name")
    if path.suffix not in _FILES:
        raise UserError(f"{name}: unknown file type {path.suffix!r}; use one of {', '.join(_FILES)}")
    try:
        if path.suffix in _DOCUMENTS:
            for where, row in _from_document(path, unfold):
                check_characters(row, where)
                yield where, row
        else:
            yield from (read_lines if path.suffix == ".jsonl" else read_table)(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None


def _from_document(path: Path, unfold: Unfold | None) -> Iterator[Placed]:
    content = _parse(path)
    if isinstance(content, dict) and unfold is not None:
        yield from unfold(content, str(path))
        return
    if not isinstance(content, list):
        raise UserError(f"{path}: holds one {_kind(content)}, not a list of rows; write '[row, ...]' or JSONL")
    for number, row in enumerate(content, start=1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: is one {_kind(row)}, not an object; correct it")
        yield where, row


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not valid JSON ({error.msg}, {place}); correct it, or name the file .jsonl") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path}: broken {path.suffix[1:].upper()}{where}; correct it") from None


def _kind(value: Any) -> str:
    return {dict: "object", str: "text", type(None): "null"}.get(type(value), type(value).__name__)


def _from_datasets(name: str, subset: str | None, hub_split: str | None) -> Iterator[Placed]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=hub_split)
    except Exception as error:  # of the hub, the network, the files: they come in classes of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if os.path.isdir(name):
            advice = "give a file of it, or a folder in the layout of the hub, and check --subset and --hub_split"
            raise UserError(f"{name}: cannot be loaded as a dataset ({reason}); {advice}") from None
        raise UserError(
            f"{name}: no local file, and as a dataset it cannot be loaded ({reason}); check the name, the network, "
            "--subset and --hub_split"
        ) from None
    splits = loaded if isinstance(loaded, dict) else {hub_split: loaded}
    for split, rows in splits.items():
        for number, row in enumerate(rows, start=1):
            yield f"{name} [{split}]: row {number}", dict(row)
