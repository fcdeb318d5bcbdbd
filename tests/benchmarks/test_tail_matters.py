import numpy as np
import pytest

from benchmarks import tail_matters
from benchmarks.tail_matters import best_of_n, best_row, judge_calls, over_seeds, read_log
from rubric_data.records import Criterion, JudgedResponse, Rubric

RUBRIC = Rubric(criteria=(Criterion(id="a", text="Is good."),))


def test_a_log_is_read_by_means_of_five_updates():
    gold = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.1, 0.0]
    rows = [{"kl": float(step), "reward/gold": one, "reward/proxy": 0.5} for step, one in enumerate(gold)]
    found = read_log(rows)
    assert [point["gold"] for point in found["curve"]] == pytest.approx([0.3, 0.4, 0.38, 0.32])
    assert found["peak"] == {"kl": 3.0, "gold": pytest.approx(0.4), "proxy": 0.5}
    assert found["last"]["kl"] == 5.0
    assert found["gold_at_kl"] == {"0.5": 0.3, "1.0": 0.3, "2.0": 0.3, "4.0": 0.38, "8.0": None}
    assert len(read_log(rows[:2])["curve"]) == 1  # shorter than the mean


def test_judge_calls_are_counted_until_the_judge_s_own_run_is_as_good():
    by_judge = {"curve": [{"gold": 0.4}, {"gold": 0.52}, {"gold": 0.7}], "smooth": 5, "criteria": 7.5}
    found = judge_calls({"peak": {"gold": 0.5}}, by_judge, 1440)
    assert found == {"in_the_loop": 720, "distilled": 1440, "runs_to_repay": 2.0}  # 6 updates of 16 responses
    assert judge_calls({"peak": {"gold": 0.9}}, by_judge, 1440)["in_the_loop"] is None


def test_a_reward_that_is_wrong_at_the_top_turns_where_gold_goes_on_rising(monkeypatch):
    monkeypatch.setattr(tail_matters, "BOOTSTRAP", 50)
    chance = np.random.default_rng(0)
    records, gold = [], []
    for prompt in range(12):
        for number in range(64):
            quantile = chance.random()
            gold.append(quantile)
            one = {"prompt_id": f"p{prompt}", "prompt": f"Prompt {prompt}.", "response_id": f"p{prompt}-{number}"}
            records.append(JudgedResponse(**one, response="R.", rubric=RUBRIC))
    wrong = np.where(np.array(gold) > 0.9, 2 - np.array(gold), gold)
    found = best_of_n(records, {"gold": np.array(gold), "wrong": wrong})
    assert best_row(found["gold"]["curve"])["n"] == 64
    best = best_row(found["wrong"]["curve"])
    assert best["n"] < 64 and found["wrong"]["curve"][-1]["gold"]["value"] == pytest.approx(
        0.9135, abs=0.015
    )  # the least of .9 to 1
    assert found["gold"]["forecast"]["outcome"] == "rises"

    both = over_seeds({"0": {"best_of_n": found}, "1": {"best_of_n": found}})
    assert both["wrong"]["best_of_n"]["n_of_highest_gold"]["median"] == best["n"]
    assert both["gold"]["best_of_n"]["gold_at_largest_n"]["n"] == 2
