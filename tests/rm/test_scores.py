import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm.scorer import Scored
from rm.scores import read_any_scores, read_scores, write_scores
from rubric_data.errors import UserError


def scored(records, probs=(0.25, 0.75), logits=(0.0, 0.0)):
    return [Scored(np.array(probs), np.array(logits), 0.5, 0) for _ in records]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_scores_come_back_in_the_order_of_the_records(judged, tmp_path, suffix):
    path = tmp_path / f"scores.{suffix}"
    different = [Scored(np.array([i / 20, 1.0]), np.zeros(2), 0.5, 0) for i in range(len(judged))]
    write_scores(path, judged, different)
    found = read_scores(path, judged[::-1][:3])  # others in the file are passed over
    assert [one.tolist() for one in found] == [[i / 20, 1.0] for i in (11, 10, 9)]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda rows: rows[1:], "'p0-r0' of prompt 'p0' is missing"),
        (lambda rows: rows + rows[:1], "'p0-r0' of prompt 'p0' stands there twice"),
        (lambda rows: [rows[0] | {"criteria": rows[0]["criteria"][:1]}, *rows[1:]], "criterion 'short' is missing"),
        (
            lambda rows: [rows[0] | {"criteria": [c | {"probability": 1.5} for c in rows[0]["criteria"]]}, *rows[1:]],
            "a probability lies outside",
        ),
        (
            lambda rows: [rows[0] | {"criteria": [c | {"by_code": True} for c in rows[0]["criteria"]]}, *rows[1:]],
            "use_verifiers false",
        ),
        (lambda rows: [{"prompt": "p0"}], "a row lacks prompt_id"),
    ],
)
def test_files_that_do_not_fit_are_refused(judged, tmp_path, change, fault):
    path = tmp_path / "scores.jsonl"
    write_scores(path, judged, scored(judged))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    with pytest.raises(UserError, match=fault):
        read_scores(path, judged)


def test_a_broken_file_is_one_line(tmp_path, judged):
    (tmp_path / "scores.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="cannot be read as scores"):
        read_scores(tmp_path / "scores.parquet", judged)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rewards_alone_come_back_in_the_order_of_the_records(judged, tmp_path, suffix):
    path = tmp_path / f"scores.{suffix}"
    rows = [
        {"prompt_id": r.prompt_id, "response_id": r.response_id, "generator": "g", "reward": 1 - 7.5 * i}
        | {"criteria": None}
        for i, r in enumerate(judged)
    ]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_any_scores(path, judged[:2][::-1]).tolist() == [-6.5, 1]
    with pytest.raises(UserError, match="criterion 'fruit' is missing"):
        read_scores(path, judged)


def test_files_with_criteria_are_read_as_ever_and_never_mixed(judged, tmp_path):
    path = tmp_path / "scores.jsonl"
    write_scores(path, judged, scored(judged))
    assert [one.tolist() for one in read_any_scores(path, judged[:2])] == [[0.25, 0.75]] * 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for change, fault in (({"criteria": None}, "has no criteria, and others have"), ({"criteria": [{}]}, "lacks")):
        path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | change, *rows[1:]]))
        with pytest.raises(UserError, match=f"'p0-r0' of prompt 'p0'.*{fault}"):
            read_any_scores(path, judged)
