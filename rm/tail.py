"""The tail stage: train on, on pairs of excellent responses, beside ordinary ones; keep it only where nothing is lost.

Orders the steps. What a pair is says `rm.mining`; what was gained or lost, `rm.tail_report`; training is `rm.train`'s.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import set_seed

from rm import tail_report
from rm.attention import choose_backend
from rm.backbone import as_dtype, load_tokenizer
from rm.config import TailConfig
from rm.data import ReplaySampler, TrainingTree, build_trees, load_exact, load_judged
from rm.encoding import Encoder
from rm.mining import Mined, mine
from rm.model import RubricRewardModel
from rm.scorer import RubricScorer
from rm.train import MODEL_FOLDER, DistillationTrainer, training_arguments
from rubric_data.builtin.drills import drills
from rubric_data.errors import UserError
from rubric_data.files import json_number, start_run, write_json
from rubric_data.records import JudgedResponse
from rubric_data.split import SPLITS, of_split

FILE = "tail.json"
PLOT = "tail.png"
_SELECTION = "selection"  # validation number of the best checkpoint


class TailTrainer(DistillationTrainer):
    """Distils trees of mined pairs, a share of every batch being ordinary trees.

    Checkpoints are told apart by the tail's pair accuracy on ``watched``; one that has forgotten more than
    ``config.tolerance`` since ``start`` comes after all that have not.
    """

    config: TailConfig
    start: dict[str, float]

    def __init__(
        self,
        config: TailConfig,
        model: RubricRewardModel,
        encoder: Encoder,
        *,
        mined: list[TrainingTree],
        ordinary: list[TrainingTree],
        watched: Sequence[JudgedResponse],
    ) -> None:
        self.encoder = encoder
        self.mined, self.ordinary, self.watched = mined, ordinary, watched
        args = training_arguments(config, Path(config.output), _SELECTION)
        trees = [*mined, *ordinary]  # in the order the sampler counts them
        super().__init__(config, model, args, tail_weight=1.0, train_dataset=trees, eval_dataset=watched)

    def sampler(self) -> ReplaySampler:
        """An epoch is one pass over the mined trees."""
        lengths, others = ([tree.tree.length for tree in trees] for trees in (self.mined, self.ordinary))
        budget, processes = self.config.tokens_per_batch, self.accelerator.num_processes
        return ReplaySampler(lengths, others, self.config.replay, budget, self.args.seed, processes)

    def validate(self) -> dict[str, float]:
        """The numbers of the watched responses, and the one that checkpoints are chosen by."""
        found = self.numbers(self.answers(self.watched))
        forgot = tail_report.forgotten(self.start, found, self.config.tolerance)
        return found | {_SELECTION: found[tail_report.TAIL_ACCURACY] - bool(forgot)}

    def numbers(self, probs: Sequence[np.ndarray]) -> dict[str, float]:
        """What these answers about the watched responses are worth."""
        return tail_report.numbers(self.watched, probs, self.config.tail)

    def answers(self, records: Sequence[JudgedResponse]) -> list[np.ndarray]:
        """The model's P(met) of every criterion, uncalibrated, (K,) for each record."""
        was_training = self.model.training
        scorer = RubricScorer(
            self.model.to(self.args.device),
            self.encoder,
            tokens_per_batch=self.config.tokens_per_batch,
            use_verifiers=False,
        )
        scored = scorer.score_records(records)
        self.model.train(was_training)
        return [one.probs for one in scored]


def with_pairs(trees: Sequence[TrainingTree], mined: Mined) -> list[TrainingTree]:
    """The trees with those of the mined pairs, and no other, whose two responses share one."""
    pairs = set(zip(mined.pairs.first_M.tolist(), mined.pairs.second_M.tolist(), strict=True))
    found = []
    for tree in trees:
        inside = itertools.permutations(range(len(tree.places)), 2)
        own = [(better, worse) for better, worse in inside if (tree.places[better], tree.places[worse]) in pairs]
        found.append(dataclasses.replace(tree, pairs=own))
    return found


def run_tail(config: TailConfig) -> dict[str, Any]:
    """Train on as ``config`` says; returns what tail.json holds. Raises UserError on bad input, or if there is no pair.

    The model in the run folder has the new weights if `tail_report.objections` has none against them, else the old.
    """
    _check(config)
    state = PartialState(cpu=not torch.cuda.is_available())
    folder = Path(config.output)
    set_seed(config.seed)
    choose_backend(config.attention, state.device, as_dtype(config.dtype, state.device))
    records, by_code = load_exact(config.data) if config.use_verifiers else (load_judged(config.data), None)
    training, validation = (of_split(records, split) for split in SPLITS[:2])
    mined = mine(training, tail=config.tail, min_margin=config.min_margin)
    if not mined.with_pairs:
        raise UserError(f"{config.data}: no pairs to train on, {_why_none(mined)}; widen --tail or lower --min_margin")
    watched = _watched(validation, config)
    model = RubricRewardModel.from_pretrained(
        config.model, dtype=config.dtype, attention=config.attention, trainable=True
    )
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    tokenizer = load_tokenizer(config.model)
    encoder = Encoder(tokenizer, model.max_length, model.rubric_blind)
    drilled = drills([(record.prompt, record.response) for record in training], config.drills, f"drills {config.seed}")
    grow = functools.partial(
        build_trees, training, encoder, responses_per_tree=config.responses_per_tree, seed=config.seed
    )
    trees, ordinary = with_pairs(grow(chosen=mined.responses), mined), grow(drilled=drilled)
    if state.is_main_process:  # last of what bad input can stop
        start_run(folder, dataclasses.asdict(config), resume=config.resume)
        Console().print(_mined_line(mined), markup=False)
    state.wait_for_everyone()
    trainer = TailTrainer(
        config, model, encoder, mined=trees, ordinary=ordinary, watched=[validation[k] for k in watched]
    )
    started = time.perf_counter()
    before = trainer.answers(validation)
    trainer.start = trainer.numbers([before[k] for k in watched])
    result = trainer.run(resume=config.resume)
    after = trainer.answers(validation)
    old, new = (tail_report.numbers(validation, probs, config.tail) for probs in (before, after))
    objections = tail_report.objections(old, new, config.tolerance)
    report = {
        "kept": not objections,
        "objections": objections,
        "pairs": _counts(mined) | {"in_trees": sum(len(tree.pairs or ()) for tree in trees)},
        "steps": result.global_step,
        "best_step": trainer.state.best_global_step,
        "processes": trainer.accelerator.num_processes,
        "seconds": round(time.perf_counter() - started, 1),
        "by_code": by_code and dataclasses.asdict(by_code),
        "tail_trees": len(trees),
        "ordinary_trees": len(ordinary),
        "tokens_cut": sum(tree.cut for tree in trees),
        "validation": tail_report.compare(
            validation, before, after, tail=config.tail, bootstrap=config.bootstrap, seed=config.seed
        ),
        "watched": {"responses": len(watched), "before": trainer.start},
        "log": trainer.state.log_history,
    }
    if state.is_main_process:
        if objections:
            trainer.model.load_weights(config.model)
        trainer.model.save(folder / MODEL_FOLDER)
        tokenizer.save_pretrained(folder / MODEL_FOLDER)
        write_json(folder / FILE, report)
        tail_report.plot(folder / PLOT, report)
        _show(report, folder)
    state.wait_for_everyone()
    return report


def _watched(validation: Sequence[JudgedResponse], config: TailConfig) -> list[int]:
    """Places of what every validation reads: responses to the first prompts. Raises UserError if they have no pair."""
    prompts = set(list(dict.fromkeys(record.prompt for record in validation))[: config.eval_prompts])
    watched = [place for place, record in enumerate(validation) if record.prompt in prompts]
    if not mine([validation[place] for place in watched], tail=config.tail).with_pairs:
        raise UserError(
            f"{config.data}: the judge ties the best responses to each of the {len(prompts)} validation prompts that "
            "are read, so nothing could be measured; raise --eval_prompts, or widen --tail"
        )
    return watched


def _check(config: TailConfig) -> None:
    """Raise UserError at a number out of range."""
    if not 0 < config.tail <= 1:
        raise UserError(f"tail: must lie in (0, 1], got {config.tail}; 0.25 is each prompt's top quarter")
    if not 0 <= config.replay < 1:
        raise UserError(f"replay: must lie in [0, 1), got {config.replay}; 0.5 makes half of every batch ordinary")
    for name in ("min_margin", "tolerance"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name}: must lie in [0, 1], got {getattr(config, name)}")
    for name in ("bootstrap", "eval_prompts", "responses_per_tree"):
        least = 2 if name == "responses_per_tree" else 1
        if getattr(config, name) < least:
            raise UserError(f"{name}: must be at least {least}, got {getattr(config, name)}")


def _counts(mined: Mined) -> dict[str, Any]:
    counts = {key: value for key, value in dataclasses.asdict(mined).items() if key != "pairs"}
    found = {"mined": len(mined.pairs.first_M), "responses": len(mined.responses)}
    return found | counts | {"mean_margin": json_number(mined.mean_margin)}


def _mined_line(mined: Mined) -> str:
    return (
        f"{len(mined.pairs.first_M)} pairs of {len(mined.responses)} responses to {mined.with_pairs} of "
        f"{mined.prompts} prompts, {mined.across} of two generators; no pair: {_why_none(mined)}"
    )


def _why_none(mined: Mined) -> str:
    return (
        f"the best tie for {mined.tied} prompts, are closer than the margin or the same text for {mined.too_close}, "
        f"and {mined.alone} have fewer than two rewarded responses"
    )


def _show(report: dict[str, Any], folder: Path) -> None:
    console = Console()
    for table in tail_report.tables(report):
        console.print(table)
    why = f"the model has its old weights: {', '.join(report['objections'])}"
    console.print("the model has the new weights" if report["kept"] else why, soft_wrap=True, markup=False)
    console.print(f"plot: {folder / PLOT}", soft_wrap=True, markup=False)
