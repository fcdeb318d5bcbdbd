"""Judged responses in files: JSONL and Parquet, both ways. Owns the file formats and what is said about bad files.

Prompts that nobody responded to yet are JSONL as well, one `PromptRecord` a line. JSONL of responses holds one
`JudgedResponse` a line, its rubric inline; where rubrics are still to come, one `Response`. Parquet holds one response
a row, and in the column ``criteria`` each criterion beside its verdict. What a record means is `rubric_data.records`.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from rubric_data.errors import UserError
from rubric_data.files import atomic_path, write_text
from rubric_data.records import Criterion, JudgedResponse, PromptRecord, Record, Response, Rubric, Verdict

R = TypeVar("R", bound=Record)
Answered = TypeVar("Answered", bound=Response)

BUILTIN = "builtin"
_SUFFIXES = (".jsonl", ".parquet")
_ADD_RUBRIC = "add it, or take the rubrics of a file of prompts by 'rubric-rm rubric attach'"

# Every struct field is always written, so Arrow has nothing to fill in; levels and verifiers are ragged by
# nature and travel as JSON text.
_CRITERION = pa.struct(
    [
        ("criterion_id", pa.string()),
        ("text", pa.string()),
        ("weight", pa.float64()),
        ("verdict", pa.float64()),
        ("human_verdict", pa.float64()),
        ("judge", pa.string()),
        ("masked", pa.string()),
        ("levels", pa.string()),
        ("veto", pa.bool_()),
        ("tags", pa.list_(pa.string())),
        ("verifier", pa.string()),
        ("count", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("response_id", pa.string()),
        ("model", pa.string()),
        ("response", pa.string()),
        ("criteria", pa.list_(_CRITERION)),
        ("source", pa.string()),
        ("split", pa.string()),
        ("licence", pa.string()),
        ("preference", pa.float64()),
    ]
)
_OPTIONAL = {"model", "source", "split", "licence", "preference"}
_OPTIONAL_OF_CRITERION = {"verdict", "human_verdict", "judge", "masked", "levels", "veto", "tags", "verifier", "count"}
_PARQUET_NAMES = {"id": "criterion_id", "value": "verdict", "human": "human_verdict", "generator": "model"}


def load_data(name: str | Path) -> list[JudgedResponse]:
    """The responses called ``name``: 'builtin', or the path of a .jsonl or .parquet file."""
    if str(name) == BUILTIN:
        from rubric_data.builtin import load_builtin

        return load_builtin()
    return read_judged(name)


def read_judged(path: str | Path) -> list[JudgedResponse]:
    """Every response in ``path`` (.jsonl or .parquet), in file order; equal rubrics are one object.

    From Parquet, verdicts come in the rubric's order. A human verdict without a judge's comes as a
    masked verdict. Raises UserError naming file, line or row, field and remedy.
    """
    return _read(Path(path), JudgedResponse)


def load_responses(name: str | Path) -> Sequence[Response]:
    """The responses that `load_data` reads, and those that have no rubric yet."""
    return load_data(name) if str(name) == BUILTIN else _read(Path(name), Response)


def _read(path: Path, kind: type[Answered]) -> list[Answered]:
    suffix = _existing(path)
    with _readable(path):
        placed = list(_read_jsonl(path, kind) if suffix == ".jsonl" else _read_parquet(path, kind))
    if not placed:
        raise UserError(f"{path}: holds no responses; give a file with at least one")
    _check_ids(placed)
    return [record for _, record in placed]


def load_prompts(name: str | Path) -> list[PromptRecord]:
    """The different prompts of a file of prompts (.jsonl), or of responses, in their order; some may have no rubric.

    Raises UserError on a bad file, and if one prompt_id stands for two texts or two rubrics.
    """
    if _holds_prompts(name):
        return _read_prompts(Path(name))
    return prompts_of(name, load_responses(name))


def load_prompts_and_responses(name: str | Path) -> tuple[list[PromptRecord], list[JudgedResponse]]:
    """What `load_prompts` finds, and the responses beside it, which have rubrics: none in a file of prompts."""
    if _holds_prompts(name):
        return _read_prompts(Path(name)), []
    responses = load_data(name)
    return prompts_of(name, responses), responses


def _holds_prompts(name: str | Path) -> bool:
    path = Path(name)
    return str(name) != BUILTIN and _existing(path) == ".jsonl" and not _holds_responses(path)


def _read_prompts(path: Path) -> list[PromptRecord]:
    with _readable(path):
        found = _different(_read_jsonl(path, PromptRecord))
    if not found:
        raise UserError(f"{path}: holds no prompts; give a file with at least one")
    return found


def prompts_of(name: str | Path, responses: Iterable[Response]) -> list[PromptRecord]:
    """The different prompts of ``responses``, which are those of the file ``name``. Raises UserError on a clash."""
    shared = PromptRecord.model_fields
    return _different(
        (f"{name}: response {record.response_id!r}", PromptRecord(**{key: getattr(record, key) for key in shared}))
        for record in responses
    )


def _different(placed: Iterable[tuple[str, PromptRecord]]) -> list[PromptRecord]:
    found: dict[str, PromptRecord] = {}
    for where, record in placed:
        first = found.setdefault(record.prompt_id, record)
        if (first.prompt, first.rubric) != (record.prompt, record.rubric):
            raise UserError(f"{where}: prompt_id {record.prompt_id!r} has another prompt or rubric before; rename it")
    return list(found.values())


def write_prompts(path: str | Path, records: Iterable[PromptRecord]) -> None:
    """Write ``records`` atomically, one a line."""
    write_text(path, "".join(record.model_dump_json() + "\n" for record in records))


def write_judged(path: str | Path, records: Iterable[JudgedResponse]) -> None:
    """Write ``records`` atomically as .jsonl or .parquet. Raises UserError as `read_judged`, or on none."""
    path, records = Path(path), list(records)
    suffix = _suffix(path)
    if not records:
        raise UserError(f"{path}: there are no responses to write; give at least one")
    _check_ids((f"{path}: response {record.response_id!r}", record) for record in records)
    if suffix == ".jsonl":
        write_text(path, "".join(record.model_dump_json() + "\n" for record in records))
        return
    table = pa.Table.from_pylist([_to_row(record) for record in records], schema=SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _suffix(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: unknown file type {path.suffix!r}; use .jsonl or .parquet")
    return path.suffix


def _existing(path: Path) -> str:
    """The suffix of a file that is there."""
    suffix = _suffix(path)
    if not os.path.isfile(path):  # not `Path.is_file`, which raises on a name that is too long
        raise UserError(f"{path}: no such file; give '{BUILTIN}' or the path of a .jsonl or .parquet file")
    return suffix


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}); check the file") from None


def _check_ids(placed: Iterable[tuple[str, Response]]) -> None:
    """Raise UserError at the first response_id that comes twice, and at the first prompt_id of a second text."""
    responses: dict[str, str] = {}
    prompts: dict[str, tuple[str, str]] = {}
    for where, record in placed:
        if record.response_id in responses:
            first = responses[record.response_id]
            raise UserError(f"{where}: response_id {record.response_id!r} was used before, at {first}; make it unique")
        responses[record.response_id] = where
        first, text = prompts.setdefault(record.prompt_id, (where, record.prompt))
        if text != record.prompt:
            raise UserError(
                f"{where}: prompt_id {record.prompt_id!r} has another prompt at {first}; give each prompt its own id"
            )


# --- JSONL ---------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, kind: type[R]) -> Iterator[tuple[str, R]]:
    pool = _RubricPool()
    for where, fields in read_lines(path):
        if isinstance(fields.get("rubric"), dict):
            fields["rubric"] = pool.intern(fields["rubric"], where, prefix=("rubric",))
        if issubclass(kind, Response):
            _check_answered(fields, where, with_rubric=kind is JudgedResponse)
        yield where, _build(kind, fields, where)


def _check_answered(fields: Mapping[str, Any], where: str, *, with_rubric: bool) -> None:
    """Raise UserError on a prompt in the place of a response, and where a rubric is wanted, on a lack of it."""
    if {"prompt_id", "prompt"} <= fields.keys() and not fields.keys() & {"response_id", "response"}:
        raise UserError(f"{where}: is a prompt without a response; give 'response_id' and 'response' with it")
    misspelt = difflib.get_close_matches("rubric", fields.keys() - {"rubric"}, n=1)
    if with_rubric and fields.get("rubric") is None and not misspelt:
        raise UserError(f"{where}: field rubric: is missing; {_ADD_RUBRIC}")


def read_lines(path: Path, *, half_characters: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on every line of a JSONL file that is not blank, with its place 'file:line'. Raises UserError.

    ``half_characters``: let those of `check_characters` pass; whoever asks for them has to replace them.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                fields = _parse_line(line, where)
                if not half_characters and b"\\ud" in line.lower():  # the only way to write one
                    check_characters(fields, where)
                yield where, fields


def _holds_responses(path: Path) -> bool:
    with _readable(path):
        return any("response" in fields or "response_id" in fields for _, fields in islice(read_lines(path), 1))


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError) and error.reason != "unexpected end of data":
            message = "not text in UTF-8; save the file as UTF-8"
        elif not line.endswith(b"\n"):  # every writer of JSONL ends its lines, so this one was cut
            message = "the last line is not complete JSON, the file seems cut off; copy it again or delete the line"
        elif isinstance(error, json.JSONDecodeError):
            message = f"not valid JSON ({error.msg}, column {error.colno}); write one JSON object a line"
        else:
            message = "not valid JSON in UTF-8; write one JSON object a line"
        raise UserError(f"{where}: {message}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: holds {_short(fields)}, not an object; write one JSON object a line")
    return fields


def check_characters(value: Any, where: str) -> None:
    """Raise UserError if a text within ``value`` holds half a character, which no file, ledger or model can hold."""
    try:
        json.dumps(value, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{where}: holds half a character ({half} without its other half); correct it") from None


# --- Parquet -------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, kind: type[Answered]) -> Iterator[tuple[str, Answered]]:
    pool = _RubricPool()
    for where, row in read_table(path, check=lambda schema: _check_columns(schema, str(path), kind)):
        yield where, _from_row(row, where, pool, kind)


def read_table(path: Path, *, check: Callable[[pa.Schema], None] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a Parquet file, with its place 'file: row n'; ``check`` may refuse its schema. Raises UserError."""
    try:
        with pq.ParquetFile(path) as file:
            if check is not None:
                check(file.schema_arrow)
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in _rows(batch, path, number):
                    number += 1
                    yield f"{path}: row {number}", row
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason}); copy or write it again") from None


def _rows(batch: pa.RecordBatch, path: Path, before: int) -> list[dict[str, Any]]:
    """The rows of ``batch``, which ``before`` rows of the file stand before. Raises UserError on what is no text."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            fault = f"{path}: row {before + 1}: not text in UTF-8 ({error.reason}, bytes {error.object[:20].hex(' ')})"
            raise UserError(f"{fault}; correct it") from None
        return [row for place in range(batch.num_rows) for row in _rows(batch.slice(place, 1), path, before + place)]


def _check_columns(schema: pa.Schema, name: str, kind: type[Response]) -> None:
    """Names only: what is in the columns is checked row by row, where a message can say the row."""
    if "criteria" not in schema.names and kind is JudgedResponse:
        found = f"the file has {', '.join(schema.names)}"
        raise UserError(f"{name}: column 'criteria' is missing; {found}; {_ADD_RUBRIC}")
    _check_names(schema.names, SCHEMA.names, _OPTIONAL | {"criteria"}, f"{name}: column")
    if "criteria" not in schema.names:
        return
    criteria = schema.field("criteria").type
    lists = pa.types.is_list(criteria) or pa.types.is_large_list(criteria)
    if not (lists and pa.types.is_struct(criteria.value_type)):
        raise UserError(f"{name}: column 'criteria' is {_short(criteria)}; it must be a list of structs")
    names = [field.name for field in criteria.value_type]
    known = [field.name for field in _CRITERION]
    _check_names(names, known, _OPTIONAL_OF_CRITERION, f"{name}: column 'criteria': field")


def _check_names(names: Sequence[str], known: Sequence[str], optional: set[str], where: str) -> None:
    for name in known:
        if name not in names and name not in optional:
            raise UserError(f"{where} {name!r} is missing; the file has {', '.join(names)}; add it")
    for name in names:
        if name not in known:
            raise UserError(f"{where} {name!r} is not known{_did_you_mean(name, known)}; drop or rename it")


def _from_row(row: dict[str, Any], where: str, pool: "_RubricPool", kind: type[Answered]) -> Answered:
    items = row.get("criteria")
    for index, item in enumerate(items or []):
        if item is None:
            raise UserError(f"{where}: field criteria.{index}: is null; drop it or fill it in")
    questions = [_question(item, where, index) for index, item in enumerate(items or [])]
    found = (_verdict(item, where, index) for index, item in enumerate(items or []))
    fields = {
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "response_id": row["response_id"],
        "response": row["response"],
        "rubric": None if items is None else pool.intern({"criteria": questions}, where, names=_PARQUET_NAMES),
        "verdicts": tuple(verdict for verdict in found if verdict is not None),
        "split": row.get("split"),
        "preference": row.get("preference"),
    }
    for column, field in (("model", "generator"), ("source", "source"), ("licence", "licence")):
        if row.get(column) is not None:
            fields[field] = row[column]
    if items is None and kind is JudgedResponse:
        raise UserError(f"{where}: column 'criteria' is null; {_ADD_RUBRIC}")
    return _build(kind, fields, where, names=_PARQUET_NAMES)


def _question(item: dict[str, Any], where: str, index: int) -> dict[str, Any]:
    """The criterion's own fields; a null in an optional one means that it is not there."""
    question = {"id": item["criterion_id"], "text": item["text"], "weight": item["weight"]}
    for name in ("veto", "tags"):
        if item.get(name) is not None:
            question[name] = item[name]
    for name in ("levels", "verifier"):
        if item.get(name) is not None:
            question[name] = _parse_cell(item[name], f"{where}: field criteria.{index}.{name}")
    return question


def _parse_cell(text: Any, where: str) -> Any:
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        raise UserError(f"{where}: must be JSON text, got {_short(text)}; correct it") from None
    if "\\ud" in text.lower():
        check_characters(value, where)
    return value


def _verdict(item: dict[str, Any], where: str, index: int) -> Verdict | None:
    value, masked, human = item.get("verdict"), item.get("masked"), item.get("human_verdict")
    if value is None and masked is None:
        if human is None:
            return None
        masked = "unjudged: the file has a human verdict only"
    fields = {
        "criterion_id": item["criterion_id"],
        "value": value,
        "masked": masked,
        "judge": item.get("judge") or "",
        "human": human,
    }
    if item.get("count") is not None:
        fields["count"] = item["count"]
    return _build(Verdict, fields, where, prefix=("criteria", index), names=_PARQUET_NAMES)


def _to_row(record: JudgedResponse) -> dict[str, Any]:
    verdicts = {verdict.criterion_id: verdict for verdict in record.verdicts}
    return {
        "prompt_id": record.prompt_id,
        "prompt": record.prompt,
        "response_id": record.response_id,
        "model": record.generator,
        "response": record.response,
        "criteria": [_to_struct(criterion, verdicts.get(criterion.id)) for criterion in record.rubric.criteria],
        "source": record.source,
        "split": record.split,
        "licence": record.licence,
        "preference": record.preference,
    }


def _to_struct(criterion: Criterion, verdict: Verdict | None) -> dict[str, Any]:
    levels = [level.model_dump() for level in criterion.levels]
    return {
        "criterion_id": criterion.id,
        "text": criterion.text,
        "weight": criterion.weight,
        "verdict": verdict.value if verdict else None,
        "human_verdict": verdict.human if verdict else None,
        "judge": verdict.judge if verdict else None,
        "masked": verdict.masked if verdict else None,
        "levels": json.dumps(levels, ensure_ascii=False) if levels else None,
        "veto": criterion.veto,
        "tags": list(criterion.tags),
        "verifier": criterion.verifier.model_dump_json() if criterion.verifier else None,
        "count": verdict.count if verdict else None,
    }


# --- records and what is wrong with them ---------------------------------------------------------------------


class _RubricPool:
    """One `Rubric` object for each content; a rubric written the same way twice is checked once."""

    def __init__(self) -> None:
        self._by_text: dict[str, Rubric] = {}
        self._by_id: dict[str, Rubric] = {}

    def intern(
        self,
        fields: dict[str, Any],
        where: str,
        *,
        prefix: tuple[str | int, ...] = (),
        names: Mapping[str, str] | None = None,
    ) -> Rubric:
        text = json.dumps(fields, sort_keys=True)
        if text not in self._by_text:
            rubric = _build(Rubric, fields, where, prefix=prefix, names=names)
            try:
                identity = rubric.id
            except ValueError:
                raise UserError(f"{where}: a verifier's args hold NaN or infinity; use finite numbers") from None
            self._by_text[text] = self._by_id.setdefault(identity, rubric)
        return self._by_text[text]


def _build(
    kind: type[R],
    fields: dict[str, Any],
    where: str,
    *,
    prefix: tuple[str | int, ...] = (),
    names: Mapping[str, str] | None = None,
) -> R:
    """A record from its fields. ``prefix`` and ``names`` turn a field of the record into its place in the file."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, prefix, names or {})}") from None


# what a file holds, by what pydantic says of the record that it becomes
_KINDS = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "an object"),
}


def explain(
    error: ValidationError, prefix: tuple[str | int, ...] = (), names: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The first thing wrong, as 'field a.2.b: what; remedy'."""
    problems = error.errors(include_url=False)
    first = problems[0]
    location = [names.get(str(part), str(part)) for part in (*prefix, *first["loc"])]
    field = f"field {'.'.join(location)}: " if location else ""
    if first["type"] == "missing":
        parent, name = first["loc"][:-1], str(first["loc"][-1])
        strangers = [
            str(problem["loc"][-1])
            for problem in problems
            if problem["type"] == "extra_forbidden" and problem["loc"][:-1] == parent
        ]
        near = difflib.get_close_matches(name, strangers, n=1)
        return f"{field}is missing; " + (f"rename {near[0]!r}" if near else "add it")
    if first["type"] == "extra_forbidden":
        return f"{field}is not known; remove or rename it"
    if first["type"] == "value_error":
        return f"{field}{first['ctx']['error']}; correct it"
    if first["type"] in _KINDS:
        return f"{field}must be {_KINDS[first['type']]}, got {_short(first['input'])}; correct it"
    problem = first["msg"].replace("Input should be", "must be")
    quoted = first["type"] == "float_type" and isinstance(first["input"], str)
    remedy = "write a number, without quotation marks" if quoted else "correct it"
    return f"{field}{problem}, got {_short(first['input'])}; {remedy}"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
