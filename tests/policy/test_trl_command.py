"""The reward by its dotted path, through TRL's own command line, as docs/rl.md has it."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from policy.prompts import rubric_prompts
from policy.reward import reward_dataset
from rm.model import RubricRewardModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_trl_finds_the_reward_by_its_dotted_path(method, tmp_path, tiny_backbone, judged):
    RubricRewardModel.from_language_model(tiny_backbone, max_length=512).save(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "model")
    reward_dataset(rubric_prompts(judged)).to_json(tmp_path / "data" / "train.jsonl")
    options = {
        "reward_funcs": "policy.reward.from_environment",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "run",
        "model_name_or_path": tiny_backbone,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "beta": 0.02,
        "report_to": "none",
    }
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {
        "RUBRIC_RM_MODEL": str(tmp_path / "model"),
        "RUBRIC_RM_REWARD": "proxy",
        "RUBRIC_RM_USE_VERIFIERS": "false",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [Path(sysconfig.get_path("scripts"), "trl"), method, *given, "--use_peft", "--use_cpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["reward"] < 1 and row["rewards/from_environment/mean"] == row["reward"]
        assert row["rubric/unscored"] == 0
        assert sum(name.startswith("criteria/") for name in row) == 2  # a group shares its prompt's two criteria
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
