"""What a run has cost, over invocations and however they end, and the folder that a run without a reply leaves."""

import json
import time
from dataclasses import asdict

import pytest

from rubric_data import spending
from rubric_data.errors import UserError
from rubric_data.files import start_run
from rubric_data.spending import Spent, tallied

ONE = Spent(calls=3, retries=1, failed={"timeout": 1}, tokens_in=100, tokens_out=10, cost=0.5)
TWO = Spent(calls=2, failed={"timeout": 1, "rate_limit": 1}, tokens_in=50, tokens_out=5, unmetered=1)
BOTH = Spent(5, 1, {"rate_limit": 1, "timeout": 2}, 150, 15, 1, None)  # a part of the cost would pass for the whole


@pytest.fixture
def folder(tmp_path):
    return start_run(tmp_path / "run", {"data": "x"}, resume=False)


def kept(folder):
    return json.loads((folder / "spent.json").read_text())


def test_sums_by_hand():
    assert ONE + TWO == TWO + ONE == BOTH
    assert ONE + Spent(calls=1, cost=0.25) + Spent() == Spent(4, 1, {"timeout": 1}, 100, 10, 0, 0.75)
    assert Spent(4, 0, {"rate_limit": 2, "timeout": 2}, 100, 10, 2, None) == TWO + TWO  # no prices, no cost


def test_what_was_spent_in_words(folder):
    assert str(Spent()) == "0 calls, 0 tokens read, 0 written"
    assert str(ONE) == "3 calls, 1 of them failed, 100 tokens read, 10 written, cost 0.5"
    told = "2 calls, 2 of them failed, 50 tokens read, 5 written, 1 replies told no tokens"
    with tallied(folder, judge=lambda: TWO, code=lambda: None) as tally:
        assert tally.lines() == [f"spent on the judge: {told}"]
    with tallied(folder, judge=lambda: ONE) as tally:
        assert tally.lines() == [f"spent on the judge: {ONE}", f"spent on the judge, earlier runs included: {BOTH}"]


def test_invocations_add_up_also_those_that_end_badly(folder):
    with pytest.raises(KeyboardInterrupt), tallied(folder, judge=lambda: ONE):
        raise KeyboardInterrupt
    with tallied(folder, judge=lambda: TWO, code=lambda: None) as tally:
        assert tally.report("judge") == {"this_run": asdict(TWO), "total": asdict(BOTH)}
        assert tally.report("code") is None
    assert kept(folder) == {"judge": asdict(BOTH)}


def test_a_process_that_is_killed_has_written_what_it_used(folder, monkeypatch):
    monkeypatch.setattr(spending, "EVERY", 0.01)
    with tallied(folder, judge=lambda: ONE):
        deadline = time.monotonic() + 10
        while not (folder / "spent.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert kept(folder) == {"judge": asdict(ONE)}  # before the block ends


def test_a_new_run_without_any_reply_leaves_no_folder_but_any_other_stays(folder):
    def fails(spent, void=("l.sqlite",)):
        with pytest.raises(UserError, match="refused"), tallied(folder, void=void, judge=lambda: spent):
            (folder / "l.sqlite").touch()
            raise UserError("refused")
        return not folder.exists()

    assert fails(Spent(calls=2, failed={"rejected": 2}))
    start_run(folder, {}, resume=False)
    assert not fails(Spent(calls=2), void=())  # something else is in it
    assert not fails(Spent(calls=2))  # the run began earlier
    (folder / "l.sqlite").unlink()
    (folder / "spent.json").unlink()
    assert not fails(Spent(calls=1, unmetered=1)) and kept(folder)["judge"]["unmetered"] == 1


def test_a_run_that_pays_nobody_is_kept_and_keeps_no_count(folder):
    with pytest.raises(UserError), tallied(folder, judge=lambda: None):
        raise UserError("interrupted")
    assert folder.exists() and not (folder / "spent.json").exists()


def test_a_broken_count_is_told_of(folder):
    (folder / "spent.json").write_text('{"judge": {"call": 1}}')
    with pytest.raises(UserError, match=r"spent\.json: cannot be read .*; restore it, or delete it"), tallied(folder):
        pass
