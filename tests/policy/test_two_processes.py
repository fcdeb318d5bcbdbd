"""The group commands in two processes, as torchrun starts them, on a random policy and a random reward model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from policy.cli import main
from rm.model import RubricRewardModel
from rubric_data.records import Criterion, Rubric, Verifier
from tests.policy.fruit import read_lines, small_run, words, write_fruit

ROOT = Path(__file__).resolve().parents[2]
RUBRIC = Rubric(
    criteria=(
        Criterion(id="commas", text="has no comma", verifier=Verifier(name="ifeval:punctuation:no_comma")),
        Criterion(id="tone", text="is friendly"),
    )
)
DECLINES = """
import sys
from policy import watching
from policy.cli import main

class Watch(watching.GoldWatch):
    def look(self, step, rollouts):
        row = super().look(step, rollouts)
        self._alarm = watching.DECLINE if step == 2 else None
        open(sys.argv[1], "a").write(f"{step} {len(rollouts)}\\n")
        return {**row, "alarm": self._alarm}

from policy import stage
stage.GoldWatch = Watch
sys.exit(main(sys.argv[2:]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def options(tmp_path, tiny_backbone):
    """Two updates of eight rollouts, which two processes do in one pass each."""
    RubricRewardModel.from_language_model(tiny_backbone, max_length=512).save(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "model")
    data = write_fruit(tmp_path / "data.jsonl", RUBRIC, ["train"] * 4 + ["test"])
    more = {"reward_model": tmp_path / "model", "steps": 2, "eval_samples": 2, "save_steps": 1}
    return words(small_run(tiny_backbone, data, **more))


def launch(*command):
    """Run a script's or a module's command in two processes; what it printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*torchrun, *command], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("method", ["grpo", "online-dpo"])
def test_two_processes_share_an_update_and_the_first_writes(method, options, tmp_path):
    two = [*options, "--output", str(tmp_path / "two")]
    printed = launch("-m", "policy.cli", method, *two)
    assert printed.count("/2  proxy 0.") == 2  # one line an update
    launch("-m", "policy.cli", method, *two, "--resume", "true", "--steps", "3")
    rows = read_lines(tmp_path / "two" / "metrics.jsonl")
    assert [(row["step"], row["episode"], row["reward/judged"]) for row in rows] == [(1, 8, 4), (2, 16, 4), (3, 24, 4)]
    for row in rows:  # both are of the rollouts of both processes
        assert row["reward/proxy"] == pytest.approx((row["criteria/has no comma"] + row["criteria/is friendly"]) / 2)
    assert main([method, *options, "--output", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["steps"], two["steps"]) == (2, 3)
    assert (one["gold_before"], one["proxy_before"]) == (two["gold_before"], two["proxy_before"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


def test_an_alarm_ends_both(options, tmp_path):
    (tmp_path / "declines.py").write_text(DECLINES)
    more = ["--steps", "4", "--on_alarm", "stop", "--output", str(tmp_path / "run")]
    launch(str(tmp_path / "declines.py"), str(tmp_path / "looks"), "rloo", *options, *more)
    assert (tmp_path / "looks").read_text() == "1 8\n2 8\n"  # one process looks, at the rollouts of both
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["alarm_step"]) == (2, 2)
