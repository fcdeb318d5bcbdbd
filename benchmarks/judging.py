"""What labelling costs beyond the judge: `python -m benchmarks.judging`, a minute and a half, or one claim by name.

Claims: client (calls in flight at a server that takes 200 ms for each, over the concurrency asked for, seen from the
server) and ledger (verdicts a second that two writing processes make visible to a third, each commit on the disk).
Every claim becomes benchmarks/results/judging-*.json; a table closes the run, and docs/performance.md quotes it.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.record import RESULTS, ROOT, quoted, table, write_record
from rubric_data.endpoint import Endpoint, Limits
from rubric_data.files import write_text
from rubric_data.labelling import label
from rubric_data.ledger import Entry, Ledger, LedgerReader
from rubric_data.openai_judge import OpenAIJudge
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

LATENCY = 0.2  # seconds
ROUNDS = 3
CRITERIA = 4
_SECONDS = 8.0  # that a round of the client takes at best
_BATCH = (
    200  # verdicts handed over at once: 50 responses, as a server at 64 calls in flight brings within a quarter second
)
_REPLY = json.dumps({"answers": [{"id": str(number), "met": True} for number in range(1, CRITERIA + 1)]})
_process = multiprocessing.get_context("spawn")  # a process of its own shares no interpreter lock with the client
_console = Console()


# --- client ----------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """What a server saw since it was asked last: seconds from the first request to the last reply, and in requests."""

    requests: int = 0
    busy: float = 0.0  # sum over requests of the seconds from its last byte read to its reply's last byte written
    first: float = 0.0
    last: float = 0.0

    @property
    def in_flight(self) -> float:
        """Mean number of requests in the server's hands."""
        return self.busy / (self.last - self.first)


def serve(pipe: Connection) -> None:
    """A chat endpoint that answers every request after `LATENCY`; tells its port, then what it saw when asked."""
    asyncio.run(_serve(pipe))


async def _serve(pipe: Connection) -> None:
    seen = Served()
    completion = {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": _REPLY}}]}
    body = json.dumps(completion | {"usage": {"prompt_tokens": 300, "completion_tokens": 40}}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    over = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = asked.partition(b"content-length:")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length))
                begin = time.monotonic()
                await asyncio.sleep(LATENCY)
                writer.write(head + body)
                await writer.drain()
                seen.first, seen.last = seen.first or begin, time.monotonic()
                seen.requests += 1
                seen.busy += seen.last - begin
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()

    def report() -> None:
        if pipe.recv() is None:
            over.set()
            return
        pipe.send(asdict(seen))
        seen.__init__()  # type: ignore[misc]

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
    asyncio.get_running_loop().add_reader(pipe.fileno(), report)
    pipe.send(server.sockets[0].getsockname()[1])
    await over.wait()


def in_flight(concurrency: int, seconds: float = _SECONDS) -> Callable[[str, Connection, Path], Served]:
    """A labelling run through ``label`` with a ledger, sized to take ``seconds`` at best."""

    def run(url: str, pipe: Connection, folder: Path) -> Served:
        judge = OpenAIJudge("m", Endpoint(url, limits=Limits(concurrency=concurrency)))
        responses = made_up(round(concurrency * seconds / LATENCY))
        with Ledger(folder / f"{time.monotonic_ns()}.sqlite") as ledger:
            _, report = label(responses, judge, ledger=ledger)
        if report.masked:
            raise RuntimeError(f"the server failed: {report.masked}")
        pipe.send("report")
        return Served(**pipe.recv())

    return run


def made_up(responses: int) -> list[JudgedResponse]:
    """Responses of a hundred words with `CRITERIA` criteria each."""
    rubric = Rubric(criteria=tuple(Criterion(id=f"c{n}", text=f"Keeps to rule {n}.") for n in range(CRITERIA)))
    return [
        JudgedResponse(
            prompt_id="p", prompt="Write.", response_id=f"r{n}", response=f"{n} " + "word " * 100, rubric=rubric
        )
        for n in range(responses)
    ]


def claim_client() -> None:
    """Requests in flight, as the server counts them, over the concurrency that the client was told to keep."""
    with _server() as (url, pipe), _folder() as folder:
        in_flight(8, seconds=1.0)(url, pipe, folder)  # warm
        for concurrency in (8, 32, 64):
            begin = time.process_time()
            runs = [in_flight(concurrency)(url, pipe, folder) for _ in range(ROUNDS)]
            each = (time.process_time() - begin) / sum(run.requests for run in runs)
            _recorded(
                f"client-{concurrency}",
                unit="requests in flight",
                samples=[run.in_flight for run in runs],
                baseline="asked for",
                baseline_samples=[concurrency],
                config={"latency": LATENCY, "criteria": CRITERIA, "requests": runs[0].requests, "target": "0.95"},
                notes=f"a call takes the client {1e3 * each:.1f} ms of CPU, verdicts and ledger included: one process "
                f"begins {1 / each:.0f} calls a second at most, and {concurrency / LATENCY:.0f} were asked for",
            )


@contextmanager
def _server() -> Iterator[tuple[str, Connection]]:
    ours, theirs = _process.Pipe()
    process = _process.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    os.environ["NO_PROXY"] = "127.0.0.1"
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1", ours
    finally:
        ours.send(None)
        process.join(5)


# --- ledger ----------------------------------------------------------------------------------------------------------


def write(path: str, name: str, batch: int) -> None:
    """Puts verdicts with replies of 300 characters into the ledger, ``batch`` at a time, until it is killed."""
    number = 0
    with Ledger(path) as ledger:
        while True:
            entries = []
            for _ in range(batch):
                number += 1
                key = sha256(f"{name} {number}".encode()).hexdigest()
                verdict = Verdict(criterion_id="c", value=number % 2, judge=name)
                entries.append(Entry(key, name, "t", 0, verdict, _REPLY.ljust(300)))
            ledger.put_many(entries)


def visible(path: Path, batch: int, seconds: int, writers: int = 2) -> list[float]:
    """Verdicts a second that become visible here while ``writers`` processes write, second by second."""
    Ledger(path).close()
    processes = [_process.Process(target=write, args=(str(path), f"w{n}", batch), daemon=True) for n in range(writers)]
    for process in processes:
        process.start()
    try:
        with LedgerReader(path) as ledger:
            while len(list(ledger.select("SELECT DISTINCT judge FROM verdicts"))) < writers:  # both are at work
                time.sleep(0.05)
            rates = []
            before, then = _rows(ledger), time.monotonic()
            for _ in range(seconds):
                time.sleep(1.0)
                rows, now = _rows(ledger), time.monotonic()
                rates.append((rows - before) / (now - then))
                before, then = rows, now
            return rates
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rows(ledger: LedgerReader) -> int:
    ((rows,),) = ledger.select("SELECT coalesce(max(rowid), 0) FROM verdicts")  # nothing is ever deleted: no gaps
    return rows


def claim_ledger() -> None:
    """Verdicts a second by two writers with full durability, beside a transaction for each verdict."""
    with _folder() as folder:
        many = visible(folder / "many.sqlite", _BATCH, seconds=8)
        single = visible(folder / "single.sqlite", 1, seconds=4)
        with Ledger(folder / "many.sqlite") as ledger:
            settings = {name: next(ledger.select(f"PRAGMA {name}"))[0] for name in ("journal_mode", "synchronous")}
    _recorded(
        "ledger",
        unit="verdicts / s",
        samples=many,
        baseline="a transaction for each verdict",
        baseline_samples=single,
        config={"writers": 2, "batch": _BATCH, **settings, "target": "5,000 / s"},
    )


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder beside the checkout's runs: /tmp may be memory, where flushing costs nothing."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        yield Path(folder)


# --- records ---------------------------------------------------------------------------------------------------------

CLAIMS: dict[str, Callable[[], None]] = {"client": claim_client, "ledger": claim_ledger}


def _recorded(name: str, **measured: Any) -> None:
    path = write_record(f"judging-{name}", **measured)
    record = json.loads(path.read_text(encoding="utf-8"))
    median, baseline = record["result"]["median"], record["baseline"]
    line = f"{name}: {median:.4g} {record['unit']}, {baseline['name']} {baseline['median']:.4g}"
    _console.print(f"{line}, ratio {record['ratio']:.3f}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help="which claims; all if none is named")
    for name in parser.parse_args().claims or CLAIMS:
        CLAIMS[name]()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("judging-*.json"))]
    rows = table(records)
    _console.print(rows, markup=False, highlight=False)
    page = ROOT / "docs" / "performance.md"
    write_text(page, quoted(page.read_text(encoding="utf-8"), "judging", rows))


if __name__ == "__main__":
    main()
