"""Where two sides are furthest apart, with the texts to read: judge and model, or the model and another predictor."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rm import metrics
from rm.sides import Predicted, Table
from rubric_data.files import JSON_DECIMALS, json_number
from rubric_data.records import JudgedResponse

SHOWN = 12


def with_judge(records: Sequence[JudgedResponse], table: Table, model: Predicted) -> list[dict[str, Any]]:
    """The verdicts the model is furthest from, at most one of a response, furthest first."""
    return [
        _verdict(records, table, model, place)
        for place in _furthest(records, table, np.abs(table.gold_N - model.prob_N))
    ]


def between(
    records: Sequence[JudgedResponse], table: Table, model: Predicted, other: Predicted
) -> list[dict[str, Any]]:
    """Where the two differ most, furthest first: in a verdict, at most one of a response.

    Where the other answers no criteria, in the place that a response's reward has among those to its prompt.
    """
    if not other.answers:
        return _by_place(records, table, model, other)
    gap_N = np.abs(model.prob_N - other.prob_N)
    return [
        _verdict(records, table, model, place) | {"other": json_number(other.prob_N[place])}
        for place in _furthest(records, table, gap_N)
        if gap_N[place] > 0
    ]


def _furthest(records: Sequence[JudgedResponse], table: Table, gap_N: np.ndarray) -> list[int]:
    """The verdict with the largest gap of each response, as places in 0..N-1; the largest of these."""
    found = []
    for response in np.unique(table.response_N):
        places = np.flatnonzero(table.response_N == response)
        place = int(places[np.argmax(gap_N[places])])
        record = records[response]
        found.append((-round(float(gap_N[place]), JSON_DECIMALS), record.prompt, record.response, place))
    return [place for *_, place in sorted(found)[:SHOWN]]


def _verdict(records: Sequence[JudgedResponse], table: Table, model: Predicted, place: int) -> dict[str, Any]:
    criterion = table.criteria_N[place]
    return _texts(records[table.response_N[place]]) | {
        "criterion_id": criterion.id,
        "criterion": criterion.text,
        "judged": json_number(table.gold_N[place]),
        "predicted": json_number(model.prob_N[place]),
    }


def _by_place(
    records: Sequence[JudgedResponse], table: Table, model: Predicted, other: Predicted
) -> list[dict[str, Any]]:
    sides = {"judged": table.reward_B, "predicted": model.reward_B, "other": other.reward_B}
    places = {name: metrics.quantiles(reward_B, table.prompt_B) for name, reward_B in sides.items()}
    gap_B = np.abs(places["predicted"] - places["other"])
    found = []
    for place, response in enumerate(np.flatnonzero(table.rewarded_B).tolist()):
        if gap_B[place] > 0:
            row = _texts(records[response])
            row |= {name: json_number(reward_B[place]) for name, reward_B in sides.items()}
            row["places"] = {name: json_number(place_B[place]) for name, place_B in places.items()}
            found.append((-round(float(gap_B[place]), JSON_DECIMALS), row["prompt"], row["response"], place, row))
    return [row for *_, row in sorted(found, key=lambda entry: entry[:4])[:SHOWN]]


def _texts(record: JudgedResponse) -> dict[str, Any]:
    shown = ("prompt_id", "response_id", "generator", "prompt", "response")
    return {key: getattr(record, key) for key in shown}
