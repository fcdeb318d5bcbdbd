"""Predictors that know less than the reward model: what an audit must be read beside.

Each gives P(met) for every criterion of every record, (K,) in rubric order. All but `zero_shot` are fitted
on judged records (the train split) and never see the verdicts of the records they predict.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rubric_data.errors import UserError
from rubric_data.records import JudgedResponse

if TYPE_CHECKING:
    from rm.scorer import RubricScorer

Predictions = list[np.ndarray]  # one (K,) array of P(met) per record
_WORD = re.compile(r"\w+")


def fitted_baselines(train: Sequence[JudgedResponse], records: Sequence[JudgedResponse]) -> dict[str, Predictions]:
    """Every fitted baseline's predictions for ``records``, by name, with `train` as the only source of verdicts."""
    return {name: predict(train, records) for name, predict in FITTED.items()}


def majority(train: Sequence[JudgedResponse], records: Sequence[JudgedResponse]) -> Predictions:
    """The mean verdict of the train split, for every criterion."""
    prior = _mean_verdict(train)
    return [np.full(len(record.rubric.criteria), prior) for record in records]


def tag_mean(train: Sequence[JudgedResponse], records: Sequence[JudgedResponse]) -> Predictions:
    """What the criterion alone gives away: the mean verdict of its text, else of its tags, else of all.

    A criterion with several tags seen in training takes the mean of their means.
    """
    by_text: dict[Hashable, list[float]] = defaultdict(list)
    by_tag: dict[Hashable, list[float]] = defaultdict(list)
    for record in train:
        for criterion, value in zip(record.rubric.criteria, record.values(), strict=True):
            if not np.isnan(value):
                by_text[criterion.text].append(value)
                for tag in criterion.tags:
                    by_tag[tag].append(value)
    text_mean, mean_of_tag, prior = _means(by_text), _means(by_tag), _mean_verdict(train)

    def guess(text: str, tags: Iterable[str]) -> float:
        seen = [mean_of_tag[tag] for tag in tags if tag in mean_of_tag]
        return text_mean.get(text, float(np.mean(seen)) if seen else prior)

    return [np.array([guess(c.text, c.tags) for c in record.rubric.criteria]) for record in records]


def length_only(train: Sequence[JudgedResponse], records: Sequence[JudgedResponse]) -> Predictions:
    """Logistic regression of the verdict on ln(1 + words of the response) and its square."""

    def features(record: JudgedResponse) -> np.ndarray:
        words = np.log1p(len(record.response.split()))
        return np.tile([words, words**2], (len(record.rubric.criteria), 1))

    return _logistic(train, records, features)


def lexical_overlap(train: Sequence[JudgedResponse], records: Sequence[JudgedResponse]) -> Predictions:
    """Logistic regression of the verdict on the share of the criterion's content words that the response has."""

    def features(record: JudgedResponse) -> np.ndarray:
        said = set(_WORD.findall(record.response.lower()))
        return np.array([[_overlap(criterion.text, said)] for criterion in record.rubric.criteria])

    return _logistic(train, records, features)


def zero_shot(scorer: "RubricScorer", records: Sequence[JudgedResponse]) -> Predictions:
    """What ``scorer``, an untrained backbone (`RubricScorer.zero_shot`), answers."""
    return [one.probs for one in scorer.score_records(records, progress=True)]


FITTED: dict[str, Callable[[Sequence[JudgedResponse], Sequence[JudgedResponse]], Predictions]] = {
    "majority": majority,
    "tag mean": tag_mean,
    "length": length_only,
    "lexical overlap": lexical_overlap,
}


def _overlap(text: str, said: set[str]) -> float:
    """Share of the content words of ``text`` in ``said``; 0 where it has none."""
    content = {word for word in _WORD.findall(text.lower()) if word not in ENGLISH_STOP_WORDS}
    return len(content & said) / len(content) if content else 0.0


def _mean_verdict(train: Sequence[JudgedResponse]) -> float:
    known = [value for record in train for value in record.values() if not np.isnan(value)]
    if not known:
        raise UserError("baselines: the train split carries no verdicts; run `rubric-rm judge` on it first")
    return float(np.mean(known))


def _means(values: Mapping[Hashable, list[float]]) -> dict[Hashable, float]:
    return {key: float(np.mean(found)) for key, found in values.items()}


def _logistic(
    train: Sequence[JudgedResponse],
    records: Sequence[JudgedResponse],
    features: Callable[[JudgedResponse], np.ndarray],
) -> Predictions:
    """Logistic regression on ``features`` (K, F) of each record.

    A verdict v stands in the fit twice: as met with weight v and as unmet with weight 1 - v.
    """
    prior = _mean_verdict(train)
    if prior in (0.0, 1.0):  # one class only: nothing to fit
        return majority(train, records)
    x_NF = np.concatenate([features(record) for record in train])
    value_N = np.concatenate([record.values() for record in train])
    x_NF, value_N = x_NF[~np.isnan(value_N)], value_N[~np.isnan(value_N)]
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(
        np.concatenate([x_NF, x_NF]),
        np.repeat([1, 0], len(x_NF)),
        logisticregression__sample_weight=np.concatenate([value_N, 1 - value_N]),
    )
    return [model.predict_proba(features(record))[:, 1] for record in records]
