"""How far predictions of P(met) agree with a judge's verdicts, as a module of the evaluate library."""

import datasets
import evaluate
import numpy as np

from rm import metrics

_DESCRIPTION = "Agreement of predicted probabilities with the verdicts of a judge on rubric criteria."
_INPUTS = """
Args:
    predictions: P(met) of each (response, criterion), in [0, 1].
    references: the judge's verdict on it, in [0, 1]; NaN where masked, which is left out and counted.
    levels: how many answers every criterion has, for kappa; 2 (the default) is no and yes.

Returns:
    accuracy, auroc, concordance, kappa, brier, log_loss, ece, as in an audit (docs/metrics.md), and how many verdicts
    are masked.
"""


class VerdictAgreement(evaluate.Metric):
    """Accuracy, AUROC, concordance, kappa, Brier score, log-loss and calibration error of P(met) against verdicts."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def _compute(self, predictions: list[float], references: list[float], levels: int = 2) -> dict[str, float]:
        prob, gold = np.array(predictions, float), np.array(references, float)
        if not ((prob >= 0) & (prob <= 1)).all():
            raise ValueError("predictions: every P(met) must lie in [0, 1]")
        if ((gold < 0) | (gold > 1)).any():
            raise ValueError("references: every verdict must lie in [0, 1], or be NaN where masked")
        if levels < 2:
            raise ValueError(f"levels: a criterion has at least 2 answers, got {levels}")
        known = ~np.isnan(gold)
        prompt = np.zeros(known.sum(), int)
        scale = np.full(len(prompt), levels)
        found = metrics.verdict_statistics(gold[known], prob[known], prompt, 1, scale)
        return {key: metrics.value(statistic) for key, statistic in found.items()} | {"masked": int((~known).sum())}
