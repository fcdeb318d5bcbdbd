"""Files of scores, both ways: one row a response with P(met) of its criteria, as `rubric-rm score` writes them.

Predictors from elsewhere write them too; of one that answers no criteria a row holds the reward alone.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rm.sides import Answers
from rubric_data.errors import UserError
from rubric_data.files import atomic_path
from rubric_data.records import JudgedResponse

if TYPE_CHECKING:
    from rm.scorer import Scored

SUFFIXES = (".jsonl", ".parquet")
_READ = ["prompt_id", "response_id", "reward", "criteria"]


def write_scores(path: str | Path, records: Sequence[JudgedResponse], scored: Sequence["Scored"]) -> None:
    """Write the scores of ``records`` atomically, JSON Lines or Parquet by the suffix (docs/data.md has the fields)."""
    path = Path(path)
    rows = score_rows(records, scored)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text("".join(lines), encoding="utf-8")


def score_rows(records: Sequence[JudgedResponse], scored: Sequence["Scored"]) -> list[dict[str, Any]]:
    """The rows of a file of scores (docs/data.md has the fields)."""
    return [
        {
            "prompt_id": record.prompt_id,
            "response_id": record.response_id,
            "generator": record.generator,
            "reward": item.reward,
            "reward_std": None if item.doubt is None else item.doubt.reward,
            "truncated_tokens": item.truncated,
            "expected": None if item.expected is None else item.expected.summary(),
            "criteria": _criterion_rows(record, item),
        }
        for record, item in zip(records, scored, strict=True)
    ]


def _criterion_rows(record: JudgedResponse, item: "Scored") -> list[dict[str, Any]]:
    """The answers to a rubric, in its order; low and high are null without a calibration that tells them."""
    nothing = [None] * len(item.probs)
    expected = item.expected
    low, high = (nothing, nothing) if expected is None else (expected.prob_low.tolist(), expected.prob_high.tolist())
    std = nothing if item.doubt is None else item.doubt.std.tolist()
    levels = [own.tolist() if len(own) > 2 else None for own in item.level_probs]
    by_code = item.by_code.tolist()
    columns = zip(record.rubric.criteria, item.probs.tolist(), std, low, high, by_code, levels, strict=True)
    return [
        {
            "criterion_id": criterion.id,
            "probability": prob,
            "std": spread,
            "low": below,
            "high": above,
            "by_code": exact,
            "levels": level_probs,
        }
        for criterion, prob, spread, below, above, exact, level_probs in columns
    ]


def read_scores(path: str | Path, records: Sequence[JudgedResponse], *, with_code: bool = False) -> list[np.ndarray]:
    """P(met) of each record's criteria, (K,) each, from a file that may hold other responses too.

    Rows are found by prompt_id and response_id. Raises UserError if the file cannot be read, if a response or a
    criterion is missing or there twice, if a probability lies outside [0, 1], or, unless ``with_code``, if code gave it
    and not the model.
    """
    path = Path(path)
    return [_probabilities(_where(path, record), record, row, with_code) for record, row in _found(path, records)]


def read_any_scores(path: str | Path, records: Sequence[JudgedResponse]) -> Answers:
    """`read_scores`, or where no row has criteria (null, or none) the rewards alone, (R,).

    Raises UserError as `read_scores`, if some rows have criteria and some have not, or if a reward is not finite.
    """
    path = Path(path)
    found = _found(path, records)
    if any(row["criteria"] for _, row in found):
        for record, row in found:
            if not row["criteria"]:
                raise UserError(f"{_where(path, record)} has no criteria, and others have; score all of them alike")
        return [_probabilities(_where(path, record), record, row) for record, row in found]
    for record, row in found:
        reward = row.get("reward")
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise UserError(f"{_where(path, record)} has neither criteria nor a finite reward; score it again")
    return np.array([row["reward"] for _, row in found], float)


def _where(path: Path, record: JudgedResponse) -> str:
    return f"{path}: response {record.response_id!r} of prompt {record.prompt_id!r}"


def _found(path: Path, records: Sequence[JudgedResponse]) -> list[tuple[JudgedResponse, dict[str, Any]]]:
    """Each record with its row."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in _rows(path):
        key = row["prompt_id"], row["response_id"]
        if key in rows:
            raise UserError(f"{path}: response {key[1]!r} of prompt {key[0]!r} stands there twice; remove one")
        rows[key] = row
    for record in records:
        if (record.prompt_id, record.response_id) not in rows:
            raise UserError(f"{_where(path, record)} is missing; score the file that is read here")
    return [(record, rows[record.prompt_id, record.response_id]) for record in records]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                there = [name for name in _READ if name in file.schema_arrow.names]
                rows = file.read(there).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as scores ({error}); write it again with `score`") from None
    if not all(isinstance(row, dict) and {"prompt_id", "response_id", "criteria"} <= row.keys() for row in rows):
        raise UserError(f"{path}: a row lacks prompt_id, response_id or criteria; write it again with `score`")
    return rows


def _probabilities(where: str, record: JudgedResponse, row: dict[str, Any], with_code: bool = False) -> np.ndarray:
    criteria = row["criteria"] or []
    if not all(isinstance(one, dict) and {"criterion_id", "probability"} <= one.keys() for one in criteria):
        raise UserError(f"{where}: a criterion lacks criterion_id or probability; write it again with `score`")
    if not with_code and any(criterion.get("by_code") for criterion in criteria):
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
