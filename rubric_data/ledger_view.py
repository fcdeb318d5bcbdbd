"""Look at a ledger without touching it: what it holds, its rows as a file, whether it is sound and what it answers.

Writing verdicts is `rubric_data.ledger`. What models and data files said is shown as plain text, never as markup.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from rich.text import Text

from rubric_data.config import LedgerExportConfig, LedgerStatsConfig, LedgerVerifyConfig
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, refuse_existing
from rubric_data.io import load_data
from rubric_data.judges import is_unanswered, reason_kind
from rubric_data.ledger import COLUMNS, LedgerReader, verdict_key
from rubric_data.records import JudgedResponse, Verdict

_VOTERS = "SELECT judge, template, max(vote) + 1 FROM verdicts GROUP BY 1, 2 ORDER BY 1, 2"
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("judge", pa.string()),
        ("template", pa.string()),
        ("vote", pa.int64()),
        ("criterion_id", pa.string()),
        ("value", pa.float64()),
        ("masked", pa.string()),
        ("raw", pa.string()),
        ("created", pa.string()),
    ]
)
_ROWS_AT_ONCE = 10_000  # in memory, of a ledger that may hold millions
_KINDS = {"answered": "answered", "masked": "masked", "open": "not asked"}  # of a question to a judge, as told
_SHOWN = 10  # questions without an answer; the others are counted
_KEY = re.compile(r"[0-9a-f]{64}")

# --- stats -----------------------------------------------------------------------------------------------------------


def run_stats(config: LedgerStatsConfig) -> dict[str, Any]:
    """Show and return what ``config.ledger`` holds: its size in bytes, and numbers by judge and template.

    Raises UserError if a page of it is damaged, whether or not the numbers come from it.
    """
    with LedgerReader(config.ledger) as ledger:
        _check_pages(ledger, "quick_check")
        groups = statistics(ledger)
    size = Path(config.ledger).stat().st_size
    console = Console()
    for one in groups:
        _show_group(console, one)
    _say(console, f"{config.ledger}: {sum(one['verdicts'] for one in groups):,} verdicts, {size / 2**20:.1f} MiB")
    return {"bytes": size, "judges": groups}


def statistics(ledger: LedgerReader) -> list[dict[str, Any]]:
    """For each judge and template: ``verdicts`` (masked ones included), their ``mean``, number of ``votes``,

    ``masked`` and ``unanswered`` attempts by kind of reason, ``first`` and ``last`` time of either.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for table, kinds in (("verdicts", "masked"), ("attempts", "unanswered")):
        numbers = "count(*), avg(value), count(DISTINCT vote), min(created), max(created)"
        for judge, template, *found in ledger.select(f"SELECT judge, template, {numbers} FROM {table} GROUP BY 1, 2"):
            group = groups.setdefault((judge, template), _nothing(judge, template))
            if table == "verdicts":
                group |= dict(zip(("verdicts", "mean", "votes"), found[:3], strict=True))
            group["first"] = min(group["first"] or found[3], found[3])
            group["last"] = max(group["last"], found[4])
        reasons = f"SELECT judge, template, masked, count(*) FROM {table} WHERE masked IS NOT NULL GROUP BY 1, 2, 3"
        for judge, template, reason, count in ledger.select(reasons):
            counts, kind = groups[judge, template][kinds], reason_kind(reason)
            counts[kind] = counts.get(kind, 0) + count
    return [groups[identity] for identity in sorted(groups)]


def _show_group(console: Console, group: dict[str, Any]) -> None:
    """A block of lines for one judge and template, of whatever width its name is; nothing of what it has none of."""
    mean = "" if group["mean"] is None else f", mean {group['mean']:.3f}"
    votes = f", {group['votes']} votes a question" if group["votes"] > 1 else ""
    first, last = (group[name][:16].replace("T", " ") for name in ("first", "last"))
    told = {
        "template": group["template"][:8],
        "verdicts": f"{group['verdicts']:,}{mean}{votes}",
        "masked": _kinds(group["masked"]),
        "no answer": _kinds(group["unanswered"]),
        "written": f"{first} to {last} UTC" if first != last else f"{first} UTC",
    }
    _say(console, group["judge"])
    for name, value in told.items():
        if value:
            _say(console, f"  {name:9}  {value}")
    console.print()


def _nothing(judge: str, template: str) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "verdicts": 0,
        "mean": None,
        "votes": 0,
        "masked": {},
        "unanswered": {},
        "first": "",
        "last": "",
    }
    return {"judge": judge, "template": template, **numbers}


# --- export ----------------------------------------------------------------------------------------------------------


def run_export(config: LedgerExportConfig) -> dict[str, Any]:
    """Write the verdicts of ``config.ledger`` into ``config.output``, in the order they came; report their number."""
    output = Path(config.output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{output}: unknown file type {output.suffix!r}; use .jsonl or .parquet")
    refuse_existing(output, config.overwrite)
    with LedgerReader(config.ledger) as ledger:
        where, values = ("", ()) if config.judge is None else (" WHERE judge = ?", (config.judge,))
        ((total,),) = ledger.select(f"SELECT count(*) FROM verdicts{where}", *values)
        if config.judge is not None and not total:
            known = ", ".join(repr(name) for (name,) in ledger.select("SELECT DISTINCT judge FROM verdicts ORDER BY 1"))
            raise UserError(
                f"{config.ledger}: holds nothing by judge {config.judge!r}; it has {known or 'no verdicts'}"
            )
        rows = ledger.select(f"SELECT {COLUMNS} FROM verdicts{where} ORDER BY rowid", *values)
        with atomic_path(output) as path:
            (_write_parquet if output.suffix == ".parquet" else _write_jsonl)(path, _watched(rows, total, "exporting"))
    return {"verdicts": total, "output": str(output)}


def _write_jsonl(path: Path, rows: Iterable[tuple]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(zip(_SCHEMA.names, row, strict=True)), ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[tuple]) -> None:
    waiting = iter(rows)
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        while part := list(islice(waiting, _ROWS_AT_ONCE)):
            columns = [
                pa.array(column, kind) for column, kind in zip(zip(*part, strict=True), _SCHEMA.types, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))


# --- verify ----------------------------------------------------------------------------------------------------------


def run_verify(config: LedgerVerifyConfig) -> dict[str, Any]:
    """Check ``config.ledger``, and with ``config.data`` show which of its questions are answered, and by whom.

    Raises UserError naming the first fault of a ledger that is damaged.
    """
    records = [] if config.data is None else load_data(config.data)
    with LedgerReader(config.ledger) as ledger:
        rows = check(ledger)
        answers = [] if config.data is None else coverage(ledger, records)
    console = Console()
    counted = f"{rows['verdicts']:,} verdicts and {rows['attempts']:,} tries without an answer"
    _say(console, f"{config.ledger}: sound; holds {counted}, all of them checked")
    if config.data is None:
        return {**rows, "judges": []}
    for one in answers:
        _say(console, f"{one['judge']}, template {one['template'][:8]}, vote {one['vote']}")
        counts = (f"{name} {len(one[kind]):,}" for kind, name in _KINDS.items())
        _say(console, f"  {', '.join(counts)}")
    every = [(record.response_id, criterion.id) for record in records for criterion in record.rubric.criteria]
    had = {question for one in answers for kind in ("answered", "masked") for question in one[kind]}
    nobody = [question for question in every if question not in had]
    _say(console, f"{config.data}: {len(every):,} questions, {len(nobody):,} of them without a verdict by anybody")
    for response, criterion in nobody[:_SHOWN]:
        _say(console, f"  response {response!r}, criterion {criterion!r}")
    if len(nobody) > _SHOWN:
        _say(console, f"  and {len(nobody) - _SHOWN:,} more")
    return {**rows, "judges": answers, "questions": len(every), "unanswered": nobody}


def check(ledger: LedgerReader) -> dict[str, int]:
    """The number of rows by table, all of them checked. Raises UserError at the first fault.

    Checked are SQLite's own structures, tables and triggers, and each row: its key is 64 hex digits, its verdict one
    that `Verdict` accepts, and calls without an answer lie among the attempts and nowhere else.
    """
    _check_pages(ledger, "integrity_check")
    if faults := ledger.layout_faults():
        raise _damaged(ledger, f"{faults[0]} is not as this version makes it")
    rows = {}
    for table in ("verdicts", "attempts"):
        ((rows[table],),) = ledger.select(f"SELECT count(*) FROM {table}")
        every = ledger.select(f"SELECT rowid, {COLUMNS} FROM {table}")
        for number, *row in _watched(every, rows[table], f"checking {table}"):
            if fault := _fault(row, unanswered=table == "attempts"):
                raise _damaged(ledger, f"row {number} of {table}: {fault}")
    return rows


def _check_pages(ledger: LedgerReader, pragma: str) -> None:
    """SQLite's own check: `quick_check` of every page, `integrity_check` also of indices against their tables."""
    found = [row[0] for row in ledger.select(f"PRAGMA {pragma}(1)")]
    if found != ["ok"]:
        raise _damaged(ledger, str(found[0]))


def coverage(ledger: LedgerReader, records: list[JudgedResponse]) -> list[dict[str, Any]]:
    """For every judge, template and vote in ``ledger``: the questions of ``records`` that it ``answered``, ``masked``,

    or left ``open``, each as (response id, criterion id).
    """
    who = "SELECT judge, template, vote FROM verdicts UNION SELECT judge, template, vote FROM attempts ORDER BY 1, 2, 3"
    found = []
    for judge, template, vote in list(ledger.select(who)):
        keys = {
            (record.response_id, criterion.id): verdict_key(
                record.prompt, record.response, criterion, judge, template, vote
            )
            for record in records
            for criterion in record.rubric.criteria
        }
        verdicts = ledger.get_many(keys.values())
        one: dict[str, Any] = {"judge": judge, "template": template, "vote": vote}
        one |= {kind: [] for kind in _KINDS}
        for question, key in keys.items():
            verdict = verdicts.get(key)
            kind = "open" if verdict is None else "masked" if verdict.value is None else "answered"
            one[kind].append(question)
        found.append(one)
    return found


def votes_on(ledger: LedgerReader, records: Sequence[JudgedResponse]) -> list[np.ndarray]:
    """The votes of the judge that each verdict of ``records`` names: of each record (K, V), NaN where there is none.

    Masked votes are none. Of a judge with several templates, the one that answered most of these questions counts.
    """
    asked = [
        (row, place, criterion, verdict.judge)
        for row, record in enumerate(records)
        for place, criterion in enumerate(record.rubric.criteria)
        for verdict in record.verdicts
        if verdict.criterion_id == criterion.id
    ]
    best: dict[str, dict[tuple[int, int, int], float]] = {}
    for judge, template, number in list(ledger.select(_VOTERS)):
        keys = {
            (row, place, vote): verdict_key(
                records[row].prompt, records[row].response, criterion, judge, template, vote
            )
            for row, place, criterion, name in asked
            if name == judge
            for vote in range(number)
        }
        given = ledger.get_many(keys.values())
        values = {place: given[key].value for place, key in keys.items() if key in given}
        answered = {place: value for place, value in values.items() if value is not None}
        if len(answered) > len(best.get(judge, {})):
            best[judge] = answered
    most = max((vote + 1 for found in best.values() for _, _, vote in found), default=0)
    by_record = [np.full((len(record.rubric.criteria), most), np.nan) for record in records]
    for found in best.values():
        for (row, place, vote), value in found.items():
            by_record[row][place, vote] = value
    return by_record


def _fault(row: list[Any], *, unanswered: bool) -> str:
    """What is wrong with a row, "" if nothing is."""
    key, judge, _, vote, criterion_id, value, masked, *_ = row
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        return f"key must be 64 hex digits, got {str(key)[:80]!r}"
    if not isinstance(vote, int):
        return f"vote must be a whole number, got {vote!r}"
    fields = {"criterion_id": criterion_id, "value": value, "masked": masked, "judge": judge}
    try:
        verdict = Verdict.model_validate(fields, strict=True)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    if is_unanswered(verdict) != unanswered:
        return f"masked {str(masked)[:80]!r} belongs into the other table"
    return ""


def _damaged(ledger: LedgerReader, what: str) -> UserError:
    return UserError(f"{ledger.path}: is damaged ({what}); restore a copy, or choose another ledger file")


# --- what is shown ---------------------------------------------------------------------------------------------------


def _plain(text: str) -> Text:
    """Text of unknown origin: neither markup nor a terminal's control sequences."""
    return Text("".join(character if character.isprintable() else "\ufffd" for character in text))


def _say(console: Console, line: str) -> None:
    console.print(_plain(line), soft_wrap=True, highlight=False)


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))


def _watched(rows: Iterator[tuple], total: int, what: str) -> Iterable[tuple]:
    """``rows`` with progress on stderr where that is a terminal, gone once they are done."""
    console = Console(stderr=True)
    return track(rows, what, total=total, console=console, transient=True, disable=not console.is_terminal)
