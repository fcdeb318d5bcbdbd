"""The ledger of verdicts: one SQLite file, append-only, found by content. Knows no judge and no batches.

Table ``verdicts`` holds one row for each key, the first that was written; ``attempts`` holds the calls that
brought no answer, which are kept for the record and asked again. Any number of processes may read and write.
Reports and exports are `rubric_data.ledger_view`.
"""

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from rubric_data.errors import UserError
from rubric_data.judges import is_unanswered
from rubric_data.records import Criterion, Verdict, content_hash

_APPLICATION_ID = 0x52524D31  # marks the file as a ledger of this layout
COLUMNS = "key, judge, template, vote, criterion_id, value, masked, raw, created"
_TYPES = (
    "judge TEXT NOT NULL, template TEXT NOT NULL, vote INTEGER NOT NULL, criterion_id TEXT NOT NULL, "
    "value REAL, masked TEXT, raw TEXT NOT NULL, created TEXT NOT NULL, CHECK ((value IS NULL) <> (masked IS NULL))"
)
_SETUP = (
    f"CREATE TABLE verdicts (key TEXT PRIMARY KEY NOT NULL, {_TYPES})",
    f"CREATE TABLE attempts (key TEXT NOT NULL, {_TYPES})",
    *(
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for table in ("verdicts", "attempts")
        for verb in ("UPDATE", "DELETE")
    ),
    # Here, not in the INSERT, so that INSERT OR REPLACE cannot slip past the DELETE trigger either
    "CREATE TRIGGER verdicts_first_wins BEFORE INSERT ON verdicts "
    "WHEN EXISTS (SELECT 1 FROM verdicts WHERE key = NEW.key) BEGIN SELECT RAISE(IGNORE); END",
    f"PRAGMA application_id = {_APPLICATION_ID}",
)
LEDGER = "ledger.sqlite"  # its usual name, in a run folder
FILES = frozenset({LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm"})  # it and its log
_KEYS_PER_QUERY = 500  # below SQLite's oldest limit on parameters


@dataclass(frozen=True)
class Entry:
    """One verdict on its way into the ledger. ``raw`` is the judge's reply, for audit."""

    key: str
    judge: str
    template: str
    vote: int
    verdict: Verdict
    raw: str = ""


def verdict_key(prompt: str, response: str, criterion: Criterion, judge: str, template: str, vote: int) -> str:
    """Content hash of one question to one judge, 64 hex digits.

    Of the criterion only what decides the answer counts (text, levels, verifier): another weight or id
    asks nothing anew.
    """
    question = criterion.model_dump(include={"text", "levels", "verifier"})
    return content_hash([prompt, response, question, judge, template, vote])


class LedgerReader:
    """A ledger opened to be read: a missing file stays missing, and one that is there unchanged.

    Use it as a context manager, from one thread. ``busy_timeout``: seconds to wait while another process has the file
    to itself. Raises UserError if it waits longer, if the file is no ledger, or if it cannot be opened.
    """

    def __init__(self, path: str | Path, *, busy_timeout: float = 30.0) -> None:
        self.path = Path(path)
        self._busy_timeout = busy_timeout
        if not self.path.exists():
            raise UserError(f"{path}: no such file; give a ledger, such as {LEDGER} in the folder of a run")
        _check_kind(self.path)
        if not self.path.stat().st_size:
            raise UserError(f"{path}: is empty, so it is no ledger; give another file, or delete this one")
        with self._explained():
            self._connection = self._opened_to_read()
            if self._pragma("application_id") != _APPLICATION_ID:
                self._connection.close()
                raise UserError(f"{path}: is another program's database; give a ledger")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; whatever was put is on the disk already."""
        self._connection.close()

    def select(self, query: str, *values: str | int) -> Iterator[tuple]:
        """The rows of an SQL query, one by one, as they were when it began."""
        with self._explained():
            for row in self._connection.execute(query, values):  # noqa: UP028 - it would close what the ledger closed
                yield row

    def layout_faults(self) -> list[str]:
        """Tables and triggers that are not as this version makes them, by name; empty in a sound ledger."""
        listing = "SELECT type || ' ' || name, sql FROM sqlite_master"
        made = sqlite3.connect(":memory:")
        for statement in _SETUP:
            made.execute(statement)
        wanted, found = dict(made.execute(listing).fetchall()), dict(self.select(listing))
        made.close()
        return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name, "") != found.get(name, ""))

    def get(self, key: str) -> Verdict | None:
        """The verdict under ``key``, or None if it was never answered."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The verdicts under ``keys``; a key that was never answered is left out."""
        found: dict[str, Verdict] = {}
        wanted = iter(dict.fromkeys(keys))
        while chunk := list(islice(wanted, _KEYS_PER_QUERY)):
            marks = ", ".join("?" * len(chunk))
            query = f"SELECT key, criterion_id, value, masked, judge FROM verdicts WHERE key IN ({marks})"
            with self._explained():
                rows = self._connection.execute(query, chunk).fetchall()
            for key, criterion_id, value, masked, judge in rows:
                found[key] = Verdict(criterion_id=criterion_id, value=value, masked=masked, judge=judge)
        return found

    def _opened_to_read(self) -> sqlite3.Connection:
        """A connection that writes nothing.

        Beside a log that somebody else left or writes, SQLite's own read-only mode. Without one that mode would leave
        the log's empty files behind; a connection that could write but does not takes them away with it. Where even
        these cannot be made nobody writes, and the file alone is the ledger.
        """
        has_log = self.path.with_name(f"{self.path.name}-wal").exists()
        modes = ["mode=ro"] if has_log else ["mode=rw", "mode=ro&immutable=1"]
        for mode in modes:
            connection = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?{mode}", uri=True, timeout=self._busy_timeout, isolation_level=None
            )
            try:
                connection.execute("PRAGMA query_only = ON")
                connection.execute("SELECT count(*) FROM sqlite_master")
                return connection
            except sqlite3.Error as error:
                connection.close()
                if mode == modes[-1] or _code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                    raise
        raise AssertionError("the last mode returns or raises")

    def _pragma(self, name: str) -> int:
        return self._connection.execute(f"PRAGMA {name}").fetchone()[0]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What SQLite raises, in one line that says what to do."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened ({error.strerror}); choose another ledger file") from None
        except sqlite3.ProgrammingError:
            raise  # the ledger is closed or used from another thread: a mistake in the code, not in the file
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: {_remedy(error, self._busy_timeout)}") from None


class Ledger(LedgerReader):
    """A ledger opened to be read and written; made if there is none, in a folder that exists.

    Otherwise as `LedgerReader`.
    """

    def __init__(self, path: str | Path, *, busy_timeout: float = 30.0) -> None:
        self.path = Path(path)
        self._busy_timeout = busy_timeout
        check_folder(path)
        with self._explained():
            self._connection = sqlite3.connect(self.path, timeout=busy_timeout, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def put_many(self, entries: Iterable[Entry]) -> None:
        """Append ``entries`` in one transaction; on return they survive a crash.

        The first verdict under a key stays, a later one is dropped. Verdicts that mean "no answer came"
        (`rubric_data.judges.UNANSWERED`) go to the attempts, where `get` does not look.
        """
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows: dict[bool, list[tuple]] = {False: [], True: []}
        for entry in entries:
            verdict = entry.verdict
            identity = (entry.key, entry.judge, entry.template, entry.vote, verdict.criterion_id)
            row = (*identity, verdict.value, verdict.masked, entry.raw, created)
            rows[is_unanswered(verdict)].append(row)
        marks = ", ".join("?" * (COLUMNS.count(",") + 1))
        with self._explained(), self._transaction():
            for table, unanswered in (("verdicts", False), ("attempts", True)):
                # not INSERT OR IGNORE, which would also swallow a row that is unfit
                statement = f"INSERT INTO {table} ({COLUMNS}) VALUES ({marks})"
                self._connection.executemany(statement, rows[unanswered])

    def _prepare(self) -> None:
        if self._pragma("application_id") == _APPLICATION_ID:
            self._use_wal()
            return
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        # asked again: another process may have made the ledger since the first look
        if tables and self._pragma("application_id") != _APPLICATION_ID:
            raise UserError(f"{self.path}: is another program's database; choose another ledger file")
        self._use_wal()
        with self._transaction():
            if self._pragma("application_id") != _APPLICATION_ID:
                for statement in _SETUP:
                    self._connection.execute(statement)

    def _use_wal(self) -> None:
        """Write-ahead log, flushed at every commit. SQLite does not wait for the switch, so this does."""
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)
        self._connection.execute("PRAGMA synchronous = FULL")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def check_folder(path: str | Path) -> None:
    """Raise UserError unless a ledger can lie at ``path``.

    A missing folder is not made: more likely than a new ledger it is a slip in the path of one that holds verdicts,
    and an empty one in its place would have every question paid for again.
    """
    _check_kind(Path(path))
    folder = Path(path).parent
    if not folder.is_dir():
        raise UserError(f"{path}: cannot be opened, there is no folder {folder}; correct the path, or make the folder")


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the ledger's file, such as {path / LEDGER}")


def _is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _remedy(error: sqlite3.Error, busy_timeout: float) -> str:
    if _is_busy(error):
        return f"locked by another process for more than {busy_timeout:g} s; stop that process or wait, then run again"
    if _code(error) == sqlite3.SQLITE_NOTADB:
        return "is not a ledger (not a SQLite file); choose another ledger file"
    if _code(error) == sqlite3.SQLITE_CORRUPT:
        return "is damaged; restore a copy, or choose another ledger file"
    return f"cannot be used ({error}); check the file, the folder and the space on the disk"
