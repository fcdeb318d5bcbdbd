"""The filter of training prompts: whose rewards decide, and what is written. The choice is `rubric_data.selection`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rm.config import FilterConfig
from rubric_data.arrays import JudgedArrays, number_prompts
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, json_number, start_run, write_json, write_text
from rubric_data.io import load_data, write_judged
from rubric_data.pairs import REWARD_DECIMALS
from rubric_data.programmatic import coded_in_rewards, load_verdicts
from rubric_data.records import JudgedResponse
from rubric_data.selection import REASONS, Choice, choose_prompts
from rubric_data.verifiers import check_verifiers

if TYPE_CHECKING:
    from rm.scorer import RubricScorer

_HELD_OUT = ("validation", "test")
_BINS = 40


def run_filter(config: FilterConfig) -> dict[str, Any]:
    """Filter the prompts of ``config.data``; write kept.jsonl, prompts.jsonl, histogram.png and report.json.

    Prompts of the validation and test splits are passed on untouched, so that what is measured on them stays
    comparable. Returns the report. Raises UserError on bad input, and if no prompt is left to train on.
    """
    check_thresholds(config)
    records = load_verdicts(config.data) if config.reward_model is None else load_data(config.data)
    training = [record for record in records if record.split not in _HELD_OUT]
    if not training:
        raise UserError(f"{config.data}: every response is held out by its split; there is nothing to filter")
    scorer = _scorer(config, training)
    folder = start_run(config.output, asdict(config))  # last of what bad input can stop, so that it leaves no folder
    reward_B = _rewards(training, scorer)
    prompts, prompt_B = number_prompts(training)
    choice = choose_prompts(
        reward_B,
        prompt_B,
        len(prompts),
        low=config.low,
        high=config.high,
        min_spread=config.min_spread,
        min_responses=config.min_responses,
    )
    kept_B = (choice.reason_P == "kept")[prompt_B]
    chosen = {record.response_id for record, kept in zip(training, kept_B, strict=True) if kept}
    passed_on = [record for record in records if record.split in _HELD_OUT or record.response_id in chosen]
    report = _report(config, choice, reward_B, kept_B, len(records) - len(training))
    write_text(folder / "prompts.jsonl", _prompt_lines(prompts, choice))
    plot(folder / "histogram.png", choice, config.min_spread)
    write_json(folder / "report.json", report)
    if not chosen:
        counts = ", ".join(f"{name} {count}" for name, count in report["prompts"].items() if count)
        raise UserError(f"{config.output}: no prompt is left ({counts}); widen low and high, or lower min_spread")
    write_judged(folder / "kept.jsonl", passed_on)
    return report


def plot(path: str | Path, choice: Choice, min_spread: float) -> None:
    """Histograms of the prompts' mean rewards and of their spreads, kept above dropped, with the thresholds."""
    from matplotlib.figure import Figure  # not pyplot: it would choose a window system

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    kept = choice.reason_P == "kept"
    panels = (
        (choice.mean_P, "mean reward of a prompt's responses", (choice.low, choice.high), 1.0),
        (choice.spread_P, "their standard deviation", (min_spread,), 0.5),
    )
    for axes, (value_P, title, thresholds, most) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        known = ~np.isnan(value_P)
        sides = [value_P[known & kept], value_P[known & ~kept]]
        labels = [f"kept ({kept.sum()})", f"dropped ({(~kept).sum()})"]
        axes.hist(sides, bins=_BINS, range=(0, most), stacked=True, label=labels, color=["tab:blue", "lightgrey"])
        for threshold in filter(np.isfinite, thresholds):
            axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
            side = "right" if threshold < thresholds[-1] else "left"  # so that two that are near do not overlap
            axes.annotate(
                f"{threshold:.2f}",
                (threshold, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha=side,
                fontsize=8,
            )
        axes.set_xlabel(title)
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].set_ylabel("prompts")
    figure.axes[1].legend(loc="upper right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def check_thresholds(config: FilterConfig) -> None:
    """Raise UserError on values out of range."""
    if not 0 <= config.low < config.high <= 1:
        raise UserError(f"low, high: must be quantiles with 0 <= low < high <= 1, got {config.low}, {config.high}")
    if not 0 <= config.min_spread <= 0.5:
        raise UserError(f"min_spread: must lie in [0, 0.5], got {config.min_spread}; no rewards spread more")
    if config.min_responses < 1:
        raise UserError(f"min_responses: must be at least 1, got {config.min_responses}; raise it")


def _scorer(config: FilterConfig, records: Sequence[JudgedResponse]) -> "RubricScorer | None":
    """The reward model whose rewards decide, if there is one."""
    if config.reward_model is None:
        return None
    import torch

    from rm.scorer import RubricScorer

    if config.use_verifiers:
        check_verifiers(records)
    return RubricScorer.from_pretrained(
        config.reward_model,
        device="cuda" if torch.cuda.is_available() else "cpu",
        tokens_per_batch=config.tokens_per_batch,
        use_verifiers=coded_in_rewards(config.use_verifiers),  # which the prompts are for
    )


def _rewards(records: Sequence[JudgedResponse], scorer: "RubricScorer | None") -> np.ndarray:
    """The reward of each response, (B,), by the model or by the records' verdicts; NaN where there is none."""
    if scorer is not None:
        return np.round([one.reward for one in scorer.score_records(records, progress=True)], REWARD_DECIMALS)
    arrays = JudgedArrays.of(records)
    return arrays.rewards(arrays.value_BK)


def _report(
    config: FilterConfig, choice: Choice, reward_B: np.ndarray, kept_B: np.ndarray, held_out: int
) -> dict[str, Any]:
    counts = Counter(choice.reason_P.tolist())
    kept_means = choice.mean_P[choice.reason_P == "kept"]
    return {
        "data": config.data,
        "rewards_by": config.reward_model or "the verdicts in the data",
        "thresholds": {
            "low": config.low,
            "high": config.high,
            "low_reward": json_number(choice.low),
            "high_reward": json_number(choice.high),
            "min_spread": config.min_spread,
            "min_responses": config.min_responses,
        },
        "prompts": {"all": len(choice.reason_P), **{reason: counts[reason] for reason in REASONS}},
        "responses": {
            "all": len(reward_B),
            "kept": int(kept_B.sum()),
            "unrewarded": int(np.isnan(reward_B).sum()),
            "held_out": held_out,
        },
        "mean_reward": {
            "all": json_number(_known_mean(choice.mean_P)),
            "kept": json_number(_known_mean(kept_means)),
        },
    }


def _known_mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _prompt_lines(prompts: Sequence[str], choice: Choice) -> str:
    """JSON Lines: what decided on each prompt."""
    columns = zip(prompts, choice.rewarded_P, choice.mean_P, choice.spread_P, choice.reason_P, strict=True)
    rows = (
        {
            "prompt_id": prompt_id,
            "rewarded": int(rewarded),
            "mean_reward": json_number(mean),
            "spread": json_number(spread),
            "decision": str(reason),
        }
        for prompt_id, rewarded, mean, spread, reason in columns
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
