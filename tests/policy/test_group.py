"""GRPO and RLOO on a random model, through the command line: updates, a stop in the middle, and bad input."""

import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy import group, stage
from policy.cli import main
from policy.config import AggregationConfig, GrpoConfig, RlooConfig
from policy.group import RecordedReward, check_groups, describe
from policy.prompts import RubricPrompt, prompt_order
from policy.reward import prompt_text, reward_dataset
from policy.stage import rows_until
from rm.posterior import Doubt
from rm.scorer import Scored
from rubric_data.errors import UserError
from rubric_data.records import Criterion, Rubric, Verifier
from tests.policy.fruit import SIX, UNTIMED, read_lines, reward_untrained, rollout, small_run, words, write_fruit

RUBRIC = Rubric(
    criteria=(
        Criterion(id="commas", text="has no comma", verifier=Verifier(name="ifeval:punctuation:no_comma")),
        Criterion(id="tone", text="is friendly", tags=("tone",)),
    )
)
PROMPT = RubricPrompt("p", "Say it.", RUBRIC)


@pytest.fixture
def command(tmp_path, tiny_backbone, monkeypatch):
    """Arguments of a run of three updates, whose reward model is an untrained one."""
    reward_untrained(monkeypatch, tiny_backbone)
    data = write_fruit(tmp_path / "data.jsonl", RUBRIC, ["train"] * 2 + ["validation"] + ["test"])
    # four groups in an update, of three prompts
    return words(small_run(tiny_backbone, data, group_size=2, eval_samples=2, save_steps=1))


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_two_updates_end_to_end(method, command, tmp_path, tiny_backbone, monkeypatch, capsys):
    for gone in ("trl.experimental.ppo", "trl.experimental.online_dpo"):
        monkeypatch.setitem(sys.modules, gone, None)  # as in a TRL that no longer has them
    run = tmp_path / "run"
    assert main([method, *command, "--steps", "2", "--aggregation.saturation", "3", "--output", str(run)]) == 0
    rows = read_lines(run / "metrics.jsonl")
    assert [(row["step"], row["episode"], row["reward/judged"]) for row in rows] == [(1, 8, 4), (2, 16, 4)]
    for row in rows:
        assert 0 < row["reward/proxy"] < 1
        assert row["reward/gold_low"] < row["reward/gold"] < row["reward/gold_high"]
        assert 0 < row["criteria/tone"] < 1 and 0 <= row["criteria/has no comma"] <= 1
        assert row["reward/paid"] > row["reward/proxy"] + 0.02  # diminishing returns: the first half is worth more
        assert row["reward/proxy"] == pytest.approx((row["criteria/tone"] + row["criteria/has no comma"]) / 2)
        assert 1 <= row["response_tokens"] <= 6
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-2)  # the first rollouts are the starting policy's own
    assert abs(rows[1]["kl"]) > 0.1
    saved = json.loads((run / "checkpoints" / "checkpoint-2" / "watch.json").read_text())
    assert saved["done"] == 2
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["prompts_trained"], result["prompts_evaluated"]) == (2, 3, 1)
    assert capsys.readouterr().out.count("/2  proxy 0.") == 2
    names = {path.name for path in run.iterdir()}
    assert {"adapter", "checkpoints", "config.json", "metrics.jsonl", "run.html", "samples.jsonl"} < names
    base = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    inputs = AutoTokenizer.from_pretrained(run / "adapter")("Name fruit", return_tensors="pt")
    before = base(**inputs).logits
    assert (PeftModel.from_pretrained(base, run / "adapter")(**inputs).logits - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_without_an_adapter_all_weights_learn_and_a_model_is_left(method, command, tmp_path, tiny_backbone):
    run = tmp_path / "run"
    assert main([method, *command, "--lora_rank", "0", "--output", str(run)]) == 0
    rows = read_lines(run / "metrics.jsonl")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)  # to what it was, which does not move
    assert abs(rows[2]["kl"]) > 0.01
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_backbone, run / "model"))
    assert not any(torch.equal(*pair) for pair in zip(before.parameters(), after.parameters(), strict=True))
    assert not (run / "adapter").exists()


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_the_option_for_unfinished_rollouts_reaches_trl(method, command, tmp_path, monkeypatch, capsys):
    def stop(config, cast, folder, trainer, *_):
        raise UserError(f"masks: {trainer.mask_truncated_completions}")

    monkeypatch.setattr(group, "watched", stop)
    options = ["--eval_samples", "1", "--mask_unfinished", "true", "--output", str(tmp_path / "run")]
    assert main([method, *command, *options]) == 2
    assert "masks: True" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(method, command, tmp_path, monkeypatch):
    six = write_fruit(tmp_path / "six.jsonl", SIX, ["train"] * 3 + ["test"])
    command += ["--data", six, "--aggregation.dropout", "0.5"]  # what an update pays depends on its number
    whole, stopped = ([method, *command, "--output", str(tmp_path / name)] for name in ("whole", "stopped"))
    assert main(whole) == 0
    write, wrote = stage.StepLog.on_log, []

    def interrupt(self, args, state, control, **rest):
        write(self, args, state, control, **rest)
        wrote.append(state.global_step)
        if wrote == [1, 2]:
            raise KeyboardInterrupt  # the second row is written, its checkpoint is not

    monkeypatch.setattr(stage.StepLog, "on_log", interrupt)
    assert main(stopped) == 130
    assert [row["step"] for row in read_lines(tmp_path / "stopped" / "metrics.jsonl")] == [1, 2]
    assert main([*stopped, "--resume", "true"]) == 0
    rows, again = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    for row, other in zip(rows, again, strict=True):
        assert other.pop("alarm") is row.pop("alarm") is None
        assert {**other, **UNTIMED} == pytest.approx({**row, **UNTIMED}, rel=1e-3)
    after = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "stopped")]
    assert after[0]["proxy_after"] == pytest.approx(after[1]["proxy_after"])
    best = [[path.name for path in (tmp_path / name / "best").iterdir()] for name in ("whole", "stopped")]
    assert best[0] == best[1] == [f"step-{rows[-1]['best_step']}"]
    assert main([*stopped, "--resume", "true"]) == 0  # stopped once training was over
    assert read_lines(tmp_path / "stopped" / "metrics.jsonl") == [{**row, "alarm": None} for row in again]


def test_a_row_of_metrics_by_hand():
    rollouts = [rollout(PROMPT, "a", 0.5), rollout(PROMPT, "b", math.nan, 4, False)]
    logs = {"kl": 0.5, "entropy": 2.0, "frac_reward_zero_std": 0.25, "grad_norm": math.nan}
    assert describe({**logs, "reward": 0.5}, rollouts, masked=False) == {
        "kl": 1.5,
        "entropy": 6.0,
        "same_reward_share": 0.25,
        "grad_norm": None,
    }
    assert describe({}, rollouts, masked=False)["kl"] is None  # with kl_coef 0, TRL measures none
    hidden = describe(logs, rollouts, masked=True)  # the second never ends: TRL's means leave its tokens out
    assert (hidden["kl"], hidden["entropy"], hidden["same_reward_share"]) == (None, None, 0.25)
    ended = [rollouts[0], rollout(PROMPT, "b", math.nan, 4, True)]
    assert describe(logs, ended, masked=True)["kl"] == 1.5


def test_rollouts_are_paid_by_prompt_and_update_and_kept_until_taken():
    class Scripted:
        def score(self, prompts, responses, rubrics):
            assert (prompts, responses, rubrics) == (["Say it."] * 2, ["A.", "B"], [RUBRIC] * 2)
            known = Scored(np.array([0.5, 0.5]), np.array([0.0, 0.0]), 0.5, 0, doubt=Doubt(np.ones(2), np.eye(2), 0.1))
            return [known, Scored(np.full(2, math.nan), np.full(2, math.nan), math.nan, 0)]

    calls = []

    def pay(rubrics, scored, groups, step):
        calls.append((groups, step))
        return [one.reward / 2 for one in scored]

    recorded = RecordedReward(Scripted(), pay, [PROMPT], end_token=2)
    told = [RUBRIC.model_dump_json()] * 2
    answers = [[{"role": "assistant", "content": " A. "}], [{"role": "assistant", "content": "B"}]]
    asked = {"completion_ids": [[5, 2], [5, 6, 7]], "place": [0, 0]}
    assert recorded([PROMPT.prompt] * 2, answers, told, **asked) == [0.25, None]
    first, second = recorded.take_rollouts()
    assert (first.prompt, first.response, first.tokens, first.finished) == (PROMPT, "A.", 2, True)
    assert (first.reward, first.paid, first.doubt) == (0.5, 0.25, 0.1)
    assert math.isnan(second.reward) and math.isnan(second.paid) and math.isnan(second.doubt)
    assert (second.tokens, second.finished) == (3, False)
    assert recorded.take_rollouts() == []
    recorded([PROMPT.prompt] * 2, answers, told, **asked)
    assert calls == [(["p", "p"], 0), (["p", "p"], 2)]


def test_rows_after_the_checkpoint_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert rows_until(None, path) == [] and path.read_text() == ""
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')  # killed while it wrote the third
    assert rows_until(tmp_path / "checkpoint-1", path) == [{"step": 1}]
    assert path.read_text() == '{"step": 1}\n'


def test_all_prompts_come_before_any_comes_again():
    order = prompt_order(3, 8, seed=0)
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2] and len(set(order[6:])) == 2
    assert prompt_order(3, 5, seed=0) == order[:5]
    assert prompt_order(3, 8, seed=1) != order
    rows = reward_dataset([PROMPT, PROMPT], [1, 0, 1])
    assert rows["place"] == [1, 0, 1] and reward_dataset([PROMPT, PROMPT])["place"] == [0, 1]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Say it."}]
    assert Rubric.model_validate_json(rows[0]["rubric"]) == RUBRIC


def test_the_policy_gets_a_dialogue_as_turns_and_the_reward_model_as_it_was():
    text = "system: Be brief.\n\nuser: Hi.\n\nassistant: Yes?\n\nuser: Go."
    (row,) = reward_dataset([RubricPrompt("p", text, RUBRIC)])
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert prompt_text(row["prompt"]) == text


def test_bad_groups_are_refused(command, tmp_path, capsys):
    for options, message in (
        (["--group_size", "1"], "group_size: must be at least 2, got 1"),
        (["--group_size", "3"], "batch_size: 8 is no multiple of group_size 3"),
        (["--save_steps", "0"], "save_steps: must be at least 1, got 0"),
    ):
        assert main(["grpo", *command, "--output", str(tmp_path / "run"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize("kind", [GrpoConfig, RlooConfig])
def test_defaults_are_whole_groups(kind):
    config = kind("model", "run")
    stage.check(config)
    check_groups(config)
    with pytest.raises(UserError, match="RL needs samples that differ"):
        stage.check(kind("model", "run", temperature=0.0))


def test_what_several_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(stage, "processes", lambda: SimpleNamespace(num_processes=4))
    stage.check(GrpoConfig("model", "run", batch_size=32))
    with pytest.raises(UserError, match="batch_size: 16 is no multiple of micro_batch_size 8 in 4 processes; change"):
        stage.check(GrpoConfig("model", "run"))
    headroom = AggregationConfig(headroom=1.0)
    with pytest.raises(UserError, match=r"aggregation\.headroom: .* none of 4 processes sees; set it to 0"):
        stage.check(GrpoConfig("model", "run", batch_size=32, aggregation=headroom))
