"""Reports on a ledger, through the command line, on ledgers that hold hand-made rows."""

import json
import re
import sqlite3

import numpy as np
import pyarrow.parquet as pq
import pytest

from policy import cli
from rubric_data.config import LedgerStatsConfig, LedgerVerifyConfig
from rubric_data.io import write_judged
from rubric_data.ledger import Entry, Ledger, LedgerReader, verdict_key
from rubric_data.ledger_view import coverage, run_stats, run_verify, statistics, votes_on
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict, content_hash

RUBRIC = Rubric(criteria=(Criterion(id="a", text="Is a."), Criterion(id="b", text="Is b.")))
RECORDS = [
    JudgedResponse(prompt_id="p", prompt="p", response_id=name, response=f"text {name}", rubric=RUBRIC)
    for name in ("one", "two")
]
MARKUP = "[bold red]x[/] \x1b[31m"


def entry(response, criterion, value=None, masked=None, *, judge="j", vote=0, raw="raw"):
    record = RECORDS[response]
    key = verdict_key(record.prompt, record.response, RUBRIC.criteria[criterion], judge, "t", vote)
    verdict = Verdict(criterion_id=RUBRIC.criteria[criterion].id, value=value, masked=masked, judge=judge)
    return Entry(key, judge, "t", vote, verdict, raw)


@pytest.fixture
def path(tmp_path):
    """A ledger with four verdicts by "j" (one masked), two votes, two calls without an answer; one by another judge."""
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.put_many([entry(0, 0, 0.25), entry(0, 1, 1.0), entry(1, 0, masked="parse_failure: odd")])
        ledger.put_many([entry(0, 0, 0.5, vote=1), entry(1, 1, masked="timeout: late")])
        ledger.put_many([entry(1, 1, masked="timeout: later"), entry(0, 0, 1.0, judge=MARKUP, raw="ä\u2028\0")])
    return tmp_path / "l.sqlite"


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_statistics_by_judge_and_template(path):
    with LedgerReader(path) as ledger:
        other, one = statistics(ledger)
    assert one.pop("first") <= one.pop("last")
    assert one == {
        "judge": "j",
        "template": "t",
        "verdicts": 4,
        "mean": pytest.approx((0.25 + 1 + 0.5) / 3),
        "votes": 2,
        "masked": {"parse_failure": 1},
        "unanswered": {"timeout": 2},
    }
    assert (other["judge"], other["verdicts"], other["unanswered"]) == (MARKUP, 1, {})


def test_what_a_judge_is_called_is_shown_as_it_is_and_controls_no_terminal(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    report = run_stats(LedgerStatsConfig(str(path)))
    shown = capsys.readouterr().out
    assert "[bold red]x[/] \ufffd[31m" in shown and "\x1b" not in shown
    assert "parse_failure 1" in shown and "timeout 2" in shown and "0.583" in shown
    assert report["bytes"] == path.stat().st_size


def test_an_empty_ledger_has_nothing_to_show(tmp_path, capsys):
    Ledger(tmp_path / "l.sqlite").close()
    assert run(capsys, "ledger", "stats", "--ledger", tmp_path / "l.sqlite")[0] == 0
    assert run(capsys, "ledger", "verify", "--ledger", tmp_path / "l.sqlite")[0] == 0
    for name in ("v.jsonl", "v.parquet"):
        assert run(capsys, "ledger", "export", "--ledger", tmp_path / "l.sqlite", "--output", tmp_path / name)[0] == 0
    assert (tmp_path / "v.jsonl").read_text() == ""
    assert pq.read_table(tmp_path / "v.parquet").num_rows == 0


def test_an_export_holds_every_row_in_either_form(path, tmp_path, capsys):
    for name in ("v.jsonl", "v.parquet"):
        code, out, _ = run(capsys, "ledger", "export", "--ledger", path, "--output", tmp_path / name)
        assert code == 0 and "verdicts: 5" in out
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text(encoding="utf-8").split("\n") if line]
    with sqlite3.connect(path) as opened:
        names = [row[1] for row in opened.execute("PRAGMA table_info(verdicts)")]
        rows = [dict(zip(names, row, strict=True)) for row in opened.execute("SELECT * FROM verdicts")]
    assert lines == rows == pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert list(lines[0]) == names and lines[4]["raw"] == "ä\u2028\0"


def test_an_export_of_one_judge(path, tmp_path, capsys):
    export = ("ledger", "export", "--ledger", path, "--output", tmp_path / "v.jsonl", "--judge")
    assert run(capsys, *export, "j")[0] == 0
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 4
    assert run(capsys, *export, "j") == (
        2,
        ANY,
        f"rubric-rm: error: {tmp_path}/v.jsonl: exists already; choose another --output, or add --overwrite true\n",
    )
    code, _, err = run(capsys, *export, "k", "--overwrite", "true")
    assert code == 2 and "holds nothing by judge 'k'; it has '[bold" in err
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 4


class _Any:
    def __eq__(self, other):
        return True


ANY = _Any()


def test_which_questions_are_answered_by_whom(path, tmp_path, capsys):
    write_judged(tmp_path / "data.jsonl", RECORDS)
    report = run_verify(LedgerVerifyConfig(str(path), str(tmp_path / "data.jsonl")))
    assert (report["verdicts"], report["attempts"], report["questions"]) == (5, 2, 4)
    assert report["unanswered"] == [("two", "b")]
    shown = capsys.readouterr().out
    assert "4 questions, 1 of them" in shown and "response 'two', criterion 'b'" in shown
    with LedgerReader(path) as ledger:
        _, first, second = coverage(ledger, RECORDS)
    assert (first["judge"], first["vote"]) == ("j", 0)
    assert first["answered"] == [("one", "a"), ("one", "b")]
    assert first["masked"] == [("two", "a")] and first["open"] == [("two", "b")]
    assert (second["vote"], second["answered"]) == (1, [("one", "a")])


DAMAGE = [
    ("DROP TRIGGER verdicts_no_update", "trigger verdicts_no_update is not as this version makes it"),
    ("CREATE INDEX extra ON verdicts (judge)", "index extra is not as this version makes it"),
    ("INSERT INTO verdicts VALUES ('ABC', 'j', 't', 0, 'c', 1, NULL, '', '')", "row 6 of verdicts: key must be 64 hex"),
    (
        f"INSERT INTO verdicts VALUES ('{'a' * 64}', 'j', 't', 0, 'c', 1.5, NULL, '', '')",
        "row 6 of verdicts: verdict on 'c': value must lie in [0, 1], got 1.5",
    ),
    (
        f"INSERT INTO verdicts VALUES ('{'a' * 64}', 'j', 't', 0, 'c', 'high', NULL, '', '')",
        "row 6 of verdicts: Input should be a valid number",
    ),
    (
        f"INSERT INTO verdicts VALUES ('{'a' * 64}', 'j', 't', 'x', 'c', 1.0, NULL, '', '')",
        "row 6 of verdicts: vote must be a whole number, got 'x'",
    ),
    (
        f"INSERT INTO verdicts VALUES ('{'a' * 64}', 'j', 't', 0, 'c', NULL, 'timeout: late', '', '')",
        "row 6 of verdicts: masked 'timeout: late' belongs into the other table",
    ),
]


@pytest.mark.parametrize(("statement", "said"), DAMAGE)
def test_a_damaged_ledger_is_one_line_and_exit_2(path, capsys, statement, said):
    with sqlite3.connect(path) as opened:
        opened.execute(statement)
    code, out, err = run(capsys, "ledger", "verify", "--ledger", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"rubric-rm: error: {path}: is damaged ({said}") and err.count("\n") == 1


@pytest.mark.parametrize("command", ["stats", "verify"])
def test_overwritten_pages_are_damage(path, capsys, command):
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096 * 3)
    code, _, err = run(capsys, "ledger", command, "--ledger", path)
    assert code == 2 and "is damaged" in err and err.count("\n") == 1


def test_whatever_page_is_overwritten_stats_tells(tmp_path, capsys):
    path = tmp_path / "l.sqlite"
    verdict = Verdict(criterion_id="c", value=1.0, judge="j")
    with Ledger(path) as ledger:  # tables, an index and long replies, of several pages each
        ledger.put_many(
            Entry(content_hash(n), "j", "t", 0, verdict, "raw " * (2_000 if n % 20 == 0 else 2)) for n in range(200)
        )
    sound = path.read_bytes()
    pages = len(sound) // 4096
    assert pages > 20
    for page in range(pages):
        path.write_bytes(sound[: page * 4096] + b"\xff" * 4096 + sound[(page + 1) * 4096 :])
        code, out, err = run(capsys, "ledger", "stats", "--ledger", path)
        assert (code, out, err.count("\n")) == (2, "", 1), f"page {page}"
        assert err.startswith(f"rubric-rm: error: {path}: is ")


def test_a_report_fits_a_narrow_terminal(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "ledger", "stats", "--ledger", path)
    times = r"\d{4}-\d\d-\d\d \d\d:\d\d( to \S+ \S+)? UTC"
    blocks = (
        r"\[bold red\]x\[/\] \ufffd\[31m\n  template   t\n  verdicts   1, mean 1\.000\n"
        rf"  written    {times}\n\n"
        r"j\n  template   t\n  verdicts   4, mean 0\.583, 2 votes a question\n  masked     parse_failure 1\n"
        rf"  no answer  timeout 2\n  written    {times}\n\n"
    )
    assert re.match(blocks, out)


@pytest.mark.parametrize("command", ["stats", "verify"])
def test_a_folder_and_an_empty_file_are_no_ledgers(tmp_path, capsys, command):
    (tmp_path / "empty.sqlite").touch()
    for name, said in (
        ("", f"is a folder; give the ledger's file, such as {tmp_path}/ledger.sqlite"),
        ("empty.sqlite", "is empty"),
    ):
        code, _, err = run(capsys, "ledger", command, "--ledger", tmp_path / name)
        assert code == 2 and said in err and err.count("\n") == 1


def test_a_missing_ledger_stays_missing(tmp_path, capsys):
    for command in ("stats", "verify"):
        code, _, err = run(capsys, "ledger", command, "--ledger", tmp_path / "no" / "l.sqlite")
        assert code == 2 and "no such file" in err
    assert not list(tmp_path.iterdir())


def test_votes_are_those_of_the_judge_a_verdict_names(path):
    with Ledger(path) as ledger:  # an older template, with fewer answers
        key = verdict_key("p", "text two", RUBRIC.criteria[0], "j", "old", 0)
        ledger.put_many([Entry(key, "j", "old", 0, Verdict(criterion_id="a", value=1.0, judge="j"), "raw")])
    named = [(Verdict(criterion_id="b", value=1, judge="j"), Verdict(criterion_id="a", value=0.4, judge="j")), ()]
    asked = [record.model_copy(update={"verdicts": row}) for record, row in zip(RECORDS, named, strict=True)]
    with LedgerReader(path) as ledger:
        first, second = votes_on(ledger, asked)
        nobody = votes_on(ledger, RECORDS)
    # criterion a twice, b once; the second response names no judge
    np.testing.assert_equal(first, [[0.25, 0.5], [1.0, np.nan]])
    assert second.shape == (2, 2) and np.isnan(second).all()
    assert [row.shape for row in nobody] == [(2, 0), (2, 0)]
