"""The two sides of an audit: the judge's verdicts and rewards as arrays, and a predictor's of the same questions.

Owns which verdicts, responses and pairs count, for everything that measures a model against its judge. The
statistics are `rm.metrics`; what is made of them is `rm.audit`'s and `rm.panel`'s.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rm import metrics
from rm.levels import levels_of
from rubric_data.errors import UserError
from rubric_data.pairs import REWARD_DECIMALS, Pairs, same_prompt_pairs
from rubric_data.records import Criterion, JudgedResponse
from rubric_data.reward import rubric_reward

# A predictor's: P(met) of the K criteria of every record, (K,) each; or, of one that answers no criteria, a reward for
# every record, (R,), which may be any real number and only ranks.
Answers = Sequence[np.ndarray] | np.ndarray


@dataclass(frozen=True)
class Table:
    """The judge's side. N unmasked verdicts; B responses with a reward; P prompts by `Prompts`."""

    text_P: np.ndarray
    known_N: np.ndarray  # over every verdict, masked ones too: which are known
    gold_N: np.ndarray
    prompt_N: np.ndarray
    response_N: np.ndarray  # the place of its record
    levels_N: np.ndarray  # how many answers its criterion has
    criteria_N: Sequence[Criterion]
    rewarded_B: np.ndarray  # over every response: which have a reward
    reward_B: np.ndarray
    prompt_B: np.ndarray

    @property
    def prompts(self) -> int:
        return len(self.text_P)

    def resamples(self, bootstrap: int, seed: int) -> np.ndarray:
        """How often each prompt is drawn, (R, P): `resamples`."""
        return resamples(self.text_P, bootstrap, seed)

    @classmethod
    def of(cls, records: Sequence[JudgedResponse]) -> "Table":
        numbered = Prompts.of(records)
        prompt = numbered.prompt_R
        response = np.repeat(np.arange(len(records)), [len(record.rubric.criteria) for record in records])
        criteria = [criterion for record in records for criterion in record.rubric.criteria]
        gold = np.array([value for record in records for value in record.values()], float)
        reward = np.array([rubric_reward(record.rubric, record.values()) for record in records], float)
        known, rewarded = ~np.isnan(gold), ~np.isnan(reward)
        return cls(
            text_P=numbered.text_P,
            known_N=known,
            gold_N=gold[known],
            prompt_N=prompt[response[known]],
            response_N=response[known],
            levels_N=np.array(levels_of(criteria))[known],
            criteria_N=[criterion for criterion, is_known in zip(criteria, known, strict=True) if is_known],
            rewarded_B=rewarded,
            reward_B=np.round(reward[rewarded], REWARD_DECIMALS),
            prompt_B=prompt[rewarded],
        )


@dataclass(frozen=True)
class Predicted:
    """One predictor's side, aligned with a `Table`. Of one that answers no criteria ``prob_N`` is empty, (0,)."""

    prob_N: np.ndarray
    reward_B: np.ndarray

    @property
    def answers(self) -> bool:
        """Whether it answers criteria. If not, its rewards are on no scale."""
        return len(self.prob_N) > 0

    @classmethod
    def of(cls, values: Answers, records: Sequence[JudgedResponse], table: Table) -> "Predicted":
        if isinstance(values, np.ndarray):
            return cls(prob_N=np.empty(0), reward_B=np.round(values[table.rewarded_B], REWARD_DECIMALS))
        # a criterion the judge did not answer leaves both rewards, so that they weigh the same questions
        asked = [np.where(np.isnan(r.values()), np.nan, v) for r, v in zip(records, values, strict=True)]
        reward = np.array([rubric_reward(r.rubric, v) for r, v in zip(records, asked, strict=True)], float)
        return cls(
            prob_N=np.concatenate([np.asarray(v, float) for v in values])[table.known_N],
            reward_B=np.round(reward[table.rewarded_B], REWARD_DECIMALS),
        )


@dataclass(frozen=True)
class Prompts:
    """The prompts of records: each record's, (R,) in 0..P-1, and the number of each one's text, (P,).

    Prompts of one text and several ids are several, as their responses may have been judged apart: no pair is of two
    of them. Numbered in order of text, so that neither the order of records nor ids decide what a resample draws.
    """

    prompt_R: np.ndarray
    text_P: np.ndarray

    @classmethod
    def of(cls, records: Sequence[JudgedResponse]) -> "Prompts":
        ids = sorted({(record.prompt, record.prompt_id) for record in records})
        number = {prompt: index for index, prompt in enumerate(ids)}
        return cls(
            np.array([number[record.prompt, record.prompt_id] for record in records], int),
            number_texts(text for text, _ in ids),
        )


def resamples(text_P: np.ndarray, bootstrap: int, seed: int) -> np.ndarray:
    """`rm.metrics.resample_counts` of prompts of which those of one text are drawn together, (R, P)."""
    texts = int(text_P.max()) + 1 if len(text_P) else 0
    return metrics.resample_counts(texts, bootstrap, seed)[:, text_P]


def number_texts(texts: Iterable[str | int]) -> np.ndarray:
    """The same integer for the same text, or its number, from 0, in order of appearance; (B,)."""
    places: dict[str | int, int] = {}
    return np.array([places.setdefault(text, len(places)) for text in texts], int)


def rewards(table: Table, one: Predicted) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """What a statistic of rewards takes: gold and proxy (B,), prompt (B,), number of prompts."""
    return table.reward_B, one.reward_B, table.prompt_B, table.prompts


def pair_sets(table: Table, tail: float) -> tuple[Pairs, Pairs]:
    """All same-prompt pairs, and those with both responses in their prompt's tail."""
    everything = same_prompt_pairs(table.prompt_B)
    members = metrics.in_tail(table.reward_B, table.prompt_B, tail)
    return everything, everything.within(np.where(members, 0, -1))


def criterion_statistics(
    table: Table, one: Predicted, chosen_N: np.ndarray | slice = slice(None)
) -> dict[str, metrics.Statistic]:
    """What is said of a set of verdicts, by its key in audit.json; undefined if ``one`` answers no criteria."""
    chosen_N = chosen_N if one.answers else slice(0)
    sides = table.gold_N[chosen_N], one.prob_N[chosen_N], table.prompt_N[chosen_N], table.prompts
    return metrics.verdict_statistics(*sides, table.levels_N[chosen_N])


def check_predictions(name: str, values: Answers, records: Sequence[JudgedResponse]) -> None:
    """Raise ValueError unless ``values`` are `Answers` for ``records``, probabilities in [0, 1], rewards finite."""
    if len(values) != len(records):
        raise ValueError(f"predictions {name!r}: {len(values)} for {len(records)} responses")
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(f"predictions {name!r}: rewards must be finite, and one for each response")
        return
    for record, probs_K in zip(records, values, strict=True):
        if np.shape(probs_K) != (len(record.rubric.criteria),):
            raise ValueError(f"predictions {name!r}: response {record.response_id!r} needs one number per criterion")
        if not ((np.asarray(probs_K) >= 0) & (np.asarray(probs_K) <= 1)).all():
            raise ValueError(f"predictions {name!r}: response {record.response_id!r} has a number outside [0, 1]")


def require_unmasked(stage: str, records: Sequence[JudgedResponse]) -> None:
    """Raise UserError, in the name of ``stage``, if no verdict of ``records`` has a value."""
    if all(np.isnan(record.values()).all() for record in records):
        raise UserError(f"{stage}: none of the responses has a verdict that is not masked; judge them first")
