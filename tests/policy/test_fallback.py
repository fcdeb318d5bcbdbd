"""Runs that pay by the judge's verdicts where the reward model is in doubt: budget, record, rows, a stop, refusals."""

import json

import numpy as np
import pytest

from policy import stage
from policy.adapter import Rollout
from policy.cli import main
from policy.config import AggregationConfig, GrpoConfig
from policy.fallback import asked_row, check_fallback
from policy.prompts import RubricPrompt
from rm.scorer import Asked, Scored
from rubric_data.errors import UserError
from rubric_data.judges import masked_verdicts
from rubric_data.ledger import LedgerReader
from rubric_data.records import Criterion, Rubric, Verdict
from tests.policy.fruit import read_lines, reward_untrained, small_run, words, write_fruit

pytest.importorskip("trl.experimental.ppo", reason="needs TRL with PPO")
RUBRIC = Rubric(criteria=(Criterion(id="tone", text="is friendly", weight=3.0), Criterion(id="short", text="is short")))
OWN = {"ppo": {"ppo_epochs": 1, "critic_layers": 1}, "grpo": {"group_size": 2, "save_steps": 1}}


class Judge:
    """Finds everything friendly, and cannot tell what is short."""

    name, template = "judge", "1"

    def __init__(self):
        self.asked = 0

    def judge(self, requests):
        self.asked += sum(len(request.criteria) for request in requests)
        return [tuple(self._verdict(one) for one in request.criteria) for request in requests]

    def _verdict(self, criterion):
        if criterion.id == "short":
            return masked_verdicts([criterion], "timeout", "no reply", judge=self.name)[0]
        return Verdict(criterion_id=criterion.id, value=1.0, judge=self.name)


@pytest.fixture
def command(tmp_path, tiny_backbone, monkeypatch):
    """Arguments of a run of three updates of eight rollouts, whose reward model is an untrained one."""
    reward_untrained(monkeypatch, tiny_backbone)
    monkeypatch.setattr(stage, "build_judge", lambda _: Judge())
    data = write_fruit(tmp_path / "data.jsonl", RUBRIC, ["train"] * 4 + ["test"])
    judge = {"fallback_budget": 24, "fallback_width": 0.1, "judge": "openai", "judge_model": "m"}
    return words(small_run(tiny_backbone, data, eval_samples=1, **judge))


def own(method):
    return words(OWN[method])


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_run_is_paid_by_the_judge_where_it_was_asked(method, command, tmp_path):
    run = tmp_path / "run"
    assert main([method, *command, *own(method), "--output", str(run)]) == 0
    rows = read_lines(run / "metrics.jsonl")
    assert [row["reward/asked"] for row in rows] == [8, 8, 8]  # the heavy criterion of every rollout
    assert [row["reward/ask_failed"] for row in rows] == [0, 0, 0]
    for row in rows:
        assert 0.75 <= row["reward/paid"] <= 1 and row["reward/proxy"] < row["reward/paid"] - 0.1
    result = json.loads((run / "result.json").read_text())
    assert (result["verdicts_asked"], result["verdicts_failed"]) == (24, 0)
    with LedgerReader(run / "asked.sqlite") as ledger:
        assert next(ledger.select("SELECT count(*), count(DISTINCT criterion_id) FROM verdicts")) == (24, 1)
    scores = read_lines(run / "scores.jsonl")  # what the model said, the judge aside
    assert all(row["criteria"][0]["probability"] < 1 for row in scores)


@pytest.mark.slow
def test_a_run_that_was_stopped_pays_as_one_that_was_not(command, tmp_path, monkeypatch):
    whole, stopped = (["grpo", *command, *own("grpo"), "--output", str(tmp_path / name)] for name in ("whole", "part"))
    assert main(whole) == 0
    write, wrote = stage.StepLog.on_log, []

    def interrupt(self, args, state, control, **rest):
        write(self, args, state, control, **rest)
        wrote.append(state.global_step)
        if wrote == [1, 2]:
            raise KeyboardInterrupt  # the second update's verdicts are paid for, its checkpoint is not written

    monkeypatch.setattr(stage.StepLog, "on_log", interrupt)
    assert main(stopped) == 130
    asked = []
    monkeypatch.setattr(stage, "build_judge", lambda _: asked.append(Judge()) or asked[0])
    assert main([*stopped, "--resume", "true"]) == 0
    rows, again = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "part"))
    keys = ("reward/asked", "reward/paid", "reward/proxy")
    assert [[row[key] for key in keys] for row in again] == [pytest.approx([row[key] for key in keys]) for row in rows]
    with LedgerReader(tmp_path / "part" / "asked.sqlite") as ledger:
        assert next(ledger.select("SELECT count(*) FROM verdicts")) == (24,)


def test_what_was_asked_in_an_update_by_hand():
    def rollout(asked):
        scored = Scored(np.full(2, 0.9), np.zeros(2), 0.9, 0, asked=asked)
        return Rollout(RubricPrompt("p", "Say it.", RUBRIC), "Yes.", scored, 2, True, 0.9)

    alone = Scored(np.full(2, 0.4), np.zeros(2), 0.4, 0)
    rollouts = [rollout(Asked(np.array([True, False]), 2, 1, alone)), rollout(None)]
    assert asked_row(rollouts) == {"reward/asked": 2, "reward/ask_failed": 1}
    assert [one.reward for one in rollouts] == [0.4, 0.9]  # the reward model's own


def test_budgets_that_cannot_be_spent_are_refused(monkeypatch):
    def check(**options):
        check_fallback(GrpoConfig("model", "run", **options))

    check()  # nobody is asked
    check(judge="local", fallback_budget=1)
    check(use_verifiers=False, fallback_budget=1)
    for options, message in (
        ({"fallback_width": 0.0}, r"fallback_width: must lie in \(0, 1\], got 0.0"),
        ({"fallback_budget": 0}, "fallback_budget: must be at least 1, got 0"),
        ({"fallback_budget": 1}, "the verifier judge knows what code has answered already"),
    ):
        with pytest.raises(UserError, match=message):
            check(**options)
    with pytest.raises(UserError, match="dropout leaves out criteria"):
        check(judge="local", fallback_budget=1, aggregation=AggregationConfig(dropout=0.3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes would each spend it"):
        check(judge="local", fallback_budget=1)
