"""Train a finished reward model on, with ordinary training replayed beside; keep that only where nothing is lost.

Owns the steps that `rm.tail` and `rm.redistil` share, their trainer and their run folder. What is learnt, what is
measured, and what speaks against the new weights they say in a `Lesson`; what was gained or lost is told by
`rm.changes`; training is `rm.train`'s.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from rm import changes
from rm.attention import choose_backend
from rm.backbone import as_dtype, load_tokenizer
from rm.config import RedistilConfig, TailConfig
from rm.data import ReplaySampler, TrainingTree, build_trees
from rm.encoding import Encoder
from rm.model import RubricRewardModel
from rm.scorer import RubricScorer
from rm.train import MODEL_FOLDER, DistillationTrainer, training_arguments
from rubric_data.builtin.drills import drills
from rubric_data.errors import UserError
from rubric_data.files import start_run, write_json
from rubric_data.records import JudgedResponse

_SELECTION = "selection"  # validation number of the best checkpoint

Config = TailConfig | RedistilConfig
Numbers = Mapping[str, Mapping[str, float]]  # of each set that is measured, by its name, what `rm.changes.numbers` says


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What is learnt, and how it is told whether that was worth it.

    ``fresh`` trees are learnt, one pass over them is an epoch; ``replayed`` ones fill every batch up. The models before
    and after answer the responses in ``measured``, sets with a name each; every validation reads the places
    ``watched`` of each. ``gain`` is what should rise, by which checkpoints are told apart; ``objections`` (before,
    after) are phrases, any of which has the old weights kept.
    """

    fresh: list[TrainingTree]
    replayed: list[TrainingTree]
    tail_weight: float
    measured: Mapping[str, Sequence[JudgedResponse]]
    watched: Mapping[str, Sequence[int]]
    gain: Callable[[Numbers], float]
    objections: Callable[[Numbers, Numbers], list[str]]


@dataclasses.dataclass(frozen=True)
class Start:
    """The model to train on from, and what reads text for it."""

    model: RubricRewardModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder

    @classmethod
    def of(cls, config: Config) -> Self:
        """Seed everything and load ``config.model``. Raises UserError if it is no reward model."""
        set_seed(config.seed)
        device = PartialState(cpu=not torch.cuda.is_available()).device
        choose_backend(config.attention, device, as_dtype(config.dtype, device))
        model = RubricRewardModel.from_pretrained(
            config.model, dtype=config.dtype, attention=config.attention, trainable=True
        )
        if config.gradient_checkpointing:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        tokenizer = load_tokenizer(config.model)
        return cls(model, tokenizer, Encoder(tokenizer, model.max_length, model.rubric_blind))

    def ordinary(self, config: Config, records: Sequence[JudgedResponse]) -> list[TrainingTree]:
        """The trees that `train` makes of ``records``, drills included."""
        texts = [(record.prompt, record.response) for record in records]
        drilled = drills(texts, config.drills, f"drills {config.seed}")
        return self.trees(config, records, drilled=drilled)

    def trees(self, config: Config, records: Sequence[JudgedResponse], **more: Any) -> list[TrainingTree]:
        """`rm.data.build_trees` as ``config`` has it."""
        shape = {"responses_per_tree": config.responses_per_tree, "seed": config.seed} | more
        return build_trees(records, self.encoder, **shape)


class FurtherTrainer(DistillationTrainer):
    """Distils the fresh trees of ``lesson``, a share of every batch being replayed ones.

    Checkpoints are told apart by the lesson's gain; one that has forgotten more than ``config.tolerance`` since
    ``start``, on any set, comes after all that have not.
    """

    config: Config
    start: Numbers

    def __init__(self, config: Config, model: RubricRewardModel, encoder: Encoder, lesson: Lesson) -> None:
        self.encoder, self.lesson = encoder, lesson
        self.watched = {
            name: [lesson.measured[name][place] for place in places] for name, places in lesson.watched.items()
        }
        args = training_arguments(config, Path(config.output), _SELECTION)
        trees = [*lesson.fresh, *lesson.replayed]  # in the order the sampler counts them
        watched = [record for records in self.watched.values() for record in records]
        super().__init__(config, model, args, tail_weight=lesson.tail_weight, train_dataset=trees, eval_dataset=watched)

    def sampler(self) -> ReplaySampler:
        """An epoch is one pass over the fresh trees."""
        lengths, others = ([one.tree.length for one in trees] for trees in (self.lesson.fresh, self.lesson.replayed))
        budget, processes = self.config.tokens_per_batch, self.accelerator.num_processes
        return ReplaySampler(lengths, others, self.config.replay, budget, self.args.seed, processes)

    def validate(self) -> dict[str, float]:
        """The numbers of the watched responses, and the one that checkpoints are chosen by."""
        found = {name: self.numbers(name, self.answers(records)) for name, records in self.watched.items()}
        forgot = any(changes.forgotten(self.start[name], found[name], self.config.tolerance) for name in found)
        return flat(found) | {_SELECTION: self.lesson.gain(found) - forgot}

    def numbers(self, name: str, probs: Sequence[np.ndarray]) -> dict[str, float]:
        """What these answers about the watched responses of a set are worth."""
        return changes.numbers(self.watched[name], probs, self.config.tail)

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


def check(config: Config) -> None:
    """Raise UserError at a number out of range."""
    if not 0 < config.tail <= 1:
        raise UserError(f"tail: must lie in (0, 1], got {config.tail}; 0.25 is each prompt's top quarter")
    if not 0 <= config.replay < 1:
        raise UserError(f"replay: must lie in [0, 1), got {config.replay}; 0.5 makes half of every batch ordinary")
    if not 0 <= config.tolerance <= 1:
        raise UserError(f"tolerance: must lie in [0, 1], got {config.tolerance}")
    for name, least in (("bootstrap", 1), ("eval_prompts", 1), ("responses_per_tree", 2)):
        if getattr(config, name) < least:
            raise UserError(f"{name}: must be at least {least}, got {getattr(config, name)}")


def of_first_prompts(records: Sequence[JudgedResponse], count: int) -> list[int]:
    """Places of the responses to the first ``count`` prompts."""
    prompts = set(list(dict.fromkeys(record.prompt for record in records))[:count])
    return [place for place, record in enumerate(records) if record.prompt in prompts]


def flat(found: Numbers) -> dict[str, float]:
    """The numbers of all sets in one, by names that begin with the set's where there are several."""
    several = len(found) > 1
    return {
        f"{name}_{key}" if several else key: value for name, numbers in found.items() for key, value in numbers.items()
    }


def train_on(
    config: Config, start: Start, lesson: Lesson, *, stage: str, titles: Mapping[str, str], about: dict[str, Any]
) -> dict[str, Any]:
    """Train ``start`` on by ``lesson``; returns what <stage>.json holds, ``about`` included.

    The model in the run folder has the new weights if there is no objection, else the old. ``titles`` are of the sets
    that are measured. `start_run` has been called: a run that was interrupted goes on.
    """
    state = PartialState()
    folder = Path(config.output)
    trainer = FurtherTrainer(config, start.model, start.encoder, lesson)
    started = time.perf_counter()
    before = {name: trainer.answers(records) for name, records in lesson.measured.items()}
    trainer.start = {
        name: trainer.numbers(name, [before[name][place] for place in places])
        for name, places in lesson.watched.items()
    }
    result = trainer.run(resume=config.resume)
    after = {name: trainer.answers(records) for name, records in lesson.measured.items()}
    numbers = functools.partial(_numbers, lesson.measured, tail=config.tail)
    objections = lesson.objections(numbers(before), numbers(after))
    compared = {
        name: changes.compare(
            records, before[name], after[name], tail=config.tail, bootstrap=config.bootstrap, seed=config.seed
        )
        for name, records in lesson.measured.items()
    }
    report = {
        "kept": not objections,
        "objections": objections,
        **about,
        "steps": result.global_step,
        "best_step": trainer.state.best_global_step,
        "processes": trainer.accelerator.num_processes,
        "seconds": round(time.perf_counter() - started, 1),
        "fresh_trees": len(lesson.fresh),
        "ordinary_trees": len(lesson.replayed),
        "tokens_cut": sum(tree.cut for tree in lesson.fresh),
        **compared,
        "watched": {"responses": sum(map(len, lesson.watched.values())), "before": flat(trainer.start)},
        "log": trainer.state.log_history,
    }
    if state.is_main_process:
        if objections:
            trainer.model.load_weights(config.model)
        trainer.model.save(folder / MODEL_FOLDER)
        start.tokenizer.save_pretrained(folder / MODEL_FOLDER)
        write_json(folder / f"{stage}.json", report)
        named = {titles[name]: found for name, found in compared.items()}
        changes.plot(folder / f"{stage}.png", named)
        _show(objections, named, folder / f"{stage}.png")
    state.wait_for_everyone()
    return report


def begin(config: Config, said: str) -> None:
    """Start or go on with the run in ``config.output``, the last thing that bad input can stop, and print ``said``."""
    state = PartialState()
    if state.is_main_process:
        start_run(config.output, dataclasses.asdict(config), resume=config.resume)
        Console().print(said, markup=False)
    state.wait_for_everyone()


def _numbers(
    measured: Mapping[str, Sequence[JudgedResponse]], probs: Mapping[str, Sequence[np.ndarray]], *, tail: float
) -> Numbers:
    return {name: changes.numbers(records, probs[name], tail) for name, records in measured.items()}


def _show(objections: Sequence[str], named: Mapping[str, Mapping[str, Any]], plot: Path) -> None:
    console = Console()
    for title, found in named.items():
        for table in changes.tables(title, found):
            console.print(table)
    kept = f"the model has its old weights: {', '.join(objections)}" if objections else "the model has the new weights"
    console.print(kept, soft_wrap=True, markup=False)
    console.print(f"plot: {plot}", soft_wrap=True, markup=False)
