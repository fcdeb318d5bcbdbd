"""Cut responses, or prompts alone, into train, validation and test so that nothing leaks. Knows no files, no models."""

import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar, get_args

from rubric_data.errors import LeakError, UserError
from rubric_data.records import JudgedResponse, PromptRecord, Split, content_hash

SPLITS: tuple[Split, ...] = get_args(Split)

Prompted = TypeVar("Prompted", PromptRecord, JudgedResponse)


def normalised(prompt: str) -> str:
    """``prompt`` without what a copy may differ in: Unicode form, case, white space."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def prompt_groups(records: Iterable[PromptRecord | JudgedResponse], *, shared_rubrics: bool = False) -> list[list[str]]:
    """Prompt ids that must stay in one split: those linked by an equal prompt text or an equal rubric.

    Links chain, so a group is a connected component. With ``shared_rubrics`` a rubric links nothing
    (checklists that belong to a category of prompts). Ids and groups are sorted.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for record in records:
        for other in _identities(record, shared_rubrics):
            parent[root(other)] = root(("prompt_id", record.prompt_id))
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, name in sorted(parent):
        if kind == "prompt_id":
            groups.setdefault(root((kind, name)), []).append(name)
    return sorted(groups.values())


def names_of(text: str | None) -> frozenset[str]:
    """The names that stand in ``text`` with commas between; none in None."""
    return frozenset(name.strip() for name in (text or "").split(",") if name.strip())


def without_generators(
    records: Sequence[JudgedResponse], held_out: Collection[str], *, name: str = "data"
) -> list[JudgedResponse]:
    """``records`` less the training and validation responses of the generators ``held_out``: unseen until the test.

    Raises UserError if one of them wrote nothing, or if a split is left empty; ``name`` says whose records.
    """
    known = {record.generator for record in records}
    if unknown := sorted(set(held_out) - known):
        raise UserError(
            f"held_out_generators: none of {name} is by {unknown[0]!r}; choose among {', '.join(sorted(known))}"
        )
    kept = [record for record in records if record.split == "test" or record.generator not in held_out]
    if emptied := sorted({str(record.split) for record in records} - {str(record.split) for record in kept}):
        raise UserError(f"held_out_generators: nothing is left for {emptied[0]}; hold out fewer")
    return kept


def assign_splits(
    records: Iterable[Prompted],
    *,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    shared_rubrics: bool = False,
    name: str = "data",
) -> list[Prompted]:
    """``records`` in their order, each with a split; groups of prompts (see `prompt_groups`) stay whole.

    ``fractions`` of the prompts go to train, validation and test, as near as whole groups allow, and every
    split with a positive fraction gets at least one group. Groups are taken by the rank of a SHA-256 of the
    seed and their first prompt id, so the order of the records plays no part. Records that all carry a
    split keep it. Raises UserError if only some do, or if there are too few groups; ``name`` says whose records.
    """
    records = list(records)
    carried = sum(record.split is not None for record in records)
    if carried:
        if carried < len(records):
            raise UserError(
                f"{name}: {carried} of {len(records)} records carry a split; give every record one, or none at all"
            )
        return records
    quotas = _quotas(fractions)
    groups = prompt_groups(records, shared_rubrics=shared_rubrics)
    if len(groups) < len(quotas):
        shared = "id or text" if shared_rubrics else "id, text or rubric"
        more = len(prompt_groups(records, shared_rubrics=True)) >= len(quotas) and not shared_rubrics
        allow = ", or let prompts of one rubric part by 'rubric-rm data split --shared_rubrics true'" if more else ""
        raise UserError(
            f"{name}: cannot be split: prompts that share an {shared} stay together, which leaves {len(groups)} "
            f"group(s) where {len(quotas)} are needed; add prompts, or set 'split' on every record{allow}"
        )
    ranked = sorted(groups, key=lambda group: content_hash([seed, group[0]]))
    split_of = _fill(ranked, quotas)
    return [record.model_copy(update={"split": split_of[record.prompt_id]}) for record in records]


def check_leaks(records: Iterable[JudgedResponse], *, shared_rubrics: bool = False) -> None:
    """Raise LeakError at the first prompt id, prompt text or rubric that stands in two splits.

    ``shared_rubrics`` lets a rubric stand in several. Responses without a split are not looked at.
    """
    first: dict[tuple[str, str], JudgedResponse] = {}
    for record in records:
        if record.split is None:
            continue
        for identity in _identities(record, shared_rubrics):
            before = first.setdefault(identity, record)
            if before.split != record.split:
                raise LeakError(
                    f"data: {_describe(identity[0], before, record)} stands in {before.split} and in {record.split}; "
                    f"put both into one split"
                )


def of_split(records: Iterable[JudgedResponse], split: Split) -> list[JudgedResponse]:
    """The records of ``split``, in order. Raises UserError if there are none."""
    records = list(records)
    chosen = [record for record in records if record.split == split]
    if not chosen:
        present = Counter(record.split or "no split" for record in records)
        found = ", ".join(f"{name} {count}" for name, count in sorted(present.items())) or "nothing"
        raise UserError(f"data: no response is in split '{split}' (found: {found}); set 'split' on every response")
    return chosen


def _identities(record: PromptRecord | JudgedResponse, shared_rubrics: bool) -> list[tuple[str, str]]:
    identities = [("prompt_id", record.prompt_id), ("text", normalised(record.prompt))]
    if shared_rubrics or record.rubric is None:
        return identities
    return [*identities, ("rubric", record.rubric.id)]


def _describe(kind: str, before: JudgedResponse, record: JudgedResponse) -> str:
    if kind == "prompt_id":
        return f"prompt {record.prompt_id!r}"
    if kind == "text":
        return f"the text of prompt {before.prompt_id!r} (again as {record.prompt_id!r})"
    return f"rubric {record.rubric.id} (of prompts {before.prompt_id!r} and {record.prompt_id!r})"


def _quotas(fractions: Sequence[float]) -> dict[Split, float]:
    """Positive fractions by split, the smallest first."""
    valid = len(fractions) == len(SPLITS) and all(0 <= fraction <= 1 for fraction in fractions)
    if not (valid and math.isclose(sum(fractions), 1)):
        raise UserError(
            f"train, validation, test: need shares in [0, 1] that add up to 1, got {tuple(fractions)}; correct them"
        )
    by_size = sorted(zip(SPLITS, fractions, strict=True), key=lambda pair: pair[1])
    return {split: fraction for split, fraction in by_size if fraction > 0}


def _fill(ranked: list[list[str]], quotas: dict[Split, float]) -> dict[str, Split]:
    """Split of each prompt id. The small splits choose first; the largest takes what is left.

    A group is taken if it brings its split nearer to the quota, so a huge group ends in the largest split.
    """
    total = sum(map(len, ranked))
    remaining, split_of = ranked, dict[str, Split]()
    for position, (split, fraction) in enumerate(quotas.items()):
        splits_after = len(quotas) - position - 1
        taken: list[list[str]] = []
        left: list[list[str]] = []
        for index, group in enumerate(remaining):
            held = sum(map(len, taken))
            enough_left = len(left) + len(remaining) - index - 1 >= splits_after
            fits = splits_after == 0 or held + len(group) / 2 <= fraction * total
            (taken if fits and enough_left else left).append(group)
        if not taken:
            smallest = min(left, key=len)
            left.remove(smallest)
            taken = [smallest]
        split_of |= {prompt_id: split for group in taken for prompt_id in group}
        remaining = left
    return split_of
