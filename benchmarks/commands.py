"""Commands of ours as benchmarks give them: in this process, with it over if one fails, and not twice."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policy.cli import main

# what small GRPO runs have in common: every rollout is judged, and KL is measured and hardly felt
SMALL_GRPO: dict[str, Any] = {
    "batch_size": 16,
    "group_size": 4,
    "response_length": 48,
    "lora_layers": 10,
    "kl_coef": 0.001,
    "gold_sample": 16,
}


def call(*words: Any) -> None:
    """Run one command. Ends the process with its exit code if it fails."""
    if code := main([str(word) for word in words]):
        sys.exit(code)


def options(settings: Mapping[str, Any]) -> list[str]:
    """``settings`` as a command line has them."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def run(folder: Path, *words: Any) -> None:
    """Run one command that writes ``folder``, or go on with it."""
    call(*words, "--output", folder, *(("--resume", "true") if folder.exists() else ()))


def once(folder: Path, finished: str, *words: Any) -> None:
    """`run`, unless ``folder`` holds the file ``finished``, which is the last that the command writes."""
    if not (folder / finished).exists():
        run(folder, *words)


def calibrate(model: Path, data: Path) -> None:
    """Calibrate a trained ``model`` on ``data``, unless that is done."""
    if not (model / "calibration.json").exists():
        call("calibrate", "--model", model, "--data", data)
