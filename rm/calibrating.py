"""The calibration stage: read the validation split, ask the model, fit both levels, write them beside the weights.

Owns the order of the work, the report and its plot; verdicts are `rm.calibration`, rewards `rm.reward_level`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.special import expit

from rm import metrics, posterior, reward_level
from rm.calibration import FILE, GROUPINGS, Calibration, GroupBy, Verdicts, choose, prompt_folds
from rm.config import CalibrateConfig
from rm.levels import Steps, levels_of
from rm.posterior import Posterior
from rm.sides import number_texts
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, json_number
from rubric_data.pairs import REWARD_DECIMALS
from rubric_data.records import JudgedResponse
from rubric_data.reward import rubric_reward
from rubric_data.split import of_split

PLOT = "calibration.png"


def run_calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Calibrate a model on the validation split; write calibration.json and calibration.png beside its weights.

    The model answers every criterion here, those with a verifier too: code has no logits to calibrate. Prints a table
    of the ways that were tried, and returns the report. Raises UserError on bad input, or if there is a calibration.
    """
    from rm.data import load_judged  # here, for these bring torch
    from rm.scorer import RubricScorer

    folder = Path(config.model)
    if (folder / FILE).exists() and not config.overwrite:
        raise UserError(f"{folder / FILE}: exists already; add --overwrite true to fit again")
    reward_level.check(config.planned_kl, config.coverage)  # before hours of work
    records = of_split(load_judged(config.data), "validation")
    scorer = RubricScorer.from_pretrained(
        folder,
        tokens_per_batch=config.tokens_per_batch,
        use_verifiers=False,
        calibration=Calibration(),
        keep_features=True,
    )
    scored = scorer.score_records(records, progress=True)
    layer = scorer.model.head
    head = np.append(layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy())
    # maps of its own for a criterion would tell a rubric-blind model what it is not to know
    groupings: tuple[GroupBy, ...] = () if scorer.model.rubric_blind else GROUPINGS
    features = [one.features for one in scored if one.features is not None]
    fitted = fit(
        records,
        [one.step_logits for one in scored],
        planned_kl=config.planned_kl,
        coverage=config.coverage,
        groupings=groupings,
        head=Head(features, head),
    )
    if fitted.posterior is not None:
        fitted.posterior.save(folder)
    fitted.calibration.save(folder, fitted.report)
    plot(folder / PLOT, fitted)
    console = Console()
    console.print(summary_table(fitted.report))
    console.print(f"plot: {folder / PLOT}", soft_wrap=True, markup=False)
    return fitted.report


@dataclass(frozen=True)
class Head:
    """The verdict head: its weights (D,), and what it read of each of the records, B of (K, D)."""

    features: Sequence[np.ndarray]
    theta: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A calibration with the report of its fit, and what the plot shows, all of it from held-out prompts.

    ``rewards`` hold proxies of held-out probabilities, ``weight_B`` what each counts in the tail; None without a
    reward level.
    """

    calibration: Calibration
    report: dict[str, Any]
    gold_N: np.ndarray
    before_N: np.ndarray
    after_N: np.ndarray
    rewards: reward_level.Rewards | None = None
    weight_B: np.ndarray | None = None
    posterior: Posterior | None = None


def fit(
    records: Sequence[JudgedResponse],
    logits: Sequence[np.ndarray],
    *,
    planned_kl: float,
    coverage: float,
    groupings: Sequence[GroupBy] = GROUPINGS,
    head: Head | None = None,
) -> Fitted:
    """Calibrate verdicts, then rewards; ``logits[i]`` (M,) are the model's on the steps of ``records[i]``.

    The reward level is fitted on probabilities that did not see the prompt, so that its errors are those of new
    prompts. With too few prompts for it the calibration has none and the report says so. With a ``head`` its posterior
    is fitted too, and held-out intervals decide whether its doubt has a part in them. Raises UserError with
    verdicts on fewer than two prompts, or a number out of range.
    """
    reward_level.check(planned_kl, coverage)
    needed = reward_level.prompts_needed(coverage)
    verdicts = Verdicts.of(records, logits)
    calibration, after, report = choose(verdicts, groupings)
    gold_N, before_N, after_N = map(verdicts.steps.expected, (verdicts.gold_N, expit(verdicts.logits_N), after))
    prompt_N = verdicts.prompt_N[verdicts.steps.step_M == 1]
    probs = _by_response(records, after_N)
    prompt_B = number_texts(record.prompt for record in records)
    told, covariances = None, None
    if head is not None:
        told, covariances, report["posterior"] = _posterior(calibration, records, logits, probs, prompt_B, head)
    rewards = reward_level.Rewards.of(records, probs, prompt_B, covariances)
    fitted = Fitted(calibration, report, gold_N, before_N, after_N, posterior=told)
    prompts = len(np.unique(rewards.prompt_B))
    if prompts < needed:
        report["reward_level"] = {
            "skipped": f"needs rewards on {needed} validation prompts for a coverage of {coverage:g}, got {prompts}; "
            "judge more"
        }
        return fitted
    known = [~np.isnan(record.values()) for record in records]
    std_N = None if covariances is None else _known(map(_stds, covariances), known)
    best_B = _best(records)
    verdict_intervals = reward_level.Intervals(
        after_N,
        gold_N - after_N,
        reward_level.verdict_scale(after_N),
        std_N,
        prompt_N,
        np.repeat(best_B, [int(own.sum()) for own in known]),
    )
    level, mapped_B, about = reward_level.fit(
        rewards,
        prompt_folds(rewards.prompt_B),
        planned_kl=planned_kl,
        coverage=coverage,
        verdicts=verdict_intervals,
        verdict_folds=prompt_folds(prompt_N),
    )
    weight_B = reward_level.tail_weights(rewards.proxy_B, rewards.prompt_B, level.beta)
    asked = [Steps.of(levels_of(record.rubric.criteria)) for record in records]
    raw_probs = [steps.expected(expit(row)) for steps, row in zip(asked, logits, strict=True)]
    raw = reward_level.Rewards.of(records, raw_probs, prompt_B).proxy_B
    predicted = {"raw": raw, "proxy": rewards.proxy_B, "calibrated": mapped_B}
    error = reward_level.errors(rewards.gold_B, predicted, rewards.proxy_B, weight_B)
    report["reward_level"] = about | {"error": error}
    return replace(fitted, calibration=replace(calibration, reward_level=level), rewards=rewards, weight_B=weight_B)


def _posterior(
    calibration: Calibration,
    records: Sequence[JudgedResponse],
    logits: Sequence[np.ndarray],
    probs: Sequence[np.ndarray],
    prompt_B: np.ndarray,
    head: Head,
) -> tuple[Posterior, list[np.ndarray], dict[str, Any]]:
    """The posterior on all verdicts, covariances of each response's answers without its prompt, and what std is worth.

    A prompt is left out of the precision that its own doubt is told by; the prior's is that of all, which no verdict
    had a part in.
    """
    steps = [Steps.of(levels_of(record.rubric.criteria)) for record in records]
    known = [~np.isnan(record.values()) for record in records]
    count = np.concatenate([record.counts() for record in records])
    curvatures = [posterior.curvature(row, own) for row, own in zip(logits, steps, strict=True)]
    weight = np.nan_to_num(np.concatenate(curvatures) * count / np.nanmean(count))
    whose = np.repeat(prompt_B, [len(own) for own in known])
    features = np.concatenate(head.features)
    everything = posterior.gram(features, weight)
    precision, effective = posterior.prior_precision(everything, head.theta)
    covariances: list[np.ndarray] = [np.empty(0)] * len(records)
    stds = list(covariances)
    for _, held in prompt_folds(prompt_B):
        left_out = np.isin(whose, prompt_B[held])
        rest = posterior.laplace(everything - posterior.gram(features[left_out], weight[left_out]), precision)
        for place in held:
            record, directions = records[place], rest.directions(head.features[place])
            calibrate = partial(calibration, criteria=record.rubric.criteria)
            told = posterior.doubt(calibrate, record.rubric, logits[place], probs[place], directions, steps[place])
            covariances[place], stds[place] = told.covariance, told.std
    gold, prob = (_known(rows, known) for rows in (map(_values, records), probs))
    report = {
        "prior_precision": json_number(precision),
        "weights": len(head.theta),
        "determined_weights": json_number(effective),
        "mean_std": json_number(_known(stds, known).mean()),
    }
    return (
        posterior.laplace(everything, precision),
        covariances,
        report | _foretold(gold, prob, _known(stds, known), _known(map(_stds, covariances), known)),
    )


def _foretold(gold_N: np.ndarray, prob_N: np.ndarray, logit_std_N: np.ndarray, std_N: np.ndarray) -> dict[str, Any]:
    """How well doubt foretells answers on the wrong side of 1/2: AUROC, 1/2 by chance."""
    decided = gold_N != metrics.THRESHOLD
    wrong = ((gold_N > metrics.THRESHOLD) != (prob_N > metrics.THRESHOLD))[decided].astype(float)
    none = np.zeros(len(wrong), int)
    signs = {"logit_std": logit_std_N, "std": std_N, "closeness_to_half": -np.abs(prob_N - metrics.THRESHOLD)}
    found = {name: metrics.value(metrics.auroc(wrong, own[decided], none, 1)) for name, own in signs.items()}
    return {"wrong": int(wrong.sum()), "error_auroc": {name: json_number(number) for name, number in found.items()}}


def _values(record: JudgedResponse) -> np.ndarray:
    return np.array(record.values(), float)


def _stds(covariance_KK: np.ndarray) -> np.ndarray:
    return np.sqrt(covariance_KK.diagonal())


def _known(rows: Iterable[np.ndarray], known: Sequence[np.ndarray]) -> np.ndarray:
    """Of each response's (K,) those with a verdict, (N,)."""
    return np.concatenate([row[own] for row, own in zip(rows, known, strict=True)])


def _best(records: Sequence[JudgedResponse]) -> np.ndarray:
    """Which responses are among the best quarter of their prompt by the judge, (B,) bool."""
    gold_B = np.round([rubric_reward(record.rubric, record.values()) for record in records], REWARD_DECIMALS)
    rewarded = np.flatnonzero(~np.isnan(gold_B))
    best_B = np.zeros(len(records), bool)
    prompt_B = number_texts(record.prompt for record in records)
    best_B[rewarded] = metrics.in_tail(gold_B[rewarded], prompt_B[rewarded], reward_level.TAIL)
    return best_B


def _by_response(records: Sequence[JudgedResponse], prob_N: np.ndarray) -> list[np.ndarray]:
    """The probabilities of the unmasked verdicts as one (K,) for each response, NaN where masked."""
    gold = [np.array(record.values(), float) for record in records]
    left = iter(prob_N)
    return [np.array([np.nan if np.isnan(value) else next(left) for value in row]) for row in gold]


def summary_table(report: Mapping[str, Any]) -> Table:
    """Every way to calibrate that was tried, for a terminal of 80 columns; of each grouping its best prior count."""
    chosen = report["chosen"]
    table = Table(
        title=f"Verdicts of {report['prompts']} prompts, each predicted without its prompt",
        caption=f"chosen: {chosen['name']}, the least Brier score",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("method", "prior count", "Brier", "log-loss", "ECE"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    best: dict[str, dict[str, Any]] = {}
    for row in report["held_out"]:
        if row["name"] not in best or row["brier"] < best[row["name"]]["brier"]:
            best[row["name"]] = row
    for name, row in best.items():
        prior = row["prior_count"] or row["step_prior"]  # of what was added last
        numbers = (f"{row[key]:.4f}" for key in ("brier", "log_loss", "ece"))
        table.add_row(name, f"{prior:g}" if prior else "", *numbers, style="bold" if name == chosen["name"] else "")
    return table


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(path: str | Path, fitted: Fitted) -> None:
    """Reliability before and after; with a reward level also its map over held-out responses, and errors."""
    from matplotlib.figure import Figure  # not pyplot: it would choose a window system

    level = fitted.calibration.reward_level
    figure = Figure(figsize=(4.2 if level is None else 12.6, 3.9), layout="constrained")
    panels = figure.subplots(1, 1 if level is None else 3, squeeze=False)[0]
    _draw_reliability(panels[0], fitted)
    if level is not None and fitted.rewards is not None and fitted.weight_B is not None:
        _draw_map(panels[1], level, fitted.rewards, fitted.weight_B)
        _draw_errors(panels[2], fitted.report["reward_level"]["error"]["by_quantile"])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _draw_reliability(ax: Any, fitted: Fitted) -> None:
    _diagonal(ax)
    for label, prob_N, colour in (
        ("before", fitted.before_N, "tab:orange"),
        (f"after: {fitted.report['chosen']['name']}", fitted.after_N, "tab:blue"),
    ):
        bin_N, together_N = metrics.equal_mass_bins(prob_N, metrics.RELIABILITY_BINS), np.zeros(len(prob_N), int)
        curve = metrics.reliability_curve(fitted.gold_N, prob_N, together_N, 1, bin_N)
        places, heights = ([metrics.value(getattr(one, side)) for one in curve] for side in ("predicted", "judged"))
        ax.plot(places, heights, marker="o", color=colour, label=label)
    ax.set(xlabel="mean predicted probability", ylabel="mean verdict of the judge", title="verdicts, held-out prompts")
    ax.legend(loc="upper left", fontsize=8)


def _draw_map(ax: Any, level: reward_level.RewardLevel, rewards: reward_level.Rewards, weight_B: np.ndarray) -> None:
    _diagonal(ax)
    size = 4 + 60 * np.sqrt(weight_B / weight_B.max())
    ax.scatter(rewards.proxy_B, rewards.gold_B, s=size, color="lightgrey", edgecolor="grey", linewidth=0.4)
    order = np.argsort(rewards.proxy_B, kind="stable")
    lower_B = level.bounds(rewards.proxy_B, rewards.spread_B, rewards.std_B)[2]
    ax.plot(rewards.proxy_B[order], lower_B[order], ".", color="tab:red", markersize=3, label="lower bound")
    grid = np.linspace(rewards.proxy_B.min(), rewards.proxy_B.max(), 200)
    ax.plot(grid, level.reward(grid), color="tab:blue", label=f"expected: {level.method}")
    title = f"rewards; large: likely at KL {level.planned_kl:g}"
    ax.set(xlabel="reward of the model (proxy)", ylabel="reward of the judge (gold)", title=title)
    ax.legend(loc="lower right", fontsize=8)


def _draw_errors(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(rows))
    for shift, (key, label, colour) in zip(
        (-0.27, 0.0, 0.27),
        (
            ("raw", "uncalibrated", "tab:orange"),
            ("proxy", "verdicts calibrated", "tab:green"),
            ("calibrated", "reward calibrated", "tab:blue"),
        ),
        strict=True,
    ):
        ax.bar(places + shift, [row[key] for row in rows], width=0.25, color=colour, label=label)
    ax.set_xticks(places, [f"{row['low']:.2f}–{row['high']:.2f}" for row in rows], fontsize=8)
    ax.set(xlabel="reward of the model, by quantile", ylabel="mean absolute error", title="rewards, held-out prompts")
    highest = max(row[key] for row in rows for key in ("raw", "proxy", "calibrated"))
    ax.set_ylim(0, 1.4 * highest or 1)  # room for the legend
    ax.legend(loc="upper left", fontsize=8)


def _diagonal(ax: Any) -> None:
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--", zorder=0)
