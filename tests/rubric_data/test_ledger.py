import dataclasses
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rubric_data.errors import UserError
from rubric_data.ledger import Entry, Ledger, LedgerReader, verdict_key
from rubric_data.records import Criterion, Level, Verdict, Verifier

ROOT = Path(__file__).resolve().parents[2]


def entry(key, value=1.0, *, masked=None, criterion_id="c", raw=""):
    verdict = Verdict(criterion_id=criterion_id, value=None if masked else value, masked=masked, judge="j")
    return Entry(key, "j", "t", 0, verdict, raw)


def rows(path, table="verdicts"):
    with sqlite3.connect(path) as connection:
        return connection.execute(f"SELECT * FROM {table}").fetchall()


def python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


# --- keys ----------------------------------------------------------------------------------------------------

CRITERION = Criterion(id="c", text="Greets.")


def key(**changes):
    parts = {"prompt": "p", "response": "r", "criterion": CRITERION, "judge": "j", "template": "t", "vote": 0}
    return verdict_key(**(parts | changes))


def test_everything_that_decides_an_answer_is_in_the_key():
    levels = (Level(label="no"), Level(label="yes"))
    changes = [
        {},
        {"prompt": "p2"},
        {"response": "r2"},
        {"judge": "j2"},
        {"template": "t2"},
        {"vote": 1},
        {"prompt": "pr", "response": ""},
        {"criterion": Criterion(id="c", text="Greets!")},
        {"criterion": Criterion(id="c", text="Greets.", levels=levels)},
        {"criterion": Criterion(id="c", text="Greets.", verifier=Verifier(name="greets"))},
    ]
    keys = [key(**change) for change in changes]
    assert len(set(keys)) == len(changes)
    assert all(len(one) == 64 for one in keys)


def test_weight_id_and_tags_ask_nothing_anew():
    assert key(criterion=Criterion(id="d", text="Greets.", weight=3, veto=True, tags=("x",))) == key()


def test_key_is_pinned():
    # golden: a key that moves makes every verdict ever paid for unreachable
    assert key() == PINNED_KEY


PINNED_KEY = "7d96e10ffcde6cf5b31b521af6821054299e7b5b186506297ee4d70420a50f0f"


# --- one process ---------------------------------------------------------------------------------------------


def test_verdicts_come_back_and_survive_closing(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.put_many([entry("a", 0.1 + 0.2), entry("b", masked="parse_failure: \0 odd")])
    with Ledger(path) as ledger:
        assert ledger.get("a") == Verdict(criterion_id="c", value=0.1 + 0.2, judge="j")
        assert ledger.get("b") == Verdict(criterion_id="c", masked="parse_failure: \0 odd", judge="j")
        assert ledger.get("z") is None
        assert set(ledger.get_many(["a", "z", "b", "a"])) == {"a", "b"}


def test_more_keys_than_one_query_takes(tmp_path):
    names = [f"k{number}" for number in range(1203)]
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.put_many(entry(name, number / 1203) for number, name in enumerate(names))
        found = ledger.get_many(names)
        assert [found[name].value for name in names] == [number / 1203 for number in range(1203)]


def test_the_whole_row_is_kept_for_audit(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.put_many([entry("a", 0.5, raw="the reply")])
    (row,) = rows(tmp_path / "l.sqlite")
    assert row[:8] == ("a", "j", "t", 0, "c", 0.5, None, "the reply")
    assert row[8].startswith("20") and row[8].endswith("+00:00")


def test_the_first_verdict_stays(tmp_path):
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        ledger.put_many([entry("a", 1.0), entry("a", 0.0)])
        ledger.put_many([entry("a", 0.5)])
        assert ledger.get("a").value == 1.0
    with sqlite3.connect(path) as other:
        other.execute("INSERT OR REPLACE INTO verdicts VALUES ('a', 'j', 't', 0, 'c', 0.25, NULL, '', '')")
    assert [row[5] for row in rows(path)] == [1.0]


@pytest.mark.parametrize("table", ["verdicts", "attempts"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET vote = 7", "DELETE FROM {}"])
def test_nothing_can_be_changed_or_removed(tmp_path, table, statement):
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        ledger.put_many([entry("a"), entry("b", masked="timeout: late")])
    with sqlite3.connect(path) as other, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute(statement.format(table))
    assert len(rows(path, table)) == 1 and rows(path, table)[0][3] == 0


@pytest.mark.parametrize("kind", ["timeout", "connection", "rate_limit", "server_error", "rejected"])
def test_a_call_without_an_answer_is_recorded_but_not_kept_as_one(tmp_path, kind):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.put_many([entry("a", masked=f"{kind}: x")])
        ledger.put_many([entry("a", masked=f"{kind}: y")])
        assert ledger.get("a") is None
        ledger.put_many([entry("a", 0.5)])
        assert ledger.get("a").value == 0.5
    assert [row[6] for row in rows(tmp_path / "l.sqlite", "attempts")] == [f"{kind}: x", f"{kind}: y"]


def test_a_batch_goes_in_whole_or_not_at_all(tmp_path):
    def interrupted():
        yield entry("a")
        raise KeyboardInterrupt

    with Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(KeyboardInterrupt):
            ledger.put_many(interrupted())
        with pytest.raises(UserError, match="NOT NULL"):
            ledger.put_many([entry("b"), dataclasses.replace(entry("c"), template=None), entry("d")])
        ledger.put_many([entry("e")])
        assert set(ledger.get_many("abcde")) == {"e"}


# --- bad files -----------------------------------------------------------------------------------------------


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "l.sqlite"
    path.write_text("verdicts, surely\n" * 100)
    with pytest.raises(UserError, match=r"^\S+l\.sqlite: is not a ledger \(not a SQLite file\); choose"):
        Ledger(path)
    assert path.read_text() == "verdicts, surely\n" * 100


def test_another_programs_database_is_left_alone(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE verdicts (x)")
    with pytest.raises(UserError, match="another program's database"):
        Ledger(path)
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_path_that_cannot_be_opened(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "l.sqlite"):
        with pytest.raises(UserError, match=r"is a folder; give the ledger's file|cannot be"):
            Ledger(path)


def test_a_missing_folder_is_not_made(tmp_path):
    path = tmp_path / "rusn" / "l.sqlite"
    with pytest.raises(UserError, match=r"there is no folder .*rusn; correct the path, or make the folder"):
        Ledger(path)
    assert not path.parent.exists()


# --- reading alone ---------------------------------------------------------------------------------------------------


def test_a_reader_makes_nothing_and_cannot_write(tmp_path):
    for path in (tmp_path / "none.sqlite", tmp_path / "no" / "folder.sqlite"):
        with pytest.raises(UserError, match="no such file; give a ledger"):
            LedgerReader(path)
    assert not list(tmp_path.iterdir())
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        ledger.put_many([entry("a")])
    before = path.read_bytes()
    with LedgerReader(path) as reader:
        assert reader.get("a").value == 1.0
        with pytest.raises(UserError, match="readonly"):
            list(reader.select("INSERT INTO verdicts SELECT * FROM attempts"))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "verdicts, surely\n" * 100])
def test_a_reader_refuses_what_is_no_ledger(tmp_path, text):
    path = tmp_path / "l.sqlite"
    path.write_text(text)
    with pytest.raises(UserError, match=r"not a ledger|is empty, so it is no ledger"):
        LedgerReader(path)
    assert path.read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_a_reader_sees_what_an_open_writer_has_put(tmp_path):
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger, LedgerReader(path) as reader:
        ledger.put_many([entry("a")])
        assert reader.get("a").value == 1.0


# --- several processes ---------------------------------------------------------------------------------------

HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN " + sys.argv[2])
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("made_before", [True, False])
def test_a_ledger_locked_by_another_process(tmp_path, made_before):
    path = tmp_path / "l.sqlite"
    if made_before:
        Ledger(path).close()
    holder = python(HOLD, path, "EXCLUSIVE")
    try:
        assert holder.stdout.readline() == "locked\n"
        start = time.monotonic()
        with pytest.raises(UserError) as caught, Ledger(path, busy_timeout=0.3) as ledger:
            ledger.put_many([entry("a")])
        assert 0.25 < time.monotonic() - start < 5
    finally:
        holder.kill()
        holder.communicate()
    assert str(caught.value) == (
        f"{path}: locked by another process for more than 0.3 s; stop that process or wait, then run again"
    )
    with Ledger(path, busy_timeout=0.3) as ledger:
        ledger.put_many([entry("a")])


WRITE = """
import sys
from rubric_data.ledger import Entry, Ledger
from rubric_data.records import Verdict
path, name, value, count = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
with Ledger(path) as ledger:
    for number in range(count):
        verdict = Verdict(criterion_id="c", value=value, judge=name)
        entries = [Entry(f"{name}-{number}", name, "t", 0, verdict), Entry(f"both-{number}", name, "t", 0, verdict)]
        ledger.put_many(entries)
        print(number, flush=True)
"""


def test_rows_that_were_acknowledged_survive_kill_9(tmp_path):
    path = tmp_path / "l.sqlite"
    writer = python(WRITE, path, "w", 0.5, 10**9)
    acknowledged = [writer.stdout.readline() for _ in range(50)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += writer.communicate()[0].splitlines()
    assert writer.returncode == -signal.SIGKILL
    numbers = [int(line) for line in acknowledged if line.strip()]
    with Ledger(path) as ledger:
        found = ledger.get_many([f"w-{number}" for number in numbers])
        assert len(found) == len(numbers) >= 50
        ledger.put_many([entry("after")])
    with sqlite3.connect(path) as check:
        assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_writers_at_once(tmp_path):
    path = tmp_path / "l.sqlite"
    writers = [python(WRITE, path, name, value, 100) for name, value in (("a", 0.25), ("b", 0.75))]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    by_key = {row[0]: row for row in rows(path)}
    assert len(by_key) == 300
    # whoever came first, the row is whole: judge and value belong together
    assert {(row[1], row[5]) for row in by_key.values()} <= {("a", 0.25), ("b", 0.75)}
    with sqlite3.connect(path) as check:
        assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
