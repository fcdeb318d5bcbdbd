"""What calls have used: the sum of one invocation, and of all that worked on one run folder. Calls nobody.

Budgets and prices are `rubric_data.endpoint`; a judge that has a ``spent`` is a `rubric_data.judges.PaidJudge`.
"""

import json
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rubric_data.errors import UserError
from rubric_data.files import drop_run, is_fresh, write_json

FILE = "spent.json"  # in a run folder: what all invocations have used, by who was paid
EVERY = 2.0  # seconds between two looks; what a killed process used since the last is not in the file


@dataclass
class Spent:
    """What was used so far. ``cost`` is None without prices; ``unmetered`` replies told no usage.

    ``calls`` are tries; those that brought no reply are in ``failed``, by kind of reason.
    """

    calls: int = 0
    retries: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    tokens_in: int = 0
    tokens_out: int = 0
    unmetered: int = 0
    cost: float | None = None

    def __add__(self, other: "Spent") -> "Spent":
        """Both together; a cost only if the prices of both were known, as a part of it would pass for the whole."""
        kinds = sorted(self.failed.keys() | other.failed.keys())
        costs = [one.cost for one in (self, other) if one.cost is not None or one.brought_replies]
        return Spent(
            calls=self.calls + other.calls,
            retries=self.retries + other.retries,
            failed={kind: self.failed.get(kind, 0) + other.failed.get(kind, 0) for kind in kinds},
            tokens_in=self.tokens_in + other.tokens_in,
            tokens_out=self.tokens_out + other.tokens_out,
            unmetered=self.unmetered + other.unmetered,
            cost=None if None in costs or not costs else sum(cost for cost in costs if cost is not None),
        )

    @property
    def brought_replies(self) -> bool:
        """Whether any call did."""
        return bool(self.tokens_in or self.tokens_out or self.unmetered)

    def __str__(self) -> str:
        """In words, for a terminal: "13 calls, 2 of them failed, 1,200 tokens read, 300 written, cost 0.25"."""
        failed = sum(self.failed.values())
        parts = (
            (self.calls == 1, "1 call"),
            (self.calls != 1, f"{self.calls:,} calls"),
            (failed, f"{failed:,} of them failed"),
            (True, f"{self.tokens_in:,} tokens read, {self.tokens_out:,} written"),
            (self.unmetered, f"{self.unmetered:,} replies told no tokens"),
            (self.cost is not None, f"cost {self.cost or 0:.4g}"),
        )
        return ", ".join(words for said, words in parts if said)


class Tally:
    """What each of ``sources`` has used in this invocation and in those before, kept in `FILE` of ``folder``.

    A source tells what it has used so far in this invocation; None if it costs nothing. Raises UserError if the file
    of an earlier invocation cannot be read.
    """

    def __init__(self, folder: Path, sources: dict[str, Callable[[], Spent | None]]) -> None:
        self._path = folder / FILE
        self._sources = sources
        self._before = read_spent(folder)
        self._kept = dict(self._before)

    def total(self) -> dict[str, Spent]:
        """What every source that costs something has used in all."""
        now = {name: source() for name, source in self._sources.items()}
        return {name: spent + self._before.get(name, Spent()) for name, spent in now.items() if spent is not None}

    def report(self, name: str) -> dict[str, dict[str, Any]] | None:
        """``this_run``, what the source ``name`` has used in this invocation, and ``total``; None if it is free."""
        spent = self._sources[name]()
        return None if spent is None else {"this_run": asdict(spent), "total": asdict(self.total()[name])}

    def lines(self) -> list[str]:
        """For a terminal, a line for each source that costs something; two where there were invocations before."""
        found = []
        for name, spent in self.total().items():
            before = self._before.get(name)
            found += [f"spent on the {name}: {self._sources[name]()}"] if before else []
            found.append(f"spent on the {name}{', earlier runs included' if before else ''}: {spent}")
        return found

    def keep(self) -> None:
        """Write the file, if there is anything new to write. Raises UserError if it cannot be written."""
        total = self.total()
        if total != self._kept:
            write_json(self._path, {name: asdict(spent) for name, spent in total.items()})
            self._kept = total


@contextmanager
def tallied(folder: Path, *, void: Collection[str] = (), **sources: Callable[[], Spent | None]) -> Iterator[Tally]:
    """A `Tally` of a run that `rubric_data.files.start_run` began, kept until the block ends, however it ends.

    A new run that fails before one paid call brought a reply leaves no folder to be in the way of the next try, as
    long as it holds nothing but files named in ``void``, which are then worth nothing.
    """
    fresh = is_fresh(folder)
    tally = Tally(folder, sources)
    over = threading.Event()
    watch = threading.Thread(target=_keep_on, args=(tally, over), name="tally", daemon=True)
    watch.start()
    try:
        try:
            yield tally
        finally:
            over.set()
            watch.join()
    except BaseException:
        with suppress(Exception):  # the first error is the one to tell; Ray may be gone with all its numbers
            total = tally.total()
            if fresh and total and not any(spent.brought_replies for spent in total.values()):
                drop_run(folder, {*void, FILE})
            else:
                tally.keep()
        raise
    tally.keep()


def _keep_on(tally: Tally, over: threading.Event) -> None:
    while not over.wait(EVERY):
        with suppress(Exception):  # the end of the run tries once more, and tells
            tally.keep()


def read_spent(folder: Path) -> dict[str, Spent]:
    """What all invocations on ``folder`` have used, by source. Raises UserError if the file cannot be read."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        return {name: Spent(**fields) for name, fields in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or delete it to count from here on") from None
