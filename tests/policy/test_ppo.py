"""The RL stage: two updates end to end on a random model, the row of metrics by hand, and bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

from policy import cli, ppo, stage
from policy.config import AggregationConfig, PolicyConfig
from policy.evaluate import PolicyEvaluation
from policy.prompts import RubricPrompt, prompt_order
from policy.stage import step_of
from rm.model import RubricRewardModel
from rm.sampling import Completion
from rm.scorer import RubricScorer
from rm.train import last_checkpoint
from rubric_data.errors import UserError
from rubric_data.files import write_text
from rubric_data.io import read_judged, write_judged
from rubric_data.programmatic import CodeFirst
from rubric_data.records import Criterion, Rubric, Verifier
from tests.policy.fruit import SIX, UNTIMED, rollout, write_fruit

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
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
        "checkpoints",
        "config.json",
        "judged.jsonl",
        "metrics.jsonl",
        "origin.json",
        "result.json",
        "run.html",
        "samples.jsonl",
        "scores.jsonl",
    ]

    rows = read_lines(run / "metrics.jsonl")
    assert [(row["step"], row["episode"], row["reward/judged"]) for row in rows] == [(1, 6, 4), (2, 12, 4)]
    for row in rows:
        assert 0 < row["reward/proxy"] < 1
        assert row["reward/paid"] == row["reward/proxy"]  # the default
        met = (row["criteria/has no comma"] + row["criteria/is friendly"]) / 2
        assert row["reward/proxy"] == pytest.approx(met)
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
    assert "On 2 held-out prompts the judge" in (run / "run.html").read_text(encoding="utf-8")
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


def stop_after(monkeypatch, step):
    """Interrupt the run once it has written the row of update ``step`` and not yet its checkpoint."""
    write = stage.StepLog.on_log

    def interrupt(self, args, state, control, **rest):
        write(self, args, state, control, **rest)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage.StepLog, "on_log", interrupt)


def without_seconds(rows):
    return [{**row, **UNTIMED} for row in rows]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(config, tmp_path, monkeypatch):
    config.steps, config.save_steps, config.gold_sample, config.eval_prompts = 3, 1, 6, 1
    config.data = write_fruit(tmp_path / "six.jsonl", SIX, ["train"] * 4 + ["test"])
    config.aggregation = AggregationConfig(dropout=0.5)  # what an update pays depends on its number
    whole = ppo.run_ppo(config)
    config.output, config.steps = str(tmp_path / "stopped"), 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        ppo.run_ppo(config)
    folder = tmp_path / "stopped"
    assert len(read_lines(folder / "metrics.jsonl")) == 2
    (folder / "checkpoints" / ".checkpoint-2.xyz").mkdir()  # killed while it wrote one
    with pytest.raises(UserError, match="add --resume true to go on"):
        ppo.run_ppo(config)
    config.resume = True
    with pytest.raises(UserError, match=r"cannot resume, as learning_rate is 0.1 and was 0.01"):
        ppo.run_ppo(replace(config, learning_rate=0.1))
    config.steps = 3  # more than were planned
    again = ppo.run_ppo(config)
    rows = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("run", "stopped")]
    assert without_seconds(rows[0]) == without_seconds(rows[1])
    assert [row["step"] for row in rows[1]] == [1, 2, 3]
    for name in ("judged.jsonl", "scores.jsonl"):
        assert (folder / name).read_text() == (tmp_path / "run" / name).read_text()
    assert {**again, "seconds": 0, "seconds_per_step": 0} == {**whole, "seconds": 0, "seconds_per_step": 0}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    ppo.run_ppo(config)  # stopped once training was over
    assert read_lines(folder / "metrics.jsonl") == rows[1]


def test_without_an_adapter_all_weights_learn_and_a_model_is_left(config, tmp_path, tiny_backbone):
    config.lora_rank, config.eval_prompts, config.on_alarm = 0, 1, "rollback"
    ppo.run_ppo(config)
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert abs(rows[0]["kl"]) < 1e-3 and abs(rows[1]["kl"]) > 0.05  # to what it was, which has not moved
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_backbone, tmp_path / "run" / "model"))
    moved = [not torch.equal(*pair) for pair in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    assert (tmp_path / "run" / "best" / f"step-{rows[-1]['best_step']}" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token == "<|im_end|>"


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
    scorer = SimpleNamespace(check=lambda rubrics: seen.update(checked=len(list(rubrics))))
    monkeypatch.setattr(RubricScorer, "from_pretrained", lambda _, **options: seen.update(options) or scorer)
    monkeypatch.setattr(ppo, "RubricRewardAdapter", lambda *_, **__: None)
    monkeypatch.setattr(ppo, "build_critic", lambda *_: None)
    monkeypatch.setattr(stage, "load_causal_lm", lambda *_, **__: SimpleNamespace(to=lambda _: None))

    def stop(config, cast, model):
        seen["judge"] = cast.judge
        raise UserError("seen enough")

    monkeypatch.setattr(stage, "evaluate", stop)
    config.use_verifiers = on
    with pytest.raises(UserError, match="seen enough"):
        ppo.run_ppo(config)
    assert seen["use_verifiers"] == (on or "vetoes") and isinstance(seen["judge"], CodeFirst) is on
    assert seen["checked"] > 0


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


def test_a_monitor_gets_trls_numbers_and_those_of_the_row(config, tmp_path, monkeypatch):
    seen = []

    class Monitor(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append((state.global_step, dict(logs)))

    monkeypatch.setattr(stage, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Monitor)
    config.report_to, config.steps, config.eval_prompts = "tensorboard", 1, 1
    config.mask_unfinished, config.critic_from = True, "reward_model"
    ppo.run_ppo(config)
    (row,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    ((step, logs),) = seen
    assert step == 1 and logs["objective/kl"] == row["kl"]
    numbers = {name: value for name, value in row.items() if value is not None}
    assert {f"rubric_rm/{name}": value for name, value in numbers.items()}.items() <= logs.items()
    assert row["reward/masked"] == 6 * (1 - row["finished_share"])  # those that never end


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
        "reward/asked": 0,
        "reward/ask_failed": 0,
        **gold,
        "kl": 1.5,
        "entropy": 30.0,
        "response_tokens": 4.5,
        "finished_share": 0.5,
        "clip_share": 0.1,
        "value_loss": 0.2,
        "reward_seconds": 0.0,
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


def test_the_prompts_of_an_update_come_in_the_order_of_the_run(tiny_backbone):
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone, padding_side="left")
    ids = [[3, 4, 5], [6, 7], [8]]
    order = prompt_order(3, 8, seed=0)
    config = PolicyConfig("model", "run", steps=2, batch_size=4)
    first, second = ppo.prompt_batches(config, tokenizer, ids, 0)
    (again,) = ppo.prompt_batches(config, tokenizer, ids, 1)
    assert first["input_ids"].shape == (4, 3)  # more rows than there are prompts
    rows = [row[row != tokenizer.pad_token_id].tolist() for batch in (first, second) for row in batch["input_ids"]]
    assert rows == [ids[place] for place in order]
    assert all((row[-1] != tokenizer.pad_token_id).item() for row in first["input_ids"])
    assert again["input_ids"].tolist() == second["input_ids"].tolist()
    assert list(ppo.prompt_batches(config, tokenizer, ids, 2)) == []


def test_the_two_evaluations_are_paired_by_prompt():
    def evaluation(gold):
        ended = Completion("x", True)
        gold = np.array(gold)[:, None]
        return PolicyEvaluation([PROMPT] * 3, [[ended]] * 3, gold, np.zeros((3, 1)), np.full((3, 1), 5))

    found = stage.compare(evaluation([0.0, 0.5, 0.25]), evaluation([0.25, 0.75, 0.5]), seed=0)
    assert found["gold_gain"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})
    assert found["gold_before"]["value"] == 0.25
    assert found["gain_gap"] == pytest.approx({"value": -0.25, "low": -0.25, "high": -0.25})
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
        ({"lora_rank": -1}, "lora_rank: must be at least 0, got -1; 0 trains all weights"),
        ({"save_steps": 0}, "save_steps: must be at least 1, got 0"),
        (
            {"report_to": "paper"},
            "report_to: 'paper' is unknown or not installed; install it, or take",
        ),
        ({"mask_unfinished": True, "missing_eos_penalty": 1.0}, "missing_eos_penalty: mask_unfinished leaves nothing"),
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


def _command(tmp_path, data, tiny_backbone, **options):
    """A run whose reward model is a random one, for a process of its own."""
    RubricRewardModel.from_language_model(tiny_backbone, max_length=512).save(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "model")
    options = {
        "reward_model": tmp_path / "model",
        "policy": tiny_backbone,
        "data": data,
        "batch_size": 8,
        "micro_batch_size": 2,
        "response_length": 6,
        "learning_rate": 1e-2,
        "critic_layers": 1,
        "lora_rank": 2,
        "gold_sample": 4,
        "eval_samples": 2,
        "eval_prompts": 1,
        "save_steps": 1,
    } | options
    return ["-m", "policy.cli", "ppo", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, data, tiny_backbone):
    command = [sys.executable, *_command(tmp_path, data, tiny_backbone, steps=12)]
    whole = [*command, "--output", str(tmp_path / "whole")]
    killed = [*command, "--output", str(tmp_path / "killed")]
    subprocess.run(whole, cwd=ROOT, check=True, capture_output=True, env=ONE_THREAD)
    checkpoints = tmp_path / "killed" / "checkpoints"
    process = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    deadline = time.time() + 300
    while step_of(last_checkpoint(checkpoints)) < 3 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    subprocess.run([*killed, "--resume", "true"], cwd=ROOT, check=True, capture_output=True, env=ONE_THREAD)
    one, two = (without_seconds(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "killed"))
    assert len(one) == 12 and one == two


@pytest.mark.slow
def test_two_processes_share_an_update_and_the_first_writes(tmp_path, data, tiny_backbone):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launch, *_command(tmp_path, data, tiny_backbone), "--output", str(tmp_path / "run")]

    def run(*more):
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD, check=False)

    first = run("--steps", "2")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("/2  proxy 0.") == 2  # one line an update
    assert run("--steps", "3", "--resume", "true").returncode == 0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["episode"], row["reward/judged"]) for row in rows] == [(1, 8, 4), (2, 16, 4), (3, 24, 4)]
    assert abs(rows[0]["kl"]) < 1 < abs(rows[2]["kl"])  # it learns, and the reference does not
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["processes"]) == (3, 2)
    alone = [sys.executable, *_command(tmp_path, data, tiny_backbone), "--output", str(tmp_path / "run")]
    refused = subprocess.run(
        [*alone, "--steps", "4", "--resume", "true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ONE_THREAD,
        check=False,
    )
    assert refused.returncode == 2
    assert "was written by 2 processes, and now 1 run; start as many" in refused.stderr
