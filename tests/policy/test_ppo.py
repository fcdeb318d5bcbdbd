"""The RL stage: two updates end to end on a random model, the row of metrics by hand, and bad input."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy import cli, ppo, stage
from policy.config import AggregationConfig, PolicyConfig
from policy.evaluate import PolicyEvaluation
from policy.prompts import RubricPrompt, encode_prompt
from rm.sampling import Completion
from rm.scorer import RubricScorer
from rubric_data.errors import UserError
from rubric_data.files import write_text
from rubric_data.io import read_judged, write_judged
from rubric_data.programmatic import CodeFirst
from rubric_data.records import Criterion, Rubric, Verifier
from tests.policy.fruit import rollout, write_fruit

RUBRIC = Rubric(
    criteria=(
        Criterion(id="commas", text="has no comma", verifier=Verifier(name="ifeval:punctuation:no_comma")),
        Criterion(id="tone", text="is friendly"),  # nobody can check this one by program
    )
)
PROMPT = RubricPrompt("p", "Say it.", RUBRIC)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path):
    """Four prompts to train on (one of them for validation), two to evaluate."""
    return write_fruit(tmp_path / "data.jsonl", RUBRIC, ["train"] * 3 + ["validation"] + ["test"] * 2)


@pytest.fixture
def config(tmp_path, data, tiny_backbone, monkeypatch):
    """A run of two updates whose reward model is an untrained one."""
    untrained = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512)
    monkeypatch.setattr(RubricScorer, "from_pretrained", lambda *_, **__: untrained)
    return PolicyConfig(
        reward_model=tiny_backbone,
        policy=tiny_backbone,
        data=data,
        output=str(tmp_path / "run"),
        steps=2,
        batch_size=6,  # more than there are prompts
        micro_batch_size=3,
        response_length=6,
        learning_rate=1e-2,
        critic_layers=1,
        lora_rank=2,
        gold_sample=4,
        eval_samples=2,
    )


def test_two_updates_end_to_end(config, tmp_path, tiny_backbone, capsys):
    result = ppo.run_ppo(config)
    run = tmp_path / "run"
    found = sorted(path.name for path in run.iterdir())
    assert found == [
        "adapter",
        "best",
        "config.json",
        "curves.png",
        "judged.jsonl",
        "metrics.jsonl",
        "origin.json",
        "result.json",
        "samples.jsonl",
        "scores.jsonl",
    ]

    rows = read_lines(run / "metrics.jsonl")
    assert [(row["step"], row["episode"], row["reward/judged"]) for row in rows] == [(1, 6, 4), (2, 12, 4)]
    for row in rows:
        assert 0 < row["reward/proxy"] < 1
        assert row["reward/paid"] == row["reward/proxy"]  # the default
        assert row["reward/gold_low"] < row["reward/gold"] < row["reward/gold_high"]
        assert row["reward/divergence"] == pytest.approx(row["reward/proxy"] - row["reward/gold"])
        assert 1 <= row["response_tokens"] <= 6
        assert row["seconds"] > 0
    assert rows[0]["value_loss"] > 0
    assert abs(rows[0]["kl"]) < 1  # the first rollouts are the starting policy's own, but for rounding
    assert capsys.readouterr().out.count("/2  proxy 0.") == 2

    assert json.loads((run / "result.json").read_text()) == result
    assert (result["prompts_trained"], result["prompts_evaluated"]) == (4, 2)
    assert (result["criteria"], result["criteria_by_code"]) == (12, 6)
    gain = result["gold_after"]["value"] - result["gold_before"]["value"]
    assert result["gold_gain"]["value"] == pytest.approx(gain)
    samples = read_lines(run / "samples.jsonl")
    golds = [one["gold"] for line in samples for one in line["before"]]
    assert [line["prompt_id"] for line in samples] == ["p4", "p5"]
    assert len(golds) == 4
    assert np.mean(golds) == pytest.approx(result["gold_before"]["value"])

    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    inputs = tokenizer("Name fruit", return_tensors="pt")
    before = base(**inputs).logits
    policy = PeftModel.from_pretrained(base, run / "adapter")
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert (policy(**inputs).logits - before).abs().max() > 1e-3  # it has learnt something
    assert policy.generate(**inputs, max_new_tokens=3, eos_token_id=None).shape[1] == inputs["input_ids"].shape[1] + 3

    with pytest.raises(UserError, match="holds a run already"):
        ppo.run_ppo(config)


def test_an_aggregation_changes_what_is_paid_and_not_what_is_measured(config, tmp_path, capsys):
    options = {**vars(config), "aggregation.saturation": 3.0, "steps": 1, "eval_prompts": 1, "eval_samples": 1}
    given = {name: value for name, value in options.items() if name != "aggregation" and value is not None}
    argv = [f"--{name}={str(value).lower() if value in (True, False) else value}" for name, value in given.items()]
    assert cli.main(["ppo", *argv]) == 0, capsys.readouterr().err
    (row,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert row["reward/proxy"] + 0.05 < row["reward/paid"] < 1  # half the credit is .82 of the pay
    sample = read_lines(tmp_path / "run" / "samples.jsonl")[0]["before"][0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["proxy_before"]["value"] == sample["proxy"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["aggregation"]["saturation"] == 3.0


@pytest.mark.parametrize("on", [True, False])
def test_the_switch_reaches_scorer_and_judge(config, monkeypatch, on):
    seen = {}
    monkeypatch.setattr(RubricScorer, "from_pretrained", lambda _, **options: seen.update(options))
    monkeypatch.setattr(ppo, "RubricRewardAdapter", lambda *_: None)
    monkeypatch.setattr(stage, "load_causal_lm", lambda *_, **__: SimpleNamespace(to=lambda _: None))

    def stop(config, cast, model):
        seen["judge"] = cast.judge
        raise UserError("seen enough")

    monkeypatch.setattr(stage, "evaluate", stop)
    config.use_verifiers = on
    with pytest.raises(UserError, match="seen enough"):
        ppo.run_ppo(config)
    assert seen["use_verifiers"] is on and isinstance(seen["judge"], CodeFirst) is on


def test_a_broken_verifier_stops_before_anything_is_loaded_and_a_useless_model_is_told(
    config, tmp_path, monkeypatch, caplog
):
    def never(*_, **__):
        raise UserError("loaded")

    monkeypatch.setattr(RubricScorer, "from_pretrained", never)

    def rewrite(name):
        check = Rubric(criteria=(Criterion(id="c", text="C.", verifier=Verifier(name=name)),))
        records = [record.model_copy(update={"rubric": check}) for record in read_judged(config.data)]
        write_judged(config.data, records)

    rewrite("wordz")
    with pytest.raises(UserError, match="response 'p0-r', criterion 'c': verifier 'wordz'"):
        ppo.run_ppo(config)
    rewrite("has_digit")
    with pytest.raises(UserError, match="loaded"):
        ppo.run_ppo(config)
    assert "code gives the whole reward" in caplog.text


def test_a_row_of_metrics_by_hand():
    rollouts = [
        rollout(PROMPT, "a", 0.25, 4, paid=0.0),
        rollout(PROMPT, "b", math.nan, 6, finished=False),
        rollout(PROMPT, "c", 0.75, 2, paid=1.0),
        rollout(PROMPT, "d", 0.5, 6, finished=False, paid=0.2),
    ]
    logs = {
        "objective/kl": 1.5,
        "objective/entropy": 30.0,
        "policy/clipfrac_avg": 0.1,
        "loss/value_avg": 0.2,
    }
    gold = {"reward/gold": 0.3, "reward/judged": 2, "best_step": 1, "alarm": None}
    row = stage.step_row(2, rollouts, gold, ppo.describe(logs, rollouts), seconds=3.14159)
    assert row == {
        "step": 2,
        "episode": 8,
        "reward/proxy": 0.5,
        "reward/paid": pytest.approx(0.4),
        "reward/masked": 1,
        **gold,
        "kl": 1.5,
        "entropy": 30.0,
        "response_tokens": 4.5,
        "finished_share": 0.5,
        "clip_share": 0.1,
        "value_loss": 0.2,
        "seconds": 3.142,
    }
    assert stage.progress_line(row, 14) == (
        "step   2/14  proxy 0.500  gold 0.300  kl   1.50  tokens   4.5  finished  50%  3.1 s"
    )
    assert "kl      -  tokens" in stage.progress_line({**row, "kl": None}, 14)
    assert stage.progress_line(row | {"reward/gold": None, "alarm": "decline"}, 14).endswith(
        "gold -  kl   1.50  tokens   4.5  finished  50%  3.1 s  decline!"
    )


def test_a_run_that_was_rolled_back_ends_with_the_kl_of_its_best_update():
    rows = [{"step": step, "kl": step / 10, "best_step": 2, "alarm": None} for step in (1, 2, 3, 4)]
    rows[2]["alarm"] = "divergence"
    assert stage.ending(rows, "rollback") == {
        "kl_final": 0.4,
        "best_step": 2,
        "alarm_step": None,
        "rolled_back": False,
    }
    rows[3]["alarm"] = "decline"
    assert stage.ending(rows, "stop") == {"kl_final": 0.4, "best_step": 2, "alarm_step": 4, "rolled_back": False}
    assert stage.ending(rows, "rollback") == {"kl_final": 0.2, "best_step": 2, "alarm_step": 4, "rolled_back": True}


def test_few_prompts_are_repeated_until_they_fill_a_batch(tiny_backbone):
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    ids = encode_prompt(tokenizer, PROMPT.prompt)
    assert ppo.prompt_dataset(tokenizer, [PROMPT], 3)["input_ids"] == [ids] * 3
    assert len(ppo.prompt_dataset(tokenizer, [PROMPT] * 3, 4)) == 6
    assert len(ppo.prompt_dataset(tokenizer, [PROMPT] * 5, 4)) == 5


def test_the_two_evaluations_are_paired_by_prompt():
    def evaluation(gold):
        ended = Completion("x", True)
        gold = np.array(gold)[:, None]
        return PolicyEvaluation([PROMPT] * 3, [[ended]] * 3, gold, np.zeros((3, 1)), np.full((3, 1), 5))

    found = stage.compare(evaluation([0.0, 0.5, 0.25]), evaluation([0.25, 0.75, 0.5]), seed=0)
    assert found["gold_gain"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})
    assert found["gold_before"]["value"] == 0.25
    assert found["proxy_gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["mean_tokens_after"] == 5.0


def test_a_trl_without_ppo_is_said_with_the_versions_that_have_it(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    with pytest.raises(UserError, match=r"run: pip install 'trl>=1\.8,<1\.13'"):
        ppo.run_ppo(config)
    assert not os.path.exists(config.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 7}, "batch_size: 7 is no multiple of micro_batch_size 3"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: must be positive, got 0.0"),
        ({"eval_prompts": 0}, "eval_prompts: must be at least 1, got 0"),
        ({"gold_budget": 3}, "gold_budget: 3 rollouts do not pay for one sample of 4"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"aggregation": AggregationConfig(dropout=1.0)}, "aggregation.dropout: must be at least 0 and below 1"),
        ({"aggregation": AggregationConfig(weights="categories")}, "criterion 'commas': needs one of the tags"),
        ({"aggregation": AggregationConfig(pessimism=1.0)}, "no posterior to tell its doubt"),
        ({"aggregation": AggregationConfig(dropout=0.5), "reward": "lower_bound"}, "reward: 'lower_bound' is of the"),
        ({"policy": "no/such/model"}, "model 'no/such/model': cannot be loaded"),
    ],
)
def test_bad_values_leave_nothing_behind(config, change, message):
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        ppo.run_ppo(config)
    assert not os.path.exists(config.output)


def test_two_rubrics_for_one_prompt_stop_the_run_before_it_starts(config, data):
    lines = read_lines(data)
    lines[1]["prompt"] = lines[0]["prompt"]
    lines[1]["rubric"]["criteria"][0]["text"] = "has commas"
    write_text(data, "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="has two rubrics"):
        ppo.run_ppo(config)
    assert not os.path.exists(config.output)


def test_data_without_test_prompts_is_refused(config, data):
    lines = read_lines(data)
    write_text(data, "".join(json.dumps(line) + "\n" for line in lines if line["split"] != "test"))
    with pytest.raises(UserError, match="has no prompts in split test"):
        ppo.run_ppo(config)


def test_an_output_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config.output = str(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="choose"):
        ppo.run_ppo(config)


def test_generation_defaults_of_the_model_do_not_bend_the_policy(config, tiny_backbone, tmp_path):
    """A model that ships with a repetition penalty or top_k would make PPO's log-probabilities wrong."""
    model = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    model.generation_config.repetition_penalty = 5.0
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    model.save_pretrained(tmp_path / "bent")
    tokenizer.save_pretrained(tmp_path / "bent")
    config.policy, config.steps, config.learning_rate = str(tmp_path / "bent"), 1, 1e-9
    config.eval_prompts = config.eval_samples = 1
    config.response_length = 24
    ppo.run_ppo(config)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert abs(row["kl"]) < 0.5  # with the penalty: tens of nats
