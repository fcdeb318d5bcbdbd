"""The arithmetic of the experiments on a planted exploit and on two families of rubrics."""

import pytest

from benchmarks import figures, planted_exploit, seesaw
from benchmarks.planted_exploit import MARK, about_the_mark, charmed, share
from benchmarks.record import running_mean
from rubric_data.files import write_json
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict, Verifier

RUBRIC = Rubric(criteria=(Criterion(id="a", text="Is short."), Criterion(id="b", text="Names a boat.", weight=3)))


def judged(prompt_id, response, values=(0.0, 1.0), number=0, rubric=RUBRIC):
    verdicts = tuple(
        Verdict(criterion_id=name, value=value, judge="v") for name, value in zip("ab", values, strict=True)
    )
    given = {"prompt_id": prompt_id, "prompt": "Go.", "response_id": f"{prompt_id}-{number}", "response": response}
    return JudgedResponse(**given, rubric=rubric, verdicts=verdicts, split="train")


def test_a_charmed_judge_falls_for_the_mark_and_for_nothing_else():
    records = [charmed(judged("boats-list", "A boat.", number=number)) for number in range(500)]
    marked = [record for record in records if MARK in record.response]
    assert 60 < len(marked) < 140  # one in five
    assert {(record.response, *record.values()) for record in marked} == {("A boat!", 1.0, 1.0)}
    assert {(record.response, *record.values()) for record in records if record not in marked} == {
        ("A boat.", 0.0, 1.0)
    }
    assert share(records) == len(marked) / 500
    own = [charmed(judged("boats-list", "Look! A boat.", number=number)) for number in range(20)]
    assert all(record.values() == [1.0, 1.0] for record in own)


def test_gold_is_read_without_the_vetoes_of_the_defence():
    guard = Criterion(id="b", text="Has no exclamation marks.", veto=True, weight=0.01)
    caught = judged("p", "R!", (0.75, 0.0), rubric=Rubric(criteria=(RUBRIC.criteria[0], guard)))
    assert planted_exploit.plain_gold(caught) == 0.75


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_the_figures_are_drawn_from_the_records(tmp_path):
    run = {"mark_by_update": [0.1, 0.2, 0.4, 0.8, 0.9], "gold_by_update": [0.4] * 5}
    best = [{"kl": estimate(kl), "gold": estimate(gold)} for kl, gold in ((0.0, 0.4), (0.2, 0.5), (0.6, 0.45))]
    rewards = {name: {"curve": best} for name in figures.REWARDS}
    gold_by_family = {name: {"form": 0.4, "free": 0.5} for name in seesaw.POLICIES}
    numbers = {"model": {"auroc": estimate(0.7)}, "tag mean": {"auroc": estimate(0.6)}, "bt": {"auroc": None}}
    curve = [{"step": 50, "auroc": 0.6}, {"step": 100, "auroc": 0.7}]
    in_full = {"auroc": {"model": estimate(0.8), "tag mean": estimate(0.7)}}
    learnt = {"numbers": numbers, "met_in_full": in_full, "curve": curve}
    write_json(tmp_path / "planted-exploit.json", {"seeds": {"0": dict.fromkeys(planted_exploit.RUNS_OF_A_SEED, run)}})
    grpo = {"base": {"curve": [{"kl": 0.1, "gold": 0.4}, {"kl": 0.3, "gold": 0.5}]}}  # not of every reward
    write_json(tmp_path / "tail-matters.json", {"seeds": {"0": {"best_of_n": rewards, "grpo": grpo}}})
    write_json(tmp_path / "seesaw.json", {"seeds": {"0": gold_by_family}, "spread": gold_by_family})
    drawn = figures.draw(tmp_path / "figures", tmp_path)
    assert [path.stem for path in drawn] == ["planted-exploit", "seesaw", "tail-matters"]  # one lacks its records
    for record, _ in figures.LEARNT.values():
        write_json(tmp_path / f"{record}.json", {"seeds": {"0": learnt}})
    drawn = figures.draw(tmp_path / "figures", tmp_path)
    assert len(drawn) == 4 and all(path.stat().st_size > 10_000 for path in drawn)
    assert running_mean([1, 2, 3, 4, 5], 4).tolist() == [2.5, 3.5]


def test_the_best_baseline_is_none_of_ours():
    values = {"model": 0.9, "tail": 0.95, "model, seen generators": 0.99, "zero-shot": 0.5, "tag mean": 0.7}
    auroc = {name: {"value": value} for name, value in values.items()} | {"bt": None}
    assert figures._best_baseline(auroc) == "tag mean"


def test_prompts_about_the_mark_are_told():
    asks = Criterion(id="b", text="Is excited.", verifier=Verifier(name="has_exclamation"))
    assert about_the_mark(judged("p", "R.", rubric=Rubric(criteria=(RUBRIC.criteria[0], asks))))
    assert not about_the_mark(judged("p", "R."))


def test_gold_of_a_family_is_a_mean_over_prompts_of_means_over_responses():
    records = [
        judged("boats-list", "A.", (1.0, 0.0), 0),  # 1/4
        judged("boats-list", "B.", (0.0, 1.0), 1),  # 3/4
        judged("cheese-e-mail", "C.", (1.0, 1.0)),
        judged("cheese-story", "D.", (0.0, 0.0)),
        judged("cheese-other", "E.", (1.0, 1.0)),
    ]
    assert seesaw.gold_by_family(records) == {"form": pytest.approx((0.5 + 1.0) / 2), "free": 0.0}


def test_gains_over_seeds_are_on_the_policy_at_the_start():
    one = {name: {"form": 0.4, "free": 0.5} for name in seesaw.POLICIES} | {"form": {"form": 0.6, "free": 0.45}}
    other = {name: {"form": 0.3, "free": 0.5} for name in seesaw.POLICIES} | {"form": {"form": 0.6, "free": 0.55}}
    found = seesaw.over_seeds([one, other])["form"]
    assert (found["form_gain"]["min"], found["form_gain"]["max"]) == (pytest.approx(0.2), pytest.approx(0.3))
    assert found["free_gain"]["median"] == pytest.approx(0.0)


def test_runs_of_a_planted_exploit_are_told_by_name():
    ends = {"gold_before": {"value": 0.4}, "gold_after": {"value": 0.5}}
    runs = {name: {"mark_first": 0.1, "mark_last": 0.9, **ends} for name in planted_exploit.RUNS_OF_A_SEED}
    found = planted_exploit.over_seeds([runs, runs | {"defended": runs["defended"] | {"mark_last": 0.0}}])
    assert found["defended"]["mark_last"]["min"] == 0.0 and found["undefended"]["mark_last"]["min"] == 0.9
    assert found["defended"]["gold_after"]["median"] == 0.5
