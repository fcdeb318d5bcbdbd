"""Which format rows look like: for a hint, where the format that was named does not fit them."""

from collections.abc import Iterator, Mapping
from typing import Any

from rubric_data.errors import UserError
from rubric_data.formats import FORMATS, OWN
from rubric_data.formats.base import SkipRow, read_row
from rubric_data.formats.source import is_dataset, read_rows


def guess_format(row: Mapping[str, Any]) -> str | None:
    """The format in which ``row`` has a prompt and a rubric; None if there is none."""
    if {"prompt_id", "prompt"} <= row.keys() and ("response_id" in row or _is_own_rubric(row.get("rubric"))):
        return OWN
    for name in sorted(FORMATS, key=lambda name: name == "preferences"):  # the others have pairs beside more
        try:
            if read_row(FORMATS[name], row, "").rubric is not None:
                return name
        except (UserError, SkipRow):
            continue
    return None


def _is_own_rubric(rubric: Any) -> bool:
    return isinstance(rubric, Mapping) and "criteria" in rubric


def first_rows(name: str) -> Iterator[dict[str, Any]]:
    """The first row of the file ``name``, for each way to take it out of a document; none of what is no file."""
    if is_dataset(name):
        return
    for unfold in dict.fromkeys(form.unfold for form in FORMATS.values()):
        try:
            yield next(read_rows(name, unfold=unfold))[1]
        except (UserError, StopIteration):
            continue
