import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rm.calibrating import run_calibrate
from rm.config import CalibrateConfig, TrainConfig
from rm.scorer import RubricScorer
from rm.train import last_checkpoint, run_train
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Rubric

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def options(tiny_backbone, judged, tmp_path):
    """A run of 8 steps on the tiny model; float32, so that losses can be compared digit by digit."""
    write_judged(tmp_path / "judged.jsonl", judged)
    return {
        "data": str(tmp_path / "judged.jsonl"),
        "model": tiny_backbone,
        "dtype": "float32",
        "max_length": 256,
        "max_steps": 8,
        "tokens_per_batch": 200,
        "eval_steps": 2,
        "lora_rank": 4,
        "learning_rate": 5e-3,
        "patience": 50,
        "responses_per_tree": 1,
    }


def _counted(records, counts):
    """The records, their two verdicts worth ``counts`` answers."""

    def verdicts(record):
        pairs = zip(record.verdicts, counts, strict=True)
        return {"verdicts": tuple(verdict.model_copy(update={"count": count}) for verdict, count in pairs)}

    return [record.model_copy(update=verdicts(record)) for record in records]


def _losses(report):
    return [(entry["step"], entry["loss"]) for entry in report["log"] if "loss" in entry]


def test_training_learns_saves_and_refuses_to_overwrite(options, tmp_path):
    report = run_train(TrainConfig(output=str(tmp_path / "run"), **{**options, "max_steps": 30}))
    assert report["train_verdicts"] == 16 and report["tokens_cut"] == 0
    assert report["by_code"] == {"verdicts": 0, "filled": 0, "corrected": 0}
    assert report["validation_after"]["loss"] < 0.7 * report["validation_before"]["loss"]
    stored = json.loads((tmp_path / "run" / "train.json").read_text())
    assert stored["steps"] == 30
    assert (tmp_path / "run" / "model" / "rubric_rm.json").exists()
    with pytest.raises(UserError, match="holds a run already"):
        run_train(TrainConfig(output=str(tmp_path / "run"), **options))


def test_resuming_gives_the_losses_of_an_uninterrupted_run(options, tmp_path):
    whole = run_train(TrainConfig(output=str(tmp_path / "whole"), **options))
    run_train(TrainConfig(output=str(tmp_path / "cut"), **options))
    for checkpoint in (tmp_path / "cut" / "checkpoints").glob("checkpoint-8"):
        os.rename(checkpoint, tmp_path / "gone")
    (tmp_path / "cut" / "checkpoints" / "checkpoint-7").mkdir()  # what a kill while writing leaves behind
    (tmp_path / "cut" / "checkpoints" / "checkpoint-7" / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path / "cut" / "checkpoints").name == "checkpoint-6"
    resumed = run_train(TrainConfig(output=str(tmp_path / "cut"), resume=True, **options))
    assert [step for step, _ in _losses(whole)] == list(range(1, 9))
    assert [loss for _, loss in _losses(resumed)] == pytest.approx([loss for _, loss in _losses(whole)], abs=1e-5)


def test_gradient_accumulation_equals_one_large_batch(options, judged, tmp_path):
    """Twice the budget in one pass and two passes of half of it see the same verdicts when trees fill both."""
    write_judged(options["data"], _counted(judged, (3, 1)))  # verdicts of unequal worth
    options |= {"eval_steps": 100, "max_steps": 1, "tokens_per_batch": 10_000, "pairwise_weight": 0.0}
    large = run_train(TrainConfig(output=str(tmp_path / "large"), **options))
    options |= {"tokens_per_batch": 1, "gradient_accumulation": 8}  # one tree a pass, all eight in one step
    small = run_train(TrainConfig(output=str(tmp_path / "small"), **options))
    assert _losses(small)[0][1] == pytest.approx(_losses(large)[0][1], rel=1e-4)
    grads = [next(entry["grad_norm"] for entry in report["log"] if "grad_norm" in entry) for report in (large, small)]
    assert grads[1] == pytest.approx(grads[0], rel=1e-3)


def test_counts_weigh_verdicts_and_only_their_ratios_matter(options, judged, tmp_path):
    """Counts that are all the same train as none do, to the last digit; unequal ones do not."""
    options |= {"eval_steps": 100, "max_steps": 1, "tokens_per_batch": 10_000, "pairwise_weight": 0.0}

    def first_step(name, counts):
        write_judged(tmp_path / f"{name}.jsonl", _counted(judged, counts))
        changed = options | {"data": str(tmp_path / f"{name}.jsonl")}
        report = run_train(TrainConfig(output=str(tmp_path / name), **changed))
        (entry,) = (entry for entry in report["log"] if "grad_norm" in entry)
        return entry["loss"], entry["grad_norm"]

    plain = first_step("plain", (1, 1))
    assert first_step("five", (5, 5)) == plain
    assert first_step("weighed", (3, 1)) != pytest.approx(plain, rel=1e-3)


def test_a_rubric_blind_model_never_learns_what_it_is_asked(options, judged, tmp_path):
    """Training, scoring and calibration: other criteria, the same answers."""
    with pytest.raises(UserError, match="rubric_blind hides them; train it with --drills 0"):
        run_train(TrainConfig(output=str(tmp_path / "drilled"), **options, rubric_blind=True, drills=2))

    def asked_otherwise(record):
        texts = (f"{record.response_id} is a mountain " * 3, "rhymes")
        criteria = zip(record.rubric.criteria, texts, strict=True)
        return record.model_copy(update={"rubric": Rubric(criteria=tuple(
            criterion.model_copy(update={"text": text, "tags": (text,)}) for criterion, text in criteria
        ))})  # fmt: skip

    judged = [r.model_copy(update={"split": "validation"}) if r.prompt_id == "p3" else r for r in judged]
    probs = []
    for name, records in (("one", judged), ("other", [asked_otherwise(record) for record in judged])):
        write_judged(options["data"], records)
        output = str(tmp_path / name)
        run_train(TrainConfig(output=output, **{**options, "max_steps": 2}, rubric_blind=True))
        report = run_calibrate(CalibrateConfig(model=f"{output}/model", data=options["data"]))
        assert {row["group_by"] for row in report["held_out"]} == {"none"}
        scorer = RubricScorer.from_pretrained(f"{output}/model", use_verifiers=False)
        probs.append(np.array([one.probs for one in scorer.score_records(records)]))
        assert (probs[-1][:, 0] == probs[-1][:, 1]).all() and len(np.unique(probs[-1])) > 6
    np.testing.assert_array_equal(*probs)


def _command(options, output, *extra):
    flags = [part for key, value in {**options, "output": output}.items() for part in (f"--{key}", str(value))]
    return ["-m", "policy.cli", "train", *flags, *extra]


@pytest.mark.slow
def test_a_killed_run_resumes(options, tmp_path):
    options |= {"max_steps": 200, "eval_steps": 5}
    command = [sys.executable, *_command(options, str(tmp_path / "run"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while last_checkpoint(tmp_path / "run" / "checkpoints") is None and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "model").exists()
    subprocess.run([*command, "--resume", "true"], cwd=ROOT, check=True, capture_output=True)
    report = json.loads((tmp_path / "run" / "train.json").read_text())
    assert [step for step, _ in _losses(report)] == list(range(1, 201))


@pytest.mark.slow
def test_two_processes_match_one_on_the_same_global_batch(options, tmp_path):
    options |= {"eval_steps": 4, "tokens_per_batch": 1}
    # torchrun, because `accelerate launch --cpu --num_processes 2` of accelerate 1.15 starts one process
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launch, *_command(options, str(tmp_path / "two"))]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    two = json.loads((tmp_path / "two" / "train.json").read_text())
    one = run_train(TrainConfig(output=str(tmp_path / "one"), **options, gradient_accumulation=2))
    assert two["processes"] == 2
    assert [step for step, _ in _losses(two)] == list(range(1, 9))
    assert [loss for _, loss in _losses(two)] == pytest.approx([loss for _, loss in _losses(one)], rel=1e-3)
