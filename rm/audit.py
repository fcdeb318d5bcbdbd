"""How far the reward model is from its judge on held-out prompts, beside the baselines.

`audit` is the arithmetic on records and predictions (docs/metrics.md names every key); `run_audit` reads the
data, asks the model and writes the run folder. What it looks like is `rm.report`; the statistics themselves
are `rm.metrics`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.special import expit

from rm import baselines, disagreements, forecast, metrics, report, reward_level
from rm.artefacts import artefacts
from rm.ceiling import ceiling, human_answers
from rm.config import AuditConfig
from rm.others import named, prepare
from rm.parts import parts
from rm.sides import (
    Answers,
    Predicted,
    Table,
    check_predictions,
    criterion_statistics,
    pair_sets,
    require_unmasked,
    rewards,
)
from rubric_data.errors import UserError
from rubric_data.files import json_number, start_run, write_json, write_text
from rubric_data.ledger import LedgerReader
from rubric_data.ledger_view import votes_on
from rubric_data.pairs import Pairs, same_prompt_pairs
from rubric_data.records import JudgedResponse
from rubric_data.split import of_split
from rubric_data.verifiers import VerifierJudge, check_verifiers

MODEL = "model"  # the calibrated model; differences and breakdowns are of this predictor
RAW = "model (raw)"  # sigmoid of its logits, before calibration
ZERO_SHOT = "zero-shot"

REWARD_BINS = 5
TOPS = 0.1, 0.25, 0.5  # shares of a prompt's responses, best by the judge, whose order is looked at
PRECISION_AT = 1, 3, 5
BEST_OF = 2, 4, 8, 16
LEDGER = "ledger.sqlite"  # beside the data that `rubric-rm judge` writes

Predictions = Mapping[str, Answers]


def run_audit(config: AuditConfig) -> dict[str, Any]:
    """Audit a trained model; write audit.json, predictions.jsonl and audit.html; print the summary.

    The model answers every criterion here, those with a verifier too: it is the model that is audited.

    Raises UserError on a share or count out of range, leaking splits, a split without verdicts, a folder that is
    no model, or a run folder in use.
    """
    from rm.data import load_judged  # here, for these bring torch, which the arithmetic does without
    from rm.scorer import RubricScorer

    if not 0 < config.tail <= 1:
        raise UserError(f"tail: must lie in (0, 1], got {config.tail}; 0.25 is each prompt's top quarter")
    if config.bootstrap < 1:
        raise UserError(f"bootstrap: must be at least 1, got {config.bootstrap}; 1000 gives steady intervals")
    records = load_judged(config.data)
    held_out = of_split(records, config.split)
    require_unmasked("audit", held_out)
    if config.artefacts:
        check_verifiers(held_out)
    train = [record for record in records if record.split == "train" and not np.isnan(record.values()).all()]
    scorer = RubricScorer.from_pretrained(config.model, tokens_per_batch=config.tokens_per_batch, use_verifiers=False)
    own_votes = _votes(config, held_out)
    sources = named(config.others or [], {MODEL, RAW, ZERO_SHOT, *baselines.FITTED})
    beside = prepare(sources, held_out, tokens_per_batch=config.tokens_per_batch)
    folder = start_run(config.output, asdict(config))  # last of what bad input can stop, so that it leaves no folder

    scored = scorer.score_records(held_out, progress=True)
    answers, raw = [one.probs for one in scored], [expit(one.logits) for one in scored]
    predictions: dict[str, Answers] = {MODEL: answers, RAW: raw} | {name: ask() for name, ask in beside.items()}
    if config.zero_shot:
        untrained = RubricScorer.zero_shot(
            scorer.model.base,
            max_length=scorer.model.max_length,
            tokens_per_batch=config.tokens_per_batch,
            use_verifiers=False,
        )
        predictions[ZERO_SHOT] = baselines.zero_shot(untrained, held_out)
    if train:  # else, as with a file of held-out responses alone, there is nothing to fit them on
        predictions |= baselines.fitted_baselines(train, held_out)

    trained_on = {record.rubric.id for record in train}
    result = {
        "facts": {
            "model": config.model,
            "data": config.data,
            "split": config.split,
            "judges": sorted({verdict.judge for record in held_out for verdict in record.verdicts if verdict.judge}),
            "truncated_responses": sum(one.truncated > 0 for one in scored),
            "rubrics_seen_in_training": len({record.rubric.id for record in held_out} & trained_on),
            "rubrics": len({record.rubric.id for record in held_out}),
            "others": {name: str(path) for name, path in sources.items()},
        }
    } | audit(
        held_out,
        predictions,
        others=list(sources),
        train=train,
        votes=own_votes,
        tail=config.tail,
        bootstrap=config.bootstrap,
        seed=config.seed,
    )
    level = scorer.calibration.reward_level
    if level is not None and result["unrewarded"] < result["responses"]:
        result["reward_level"] = reward_level.measure(
            held_out,
            answers,
            raw,
            level,
            tail=config.tail,
            bootstrap=config.bootstrap,
            seed=config.seed,
            covariances=None if scored[0].doubt is None else [one.doubt.covariance for one in scored if one.doubt],
        )
    if config.artefacts:
        options = {"bootstrap": config.bootstrap, "seed": config.seed}
        result["artefacts"] = artefacts(scorer, VerifierJudge(), held_out, answers, **options)
    write_json(folder / "audit.json", result)
    write_text(folder / "predictions.jsonl", prediction_lines(held_out, predictions))
    write_text(folder / "audit.html", report.render(result))
    console = Console()
    console.print(report.summary_table(result))
    if config.artefacts:
        console.print(report.artefact_table(result))
    console.print(f"report: {folder / 'audit.html'}", soft_wrap=True, markup=False)
    return result


def audit(
    records: Sequence[JudgedResponse],
    predictions: Predictions,
    *,
    others: Sequence[str] = (),
    train: Sequence[JudgedResponse] = (),
    votes: Sequence[np.ndarray] | None = None,
    tail: float = 0.25,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Agreement of each predictor with the verdicts of ``records``, as JSON-able values.

    ``predictions[name][i]`` holds P(met) in [0, 1] for every criterion of ``records[i]``, (K,); or, of a predictor that
    answers no criteria, ``predictions[name]`` is an array of real rewards, (R,). The predictor "model" must be there
    and answer. ``others`` names predictors that the model is compared with text by text, too. Every interval comes from
    the same ``bootstrap`` resamples of prompts. Masked verdicts are left out, of both sides' rewards too. Neither the
    order of the records nor the names of prompts matter. ``train`` is what the model was trained on, to tell seen from
    unseen; ``votes[i]`` (K, V) are the judge's votes on ``records[i]``, NaN where there is none, for its agreement with
    itself.

    Raises UserError if no verdict is left, ValueError on predictions that do not fit the records.
    """
    for name in (MODEL, *others):
        if name not in predictions:
            there = ", ".join(map(repr, predictions)) or "none"
            raise ValueError(f"predictions: {name!r} is missing among {there}")
    for name, values in predictions.items():
        check_predictions(name, values, records)
    if isinstance(predictions[MODEL], np.ndarray):
        raise ValueError(f"predictions: {MODEL!r} must answer criteria; give an array of P(met) for each response")
    require_unmasked("audit", records)
    table = Table.of(records)
    counts_RP = table.resamples(bootstrap, seed)
    judged = {name: Predicted.of(values, records, table) for name, values in predictions.items()}
    model = judged[MODEL]
    everything, best = pair_sets(table, tail)
    tops = {f"{share:.0%}": pair_sets(table, share)[1] for share in TOPS}
    found = {name: _statistics(table, one, everything, best, tops) for name, one in judged.items()}

    def settle(statistic: metrics.Statistic) -> dict[str, float | None]:
        return metrics.estimate(statistic, counts_RP).as_dict()

    def minus(ours: metrics.Statistic, theirs: metrics.Statistic) -> dict[str, float | None]:
        return metrics.difference(ours, theirs, counts_RP).as_dict()

    return {
        "prompts": table.prompts,
        "responses": len(records),
        "verdicts": len(table.gold_N),
        "masked": int((~table.known_N).sum()),
        "undecided": int((table.gold_N == metrics.THRESHOLD).sum()),
        "soft": int(((table.gold_N > 0) & (table.gold_N < 1)).sum()),
        "unrewarded": int((~table.rewarded_B).sum()),
        "mean_verdict": settle(metrics.mean(table.gold_N, table.prompt_N, table.prompts)),
        "mean_reward": settle(metrics.mean(table.reward_B, table.prompt_B, table.prompts)),
        "pairs": {
            name: {
                "count": len(pairs.first_M),
                "judge_ties": settle(metrics.judge_ties(table.reward_B, table.prompt_B, table.prompts, pairs)),
            }
            for name, pairs in {"all": everything, "tail": best, **tops}.items()
        },
        "selection": {
            kind: {key: {"prompts": int(s.count_P.sum()), "by_chance": settle(s)} for key, s in found.items()}
            for kind, found in _selection_statistics(table, np.zeros_like(table.reward_B)).items()
        },
        "tail": tail,
        "bootstrap": bootstrap,
        "seed": seed,
        "level": metrics.LEVEL,
        "predictors": {
            name: {
                "criterion": _settled(settle, found[name]["criterion"]) | _reliability(table, one, counts_RP),
                "reward": _settled(settle, found[name]["reward"])
                | {"by_quantile": _by_quantile(table, one, counts_RP)},
            }
            for name, one in judged.items()
        },
        "model_minus": {
            name: _settled(minus, _compared(found[MODEL]), _compared(theirs))
            for name, theirs in found.items()
            if name != MODEL
        },
        "ceiling": ceiling(
            table,
            model,
            human_answers(records)[table.known_N],
            None if votes is None else np.concatenate(votes)[table.known_N],
            counts_RP,
        ),
        **parts(records, train, table, model, counts_RP),
        "forecast": forecast.section(table.reward_B, model.reward_B, table.prompt_B, counts_RP, settle),
        "disagreements": disagreements.with_judge(records, table, model),
        "others": {
            name: {
                "answers": judged[name].answers,
                "disagreements": disagreements.between(records, table, model, judged[name]),
            }
            for name in others
        },
    }


def prediction_lines(records: Sequence[JudgedResponse], predictions: Predictions) -> str:
    """JSON Lines, one per (response, criterion): the judge's verdict (null where masked) and every prediction.

    The rewards of predictors that answer no criteria stand in every line of the response.
    """
    answered = {name: values for name, values in predictions.items() if not isinstance(values, np.ndarray)}
    lines = []
    for index, record in enumerate(records):
        rewarded = {name: json_number(float(v[index])) for name, v in predictions.items() if name not in answered}
        for place, (criterion, value) in enumerate(zip(record.rubric.criteria, record.values(), strict=True)):
            line = {
                "prompt_id": record.prompt_id,
                "response_id": record.response_id,
                "criterion_id": criterion.id,
                "gold": json_number(value),
                "predicted": {name: json_number(values[index][place]) for name, values in answered.items()},
            }
            line |= {"rewards": rewarded} if rewarded else {}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _votes(config: AuditConfig, records: Sequence[JudgedResponse]) -> list[np.ndarray] | None:
    """The judge's votes on ``records``, from its ledger; None without one."""
    beside = Path(config.data).with_name(LEDGER)
    if config.ledger is None and not (Path(config.data).is_file() and beside.is_file()):
        return None
    with LedgerReader(config.ledger or beside) as ledger:
        return votes_on(ledger, records)


# --- groups of statistics --------------------------------------------------------------------------------------------


def _statistics(
    table: Table, one: Predicted, everything: Pairs, best: Pairs, tops: Mapping[str, Pairs]
) -> dict[str, Any]:
    """What is said of a predictor, by its keys in audit.json."""
    sides = rewards(table, one)
    gap_B = one.reward_B - table.reward_B if one.answers else np.empty(0)
    return {
        "criterion": criterion_statistics(table, one),
        "reward": {
            "spearman": metrics.spearman(*sides),
            "kendall": metrics.kendall(*sides),
            "bias": metrics.mean(gap_B, table.prompt_B[: len(gap_B)], table.prompts),
            "pair_accuracy": _pair_statistics(table, one, everything),
            "tail_pair_accuracy": _pair_statistics(table, one, best),
            "top_pair_accuracy": {top: _pair_statistics(table, one, pairs) for top, pairs in tops.items()},
            **_selection_statistics(table, one.reward_B),
        },
    }


def _pair_statistics(table: Table, one: Predicted, pairs: Pairs) -> dict[str, metrics.Statistic]:
    sides = rewards(table, one)
    by_rule: dict[str, metrics.Statistic] = {
        rule: metrics.pair_accuracy(*sides, pairs, rule) for rule in metrics.TIE_RULES
    }
    return by_rule | {"prediction_ties": metrics.prediction_ties(*sides, pairs)}


def _selection_statistics(table: Table, proxy_B: np.ndarray) -> dict[str, dict[str, metrics.Ratio]]:
    """What is found, and what is lost, by taking a prompt's best by ``proxy``."""
    sides = table.reward_B, proxy_B, table.prompt_B, table.prompts
    return {
        "precision": {str(k): metrics.precision_at(*sides, k) for k in PRECISION_AT},
        "regret": {str(n): metrics.best_of_n_regret(*sides, n) for n in BEST_OF},
        "exploitation": {f"{share:.0%}": metrics.exploitation(*sides, share) for share in TOPS},
    }


def _compared(found: dict[str, Any]) -> dict[str, Any]:
    """What is told of the difference of two predictors, from the `_statistics` of one."""
    reward = found["reward"]
    halves = {key: reward[key]["half"] for key in ("pair_accuracy", "tail_pair_accuracy")}
    tops = {top: pairs["half"] for top, pairs in reward["top_pair_accuracy"].items()}
    same = {key: reward[key] for key in ("spearman", "kendall", "precision", "regret", "exploitation")}
    return found["criterion"] | same | halves | {"top_pair_accuracy": tops}


def _settled(settle: Callable[..., Any], *found: Any) -> Any:
    """``settle`` of every statistic of nested mappings, or of every two and more in the same place of several."""
    if isinstance(found[0], Mapping):
        return {key: _settled(settle, *(one[key] for one in found)) for key in found[0]}
    return settle(*found)


def _reliability(table: Table, one: Predicted, counts_RP: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """Two reliability curves: over bins of equally many verdicts, and of equal width."""
    said = len(one.prob_N)
    sides = table.gold_N[:said], one.prob_N, table.prompt_N[:said], table.prompts
    bins = {
        "reliability": metrics.equal_mass_bins(one.prob_N, metrics.RELIABILITY_BINS),
        "reliability_by_width": metrics.equal_width_bins(one.prob_N, metrics.RELIABILITY_BINS),
    }

    def row(found: metrics.ReliabilityBin) -> dict[str, Any]:
        estimates = {"predicted": found.predicted, "judged": found.judged}
        bounds = {"count": found.count, "low": json_number(found.low), "high": json_number(found.high)}
        return bounds | {key: metrics.estimate(s, counts_RP).as_dict() for key, s in estimates.items()}

    return {key: [row(found) for found in metrics.reliability_curve(*sides, bin_N)] for key, bin_N in bins.items()}


def _by_quantile(table: Table, one: Predicted, counts_RP: np.ndarray) -> list[dict[str, Any]]:
    """Agreement over equal-mass bins of the judge's reward, all prompts together, worst bin first."""
    bin_B = metrics.equal_mass_bins(table.reward_B, REWARD_BINS)
    pairs = same_prompt_pairs(table.prompt_B)
    rows = []
    for index in np.unique(bin_B):
        chosen = bin_B == index
        within = pairs.within(np.where(chosen, 0, -1))
        scaled = chosen & one.answers
        statistics: dict[str, metrics.Statistic] = {
            "gold": metrics.mean(table.reward_B[chosen], table.prompt_B[chosen], table.prompts),
            "proxy": metrics.mean(one.reward_B[scaled], table.prompt_B[scaled], table.prompts),
            "pair_accuracy": metrics.pair_accuracy(*rewards(table, one), within, "half"),
        }
        rows.append(
            {
                "low": json_number(table.reward_B[chosen].min()),
                "high": json_number(table.reward_B[chosen].max()),
                "responses": int(chosen.sum()),
                "pairs": int((table.reward_B[within.first_M] != table.reward_B[within.second_M]).sum()),
            }
            | {key: metrics.estimate(s, counts_RP).as_dict() for key, s in statistics.items()}
        )
    return rows
