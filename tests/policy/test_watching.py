"""The judge in the loop: when it is asked, what is logged, and a planted decline of gold through a whole run."""

import json

import pytest
import torch
from peft import load_peft_weights

from policy import stage
from policy.cli import main
from policy.prompts import RubricPrompt
from policy.watching import GoldFell, GoldWatch, is_due, planned_looks
from rm.scorer import RubricScorer
from rubric_data.judges import masked_verdicts
from rubric_data.records import Criterion, Rubric, Verdict
from tests.policy.fruit import rollout, write_fruit

pytest.importorskip("trl.experimental.ppo", reason="needs TRL with PPO")
RUBRIC = Rubric(criteria=(Criterion(id="tone", text="is friendly"),))


class FallingJudge:
    """Says yes to everything for ``calls`` calls, and no from then on; None stands for a failed call."""

    name, template = "falling", "1"

    def __init__(self, calls, then=0.0):
        self.left, self.then, self.asked = calls, then, 0

    def judge(self, requests):
        self.left -= 1
        self.asked += len(requests)
        return [self._verdicts(request, 1.0 if self.left >= 0 else self.then) for request in requests]

    def _verdicts(self, request, value):
        if value is None:
            return masked_verdicts(request.criteria, "timeout", "no reply", judge=self.name)
        return tuple(Verdict(criterion_id=one.id, value=value, judge=self.name) for one in request.criteria)


class Kept:
    """In the place of `BestAdapter`: what was asked of it."""

    def __init__(self):
        self.calls = []

    def remember(self):
        pass

    def keep(self, step):
        self.calls.append(step)

    def save(self, folder):
        pass

    def take(self, folder):
        pass

    def restore(self):
        self.calls.append("restored")


def batch(reward=0.5):
    return [rollout(RubricPrompt(f"p{number}", "Say it.", RUBRIC), "Yes.", reward) for number in range(16)]


class Nowhere:
    """In the place of `JudgedRollouts`: keeps nothing."""

    def add(self, step, rollouts, verdicts):
        assert len(rollouts) == len(verdicts)


def watch(judge, *, steps=8, sample=8, looks=8, on_alarm="warn"):
    kept = Kept()
    return GoldWatch(judge, kept, Nowhere(), steps=steps, sample=sample, looks=looks, on_alarm=on_alarm, seed=0), kept


def test_a_budget_buys_looks_that_are_spread_evenly():
    assert [planned_looks(14, 16, budget) for budget in (None, 999, 64, 16)] == [14, 14, 4, 1]
    assert [step for step in range(1, 15) if is_due(step, 4, 14)] == [4, 7, 11, 14]
    assert [step for step in range(1, 5) if is_due(step, 4, 4)] == [1, 2, 3, 4]
    assert [step for step in range(1, 15) if is_due(step, 1, 14)] == [14]


def test_a_look_is_judged_on_its_sample_and_an_update_between_looks_is_not():
    judge = FallingJudge(99)
    watched, kept = watch(judge, looks=4)
    empty = watched.look(1, batch())
    assert judge.asked == 0
    assert empty == {
        "reward/gold": None,
        "reward/gold_low": None,
        "reward/gold_high": None,
        "reward/divergence": None,
        "reward/judged": 0,
        "reward/judge_failed": 0,
        "best_step": None,
        "alarm": None,
    }
    row = watched.look(2, batch())
    assert judge.asked == row["reward/judged"] == 8
    assert row["reward/gold"] == pytest.approx(1.0)
    assert row["reward/divergence"] == pytest.approx(-0.5)
    assert row["best_step"] == 2 and kept.calls == [2]


def test_failed_calls_are_counted_and_never_read_as_a_decline():
    watched, kept = watch(FallingJudge(4, then=None), on_alarm="stop")
    rows = [watched.look(step, batch()) for step in range(1, 9)]
    assert [row["reward/judge_failed"] for row in rows] == [0] * 4 + [8] * 4
    assert [row["reward/gold"] for row in rows[4:]] == [None] * 4
    assert all(row["alarm"] is None for row in rows)
    watched.act()
    assert kept.calls == [1, 2, 3, 4]  # the same gold over more updates is better known each time


@pytest.mark.parametrize(("on_alarm", "last"), [("warn", []), ("stop", []), ("rollback", ["restored"])])
def test_what_an_alarm_leads_to(on_alarm, last, caplog):
    watched, kept = watch(FallingJudge(4), on_alarm=on_alarm)
    for step in range(1, 9):
        row = watched.look(step, batch())
        if row["alarm"] == "decline":
            break
        watched.act()
    assert 5 <= step <= 7 and row["best_step"] == 4
    assert "gold reward has declined: at least 0." in caplog.text
    if on_alarm == "warn":
        watched.act()
    else:
        with pytest.raises(GoldFell):
            watched.act()
    assert kept.calls == [1, 2, 3, 4, *last]


def test_a_proxy_that_rises_where_gold_does_not_only_warns(caplog):
    watched, _ = watch(FallingJudge(99), on_alarm="stop", sample=16)
    alarms = []
    for step in range(1, 9):
        alarms.append(watched.look(step, batch(0.1 if step < 5 else 0.95))["alarm"])
        watched.act()
    assert alarms[:4] == [None] * 4 and alarms[-1] == "divergence"
    assert "drift apart" in caplog.text


PPO = {"ppo_epochs": 1, "critic_layers": 1}
GRPO = {"group_size": 2}


def run(tmp_path, data, backbone, on_alarm, method="ppo", own=PPO):
    options = {
        "reward_model": backbone,
        "policy": backbone,
        "data": data,
        "output": tmp_path / on_alarm,
        "steps": 4,
        "batch_size": 16,
        "micro_batch_size": 8,
        "response_length": 3,
        "learning_rate": 1e-2,
        "lora_rank": 2,
        "eval_samples": 1,
        "on_alarm": on_alarm,
        **own,
    }
    assert main([method, *(str(word) for key, value in options.items() for word in (f"--{key}", value))]) == 0
    folder = tmp_path / on_alarm
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, rows, json.loads((folder / "result.json").read_text())


@pytest.fixture
def planted(tmp_path, tiny_backbone, monkeypatch):
    """Sixteen prompts, and a judge whose gold is 1 before training and at the first update, then 0."""
    data = write_fruit(tmp_path / "data.jsonl", RUBRIC, ["train"] * 16 + ["test"])
    untrained = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512)
    monkeypatch.setattr(RubricScorer, "from_pretrained", lambda *_, **__: untrained)
    monkeypatch.setattr(stage, "build_judge", lambda _: FallingJudge(2))
    return tmp_path, data, tiny_backbone


def test_a_planted_decline_stops_the_run_and_rolls_it_back(planted):
    stopped, rows, result = run(*planted, "stop")
    assert [row["alarm"] for row in rows] == [None, "decline"]
    assert (result["alarm_step"], result["best_step"], result["rolled_back"]) == (2, 1, False)
    assert result["kl_final"] == rows[1]["kl"]
    assert [path.name for path in (stopped / "best").iterdir()] == ["step-1"]

    back, again, result = run(*planted, "rollback")
    assert len(again) == 2 and result["rolled_back"]
    assert result["kl_final"] == again[0]["kl"]
    folders = (back / "best/step-1", back / "adapter", stopped / "adapter")
    best, left, last = (load_peft_weights(str(folder)) for folder in folders)
    assert best.keys() == left.keys()
    assert all(torch.equal(best[name], left[name]) for name in best)
    # the first update's rollouts are the starting policy's, whose adapter adds nothing yet
    assert not any((weight != 0).any() for name, weight in best.items() if "lora_B" in name)
    assert any((weight != 0).any() for name, weight in last.items() if "lora_B" in name)


def test_a_planted_decline_rolls_a_group_run_back(planted):
    folder, rows, result = run(*planted, "rollback", "grpo", GRPO)
    assert rows[-1]["alarm"] == "decline" and len(rows) < 4
    assert result["rolled_back"] and result["kl_final"] == rows[0]["kl"]
    best, left = (load_peft_weights(str(folder / name)) for name in ("best/step-1", "adapter"))
    assert best.keys() == left.keys() and all(torch.equal(best[name], left[name]) for name in best)


def test_a_watch_goes_on_from_what_it_saved(tmp_path):
    whole, _ = watch(FallingJudge(4), sample=6)
    rows = [whole.look(step, batch()) for step in range(1, 9)]
    for place in (3, 6):
        before, _ = watch(FallingJudge(4), sample=6)
        for step in range(1, place):
            before.look(step, batch())
        before.save(tmp_path / str(place))
        after, kept = watch(FallingJudge(4 - place + 1), sample=6)
        after.load(tmp_path / str(place))
        assert [after.look(step, batch()) for step in range(place, 9)] == rows[place - 1 :]
        assert kept.calls == [step for step in range(1, 5) if step >= place]
    longer, _ = watch(FallingJudge(0), steps=16, looks=5)  # a budget that the five looks before have spent
    longer.load(tmp_path / "6")
    assert longer.look(16, batch())["reward/judged"] == 0
