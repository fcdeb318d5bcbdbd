"""Where rows come from: files of each kind, folders in the hub's layout, the hub; and what is said of bad ones."""

import json
import socket
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rubric_data.errors import UserError
from rubric_data.formats import FORMATS
from rubric_data.formats.base import read_row
from rubric_data.formats.source import is_dataset, read_rows

FIXTURES = Path(__file__).parent / "fixtures"
RAR = FIXTURES / "rar.jsonl"
ROWS = [json.loads(line) for line in RAR.read_text().splitlines()]


@pytest.fixture
def offline(monkeypatch):
    """Every attempt to reach another machine fails, and is noted."""
    attempts = []

    def refuse(self, address):
        attempts.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield attempts
    assert attempts == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_local_file_is_read_row_by_row_without_the_network(tmp_path, offline, suffix):
    path = tmp_path / f"rar{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_text(json.dumps(ROWS) if suffix == ".json" else RAR.read_text())
    placed = list(read_rows(str(path)))
    assert [row for _, row in placed] == ROWS
    assert placed[1][0] == (f"{path}:2" if suffix == ".jsonl" else f"{path}: row 2")


def hub_folder(tmp_path):
    """A folder as a dataset's repository is laid out: a card, and Parquet by split."""
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    for split, row in zip(("train", "test"), ROWS, strict=True):
        pq.write_table(pa.Table.from_pylist([row]), folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: data/train-*\n  - split: test\n    path: data/test-*\n---\n"
    )
    return folder


def test_a_dataset_is_loaded_by_datasets_split_by_split(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = str(hub_folder(tmp_path))
    placed = list(read_rows(folder))
    assert [(where, row["question"]) for where, row in placed] == [
        (f"{folder} [train]: row 1", "Why does bread rise?"),
        (f"{folder} [test]: row 1", "What is 2 + 2?"),
    ]
    form = FORMATS["rar"]
    assert [read_row(form, row, where) for where, row in placed] == [read_row(form, row, "F") for row in ROWS]
    (only,) = read_rows(folder, hub_split="test", subset="default")
    assert only[1]["question"] == "What is 2 + 2?"
    with pytest.raises(UserError, match=r"cannot be loaded as a dataset \(.*'test'.*\); .* --hub_split"):
        list(read_rows(folder, hub_split="dev"))


def test_a_name_of_the_hub_goes_to_load_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.DatasetDict({"val": datasets.Dataset.from_list(ROWS[:1])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ((where, row),) = read_rows("ScaleAI/RaR-Science", subset="default")
    assert (where, row["question"]) == ("ScaleAI/RaR-Science [val]: row 1", "Why does bread rise?")
    assert calls == [(("ScaleAI/RaR-Science", "default"), {"split": None})]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ScaleAI/RaR-Science", True),
        ("JunkaiZ/Rubrics.v1", True),
        ("here/data", False),  # here/ exists
        ("nowhere/data.jsonl", False),
        ("nowhere/data.csv", False),
        ("data", False),
        ("a/b/c", False),
        ("../a", False),
    ],
)
def test_what_looks_like_a_path_never_goes_to_the_hub(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_dataset(name) is expected


# --- what is said of bad input -------------------------------------------------------------------------------


def complaint(name, path, **options):
    form = FORMATS[name]
    with pytest.raises(UserError) as caught:
        for where, row in read_rows(str(path), unfold=form.unfold, **options):
            read_row(form, row, where)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message and ";" in message
    return message.replace(str(path), "FILE")


RUBRIC = [{"title": "t", "description": "d", "weight": 1}]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("rar", {"rubric": RUBRIC}, "field question: is missing; add it"),
        ("rar", {"question": None, "rubric": RUBRIC}, "field question: is missing; add it"),
        ("rar", {"question": 7, "rubric": RUBRIC}, "field question: must be a valid string, got 7; correct it"),
        (
            "rar",
            {"question": "q", "rubric": [*RUBRIC, {"description": "d", "weight": "2"}]},
            "field rubric.1.weight: must be a valid number, got '2'; write a number, without quotation marks",
        ),
        (
            "rar",
            {"question": "q", "rubric": [{**RUBRIC[0], "weight": float("nan")}]},
            "criterion 't': weight must be finite and non-zero, got nan; correct it",
        ),
        (
            "healthbench",
            {"prompt": "hi", "prompt_id": "p", "rubrics": []},
            "field prompt: must be a list, got 'hi'; correct it",
        ),
        ("preferences", {"chosen": "a"}, "field rejected: is missing; add it"),
        (
            "preferences",
            {"chosen": [{"role": "assistant"}], "rejected": "b"},
            "field chosen.messages.0.content: is missing; add it",
        ),
        (
            "verifiers",
            {"question": "q", "info": "{"},
            "field info: must be an object, or one as JSON text; correct it",
        ),
        (
            "verifiers",
            {"question": "q", "info": {"criteria": [{"text": "t", "choices": ["one"]}]}},
            "info: field criteria.0: choices need at least two answers, got ['one']; correct it",
        ),
        (
            "autorubric",
            {"prompt": "p", "rubric": [{"requirement": "r"}], "ground_truth": ["MET", "MET"]},
            "field ground_truth: has 2 values for 1 criteria; give one each",
        ),
    ],
)
def test_a_malformed_row_is_named_with_its_field_and_remedy(tmp_path, name, row, expected):
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    assert complaint(name, path) == f"FILE:2: {expected}"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("a.json", '{"question": "q"}', "FILE: holds one object, not a list of rows; write '[row, ...]' or JSONL"),
        ("a.json", "[1]", "FILE: row 1: is one int, not an object; correct it"),
        (
            "a.json",
            "[",
            "FILE: not valid JSON (Expecting value, line 1, column 2); correct it, or name the file .jsonl",
        ),
        ("a.yaml", "a: [", "FILE: broken YAML (line 1); correct it"),
        ("a.csv", "a,b", "FILE: unknown file type '.csv'; use one of .jsonl, .parquet, .json, .yaml, .yml"),
        ("a.parquet", "x", "FILE: not a readable Parquet file ("),
    ],
)
def test_a_bad_file(tmp_path, file, text, expected):
    path = tmp_path / file
    path.write_text(text)
    assert complaint("rar", path).startswith(expected)


def test_a_missing_file_and_options_that_a_file_does_not_have(tmp_path):
    path = tmp_path / "none.jsonl"
    assert complaint("rar", path) == "FILE: no such file; give one, or a dataset of the hub as owner/name"
    assert complaint("rar", RAR, subset="health") == "subset: FILE is a file and has none; leave it out"


def test_a_document_without_its_list():
    form = FORMATS["chasing-tail"]
    with pytest.raises(UserError, match="has no list 'results' or 'rubrics'; give a list of rows"):
        form.unfold({"metadata": {}}, "F")
    with pytest.raises(UserError, match="F: no item has a prompt; add 'prompt' to the document or to its items"):
        FORMATS["autorubric"].unfold({"rubric": [{"requirement": "r"}]}, "F")


@pytest.mark.parametrize(
    ("name", "file", "text", "where"),
    [
        ("rar", "a.jsonl", '{"question": "\\ud83d", "rubric": []}\n', "FILE:1"),
        ("rar", "a.json", '[{"question": "\\ud83d", "rubric": []}]', "FILE: row 1"),
        ("autorubric", "a.yaml", 'prompt: "\\ud83d"\nrubric: []\n', "FILE: item 1"),
        (
            "verifiers",
            "a.jsonl",
            json.dumps({"question": "q", "info": '{"a": "\\ud83d"}'}) + "\n",
            "FILE:1: field info",
        ),
    ],
)
def test_half_a_character_is_told_of_where_it_stands(tmp_path, name, file, text, where):
    (tmp_path / file).write_text(text)
    half = "holds half a character (\\ud83d without its other half); correct it"
    assert complaint(name, tmp_path / file) == f"{where}: {half}"
