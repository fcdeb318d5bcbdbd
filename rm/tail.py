"""The tail stage: train on, on pairs of excellent responses, beside ordinary ones; keep it only where nothing is lost.

What a pair is says `rm.mining`; the work is `rm.further`'s.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from rm.changes import TAIL_ACCURACY, forgotten
from rm.config import TailConfig
from rm.data import TrainingTree, load_training
from rm.further import Lesson, Numbers, Start, begin, check, of_first_prompts, train_on
from rm.mining import Mined, mine
from rubric_data.errors import UserError
from rubric_data.files import json_number
from rubric_data.records import JudgedResponse
from rubric_data.split import SPLITS, of_split

_SET = "validation"  # the only one that is measured


def with_pairs(trees: Sequence[TrainingTree], mined: Mined) -> list[TrainingTree]:
    """The trees with those of the mined pairs, and no other, whose two responses share one."""
    pairs = set(zip(mined.pairs.first_M.tolist(), mined.pairs.second_M.tolist(), strict=True))
    found = []
    for tree in trees:
        inside = itertools.permutations(range(len(tree.places)), 2)
        own = [(better, worse) for better, worse in inside if (tree.places[better], tree.places[worse]) in pairs]
        found.append(dataclasses.replace(tree, pairs=own))
    return found


def objections(before: Numbers, after: Numbers, tolerance: float) -> list[str]:
    """Why the new weights are not worth keeping, a phrase for each reason; none if they are."""
    old, new = before[_SET], after[_SET]
    worse = new[TAIL_ACCURACY] < old[TAIL_ACCURACY]
    tail = [f"tail pair accuracy fell from {old[TAIL_ACCURACY]:.4f} to {new[TAIL_ACCURACY]:.4f}"] if worse else []
    return tail + forgotten(old, new, tolerance)


def run_tail(config: TailConfig) -> dict[str, Any]:
    """Train on as ``config`` says; returns what tail.json holds. Raises UserError on bad input, or if there is no pair.

    The model in the run folder has the new weights if there are no `objections` to them, else the old.
    """
    check(config)
    if not 0 <= config.min_margin <= 1:
        raise UserError(f"min_margin: must lie in [0, 1], got {config.min_margin}")
    records, by_code = load_training(config.data, use_verifiers=config.use_verifiers)
    training, validation = (of_split(records, split) for split in SPLITS[:2])
    mined = mine(training, tail=config.tail, min_margin=config.min_margin)
    if not mined.with_pairs:
        raise UserError(f"{config.data}: no pairs to train on, {_why_none(mined)}; widen --tail or lower --min_margin")
    watched = _watched(validation, config)
    start = Start.of(config)
    trees = with_pairs(start.trees(config, training, chosen=mined.responses), mined)
    lesson = Lesson(
        fresh=trees,
        replayed=start.ordinary(config, training),
        tail_weight=1.0,
        measured={_SET: validation},
        watched={_SET: watched},
        gain=lambda found: found[_SET][TAIL_ACCURACY],
        objections=lambda before, after: objections(before, after, config.tolerance),
    )
    begin(config, _mined_line(mined))
    about = {
        "pairs": _counts(mined) | {"in_trees": sum(len(tree.pairs or ()) for tree in trees)},
        "by_code": by_code and dataclasses.asdict(by_code),
    }
    return train_on(config, start, lesson, stage="tail", titles={_SET: "Validation"}, about=about)


def _watched(validation: Sequence[JudgedResponse], config: TailConfig) -> list[int]:
    """Places of what every validation reads: responses to the first prompts. Raises UserError if they have no pair."""
    watched = of_first_prompts(validation, config.eval_prompts)
    found = mine([validation[place] for place in watched], tail=config.tail)
    if not found.with_pairs:
        raise UserError(
            f"{config.data}: the judge ties the best responses to each of the {found.prompts} validation prompts that "
            "are read, so nothing could be measured; raise --eval_prompts, or widen --tail"
        )
    return watched


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
