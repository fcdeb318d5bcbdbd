"""Checkpoints of training runs: find them, score them on judged responses, average their weights.

Scores are kept in files, one a checkpoint, so that nothing is scored twice. What is made of them is `rm.panel`'s.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from rm.backbone import count_parameters, load_tokenizer
from rm.bench import Run
from rm.encoding import Encoder
from rm.model import RubricRewardModel
from rm.panel import Scale
from rm.scorer import RubricScorer
from rm.scores import SUFFIXES, read_scores, write_scores
from rm.snr import blocks
from rm.train import CHECKPOINTS, whole_checkpoints
from rubric_data.errors import UserError
from rubric_data.files import CONFIG_NAME
from rubric_data.records import JudgedResponse, content_hash


@dataclass(frozen=True)
class Trained:
    """One training run and those of its checkpoints that count, by step: model folders, or files of scores."""

    path: Path
    steps: tuple[int, ...]
    sources: tuple[Path, ...]

    @property
    def scored(self) -> bool:
        """Whether the checkpoints are files of scores already."""
        return self.sources[0].suffix in SUFFIXES

    @property
    def key(self) -> str:
        """A name for a folder of this run's scores, the same wherever the command is called from."""
        where = self.path.resolve()
        return f"{where.name}-{content_hash(str(where))[:8]}"


def find(path: str, *, last: int, early: int) -> Trained:
    """The last ``last`` checkpoints of the run at ``path``, and ``early`` of those before, evenly spread.

    ``path``: the folder of a training run, or one of score files whose names end in the step (step-100.parquet).
    Raises UserError if it is neither, or has too few checkpoints.
    """
    folder = Path(path)
    if (folder / CHECKPOINTS).is_dir():
        found = whole_checkpoints(folder / CHECKPOINTS)
        remedy = f"train with --keep_checkpoints {last + early}, or lower --last"
    else:
        files = [file for file in folder.glob("*") if file.suffix in SUFFIXES]
        found = {int(match[1]): file for file in files if (match := re.search(r"(\d+)$", file.stem))}
        if len(found) < len(files):
            raise UserError(f"{path}: every score file needs a step of its own in its name, such as step-100.parquet")
        remedy = "score more of them, or lower --last"
    if not found:
        raise UserError(f"{path}: holds no checkpoints; give the folder of a training run, or one of score files")
    if len(found) < last:
        raise UserError(f"{path}: has {len(found)} checkpoints, and {last} are asked for; {remedy}")
    steps = sorted(found)
    before = steps[: len(steps) - last]
    spread = np.unique(np.linspace(0, len(before) - 1, min(early, len(before))).round().astype(int))
    chosen = [before[place] for place in spread] + steps[len(before) :]
    return Trained(folder, tuple(chosen), tuple(found[step] for step in chosen))


def score_runs(
    trained: Sequence[Trained],
    names: Sequence[str],
    records: Sequence[JudgedResponse],
    folder: Path,
    *,
    last: int,
    average: int,
    tokens_per_batch: int,
) -> list[Run]:
    """Predictions of every checkpoint on ``records``, from ``folder`` where it has them already.

    ``average``: also score the mean of the weights of so many neighbours among the last, where there are weights;
    0 scores none. The models answer every criterion, uncalibrated.
    """
    missing = [job for run in trained for job in _jobs(run, folder, last, average) if not job[0].exists()]
    for path, sources in track(missing, "scoring checkpoints", console=Console(stderr=True), transient=True):
        model = average_weights(sources)
        encoder = Encoder(load_tokenizer(model.base), model.max_length)
        scorer = RubricScorer(model, encoder, tokens_per_batch=tokens_per_batch, use_verifiers=False)
        write_scores(path, records, scorer.score_records(records))
    return [_read(run, name, records, folder, last, average) for run, name in zip(trained, names, strict=True)]


_Job = tuple[Path, tuple[Path, ...]]  # a file of scores to write, and the checkpoints whose mean is scored


def _jobs(run: Trained, folder: Path, last: int, average: int) -> list[_Job]:
    """One for each checkpoint, then one for each block of the last ones."""
    if run.scored:
        return []
    home = folder / run.key
    single = [(home / f"step-{step}.parquet", (at,)) for step, at in zip(run.steps, run.sources, strict=True)]
    steps, sources = run.steps[-last:], run.sources[-last:]
    several = [
        (home / "averaged" / f"steps-{'-'.join(map(str, steps[block]))}.parquet", sources[block])
        for block in (blocks(last, average) if average else [])
    ]
    return single + several


def _read(run: Trained, name: str, records: Sequence[JudgedResponse], folder: Path, last: int, average: int) -> Run:
    paths = [path for path, _ in _jobs(run, folder, last, average)] or run.sources
    predictions = [read_scores(path, records) for path in paths]
    count = len(run.steps)
    return Run(name, run.steps, predictions[:count], predictions[count:])


@torch.no_grad()
def average_weights(folders: Sequence[Path]) -> RubricRewardModel:
    """The model whose weights are the mean of those in ``folders``, LoRA folded in before.

    Factors of LoRA are not averaged: the mean of products is not the product of means. Holds one copy of the weights
    in float32 beside a model.
    """
    model = _merged(folders[0])
    if len(folders) == 1:
        return model
    total = {name: tensor.to(torch.float32, copy=True) for name, tensor in model.state_dict().items()}
    for folder in folders[1:]:
        for name, tensor in _merged(folder).state_dict().items():
            total[name] += tensor
    model.load_state_dict({name: tensor / len(folders) for name, tensor in total.items()})
    return model


def _merged(folder: Path) -> RubricRewardModel:
    model = RubricRewardModel.from_pretrained(folder)
    model.merge()
    return model


def scale(run: Trained) -> Scale:
    """How much a finished training run was given. Raises UserError if its folder does not tell."""
    try:
        report = json.loads((run.path / "train.json").read_text(encoding="utf-8"))
        base = json.loads((run.path / CONFIG_NAME).read_text(encoding="utf-8"))["model"]
        passes = max(entry["epoch"] for entry in report["log"] if "epoch" in entry)
        return Scale(verdicts=report["train_verdicts"] * min(passes, 1.0), parameters=count_parameters(base))
    except (OSError, ValueError, KeyError):
        raise UserError(f"{run.path}: is no finished training run (train.json); a ladder needs one") from None
