import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy import cli
from rubric_data.ablation import ablate, centred_correlation, leave_out
from rubric_data.arrays import JudgedArrays
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

NAN = math.nan
A, B, C = (Criterion(id=name, text=f"Is {name}.", weight=weight) for name, weight in (("a", 2.0), ("b", 1), ("c", -1)))


def response(name, values, *, prompt="p", preference=None, human=None, criteria=(A, B, C)):
    verdicts = [
        Verdict(criterion_id=c.id, value=v, human=h)
        for c, v, h in zip(criteria, values, human or [None] * len(values), strict=True)
    ]
    return JudgedResponse(
        prompt_id=prompt,
        prompt=prompt,
        response_id=name,
        response=name,
        rubric=Rubric(criteria=criteria),
        preference=preference,
        verdicts=tuple(verdicts),
    )


def test_leaving_out_by_hand():
    # two prompts; with: .5 over .25, and a tie of .5; without: .25 over .5, and .75 over .5
    with_B, without_B = np.array([0.5, 0.25, 0.5, 0.5]), np.array([0.25, 0.5, 0.75, 0.5])
    prompt_B, value_B = np.array([0, 0, 1, 1]), np.array([1.0, 0.0, 0.0, NAN])
    preference = np.array([2.0, 1.0, 1.0, 0.0])
    row = leave_out(with_B, without_B, value_B, prompt_B, {"preference": preference, "human": np.full(4, NAN)})
    assert row["reward_change"] == pytest.approx(0.1875)  # .25 three times, 0 once
    assert row["reordered"] == 1.0
    assert row["top_ties"] == {"with": 0.5, "without": 0.0, "change": -0.5}
    assert row["discrimination"] == {"with": 0.125, "without": 0.25, "change": 0.125}
    # with: one right, one tie, 1.5 / 2; without: one wrong, one right
    assert row["pair_accuracy"] == {"preference": {"pairs": 2, "with": 0.75, "without": 0.5, "change": -0.25}}
    # in prompt 0 verdicts +-.5 against rewards -+.125; prompt 1 has one verdict and adds nothing
    assert row["redundancy"] == -1.0


def test_what_is_undefined_is_null():
    row = leave_out(np.array([0.5]), np.array([0.5]), np.array([1.0]), np.array([0]), {"human": np.array([1.0])})
    assert row["reordered"] is None and row["redundancy"] is None and row["pair_accuracy"] == {}
    assert row["top_ties"] == {"with": None, "without": None, "change": None}


def test_a_file_by_hand():
    # rewards (2 a + b - c) / 3; people put x above y above z
    records = [
        response("x", [1.0, 0.0, 0.0], preference=3, human=[1.0, 1.0, 0.0]),  # 2/3; without a, b, c: 0, 1, 2/3
        response("y", [0.0, 1.0, 0.0], preference=2),  # 1/3; 1, 0, 1/3
        response("z", [1.0, 1.0, 1.0], preference=1, human=[0.0, 0.0, 0.0]),  # 2/3; 0, 1/2, 1
    ]
    rows = {row["text"]: row for row in ablate(JudgedArrays.of(records))}
    # pairs xy, xz, yz: right, tie, wrong; without a: wrong, tie, right; without b: right, right, wrong;
    # without c: right, wrong, wrong
    accuracy = {text: row["pair_accuracy"]["preference"] for text, row in rows.items()}
    assert {text: round(one["without"], 3) for text, one in accuracy.items()} == {
        "Is b.": 0.667, "Is a.": 0.5, "Is c.": 0.333,
    }  # fmt: skip
    assert list(rows) == ["Is b.", "Is a.", "Is c."]  # the worst, whose absence people like best, comes first
    assert all(one["with"] == 0.5 and one["pairs"] == 3 for one in accuracy.values())
    assert rows["Is a."]["pair_accuracy"]["human"] == {"pairs": 1, "with": 0.5, "without": 0.5, "change": 0.0}
    assert rows["Is b."]["top_ties"] == {"with": 1.0, "without": 0.0, "change": -1.0}
    assert rows["Is b."]["discrimination"]["without"] == 0.5
    assert rows["Is c."]["pitfall"] and rows["Is c."]["mean_verdict"] == pytest.approx(1 / 3, abs=1e-6)
    assert rows["Is a."]["redundancy"] == pytest.approx(-1.0)  # a is 1, 0, 1 where the rest is 0, 1, 0


def test_a_criterion_without_which_nothing_is_left_is_counted():
    only = (A,)
    records = [response(name, [value], criteria=only) for name, value in (("x", 1.0), ("y", 0.0))]
    (row,) = ablate(JudgedArrays.of(records))
    assert (row["responses"], row["unrewarded_without"], row["reward_change"]) == (0, 2, None)


def test_what_changes_nothing_comes_last_and_what_people_know_nothing_of_behind_the_others():
    """People prefer what lacks a, and say nothing of c to e: d is met by nobody, e asked of one response alone."""
    c, d, e = (Criterion(id=name, text=f"Is {name}.") for name in "cde")
    asked = [response(f"p{n}", [float(n), 1.0], criteria=(A, B), preference=-float(n)) for n in range(2)]
    others = [response(f"q{n}", [float(n), 0.0], prompt="q", criteria=(c, d)) for n in range(2)]
    rows = ablate(JudgedArrays.of([*asked, *others, response("r", [1.0, 1.0], prompt="r", criteria=(A, e))]))
    assert [row["text"] for row in rows] == ["Is a.", "Is b.", "Is d.", "Is c.", "Is e."]
    assert rows[1]["discrimination"]["change"] == pytest.approx(1 / 3, abs=1e-6)  # 2/3 with b, 1 without


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2)), min_size=1, max_size=20))
def test_correlation_is_that_of_the_centred_columns_and_never_more_than_one(rows):
    first, second, prompt = (np.array(column) for column in zip(*rows, strict=True))
    found = centred_correlation(first, second, prompt)
    shifted = centred_correlation(first + prompt, second - 3 * prompt, prompt)
    assert math.isnan(found) or abs(found) <= 1 + 1e-9
    if not math.isnan(found) and np.ptp(first) > 1e-3 and np.ptp(second) > 1e-3 and not math.isnan(shifted):
        a = first - np.array([first[prompt == p].mean() for p in prompt])
        b = second - np.array([second[prompt == p].mean() for p in prompt])
        if min(np.abs(a).max(), np.abs(b).max()) > 1e-3:
            assert found == pytest.approx(shifted, abs=1e-6)
            assert found == pytest.approx((a @ b) / np.sqrt((a @ a) * (b @ b)), abs=1e-9)


def test_the_command_writes_the_report_and_prints_the_worst_first(tmp_path, capsys):
    records = [
        response(f"{p}{n}", [float(n % 2), float(p % 2), float(n < 2)], prompt=f"p{p}")
        for p in range(3)
        for n in range(4)
    ]
    write_judged(tmp_path / "in.parquet", records)
    run = tmp_path / "run"
    assert cli.main(["rubric", "ablate", "--data", str(tmp_path / "in.parquet"), "--output", str(run)]) == 0
    report = json.loads((run / "ablation.json").read_text())
    assert (report["responses"], report["prompts"], report["criteria"]) == (12, 3, 3)
    assert report["pair_accuracy"] == {"preference": None, "human": None}
    # a tells 2 of 4 apart and the pitfall one of those: rewards in a prompt 1/3 steps with one best, so no tie
    assert report["top_ties"] == 0.0
    out = capsys.readouterr().out
    shown = [line.split(".")[0].strip() for line in out.splitlines() if line.strip().startswith("Is ")]
    assert shown == [row["text"].rstrip(".") for row in report["by_criterion"]]


def test_embedded_data_can_be_looked_at(tmp_path):
    assert cli.main(["rubric", "ablate", "--config", "rubric-ablate", "--output", str(tmp_path / "run")]) == 0
