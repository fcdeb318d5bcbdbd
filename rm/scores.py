"""Files of scores, both ways: one row a response with P(met) of its criteria, as `rubric-rm score` writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rubric_data.errors import UserError
from rubric_data.files import atomic_path
from rubric_data.records import JudgedResponse

if TYPE_CHECKING:
    from rm.scorer import Scored

SUFFIXES = (".jsonl", ".parquet")


def write_scores(path: str | Path, records: Sequence[JudgedResponse], scored: Sequence["Scored"]) -> None:
    """Write the scores of ``records`` atomically, JSON Lines or Parquet by the suffix (docs/data.md has the fields)."""
    path = Path(path)
    rows = [
        {
            "prompt_id": record.prompt_id,
            "response_id": record.response_id,
            "generator": record.generator,
            "reward": item.reward,
            "truncated_tokens": item.truncated,
            "expected": None if item.expected is None else item.expected.summary(),
            "criteria": _criterion_rows(record, item),
        }
        for record, item in zip(records, scored, strict=True)
    ]
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text("".join(lines), encoding="utf-8")


def _criterion_rows(record: JudgedResponse, item: "Scored") -> list[dict[str, Any]]:
    """The answers to a rubric, in its order; low and high are null without a calibration that tells them."""
    nothing = [None] * len(item.probs)
    expected = item.expected
    low, high = (nothing, nothing) if expected is None else (expected.prob_low.tolist(), expected.prob_high.tolist())
    columns = zip(record.rubric.criteria, item.probs.tolist(), low, high, item.by_code.tolist(), strict=True)
    return [
        {"criterion_id": criterion.id, "probability": prob, "low": below, "high": above, "by_code": by_code}
        for criterion, prob, below, above, by_code in columns
    ]


def read_scores(path: str | Path, records: Sequence[JudgedResponse]) -> list[np.ndarray]:
    """P(met) of each record's criteria, (K,) each, from a file that may hold other responses too.

    Rows are found by prompt_id and response_id. Raises UserError if the file cannot be read, if a response or a
    criterion is missing or there twice, if a probability lies outside [0, 1], or if code gave it and not the model.
    """
    path = Path(path)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _rows(path):
        key = row["prompt_id"], row["response_id"]
        if key in found:
            raise UserError(f"{path}: response {key[1]!r} of prompt {key[0]!r} stands there twice; remove one")
        found[key] = row["criteria"]
    return [_probabilities(path, record, found) for record in records]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            rows = pq.read_table(path, columns=["prompt_id", "response_id", "criteria"]).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as scores ({error}); write it again with `score`") from None
    if not all(isinstance(row, dict) and {"prompt_id", "response_id", "criteria"} <= row.keys() for row in rows):
        raise UserError(f"{path}: a row lacks prompt_id, response_id or criteria; write it again with `score`")
    return rows


def _probabilities(
    path: Path, record: JudgedResponse, found: dict[tuple[str, str], list[dict[str, Any]]]
) -> np.ndarray:
    where = f"{path}: response {record.response_id!r} of prompt {record.prompt_id!r}"
    if (record.prompt_id, record.response_id) not in found:
        raise UserError(f"{where} is missing; score the file that is read here")
    criteria = found[record.prompt_id, record.response_id]
    if any(criterion.get("by_code") for criterion in criteria):
        raise UserError(f"{where} has answers by code, which say nothing of a model; score with --use_verifiers false")
    by_id = {criterion["criterion_id"]: criterion["probability"] for criterion in criteria}
    missing = [criterion.id for criterion in record.rubric.criteria if criterion.id not in by_id]
    if missing or len(by_id) < len(criteria):
        fault = f"criterion {missing[0]!r} is missing" if missing else "a criterion stands there twice"
        raise UserError(f"{where}: {fault}; score the file that is read here")
    probs_K = np.array([by_id[criterion.id] for criterion in record.rubric.criteria], float)
    if not ((probs_K >= 0) & (probs_K <= 1)).all():
        raise UserError(f"{where}: a probability lies outside [0, 1]; correct it")
    return probs_K
