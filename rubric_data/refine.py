"""Refinement through differentiation: rounds in which a proposer sees a prompt's two best responses and writes the
rubric anew (*Chasing the Tail*, arXiv:2509.21500, section 4).

Owns pools, pairs, when a new rubric is taken, and the numbers of a round. Who scores is a function handed in, who
proposes is `rubric_data.proposer`; files and models are `rm.refining`.

Rewards lie in [0, 1]; NaN means that a response could not be scored, and it takes no part. Of a pool under a rubric,
the *gap* is the best reward minus the second best, and there is a *tie at the top* if the gap is no larger than
``tie``.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rubric_data.attaching import with_rubrics
from rubric_data.judges import reason_kind
from rubric_data.lint import lint_rubric
from rubric_data.pairs import REWARD_DECIMALS
from rubric_data.proposer import Proposal, Proposer, Request, refine_prompt
from rubric_data.records import JudgedResponse, Rubric, content_hash
from rubric_data.versions import Version

Pool = Literal["good", "great", "diverse"]
Ranker = Callable[[Sequence[JudgedResponse]], Sequence[float]]  # rewards of responses under their own rubrics


@dataclass(frozen=True)
class Settings:
    """How pairs are drawn and compared. ``top``: share of a prompt's responses that is great."""

    pool: Pool = "diverse"
    top: float = 0.25
    generators: frozenset[str] = frozenset()  # where given, their responses are the pool, whatever their reward
    tie: float = 1e-6
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """One prompt on its way: its pool under the current rubric, and what was shown already.

    ``rewards`` are aligned with ``pool``; ``used`` are ids of responses.
    """

    pool: tuple[JudgedResponse, ...]
    rewards: tuple[float, ...]
    used: frozenset[str] = frozenset()

    @property
    def prompt_id(self) -> str:
        return self.pool[0].prompt_id

    @property
    def rubric(self) -> Rubric:
        return self.pool[0].rubric

    def reward_of(self, response_id: str) -> float:
        """The reward of one response of the pool."""
        return next(r for record, r in zip(self.pool, self.rewards, strict=True) if record.response_id == response_id)

    def best(self, seed: int) -> list[JudgedResponse]:
        """The scored responses, best first, equal ones in an order drawn by ``seed``."""
        return [self.pool[place] for place in best_first(self.pool, self.rewards, seed)]

    @property
    def gap(self) -> float:
        """Best minus second best reward of the whole pool; NaN with fewer than two."""
        best = sorted((reward for reward in self.rewards if not math.isnan(reward)), reverse=True)
        return best[0] - best[1] if len(best) > 1 else math.nan


@dataclass(frozen=True)
class Round:
    """What a round left behind: the subjects, in order, and a version for each proposal."""

    subjects: list[Subject]
    versions: list[Version] = field(default_factory=list)
    tokens: tuple[int, int] = (0, 0)


# --- pools and pairs -------------------------------------------------------------------------------------------------


def best_first(records: Sequence[JudgedResponse], rewards: Sequence[float], seed: int) -> list[int]:
    """Places of the scored responses, best first; equal rewards by the rank of a hash of seed and response id."""
    scored = [place for place, reward in enumerate(rewards) if not math.isnan(reward)]
    rounded = {place: round(rewards[place], REWARD_DECIMALS) for place in scored}
    return sorted(scored, key=lambda place: (-rounded[place], content_hash([seed, records[place].response_id])))


def draw_pool(records: Sequence[JudgedResponse], rewards: Sequence[float], settings: Settings) -> list[int]:
    """Places of the responses that a prompt's pairs are drawn from, in their order; equal texts count once.

    Great are the best ceil(``top`` x n) of the n scored responses, two at the least; good are the others. `diverse`
    draws from the great too, `draw_pair` sees to the generators. With ``generators`` the pool is theirs.
    """
    first: dict[str, int] = {}
    for place in best_first(records, rewards, settings.seed):
        first.setdefault(records[place].response, place)
    ranked = list(first.values())
    if settings.generators:
        return sorted(place for place in ranked if records[place].generator in settings.generators)
    great = max(2, math.ceil(settings.top * len(ranked) - 1e-9))
    return sorted(ranked[great:] if settings.pool == "good" else ranked[:great])


def draw_pair(subject: Subject, settings: Settings) -> tuple[JudgedResponse, JudgedResponse] | None:
    """The two best responses that were not shown yet; None if fewer than two are left.

    `diverse` takes the best and the best of another generator, as long as there is another.
    """
    left = [record for record in subject.best(settings.seed) if record.response_id not in subject.used]
    if len(left) < 2:
        return None
    others = [record for record in left if record.generator != left[0].generator]
    second = others[0] if settings.pool == "diverse" and others else left[1]
    return left[0], second


# --- one round -------------------------------------------------------------------------------------------------------


def run_round(
    number: int,
    subjects: Sequence[Subject],
    rank: Ranker,
    proposer: Proposer,
    settings: Settings,
    *,
    max_failed: float = 1.0,
    progress: bool = False,
) -> Round:
    """Show the proposer one pair of every subject, score the pools under what it writes, and take what is better.

    A subject with no pair left goes on as it is. Raises UserError as `Proposer.propose` and the ranker do; then nothing
    of the round has happened but what journal and ledger keep.
    """
    pairs = [draw_pair(subject, settings) for subject in subjects]
    asked = [(subject, pair) for subject, pair in zip(subjects, pairs, strict=True) if pair]
    requests = [
        Request(
            refine_prompt(subject.pool[0].prompt, subject.rubric, one.response, other.response, proposer.checks),
            previous=subject.rubric,
            prefix=f"r{number}c",
        )
        for subject, (one, other) in asked
    ]
    title = f"round {number}" if progress else None
    proposals = proposer.propose(requests, max_failed=max_failed, progress=title)
    reasons = [_unfit(subject, proposal) for (subject, _), proposal in zip(asked, proposals, strict=True)]
    trials = [
        [record.model_copy(update={"rubric": proposal.rubric, "verdicts": ()}) for record in subject.pool]
        for (subject, _), proposal, reason in zip(asked, proposals, reasons, strict=True)
        if reason is None
    ]
    rewards = iter(rank([record for trial in trials for record in trial]))
    scored = iter([Subject(tuple(trial), tuple(next(rewards) for _ in trial)) for trial in trials])
    after: dict[str, Subject] = {}
    versions = []
    for (subject, pair), proposal, unfit in zip(asked, proposals, reasons, strict=True):
        trial = None if unfit else next(scored)
        reason = unfit if trial is None else not_better(subject, trial, pair, settings)
        versions.append(_version(number, subject, proposal, proposer, pair, reason))
        kept = subject if trial is None or reason else trial
        after[subject.prompt_id] = replace(kept, used=subject.used | {record.response_id for record in pair})
    # the sum goes over different requests only where equal ones were paid once
    spent = {id(proposal): proposal.tokens for proposal in proposals}.values()
    tokens = (sum(read for read, _ in spent), sum(written for _, written in spent))
    return Round([after.get(subject.prompt_id, subject) for subject in subjects], versions, tokens)


def _unfit(subject: Subject, proposal: Proposal) -> str | None:
    """Why a proposal need not be scored, as "kind: detail"; None if it must be."""
    if proposal.rubric is None:
        return proposal.failure
    if proposal.rubric.id == subject.rubric.id:
        return "unchanged: the proposer gave the rubric back as it was"
    told = {(finding.rule, finding.message) for finding in lint_rubric("", subject.rubric)}
    for finding in lint_rubric("", proposal.rubric):
        if finding.severity == "error" and (finding.rule, finding.message) not in told:
            return f"lint: {finding.criterion_id}: {finding.rule}: {finding.message}"
    return None


def not_better(
    before: Subject, after: Subject, pair: tuple[JudgedResponse, JudgedResponse], settings: Settings
) -> str | None:
    """Why the rubric of ``after`` is not better than that of ``before``, as "kind: detail"; None if it is.

    Better means all of this: both responses of the pair are scored; their rewards differ by more than ``tie`` and by
    more than before, in whichever direction, as the new rubric may well put the other one first; and the whole pool
    has no tie at the top, unless it had one before.
    """
    old, new = (
        abs(subject.reward_of(pair[0].response_id) - subject.reward_of(pair[1].response_id))
        for subject in (before, after)
    )
    if math.isnan(new):
        return "unscored: the pair has no reward under the new rubric"
    if new <= settings.tie:
        return f"tie: the pair's rewards still differ by {new:.3g} only"
    if new <= old + 1e-9:
        return f"smaller_gap: the pair's rewards differed by {old:.3g} before and by {new:.3g} now"
    if is_tied(after, settings) and not is_tied(before, settings):
        return "top_tie: the pool's two best were apart before and are tied now"
    return None


def is_tied(subject: Subject, settings: Settings) -> bool:
    """Whether the pool's two best differ by no more than ``tie``; False with fewer than two scored."""
    return subject.gap <= settings.tie


def _version(
    number: int,
    subject: Subject,
    proposal: Proposal,
    proposer: Proposer,
    pair: tuple[JudgedResponse, JudgedResponse],
    reason: str | None,
) -> Version:
    return Version(
        prompt_id=subject.prompt_id,
        id=proposal.rubric.id if proposal.rubric else None,
        round=number,
        parents=(subject.rubric.id,),
        accepted=reason is None,
        reason=reason,
        proposer=proposer.name,
        template=proposer.template,
        pair=tuple(record.response_id for record in pair),
        reply=proposal.reply_hash,
        rubric=proposal.rubric,
    )


# --- before, between and after rounds --------------------------------------------------------------------------------


def first_subjects(records: Sequence[JudgedResponse], rank: Ranker, settings: Settings) -> list[Subject]:
    """The prompts of ``records`` in their order, each with its pool under the rubric it has."""
    rewards = rank(records)
    by_prompt: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        by_prompt.setdefault(record.prompt_id, []).append(place)
    subjects = []
    for places in by_prompt.values():
        mine, theirs = [records[place] for place in places], [rewards[place] for place in places]
        chosen = draw_pool(mine, theirs, settings)
        if chosen:
            subjects.append(Subject(tuple(mine[i] for i in chosen), tuple(theirs[i] for i in chosen)))
    return subjects


def replayed(subjects: Sequence[Subject], versions: Sequence[Version], rank: Ranker) -> list[Subject]:
    """``subjects`` as ``versions``, of whole rounds in their order, left them."""
    rubrics: dict[str, Rubric] = {}
    used: dict[str, set[str]] = {}
    for version in versions:
        used.setdefault(version.prompt_id, set()).update(version.pair)
        if version.accepted and version.round and version.rubric:
            rubrics[version.prompt_id] = version.rubric
    pools = [with_rubrics(subject.pool, rubrics) for subject in subjects]
    rewards = iter(rank([record for pool in pools for record in pool]))
    return [
        Subject(tuple(pool), tuple(next(rewards) for _ in pool), frozenset(used.get(subject.prompt_id, ())))
        for subject, pool in zip(subjects, pools, strict=True)
    ]


def summary(number: int, done: Round, settings: Settings) -> dict[str, Any]:
    """The numbers after a round, over all prompts and their whole pools; round 0 is the start.

    ``ties``: share of prompts with a tie at the top; ``discrimination``: mean gap. Both over the ``compared`` prompts,
    which have two scored responses or more, and None if there are none. ``best``: how often each generator supplied
    one of the two best. ``ran_out``: prompts with fewer than two responses left to show, so that nothing was asked for
    them. ``refused``: by kind of reason. ``tokens_in``, ``tokens_out``: of the replies that came.
    """
    compared = [subject for subject in done.subjects if not math.isnan(subject.gap)]
    best = Counter(record.generator for subject in compared for record in subject.best(settings.seed)[:2])
    refused = Counter(reason_kind(version.reason) for version in done.versions if version.reason)
    return {
        "round": number,
        "prompts": len(done.subjects),
        "compared": len(compared),
        "ties": float(np.mean([is_tied(subject, settings) for subject in compared])) if compared else None,
        "discrimination": float(np.mean([subject.gap for subject in compared])) if compared else None,
        "criteria": float(np.mean([len(subject.rubric.criteria) for subject in done.subjects])),
        "asked": len(done.versions) if number else 0,
        "ran_out": len(done.subjects) - len(done.versions) if number else 0,
        "accepted": sum(version.accepted for version in done.versions) if number else 0,
        "refused": dict(sorted(refused.items())),
        "best": dict(best.most_common()),
        "tokens_in": done.tokens[0],
        "tokens_out": done.tokens[1],
    }
