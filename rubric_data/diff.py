"""What changed between two rubrics of one prompt. Compares and prints; keeps nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from rubric_data.config import DiffConfig
from rubric_data.io import load_prompts
from rubric_data.lint import lexical_similarity, shown
from rubric_data.records import Criterion, Rubric

_REWORDED = 0.4  # criteria less similar than this are two different ones
_PROMPT = 60  # characters of a prompt that are shown beside its id


@dataclass(frozen=True)
class RubricDiff:
    """``added``, ``removed``; ``reworded`` and ``reweighted``: (before, after). Reworded ones may be reweighted too."""

    added: tuple[Criterion, ...] = ()
    removed: tuple[Criterion, ...] = ()
    reworded: tuple[tuple[Criterion, Criterion], ...] = ()
    reweighted: tuple[tuple[Criterion, Criterion], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.reworded or self.reweighted)


def diff_rubrics(before: Rubric | None, after: Rubric | None) -> RubricDiff:
    """What turns ``before`` into ``after``; None is a rubric without criteria.

    Equal texts belong together; of the rest, the most similar pairs do, each criterion once, as far as they are
    similar at all.
    """
    old = list(before.criteria) if before else []
    new = list(after.criteria) if after else []
    by_text = {criterion.text: criterion for criterion in new}
    same = [(criterion, by_text[criterion.text]) for criterion in old if criterion.text in by_text]
    kept = {criterion.text for criterion, _ in same}
    old, new = ([c for c in side if c.text not in kept] for side in (old, new))
    reworded = _pairs(old, new)
    matched = {id(criterion) for pair in reworded for criterion in pair}
    return RubricDiff(
        added=tuple(c for c in new if id(c) not in matched),
        removed=tuple(c for c in old if id(c) not in matched),
        reworded=tuple(reworded),
        reweighted=tuple((a, b) for a, b in same if a.weight != b.weight),
    )


def _pairs(old: list[Criterion], new: list[Criterion]) -> list[tuple[Criterion, Criterion]]:
    if not old or not new:
        return []
    similarity = lexical_similarity([criterion.text for criterion in old + new])[: len(old), len(old) :]
    found = []
    while similarity.max() >= _REWORDED:
        row, column = (int(place) for place in np.unravel_index(similarity.argmax(), similarity.shape))
        found.append((old[row], new[column]))
        similarity[row, :] = similarity[:, column] = -1.0
    return found


def run_diff(config: DiffConfig) -> dict[str, Any]:
    """Print what changed from ``config.before`` to ``config.after``; returns counts. Raises UserError on bad input."""
    sides = [load_prompts(name) for name in (config.before, config.after)]
    before, after = ({record.prompt_id: record.rubric for record in side} for side in sides)
    prompts = {record.prompt_id: record.prompt for side in sides for record in side}
    console = Console()
    diffs = {key: diff_rubrics(before.get(key), after.get(key)) for key in dict.fromkeys((*before, *after))}
    for prompt_id, diff in diffs.items():
        lone = (
            ""
            if prompt_id in before and prompt_id in after
            else ", only " + ("before" if prompt_id in before else "after")
        )
        if diff or lone:
            heading = Text.assemble((shown(prompt_id) + lone, "bold"), f": {_first_words(prompts[prompt_id])}")
            console.print(heading, soft_wrap=True)
            for line in _lines(diff):
                console.print(line, soft_wrap=True)
    parts = ("added", "removed", "reworded", "reweighted")
    return {
        "prompts": len(diffs),
        "changed": sum(map(bool, diffs.values())),
        **{part: sum(len(getattr(diff, part)) for diff in diffs.values()) for part in parts},
    }


def _lines(diff: RubricDiff) -> Iterable[Text]:
    """A line for each change; as Text, for criteria are written by models and may hold markup."""
    for criterion in diff.removed:
        yield Text(f"  - {_weighted(criterion)}", style="red")
    for criterion in diff.added:
        yield Text(f"  + {_weighted(criterion)}", style="green")
    for before, after in diff.reworded:
        yield Text(f"  ~ {_weighted(before)}")
        yield Text(f"    {_weighted(after)}")
    for before, after in diff.reweighted:
        yield Text(f"  = [{before.weight:g} -> {after.weight:g}] {shown(after.text)}")


def _first_words(prompt: str) -> str:
    words = shown(prompt)
    return words if len(words) <= _PROMPT else f"{words[: _PROMPT - 1].rstrip()}…"


def _weighted(criterion: Criterion) -> str:
    return f"[{criterion.weight:g}] {shown(criterion.text)}"
