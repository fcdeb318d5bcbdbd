"""Distil new verdicts into a finished reward model, the old ones replayed; keep it only where it helps.

Owns which responses are learnt, which are replayed and which only measure; the work is `rm.further`'s.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rm.changes import forgotten
from rm.config import RedistilConfig
from rm.data import load_training
from rm.further import Lesson, Numbers, Start, begin, check, of_first_prompts, train_on
from rm.sides import require_unmasked
from rubric_data.errors import UserError
from rubric_data.records import JudgedResponse
from rubric_data.split import assign_splits, check_leaks, normalised, of_split

logger = logging.getLogger(__name__)
_NEW, _OLD = "new", "old"  # the sets that are measured: held-out new responses, the old validation split
_TITLES = {_NEW: "Held-out new verdicts", _OLD: "Old validation split"}
_FEW = 10  # prompts, below which nobody should believe an interval over them


@dataclass(frozen=True)
class Parts:
    """Who learns and who measures. No prompt of ``held_out`` or ``validation`` is in ``learnt`` or ``replayed``.

    ``cut``: whether ``held_out`` had to be cut out of the training prompts. ``left_out``: new ones to test prompts.
    """

    learnt: list[JudgedResponse]
    held_out: list[JudgedResponse]
    replayed: list[JudgedResponse]
    validation: list[JudgedResponse]
    cut: bool
    left_out: int

    def counts(self) -> dict[str, Any]:
        """Responses and prompts of each part, as JSON."""
        parts = {name: getattr(self, name) for name in ("learnt", "held_out", "replayed", "validation")}
        found = {name: {"prompts": len({r.prompt for r in own}), "responses": len(own)} for name, own in parts.items()}
        return found | {"held_out_cut": self.cut, "left_out": self.left_out}

    def line(self) -> str:
        """The same in words."""
        counts = self.counts()
        told = [
            f"{name.replace('_', ' ')} {counts[name]['responses']} to {counts[name]['prompts']} prompts"
            for name in ("learnt", "held_out", "replayed", "validation")
        ]
        return "responses: " + ", ".join(told)


def part(new: Sequence[JudgedResponse], old: Sequence[JudgedResponse], *, share: float, seed: int, name: str) -> Parts:
    """New and old responses by what they are for.

    A new response without a split has that of its prompt in ``old``, or else is for training. Those to validation
    prompts are held out, as a policy's rollouts on them may be; where there are none, ``share`` of the new training
    prompts is, chosen by `rubric_data.split.assign_splits`, and old responses to these are not replayed either. Raises
    LeakError at a prompt in two splits, and UserError where a part is empty; ``name`` is the new file's.
    """
    known = {normalised(record.prompt): record.split for record in old}
    new = [
        record.model_copy(update={"split": record.split or known.get(normalised(record.prompt)) or "train"})
        for record in new
    ]
    check_leaks([*old, *new], shared_rubrics=True)
    learnt, held_out, tests = ([r for r in new if r.split == split] for split in ("train", "validation", "test"))
    if not learnt:
        raise UserError(f"{name}: no response is to a training prompt, so there is nothing to learn; judge some")
    if cut := not held_out:
        unsplit = [record.model_copy(update={"split": None}) for record in learnt]
        again = assign_splits(unsplit, fractions=(1 - share, share, 0.0), seed=seed, shared_rubrics=True, name=name)
        learnt, held_out = ([r for r in again if r.split == split] for split in ("train", "validation"))
    aside = {normalised(record.prompt) for record in held_out} | {record.prompt_id for record in held_out}
    replayed = [r for r in of_split(old, "train") if normalised(r.prompt) not in aside and r.prompt_id not in aside]
    return Parts(learnt, held_out, replayed, of_split(old, "validation"), cut, len(tests))


def objections(before: Numbers, after: Numbers, tolerance: float) -> list[str]:
    """Why the new weights are not worth keeping, a phrase for each reason; none if they are."""
    old, new = before[_NEW]["brier"], after[_NEW]["brier"]
    gained = [] if new < old else [f"brier on new verdicts did not fall: {old:.4f} before, {new:.4f} after"]
    lost = {
        "on old ones": forgotten(before[_OLD], after[_OLD], tolerance),
        "on new verdicts": [] if gained else forgotten(before[_NEW], after[_NEW], tolerance),
    }
    return gained + [f"{phrase} {where}" for where, phrases in lost.items() for phrase in phrases]


def run_redistil(config: RedistilConfig) -> dict[str, Any]:
    """Train on as ``config`` says; returns what redistil.json holds. Raises UserError on bad input.

    The model in the run folder has the new weights if there are no `objections` to them, else the old.
    """
    check(config)
    if not 0 < config.held_out < 1:
        raise UserError(f"held_out: must lie between 0 and 1, got {config.held_out}; 0.2 measures on a fifth")
    new, by_code = load_training(config.new, use_verifiers=config.use_verifiers)
    old, _ = load_training(config.data, use_verifiers=config.use_verifiers)
    parts = part(new, old, share=config.held_out, seed=config.seed, name=config.new)
    if config.replay and not parts.replayed:
        raise UserError(
            f"{config.data}: every training prompt is held out, so nothing is left to replay; lower --held_out, or "
            "set --replay 0"
        )
    measured = {_NEW: parts.held_out, _OLD: parts.validation}
    watched = {name: of_first_prompts(records, config.eval_prompts) for name, records in measured.items()}
    require_unmasked(f"{config.new}, what is learnt", parts.learnt)
    require_unmasked(f"{config.new}, what is measured on", [parts.held_out[place] for place in watched[_NEW]])
    if (prompts := len({record.prompt for record in parts.held_out})) < _FEW:
        logger.warning(
            "%s: only %d prompt(s) are held out to measure the gain on; read its interval with doubt",
            config.new,
            prompts,
        )
    start = Start.of(config)
    lesson = Lesson(
        fresh=start.trees(config, parts.learnt, tail=config.tail),
        replayed=start.ordinary(config, parts.replayed) if config.replay else [],
        tail_weight=config.tail_weight,
        measured=measured,
        watched=watched,
        gain=lambda found: -found[_NEW]["brier"],
        objections=lambda before, after: objections(before, after, config.tolerance),
    )
    begin(config, parts.line())
    about = {"parts": parts.counts(), "by_code": by_code and asdict(by_code)}
    return train_on(config, start, lesson, stage="redistil", titles=_TITLES, about=about)
