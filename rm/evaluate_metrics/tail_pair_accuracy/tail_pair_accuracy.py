"""How often predicted rewards order the best responses to a prompt as the judge does, for the evaluate library."""

import datasets
import evaluate
import numpy as np

from rm import metrics
from rubric_data.pairs import REWARD_DECIMALS, same_prompt_pairs

_DESCRIPTION = "Pair accuracy of predicted rewards among all responses to a prompt, and among the judge's best."
_INPUTS = """
Args:
    predictions: the predicted reward of each response.
    references: the judge's reward of it; NaN where there is none, which is left out and counted.
    prompts: which prompt it responds to, as a string; only responses to one prompt are compared.
    tail: top share of each prompt's responses by the judge, in (0, 1]; 0.25 by default.
    ties: what a pair counts that the prediction ties on: "half" (the default), "wrong", or "excluded".

Returns:
    pair_accuracy, tail_pair_accuracy, and over the tail prediction_ties and judge_ties, as in an audit
    (docs/metrics.md); tail_pairs, the pairs in the tail that the judge orders; unrewarded, the responses left out.
"""


class TailPairAccuracy(evaluate.Metric):
    """Pair accuracy overall and in the tail."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        features = datasets.Features({"predictions": number, "references": number, "prompts": datasets.Value("string")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        prompts: list[str],
        tail: float = 0.25,
        ties: metrics.TieRule = "half",
    ) -> dict[str, float]:
        proxy, gold = (np.round(np.array(column, float), REWARD_DECIMALS) for column in (predictions, references))
        if np.isnan(proxy).any():
            raise ValueError("predictions: a reward is missing (NaN)")
        if not 0 < tail <= 1:
            raise ValueError(f"tail: must lie in (0, 1], got {tail}")
        if ties not in metrics.TIE_RULES:
            raise ValueError(f"ties: must be one of {', '.join(metrics.TIE_RULES)}, got {ties!r}")
        known = ~np.isnan(gold)
        names, prompt = np.unique(np.array(prompts, str)[known], return_inverse=True)
        sides = gold[known], proxy[known], prompt, max(len(names), 1)
        everything = same_prompt_pairs(prompt)
        best = everything.within(np.where(metrics.in_tail(sides[0], prompt, tail), 0, -1))
        found = {
            "pair_accuracy": metrics.pair_accuracy(*sides, everything, ties),
            "tail_pair_accuracy": metrics.pair_accuracy(*sides, best, ties),
            "prediction_ties": metrics.prediction_ties(*sides, best),
            "judge_ties": metrics.judge_ties(sides[0], prompt, sides[3], best),
        }
        ordered = int((sides[0][best.first_M] != sides[0][best.second_M]).sum())
        values = {key: metrics.value(statistic, sides[3]) for key, statistic in found.items()}
        return values | {"tail_pairs": ordered, "unrewarded": int((~known).sum())}
