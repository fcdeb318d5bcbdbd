"""Text in, verdicts and rewards out: the one entry that audit, serving and RL use.

Owns grouping, budgets and the caller's order; the forward pass is `rm.model`, the wording `rm.template`.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from rm.backbone import load_tokenizer
from rm.calibration import Calibration
from rm.config import RewardKind, ScoreConfig
from rm.data import budget_batches
from rm.encoding import Encoder
from rm.layout import Branch, Tree, pack
from rm.levels import Steps, levels_of, thresholds
from rm.model import RubricRewardModel
from rm.posterior import Doubt, Posterior, doubt
from rm.prefix_cache import PrefixCache, Reading
from rm.reward_level import Expected
from rm.scores import SUFFIXES, write_scores
from rubric_data.errors import UserError
from rubric_data.files import refuse_existing
from rubric_data.io import load_data
from rubric_data.programmatic import Coded, is_coded
from rubric_data.records import Criterion, JudgedResponse, Rubric
from rubric_data.reward import rubric_reward
from rubric_data.verifiers import Check, check_verifiers, prepare

T = TypeVar("T")
_MOST_IN_PART = 64  # responses that a Ray worker scores at a time, and that are scored again if it dies


@dataclass(frozen=True)
class Graded:
    """The M steps (`rm.levels`) that K criteria ask, some of them graded: P(level >= j), and the raw logits, (M,)."""

    steps: Steps
    probs: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Asked:
    """What a judge was asked about a response in the model's place (`rm.fallback`).

    ``judged`` (K,) bool: the criteria that its verdict stands on. ``questions`` put to it for this response, ``failed``
    of them without a verdict. ``model``: what the model alone had said.
    """

    judged: np.ndarray
    questions: int
    failed: int
    model: "Scored"


@dataclass(frozen=True)
class Scored:
    """One response under one rubric of K criteria.

    ``probs`` (K,) calibrated P(met), of a graded criterion its expected level over the best one, and ``logits`` (K,)
    the same uncalibrated, in the rubric's order; where code answered, its answer and no logit (NaN). ``reward`` in
    [0, 1]. ``truncated``: how many tokens of prompt and response did not fit the model's window, 0 if it had nothing to
    read. ``expected``: what the judge would say, with intervals; None unless the model was calibrated on prompts
    enough. ``graded``: what the answers are made of; None if all criteria are of yes and no. ``doubt``: how unsure the
    verdict head is of logits and reward; None if the model has no posterior. ``features`` (J, D): what the head read,
    and 1, of the J that the model answered; None unless the scorer keeps them. ``asked``: which of the answers are a
    judge's; None if none was asked.
    """

    probs: np.ndarray
    logits: np.ndarray
    reward: float
    truncated: int
    expected: Expected | None = None
    graded: Graded | None = None
    doubt: Doubt | None = None
    features: np.ndarray | None = None
    asked: Asked | None = None

    @property
    def own(self) -> "Scored":
        """What the model, and code, said without a judge."""
        return self if self.asked is None else self.asked.model

    @property
    def level_probs(self) -> tuple[np.ndarray, ...]:
        """Probability of every level of each criterion, worst first, K of (L,); of yes and no (1 - p, p)."""
        if self.graded is None:
            return Steps.of([2] * len(self.probs)).split(self.probs)
        return self.graded.steps.split(self.graded.probs)

    @property
    def step_logits(self) -> np.ndarray:
        """Raw logits of the steps, (M,); `logits` themselves if all criteria are of yes and no."""
        return self.logits if self.graded is None else self.graded.logits

    @property
    def by_code(self) -> np.ndarray:
        """Which criteria were answered by code, (K,) bool."""
        return np.isnan(self.logits) & ~np.isnan(self.probs)


class RubricScorer:
    """Scores any responses against any rubrics; equal prompts and equal responses are read once.

    ``cache_tokens``: keep keys and values of so many tokens of prompts and responses between calls, so that the same
    response under another rubric costs its criteria only (`rm.prefix_cache`); 0 keeps none.

    ``use_verifiers``: criteria with a verifier are answered by code, exactly, and cost the model nothing. False: the
    model answers them all, which is what a measurement of it wants. "vetoes": it answers all but vetoes with a
    verifier, which a reward is not to be argued out of.

    ``reward``: what `Scored.reward` is. "proxy", the weighted mean of the calibrated verdicts; "calibrated", the reward
    the judge would give on average; "lower_bound", what its reward rarely falls below, for a policy that should be paid
    for certainty. Raises UserError if the calibration cannot tell the latter two.

    ``posterior`` tells `Scored.doubt` (`rm.posterior`). ``keep_features`` is for fitting one, and needs memory.
    """

    def __init__(
        self,
        model: RubricRewardModel,
        encoder: Encoder,
        calibration: Calibration | None = None,
        *,
        tokens_per_batch: int = 8192,
        cache_tokens: int = 0,
        use_verifiers: Coded = True,
        reward: RewardKind = "proxy",
        posterior: Posterior | None = None,
        keep_features: bool = False,
    ) -> None:
        self.model = model.eval()
        self.encoder = encoder
        self.calibration = calibration or Calibration()
        self.tokens_per_batch = tokens_per_batch
        self._use_verifiers = use_verifiers
        self.reward = reward
        self.keep_features = keep_features
        self._root = None if posterior is None else torch.from_numpy(posterior.root_DD).float()
        self._cuts = {2: np.zeros(1)}  # thresholds by number of levels
        self.cache = PrefixCache(cache_tokens) if cache_tokens else None
        if reward != "proxy" and self.calibration.reward_level is None:
            raise UserError(
                f"reward {reward!r}: the model was not calibrated for it; run `calibrate` on more validation "
                "prompts, or use reward 'proxy'"
            )

    @property
    def tells_doubt(self) -> bool:
        """Whether `Scored.doubt` is known: the model has a posterior."""
        return self._root is not None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        attention: str = "auto",
        tokens_per_batch: int = 8192,
        cache_tokens: int = 0,
        use_verifiers: Coded = True,
        reward: RewardKind = "proxy",
        calibration: Calibration | None = None,
        keep_features: bool = False,
    ) -> Self:
        """Load a trained model with calibration and posterior; LoRA is merged. ``calibration`` stands in for both.

        Raises UserError if ``path`` holds no model, or a calibration that cannot be read.
        """
        model = RubricRewardModel.from_pretrained(path, dtype=dtype, attention=attention)
        model.merge()
        encoder = Encoder(load_tokenizer(str(path)), model.max_length, model.rubric_blind)
        return cls(
            model.to(device),
            encoder,
            calibration or Calibration.load(path),
            tokens_per_batch=tokens_per_batch,
            cache_tokens=cache_tokens,
            use_verifiers=use_verifiers,
            reward=reward,
            posterior=Posterior.load(path) if calibration is None else None,
            keep_features=keep_features,
        )

    @classmethod
    def zero_shot(
        cls,
        name: str = "smollm2",
        *,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        attention: str = "auto",
        max_length: int = 2048,
        tokens_per_batch: int = 8192,
        use_verifiers: bool = True,
    ) -> Self:
        """The untrained language model ``name`` as a scorer, uncalibrated."""
        model = RubricRewardModel.from_language_model(name, max_length=max_length, dtype=dtype, attention=attention)
        encoder = Encoder(load_tokenizer(name), max_length)
        return cls(model.to(device), encoder, tokens_per_batch=tokens_per_batch, use_verifiers=use_verifiers)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rubrics: Sequence[Rubric], *, progress: bool = False
    ) -> list[Scored]:
        """Score B responses, each against its own rubric; results in the caller's order.

        Raises ValueError if the three lists differ in length; UserError, before any work, if a criterion does not fit
        the window or a verifier is unknown or misused.
        """
        checks = [self._checks(rubric) for rubric in rubrics]
        asked = [_unchecked(rubric, row) for rubric, row in zip(rubrics, checks, strict=True)]
        self._check_room(asked)  # before hours of work
        rows = list(zip(prompts, responses, rubrics, checks, strict=True))
        found: dict[int, Scored] = {}
        total = sum(map(bool, asked))
        with Progress(transient=True, disable=not (progress and total)) as bar:
            task = bar.add_task("scoring", total=total)
            for batch, finished in ahead(self._batches(_by_prompt(prompts, responses, asked))):
                for chosen, cached in self._by_cache(batch):
                    answers = self._answers([piece.tree for _, piece in chosen], cached)
                    for job, piece in chosen:
                        for place in piece.places:
                            job.answers[place] = next(answers)
                for job in finished:
                    for index, answers_J, truncated in job.results():
                        found[index] = self._scored(*rows[index], answers_J, truncated)
                        bar.advance(task)
        return [found.get(index) or self._scored(*row, [], 0) for index, row in enumerate(rows)]

    def check(self, rubrics: Iterable[Rubric]) -> None:
        """Raise UserError at a criterion that does not fit the window, or a verifier that is unknown or misused."""
        self._check_room(_unchecked(rubric, self._checks(rubric)) for rubric in rubrics)

    def _check_room(self, asked: "Iterable[_Asked]") -> None:
        different = {self.encoder.question(criterion): criterion for criteria in asked for criterion in criteria}
        self.encoder.check(different.values())

    def score_records(self, records: Sequence[JudgedResponse], *, progress: bool = False) -> list[Scored]:
        """`score` on records, whose verdicts it does not look at."""
        columns = zip(*((record.prompt, record.response, record.rubric) for record in records), strict=True)
        prompts, responses, rubrics = (list(column) for column in columns)
        return self.score(prompts, responses, rubrics, progress=progress)

    def _checks(self, rubric: Rubric) -> list[Check | None]:
        """Who answers each criterion: its check, or the model (None)."""
        found: list[Check | None] = []
        for criterion in rubric.criteria:
            try:
                verifier = criterion.verifier if is_coded(criterion, self._use_verifiers) else None
                found.append(None if verifier is None else prepare(verifier))
            except UserError as error:
                raise UserError(f"criterion {criterion.id!r}: {error}") from None
        return found

    def _scored(
        self,
        prompt: str,
        response: str,
        rubric: Rubric,
        checks: Sequence[Check | None],
        answers_J: "Sequence[_Answer]",
        truncated: int,
    ) -> Scored:
        """The answers of the checks, and between them the model's: J of them, in the rubric's order."""
        by_code = np.array([check is not None for check in checks])
        latent_K, exact_K = np.full(len(checks), np.nan), np.full(len(checks), np.nan)
        latent_K[~by_code] = [answer.logit for answer in answers_J]
        exact_K[by_code] = [check(response, prompt) for check in checks if check is not None]
        levels_K = levels_of(rubric.criteria)
        steps = Steps.of(levels_K)
        logits_M = latent_K[steps.verdict_M] - self._thresholds(levels_K)
        reached_M = np.where(
            by_code[steps.verdict_M], steps.targets(exact_K), self.calibration(logits_M, rubric.criteria)
        )
        probs_K = steps.expected(reached_M)
        told = self._doubt(rubric, steps, logits_M, probs_K, by_code, answers_J)
        level = self.calibration.reward_level
        covariance = None if told is None else told.covariance
        expected = None if level is None else level.expected(rubric, probs_K, by_code, covariance)
        reward = self._reward(rubric, probs_K, expected)
        graded = Graded(steps, reached_M, logits_M) if steps.graded else None
        features = np.array([answer.features for answer in answers_J]) if self.keep_features else None
        return Scored(probs_K, steps.logits(logits_M), reward, truncated, expected, graded, told, features)

    def corrected(self, rubric: Rubric, scored: Scored, values_K: np.ndarray) -> Scored:
        """``scored`` with ``values`` in [0, 1], taken for certain, in the place of its answers; NaN leaves an answer.

        Intervals, doubt and reward are those of the answers then. Logits and features stay the model's.
        """
        known_K = ~np.isnan(values_K)
        steps = Steps.of(levels_of(rubric.criteria))
        before_M = scored.probs if scored.graded is None else scored.graded.probs
        reached_M = np.where(known_K[steps.verdict_M], steps.targets(values_K), before_M)
        probs_K = steps.expected(reached_M)
        told = None if scored.doubt is None else scored.doubt.without(known_K, rubric, probs_K)
        level = self.calibration.reward_level
        covariance = None if told is None else told.covariance
        expected = None if level is None else level.expected(rubric, probs_K, known_K | scored.by_code, covariance)
        graded = None if scored.graded is None else replace(scored.graded, probs=reached_M)
        reward = self._reward(rubric, probs_K, expected)
        return replace(scored, probs=probs_K, reward=reward, expected=expected, graded=graded, doubt=told)

    def _doubt(
        self,
        rubric: Rubric,
        steps: Steps,
        logits_M: np.ndarray,
        probs_K: np.ndarray,
        by_code: np.ndarray,
        answers_J: "Sequence[_Answer]",
    ) -> Doubt | None:
        if self._root is None:
            return None
        directions_KD = np.zeros((len(by_code), len(self._root)))
        directions_KD[~by_code] = [answer.direction for answer in answers_J] if answers_J else 0.0
        calibrate = partial(self.calibration, criteria=rubric.criteria)
        return doubt(calibrate, rubric, logits_M, probs_K, directions_KD, steps)

    def _thresholds(self, levels_K: Sequence[int]) -> np.ndarray:
        """Of the model's levels, (M,), for all the criteria of a rubric."""
        for levels in levels_K:
            if levels not in self._cuts:
                self._cuts[levels] = thresholds(self.model.level_spacing.detach().cpu().numpy(), levels)
        return np.concatenate([self._cuts[levels] for levels in levels_K])

    def _reward(self, rubric: Rubric, probs_K: np.ndarray, expected: Expected | None) -> float:
        if expected is None or self.reward == "proxy":
            return rubric_reward(rubric, probs_K)
        return expected.reward if self.reward == "calibrated" else expected.lower

    def _batches(self, groups: "dict[str, _Group]") -> Iterator[tuple[list["_Work"], list["_Job"]]]:
        """Pieces of trees within the budget, and the jobs that are complete with them; prompts are encoded as met."""
        batch: list[_Work] = []
        finished: list[_Job] = []
        tokens = 0
        for prompt, group in groups.items():
            job = _Job(self.encoder, prompt, group)
            for piece in job.pieces(self.tokens_per_batch):
                if batch and tokens + piece.tree.length > self.tokens_per_batch:
                    yield batch, finished
                    batch, finished, tokens = [], [], 0
                batch.append((job, piece))
                tokens += piece.tree.length
            finished.append(job)
        if batch:
            yield batch, finished

    def _by_cache(self, pieces: list["_Work"]) -> Iterator[tuple[list["_Work"], bool]]:
        """The pieces whose prefixes are all cached, then the others, whose storing may push the first ones out."""
        sides: dict[bool, list[_Work]] = {True: [], False: []}
        for job, piece in pieces:
            sides[self.cache is not None and self.cache.knows(piece.tree)].append((job, piece))
        return ((side, cached) for cached, side in sides.items() if side)

    @torch.inference_mode()
    def _answers(self, trees: Sequence[Tree], cached: bool) -> "Iterator[_Answer]":
        input_ids, position_ids, layout = pack(trees)
        device = self.model.head.weight.device
        reading = None
        if self.cache is not None:
            reading = self.cache.recall(trees, layout).to(device) if cached else Reading(layout.to(device))
        batch = input_ids.to(device), position_ids.to(device), layout, reading
        if self._root is None and not self.keep_features:
            answers = [_Answer(logit) for logit in self.model(*batch).tolist()]
        else:
            answers = self._with_features(self.model.features(*batch))
        if self.cache is not None and reading is not None and not cached:
            self.cache.store(trees, reading)
        return iter(answers)

    def _with_features(self, hidden_ND: torch.Tensor) -> "list[_Answer]":
        logits = self.model.head(hidden_ND).squeeze(-1).tolist()
        features_ND = torch.nn.functional.pad(hidden_ND, (0, 1), value=1.0)
        kept = features_ND.cpu().numpy() if self.keep_features else [None] * len(logits)
        if self._root is None:
            return [_Answer(logit, None, own) for logit, own in zip(logits, kept, strict=True)]
        self._root = self._root.to(hidden_ND.device)
        directions = (features_ND @ self._root.T).cpu().numpy()
        return [_Answer(*row) for row in zip(logits, directions, kept, strict=True)]


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, the next ``depth`` of them made in a thread while the caller is busy with one."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, items, end))
            yield item


class _Answer(NamedTuple):
    """The model's to one question: its logit, and of the head's posterior and input what is wanted, (D,)."""

    logit: float
    direction: np.ndarray | None = None
    features: np.ndarray | None = None


_Asked = tuple[Criterion, ...]  # what a rubric leaves to the model
_Group = dict[str, list[tuple[int, _Asked]]]  # response -> who asked for it, and what


def _unchecked(rubric: Rubric, checks: Sequence[Check | None]) -> _Asked:
    return tuple(criterion for criterion, check in zip(rubric.criteria, checks, strict=True) if check is None)


def _by_prompt(prompts: Sequence[str], responses: Sequence[str], asked: Sequence[_Asked]) -> dict[str, _Group]:
    """What the model has to read; a response of which nothing is asked is left out."""
    grouped: dict[str, _Group] = {}
    for index, (prompt, response, criteria) in enumerate(zip(prompts, responses, asked, strict=True)):
        if criteria:
            grouped.setdefault(prompt, {}).setdefault(response, []).append((index, criteria))
    return grouped


@dataclass(frozen=True)
class _Piece:
    """A part of a tree within the budget; ``places`` are the (branch, criterion) of its answers, in order."""

    tree: Tree
    places: list[tuple[int, int]]


_Work = tuple["_Job", _Piece]


class _Job:
    """All that is asked of one prompt: encoded once, cut into pieces, put together again."""

    def __init__(self, encoder: Encoder, prompt: str, group: _Group) -> None:
        self.encoder = encoder
        self.group = group
        self.questions: list[dict[Any, int]] = []  # of each response: its different questions, numbered
        criteria: list[list[Criterion]] = []
        for asked in group.values():
            different = {encoder.question(criterion): criterion for _, wanted in asked for criterion in wanted}
            self.questions.append({question: number for number, question in enumerate(different)})
            criteria.append(list(different.values()))
        self.encoded = encoder.encode(prompt, list(group), criteria)
        self.answers: dict[tuple[int, int], _Answer] = {}

    def pieces(self, budget: int) -> Iterator[_Piece]:
        """Cut between responses, then inside one; the prefix is read again, nothing is dropped."""
        root = self.encoded.tree.tokens
        branches: list[Branch] = []
        places: list[tuple[int, int]] = []
        used = len(root)
        for number, branch in enumerate(self.encoded.tree.branches):
            lengths = [len(criterion) for criterion in branch.criteria]
            own = len(branch.tokens)
            if branches and used + own + sum(lengths) > budget:
                yield _Piece(Tree(root, branches), places)
                branches, places, used = [], [], len(root)
            room = max(budget - len(root) - own, 1)
            parts = list(budget_batches(lengths, room))
            for part in parts:
                if branches and len(parts) > 1:
                    yield _Piece(Tree(root, branches), places)
                    branches, places, used = [], [], len(root)
                branches.append(Branch(branch.tokens, [branch.criteria[index] for index in part]))
                places += [(number, index) for index in part]
                used += own + sum(lengths[index] for index in part)
        yield _Piece(Tree(root, branches), places)

    def results(self) -> Iterator[tuple[int, list[_Answer], int]]:
        """For everybody who asked: index, answers to the criteria in the order they were asked in, tokens cut."""
        for number, asked in enumerate(self.group.values()):
            truncated = self.encoded.prompt_cut + self.encoded.response_cut[number]
            for index, criteria in asked:
                asked_as = map(self.encoder.question, criteria)
                places = [(number, self.questions[number][question]) for question in asked_as]
                yield index, [self.answers[place] for place in places], truncated


def run_score(config: ScoreConfig) -> dict[str, Any]:
    """Score a file of responses into another: one row a response, with its reward and P(met) of each criterion.

    Criteria with a verifier are answered by code, and marked so, unless ``config.use_verifiers`` is off. Raises
    UserError on bad input or if the output exists.
    """
    output = Path(config.output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"{output}: unknown format {output.suffix!r}; use .jsonl or .parquet")
    refuse_existing(output, config.overwrite)
    records = load_data(config.data)
    if config.use_verifiers:
        check_verifiers(records)  # here, where a mistake has a place in the file
    if config.engine == "ray":
        scored = _score_on_ray(config, records)
    else:
        scored = _load(config).score_records(records, progress=True)
    write_scores(output, records, scored)
    return {
        "responses": len(records),
        "verdicts": sum(len(item.probs) for item in scored),
        "by_code": int(sum(item.by_code.sum() for item in scored)),
        "mean_reward": float(np.mean([item.reward for item in scored])),
        "truncated_responses": sum(1 for item in scored if item.truncated),
        "calibration": Calibration.load(config.model).name,
    }


def _load(config: ScoreConfig) -> RubricScorer:
    return RubricScorer.from_pretrained(
        config.model,
        tokens_per_batch=config.tokens_per_batch,
        use_verifiers=config.use_verifiers,
        reward=config.reward,
    )


def _score_on_ray(config: ScoreConfig, records: Sequence[JudgedResponse]) -> list[Scored]:
    """`RubricScorer.score_records` by workers with a scorer each, to rounding; a prompt stays with one of them."""
    from rm.ray_pool import Pool, cluster

    scored: list[Scored | None] = [None] * len(records)
    with cluster(config.ray_address, config.workers), Pool(partial(_load, config), config.workers) as pool:
        pool.first(RubricScorer.check, [record.rubric for record in records])
        with Progress(transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task("scoring", total=len(records))
            parts = [(part, [records[place] for place in part]) for part in whole_prompts(records, config.workers)]
            for part, found in pool.map(_score_part, parts):
                for place, item in zip(part, found, strict=True):
                    scored[place] = item
                bar.advance(task, len(part))
    return [item for item in scored if item is not None]


def whole_prompts(records: Sequence[JudgedResponse], workers: int) -> list[list[int]]:
    """Places of ``records`` in parts for ``workers``: up to `_MOST_IN_PART`, more only where one prompt has more."""
    most = min(_MOST_IN_PART, math.ceil(len(records) / workers))
    by_prompt: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        by_prompt.setdefault(record.prompt, []).append(place)
    parts: list[list[int]] = []
    for places in by_prompt.values():
        if not parts or len(parts[-1]) + len(places) > most:
            parts.append([])
        parts[-1] += places
    return parts


def _score_part(scorer: RubricScorer, part: tuple[list[int], list[JudgedResponse]]) -> tuple[list[int], list[Scored]]:
    return part[0], scorer.score_records(part[1])
