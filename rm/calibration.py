"""Map the model's logits to the judge's scale, criterion by criterion. Owns the maps, their fit and their file.

Every map rises strictly, so calibration reverses no order and ties nothing: AUROC within a group stays what it was.
One curve for all criteria: beta calibration (Kull et al. 2017) and its special cases, or isotonic. On top of it each
step of graded criteria, and each group of criteria, may have a slope and a shift of its own, shrunk towards none.
`rm.scorer` applies it everywhere; rewards are `rm.reward_level`, the command is `rm.calibrating`.

What is mapped are steps, "is it level j or better?" (`rm.levels`): of a yes/no criterion there is one, of one with L
levels L - 1, each of 1 / (L - 1) of a verdict's weight. Their Brier score is then the ranked probability score.

Letters: N steps of unmasked verdicts, K criteria of one rubric, M their steps.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit, logit
from sklearn.model_selection import GroupKFold

from rm import metrics, monotone
from rm.levels import Steps, levels_of
from rm.reward_level import Doubted, RewardLevel
from rm.sides import number_texts
from rubric_data.errors import UserError
from rubric_data.files import json_number, write_json
from rubric_data.records import Criterion, JudgedResponse

FILE = "calibration.json"
VERSION = 3  # of the file; 2 had no steps; 1, without the key, had one Platt map
METHODS = ("identity", "temperature", "platt", "beta", "isotonic")
GroupBy = Literal["none", "tag", "text"]
GROUPINGS: tuple[GroupBy, ...] = ("tag", "text")
PRIOR_COUNTS = (10.0, 50.0, 250.0)  # verdicts that speak for the common curve in every group; one is chosen

_FOLDS = 5
_BINS = 10
_RIDGE = 1.0  # of the common curve, in verdicts: keeps a tiny fit finite
_GROUP_RIDGE = 0.01  # of a group, whose prior count does the work: keeps a slope that nothing determines finite
_GROUP_PROMPTS = 2  # with verdicts, that make a group: one prompt would be learnt by heart
_SMOOTH = 0.05  # share of Platt's curve in the isotonic one: rises where that is flat, and is never quite 0 or 1
_EXTREME = 1e-13  # probabilities are kept this far from 0 and 1 where their logit is taken


@dataclass(frozen=True)
class Curve:
    """p = sigmoid(a ln s - b ln(1 - s) + shift) with s = sigmoid(logit), a and b > 0.

    This is beta calibration. a = b is Platt's map (1999), with shift 0 temperature scaling (Guo et al. 2017,
    arXiv:1706.04599). ``knots`` (logit, probability), both rising, are there for `isotonic` alone: straight lines
    between them, of which a twentieth is the sigmoid above.
    """

    method: str = "identity"
    a: float = 1.0
    b: float = 1.0
    shift: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()

    def logits(self, logits_N: np.ndarray) -> np.ndarray:
        """Calibrated logits of the same shape; NaN stays NaN."""
        smooth = _beta_features(logits_N) @ [self.a, self.b] + self.shift
        if not self.knots:
            return smooth
        places, heights = np.transpose(self.knots)
        probs = (1 - _SMOOTH) * np.interp(logits_N, places, heights) + _SMOOTH * expit(smooth)
        return logit(np.clip(probs, _EXTREME, 1 - _EXTREME))


@dataclass(frozen=True)
class Adjustment:
    """A group's own map on top of the curve's logits: scale * logit + shift, scale > 0; how much it was fitted on."""

    scale: float = 1.0
    shift: float = 0.0
    verdicts: int = 0
    prompts: int = 0


_NO_ADJUSTMENT = Adjustment()


@dataclass(frozen=True)
class Calibration:
    """One curve, adjusted by the step and by the group of the criterion; what has no adjustment gets the curve itself.

    ``steps``: by `step_key`, of graded criteria. ``reward_level``, where there was data enough to fit it, tells what
    the judge's reward would be.
    """

    curve: Curve = Curve()
    group_by: GroupBy = "none"
    groups: Mapping[str, Adjustment] = field(default_factory=dict)
    reward_level: RewardLevel | None = None
    steps: Mapping[str, Adjustment] = field(default_factory=dict)

    def __call__(self, logits_M: np.ndarray, criteria: Sequence[Criterion]) -> np.ndarray:
        """P(level >= j) in [0, 1] of the M steps of K criteria, of yes and no P(met), (M,); NaN where the logit is.

        Of one criterion it never rises with j.
        """
        steps = Steps.of(levels_of(criteria))
        keys = [group_key(criterion, self.group_by) for criterion in criteria]
        return self.by_key(logits_M, [keys[verdict] for verdict in steps.verdict_M], steps)

    def by_key(self, logits_N: np.ndarray, keys: Sequence[str | None], steps: Steps | None = None) -> np.ndarray:
        """The same with the group key of each step's criterion; without ``steps`` they are all of yes and no."""
        logits_N = self.curve.logits(np.asarray(logits_N, float))
        if steps is not None and steps.graded:
            logits_N = steps.falling(_adjusted(logits_N, self.steps, step_keys(steps)))
        return expit(_adjusted(logits_N, self.groups, keys))

    @property
    def name(self) -> str:
        """The method and what it is adjusted by, as in 'platt by step and tag'."""
        return _name(self.curve.method, bool(self.steps), self.group_by)

    def save(self, folder: str | Path, report: dict[str, Any]) -> None:
        """Write the maps beside the weights, with the report of their fit."""
        write_json(Path(folder) / FILE, {"version": VERSION, **dataclasses.asdict(self), "report": report})

    @classmethod
    def load(cls, folder: str | Path) -> "Calibration":
        """The maps stored in ``folder``; the identity if the model has not been calibrated.

        Raises UserError on a file that this version cannot read.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return cls()
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if "version" not in stored:
                return cls(Curve(stored["method"], stored["scale"], stored["scale"], stored["shift"]))
            if stored["version"] not in (2, VERSION):
                raise ValueError(f"version {stored['version']}")
            curve, level = stored["curve"], stored["reward_level"]
            return cls(
                Curve(**{**curve, "knots": _pairs(curve["knots"])}),
                stored["group_by"],
                {key: Adjustment(**one) for key, one in stored["groups"].items()},
                None if level is None else _reward_level(level),
                {key: Adjustment(**one) for key, one in stored.get("steps", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: is no calibration that this version reads ({error}); run `calibrate` again with "
                "--overwrite true"
            ) from None


def _reward_level(stored: Mapping[str, Any]) -> RewardLevel:
    doubted = stored.get("doubted")
    parts = {"knots": _pairs(stored["knots"]), "doubted": None if doubted is None else Doubted(**doubted)}
    return RewardLevel(**{**stored, **parts})


def group_key(criterion: Criterion, group_by: GroupBy) -> str | None:
    """The group of a criterion: its tags, all of them together, or its text; None if it belongs to none."""
    if group_by == "tag":
        return " + ".join(sorted(criterion.tags)) or None
    return criterion.text if group_by == "text" else None


def step_keys(steps: Steps) -> list[str | None]:
    """Which step of how many, as in '2 of 4'; None of yes and no."""
    pairs = zip(steps.step_M.tolist(), steps.last_M.tolist(), strict=True)
    return [f"{step} of {last}" if last > 1 else None for step, last in pairs]


def _adjusted(logits_N: np.ndarray, adjustments: Mapping[str, Adjustment], keys: Sequence[str | None]) -> np.ndarray:
    own = [_NO_ADJUSTMENT if key is None else adjustments.get(key, _NO_ADJUSTMENT) for key in keys]
    return np.array([one.scale for one in own]) * logits_N + np.array([one.shift for one in own])


# --- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdicts:
    """N steps of unmasked verdicts beside the model's logits, those of a verdict beside each other.

    ``gold`` in [0, 1], soft verdicts as they are; ``weight`` the verdict's count over the mean count, shared by its
    steps; ``prompt`` an integer for each different prompt text; ``criteria`` the criterion of each.
    """

    logits_N: np.ndarray
    gold_N: np.ndarray
    weight_N: np.ndarray
    prompt_N: np.ndarray
    criteria: Sequence[Criterion]

    @classmethod
    def of(cls, records: Sequence[JudgedResponse], logits: Sequence[np.ndarray]) -> "Verdicts":
        """The unmasked verdicts of ``records`` in their order; ``logits[i]`` (M,) are of the steps of ``records[i]``.

        Raises UserError if none is left.
        """
        value = np.array([value for record in records for value in record.values()], float)
        count = np.array([count for record in records for count in record.counts()], float)
        if np.isnan(value).all():
            raise UserError("calibration: none of the validation responses has a verdict; judge them first")
        # by text: a prompt under two ids must not be on two sides of a fold
        prompt_B = number_texts(record.prompt for record in records)
        prompt = np.repeat(prompt_B, [len(record.rubric.criteria) for record in records])
        criteria = [criterion for record in records for criterion in record.rubric.criteria]
        steps = Steps.of(levels_of(criteria))
        gold = steps.targets(value)
        known, whose = ~np.isnan(gold), steps.verdict_M[~np.isnan(gold)]
        return cls(
            np.concatenate([np.asarray(row, float) for row in logits])[known],
            gold[known],
            count[whose] / np.nanmean(count) / steps.last_M[known],
            prompt[whose],
            [criteria[place] for place in whose],
        )

    @cached_property
    def steps(self) -> Steps:
        """Whose each step is, and which."""
        return Steps.of_rows(levels_of(self.criteria))

    def keys(self, group_by: GroupBy) -> list[str | None]:
        """The group key of each verdict's criterion."""
        return [group_key(criterion, group_by) for criterion in self.criteria]

    def take(self, places: np.ndarray) -> "Verdicts":
        """Those at ``places``."""
        return Verdicts(
            self.logits_N[places],
            self.gold_N[places],
            self.weight_N[places],
            self.prompt_N[places],
            [self.criteria[place] for place in places],
        )


@dataclass(frozen=True)
class Candidate:
    """A way to calibrate. ``prior_count`` is of groups only; ``step_prior`` of steps, which have no maps if it is 0."""

    method: str
    group_by: GroupBy = "none"
    prior_count: float = 0.0
    step_prior: float = 0.0

    def fit(self, verdicts: Verdicts) -> Calibration:
        """The maps with the least log-loss on ``verdicts``."""
        curve = fit_curve(self.method, verdicts.logits_N, verdicts.gold_N, verdicts.weight_N)
        steps = fit_steps(curve, verdicts, self.step_prior) if self.step_prior else {}
        groups = fit_groups(curve, verdicts, self.group_by, self.prior_count, steps)
        return Calibration(curve, self.group_by, groups, steps=steps)

    @property
    def name(self) -> str:
        return _name(self.method, bool(self.step_prior), self.group_by)


def fit_curve(method: str, logits_N: np.ndarray, gold_N: np.ndarray, weight_N: np.ndarray | None = None) -> Curve:
    """The curve of ``method`` with the least log-loss (isotonic: squared error); gold in [0, 1], equal weights if None.

    Raises ValueError on an unknown method.
    """
    logits_N, gold_N = np.asarray(logits_N, float), np.asarray(gold_N, float)
    weight_N = np.ones(len(gold_N)) if weight_N is None else weight_N
    if method == "identity":
        return Curve()
    if method in ("temperature", "platt"):
        (slope,), shift = monotone.logistic(logits_N[:, None], gold_N, weight_N, shift=method == "platt", ridge=_RIDGE)
        return Curve(method, float(slope), float(slope), shift)
    if method == "beta":
        (a, b), shift = monotone.logistic(_beta_features(logits_N), gold_N, weight_N, ridge=_RIDGE)
        return Curve(method, float(a), float(b), shift)
    if method == "isotonic":
        smooth = fit_curve("platt", logits_N, gold_N, weight_N)
        knots = np.transpose(monotone.isotonic(logits_N, gold_N, weight_N)).tolist()
        return dataclasses.replace(smooth, method=method, knots=_pairs(knots))
    raise ValueError(f"calibration: unknown method {method!r}; choose one of {', '.join(METHODS)}")


def fit_groups(
    curve: Curve,
    verdicts: Verdicts,
    group_by: GroupBy,
    prior_count: float,
    steps: Mapping[str, Adjustment] | None = None,
) -> dict[str, Adjustment]:
    """The adjustment of every group with verdicts on two prompts or more; none under ``group_by`` "none".

    It comes on top of curve and ``steps``, which speak with the weight of ``prior_count`` verdicts: `_shrunk`.
    """
    logits_N = _adjusted(curve.logits(verdicts.logits_N), steps or {}, step_keys(verdicts.steps))
    return _shrunk(logits_N, verdicts, verdicts.keys(group_by), verdicts.weight_N, prior_count)


def fit_steps(curve: Curve, verdicts: Verdicts, prior_count: float) -> dict[str, Adjustment]:
    """The adjustment of every step of graded criteria with verdicts on two prompts or more: `_shrunk`.

    Here a step weighs as much as its verdict.
    """
    weight_N = verdicts.weight_N * verdicts.steps.last_M
    return _shrunk(curve.logits(verdicts.logits_N), verdicts, step_keys(verdicts.steps), weight_N, prior_count)


def _shrunk(
    logits_N: np.ndarray,
    verdicts: Verdicts,
    keys: Sequence[str | None],
    weight_N: np.ndarray,
    prior_count: float,
) -> dict[str, Adjustment]:
    """An adjustment of ``logits`` for every key, pulled towards none.

    ``prior_count`` verdicts that say exactly what the logits say, spread over the key's own, stand beside its
    verdicts: with no verdicts it has no adjustment, with many its own map. Over equal logits its probability is (sum
    of verdicts + prior_count * sigmoid(logit)) / (verdicts + prior_count).
    """
    members: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        if key is not None:
            members.setdefault(key, []).append(place)
    found = {}
    for key, places in members.items():
        prompts = len(np.unique(verdicts.prompt_N[places]))
        if prompts < _GROUP_PROMPTS:
            continue
        own, weight = logits_N[places], weight_N[places]
        prior = np.full(len(places), prior_count / len(places))
        target = (weight * verdicts.gold_N[places] + prior * expit(own)) / (weight + prior)
        (scale,), shift = monotone.logistic(own[:, None], target, weight + prior, ridge=_GROUP_RIDGE)
        whose = np.unique(verdicts.steps.verdict_M[places])
        found[key] = Adjustment(float(scale), shift, len(whose), prompts)
    return found


def choose(
    verdicts: Verdicts, groupings: Sequence[GroupBy] = GROUPINGS
) -> tuple[Calibration, np.ndarray, dict[str, Any]]:
    """The way to calibrate with the least Brier score on held-out prompts, refitted on everything.

    First the curve, then on top of the best one steps, if there are graded criteria, and on top of the best of these
    each of ``groupings``, with every prior count. Folds are of whole prompts, so the prior count that wins also makes
    up for verdicts on one prompt being alike.

    Returns the calibration, what it predicts of each step when fitted without its prompt, (N,), and the comparison.
    Raises UserError with fewer than two prompts.
    """
    folds = prompt_folds(verdicts.prompt_N)
    tried: dict[Candidate, np.ndarray] = {}

    def best(candidates: Sequence[Candidate]) -> Candidate:
        tried.update({one: held_out(one.fit, verdicts, folds) for one in candidates})
        return min(tried, key=lambda one: agreement(verdicts, tried[one])["brier"])

    curve = best([Candidate(method) for method in METHODS])
    common = curve
    if verdicts.steps.graded:
        common = best([replace(curve, step_prior=count) for count in PRIOR_COUNTS])
    chosen = best([replace(common, group_by=by, prior_count=count) for by in groupings for count in PRIOR_COUNTS])
    rows = [
        {"name": one.name, **dataclasses.asdict(one), **_rounded(agreement(verdicts, probs))}
        for one, probs in tried.items()
    ]
    before, after = (_rounded(agreement(verdicts, tried[one])) for one in (Candidate("identity"), chosen))
    report = {
        "verdicts": int(verdicts.steps.verdict_M[-1]) + 1,
        "graded_verdicts": int(((verdicts.steps.last_M > 1) & (verdicts.steps.step_M == 1)).sum()),
        "prompts": len(np.unique(verdicts.prompt_N)),
        "folds": len(folds),
        "chosen": {"name": chosen.name, **dataclasses.asdict(chosen)},
        "before": before,
        "after": after,
        "held_out": rows,
    }
    return chosen.fit(verdicts), tried[chosen], report


def prompt_folds(prompt_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Places to fit on and places to judge by, five times (fewer prompts: as often); a prompt is on one side only.

    Raises UserError with fewer than two prompts.
    """
    prompts = len(np.unique(prompt_N))
    if prompts < 2:
        raise UserError(f"calibration: needs verdicts on at least 2 validation prompts, got {prompts}; judge more")
    return list(GroupKFold(min(_FOLDS, prompts)).split(prompt_N, groups=prompt_N))


def held_out(
    fit: Callable[[Verdicts], Calibration], verdicts: Verdicts, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """What ``fit`` predicts of each step from the other folds, (N,)."""
    probs = np.empty(len(verdicts.gold_N))
    for train, test in folds:
        asked = verdicts.take(test)
        calibration = fit(verdicts.take(train))
        probs[test] = calibration.by_key(asked.logits_N, asked.keys(calibration.group_by), asked.steps)
    return probs


def agreement(verdicts: Verdicts, prob_N: np.ndarray) -> dict[str, float]:
    """Log-loss (nats), Brier score and expected calibration error, each verdict counting by its weight."""
    everything = verdicts.gold_N, prob_N, np.arange(len(prob_N)), len(prob_N)  # each verdict by itself
    bins = metrics.equal_mass_bins(prob_N, _BINS)
    gaps = np.bincount(bins, verdicts.weight_N * (prob_N - verdicts.gold_N))
    return {
        "brier": float(metrics.brier(*everything).at(verdicts.weight_N[None])[0]),
        "log_loss": float(metrics.log_loss(*everything).at(verdicts.weight_N[None])[0]),
        "ece": float(np.abs(gaps).sum() / verdicts.weight_N.sum()),
    }


def _beta_features(logits_N: np.ndarray) -> np.ndarray:
    """ln s and -ln(1 - s) of s = sigmoid(logit), (N, 2): both rise with it; NaN stays NaN, without a warning."""
    logits_N = np.asarray(logits_N, float)
    rest = np.log1p(np.exp(-np.abs(logits_N)))
    return np.stack([np.minimum(logits_N, 0) - rest, np.maximum(logits_N, 0) + rest], -1)


def _name(method: str, by_step: bool, group_by: str) -> str:
    by = ["step"] * by_step + [group_by] * (group_by != "none")
    return f"{method} by {' and '.join(by)}" if by else method


def _rounded(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {key: json_number(number) for key, number in numbers.items()}


def _pairs(knots: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y in knots)
