"""Judged responses as training trees: grouping, targets, token budgets, collation. Owns no loss and no model.

A collated batch, for two trees with N = 5 verdicts, R = 3 responses and P = 1 pair:

    input_ids       (1, T)   packed tokens
    position_ids    (1, T)   restart along every path
    layout          TreeLayout
    labels          (N,)     verdicts in [0, 1]; -100 where masked
    counts          (N,)     of each verdict: how many independent answers it is worth, 1 on average over the data
    weights, veto   (N,)     of the criterion
    response        (N,)     which of the batch's R responses a verdict belongs to
    levels          (N,)     how many levels the criterion has; 2 for yes and no
    pairs           (P, 2)   better and worse response of one prompt, by the judge
    pair_weights    (P,)     sums to the number of verdicts of the trees that have pairs
"""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Sampler

from rm.encoding import Encoder
from rm.layout import Tree, pack
from rm.levels import levels_of
from rm.metrics import in_tail
from rubric_data.builtin.drills import Drill
from rubric_data.errors import UserError
from rubric_data.io import load_data
from rubric_data.pairs import REWARD_DECIMALS
from rubric_data.programmatic import CodeReport, answer_by_code, load_verdicts, require_verdicts
from rubric_data.records import JudgedResponse
from rubric_data.reward import rubric_reward
from rubric_data.split import check_leaks

MASKED = -100.0  # label of a verdict without a value; the Trainer counts the others


@dataclass(frozen=True)
class TrainingTree:
    """One prompt, some of its responses, and what the judge said of them.

    ``values``, ``counts``, ``weights``, ``veto``, ``levels`` (N,) depth-first, the first two NaN where masked;
    ``sizes`` (R,) criteria of each response; ``rewards`` (R,) the judge's, to `REWARD_DECIMALS`; ``tail`` (R,) whether
    the response is in the prompt's top share; ``places`` (R,) where the responses stand in the data; ``cut`` tokens
    lost. ``pairs`` (better, worse): the only ones to train on; None means all that the judge tells apart.
    """

    tree: Tree
    values: list[float]
    counts: list[float]
    weights: list[float]
    veto: list[bool]
    levels: list[int]
    sizes: list[int]
    rewards: list[float]
    tail: list[bool]
    places: list[int]
    cut: int
    pairs: list[tuple[int, int]] | None = None


def load_judged(name: str) -> list[JudgedResponse]:
    """Responses with verdicts, as `rubric_data.programmatic.load_verdicts` reads them.

    Raises UserError if nothing has been judged, LeakError if a prompt stands in two splits.
    """
    records = load_verdicts(name)
    check_leaks(records, shared_rubrics=True)  # a checklist may belong to a whole category of prompts
    return records


def load_exact(name: str) -> tuple[list[JudgedResponse], CodeReport]:
    """The same with code's verdict on every criterion that carries a verifier, whatever the file says of it.

    Raises UserError, LeakError as `load_judged`, and UserError on a verifier that is unknown or misused.
    """
    records, report = answer_by_code(load_data(name))
    require_verdicts(name, records)
    check_leaks(records, shared_rubrics=True)
    return records, report


def load_training(name: str, *, use_verifiers: bool) -> tuple[list[JudgedResponse], CodeReport | None]:
    """What a training reads: `load_exact`, or without ``use_verifiers`` `load_judged`, which code has no part in."""
    return load_exact(name) if use_verifiers else (load_judged(name), None)


def _in_tail(rewards: Sequence[float], share: float) -> list[bool]:
    """Which of one prompt's responses are in its top ``share``; one without a reward never is."""
    gold = np.array(rewards)
    known = np.flatnonzero(~np.isnan(gold))
    found = np.zeros(len(gold), bool)
    found[known] = in_tail(gold[known], np.zeros(len(known), int), share)
    return found.tolist()


def build_trees(
    records: Sequence[JudgedResponse],
    encoder: Encoder,
    *,
    responses_per_tree: int,
    seed: int,
    tail: float = 0.25,
    drilled: Sequence[Sequence[Drill]] | None = None,
    chosen: Collection[int] | None = None,
) -> list[TrainingTree]:
    """Group records by prompt, shuffle each group's responses, and cut it into trees of about equal size.

    ``drilled``: for each record, criteria to ask beside its rubric, with their verdicts. They have no weight in
    rewards and pairs. Counts are divided by their mean over all verdicts, so that those of equal count weigh 1.
    ``chosen``: the places of the only records to put into trees; tails and counts are still those among all.
    """
    asked = list(zip(records, drilled or itertools.repeat(()), strict=drilled is not None))
    groups: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        groups[record.prompt].append(place)
    typical = _mean_count(asked)
    rewards = np.round([rubric_reward(record.rubric, record.values()) for record in records], REWARD_DECIMALS).tolist()
    trees = []
    for prompt, everybody in groups.items():
        random.Random(f"{seed}/{prompt}").shuffle(everybody)
        top = dict(zip(everybody, _in_tail([rewards[place] for place in everybody], tail), strict=True))
        members = [place for place in everybody if chosen is None or place in chosen]
        count = math.ceil(len(members) / responses_per_tree)
        for part in range(count):
            places = members[part::count]
            some = [asked[place] for place in places]
            criteria = [[*record.rubric.criteria, *(criterion for criterion, _ in more)] for record, more in some]
            encoded = encoder.encode(prompt, [record.response for record, _ in some], criteria)
            values = [[*record.values(), *(verdict.value for _, verdict in more)] for record, more in some]
            counts = [_counts(record, more) for record, more in some]
            own = [len(record.rubric.criteria) for record, _ in some]
            trees.append(
                TrainingTree(
                    encoded.tree,
                    [math.nan if value is None else value for row in values for value in row],
                    [count / typical for row in counts for count in row],
                    [
                        c.weight if i < n else 0.0
                        for row, n in zip(criteria, own, strict=True)
                        for i, c in enumerate(row)
                    ],
                    [c.veto and i < n for row, n in zip(criteria, own, strict=True) for i, c in enumerate(row)],
                    levels_of(itertools.chain(*criteria)),
                    [len(row) for row in criteria],
                    [rewards[place] for place in places],
                    [top[place] for place in places],
                    places,
                    encoded.prompt_cut + sum(encoded.response_cut),
                )
            )
    return trees


def _counts(record: JudgedResponse, drills_of_it: Sequence[Drill]) -> list[float]:
    """Effective counts of the rubric's and the drills' verdicts; NaN where masked."""
    return [*record.counts(), *(math.nan if v.value is None else v.count for _, v in drills_of_it)]


def _mean_count(members: Iterable[tuple[JudgedResponse, Sequence[Drill]]]) -> float:
    """Mean effective count of the verdicts that have a value; 1 if none has."""
    counts = [count for record, more in members for count in _counts(record, more) if not math.isnan(count)]
    return math.fsum(counts) / len(counts) if counts else 1.0


def judged_pairs(rewards: Sequence[float], tail: Sequence[bool], tail_weight: float) -> list[tuple[int, int, float]]:
    """(better, worse, weight) for all pairs the judge tells apart; both in the tail counts ``tail_weight``, else 1."""
    pairs = []
    for first, second in itertools.combinations(range(len(rewards)), 2):
        if rewards[first] > rewards[second]:
            better, worse = first, second
        elif rewards[second] > rewards[first]:
            better, worse = second, first
        else:  # a tie, or no reward
            continue
        pairs.append((better, worse, tail_weight if tail[first] and tail[second] else 1.0))
    return pairs


def collate(trees: Sequence[TrainingTree], tail_weight: float) -> dict[str, Any]:
    """Pack trees into the batch the module docstring shows."""
    input_ids, position_ids, layout = pack([tree.tree for tree in trees])
    values = torch.tensor([value for tree in trees for value in tree.values])
    sizes = torch.tensor([size for tree in trees for size in tree.sizes])
    pairs, pair_weights, first = [], [], 0
    for tree in trees:
        if tree.pairs is None:
            found = judged_pairs(tree.rewards, tree.tail, tail_weight)
        else:
            found = [(better, worse, 1.0) for better, worse in tree.pairs]
        verdicts = sum(not math.isnan(value) for value in tree.values)
        total = sum(weight for *_, weight in found)
        pairs += [(first + better, first + worse) for better, worse, _ in found]
        pair_weights += [weight * verdicts / total for *_, weight in found]
        first += len(tree.sizes)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "layout": layout,
        "labels": values.nan_to_num(MASKED),
        "counts": torch.tensor([count for tree in trees for count in tree.counts]).nan_to_num(0.0),
        "weights": torch.tensor([weight for tree in trees for weight in tree.weights]),
        "veto": torch.tensor([veto for tree in trees for veto in tree.veto]),
        "levels": torch.tensor([count for tree in trees for count in tree.levels]),
        "response": torch.repeat_interleave(torch.arange(len(sizes)), sizes),
        "pairs": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        "pair_weights": torch.tensor(pair_weights),
    }


def budget_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive indices whose lengths sum to at most ``budget``; a longer item stands alone."""
    batch: list[int] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if batch and tokens + length > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += length
    if batch:
        yield batch


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of at most ``budget`` packed tokens, mixed over prompts; a new order every epoch.

    What is in a batch is fixed by ``seed``, so an epoch always has the same number of batches; it is a multiple
    of ``processes``, to give every process as many (the few batches left over come back in another place next epoch).
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int, processes: int = 1) -> None:
        order = list(range(len(lengths)))
        random.Random(seed).shuffle(order)
        packed = budget_batches([lengths[index] for index in order], budget)
        self.batches = [[order[place] for place in batch] for batch in packed]
        self.seed = seed
        self.epoch = 0
        self.length = len(self.batches) // processes * processes
        if not self.length:
            raise UserError(
                f"tokens_per_batch: {len(self.batches)} batches do not feed {processes} processes; lower it, or start "
                "fewer processes"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    @property
    def sampler(self) -> Self:
        """Where accelerate looks for `set_epoch` if several processes share the batches."""
        return self

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.batches)))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return iter([self.batches[index] for index in order[: self.length]])


class ReplaySampler(TokenBudgetSampler):
    """Batches of some trees, each filled up with others that come after them in the data: another draw every epoch.

    ``lengths`` are those of the former, an epoch is one pass over them; ``others`` those of the latter. These take the
    ``share`` in [0, 1) of each batch's tokens, by one tree at most more, and one at least unless ``share`` is 0.
    """

    def __init__(
        self, lengths: Sequence[int], others: Sequence[int], share: float, budget: int, seed: int, processes: int = 1
    ) -> None:
        super().__init__(lengths, round((1 - share) * budget), seed, processes)
        self.lengths = [*lengths, *others]
        self.others = range(len(lengths), len(self.lengths))
        self.ratio = share / (1 - share)

    def __iter__(self) -> Iterator[list[int]]:
        draw = self._draw()
        for batch in super().__iter__():
            room = self.ratio * sum(self.lengths[index] for index in batch)
            added: list[int] = []
            while sum(self.lengths[index] for index in added) < room:
                added.append(next(draw))
            yield [*batch, *added]

    def _draw(self) -> Iterator[int]:
        """The others in a random order, and again in another."""
        source = random.Random(f"{self.seed}/{self.epoch}/others")
        while True:
            yield from source.sample(self.others, len(self.others))


def collator(tail_weight: float) -> Callable[[Sequence[TrainingTree]], dict[str, Any]]:
    """`collate` as a DataLoader wants it."""
    return lambda trees: collate(trees, tail_weight)
