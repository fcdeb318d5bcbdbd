import json

import pytest

from rubric_data.errors import UserError
from rubric_data.files import atomic_path, commit, start_run, write_json


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(tmp_path):
    config = {"output": str(tmp_path / "run"), "rate": 0.1, "resume": False}
    folder = start_run(tmp_path / "run", config)
    with pytest.raises(UserError, match=r"holds a run already; choose another --output$"):
        start_run(folder, config)
    with pytest.raises(UserError, match="holds a run already; choose another --output, or add --resume true to go on"):
        start_run(folder, config, resume=False)
    assert start_run(folder, {**config, "resume": True}, resume=True) == folder
    with pytest.raises(UserError, match="cannot resume, as rate is"):
        start_run(folder, {**config, "rate": 0.2}, resume=True)
    assert start_run(folder, {**config, "rate": 0.2}, resume=True, free={"rate"}) == folder


def test_a_run_names_the_commit_of_the_checkout_that_made_it(tmp_path, monkeypatch):
    origin = json.loads((start_run(tmp_path / "run", {}) / "origin.json").read_text())
    assert origin["command"] and (origin["commit"] is None or len(origin["commit"]) == 40)
    assert commit(tmp_path) is None  # installed somewhere else
    monkeypatch.setenv("PATH", "")
    (tmp_path / ".git").mkdir()
    assert commit(tmp_path) is None  # no git at hand


def test_folders_that_cannot_take_a_run(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; choose a folder"):
        start_run(tmp_path / "file", {})
    with pytest.raises(UserError, match="cannot write here"):
        start_run(tmp_path / "file" / "below", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        start_run(tmp_path / "full", {})


def test_a_resumed_run_may_change_what_is_free_in_a_section(tmp_path):
    folder = start_run(tmp_path / "run", {"a": 1, "judge": {"limit": 1, "name": "x"}}, resume=False)
    start_run(folder, {"a": 1, "judge": {"limit": 2, "name": "x"}}, resume=True, free={"judge.limit"})
    with pytest.raises(UserError, match=r"cannot resume, as judge\.name is"):
        start_run(folder, {"a": 1, "judge": {"limit": 1, "name": "y"}}, resume=True, free={"judge.limit"})
