import json

import pytest

from benchmarks import record


def test_spread_is_the_median_with_its_quartiles():
    # 1 2 3 4 10: the median is the third, the quartiles the second and fourth
    assert record.spread([10, 1, 3, 4, 2]) == {"n": 5, "median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 10.0}


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_spread_refuses_what_has_no_median(samples):
    with pytest.raises(ValueError, match="samples must be finite"):
        record.spread(samples)


def test_a_record_holds_what_a_rerun_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "commit", lambda root: {"commit": "abc", "dirty": False})
    data = tmp_path / "data.jsonl"
    data.write_text("hello\n")
    path = record.write_record(
        "speed",
        unit="criteria/s",
        samples=[20, 40, 30],
        baseline="local judge",
        baseline_samples=[10],
        config={"b": 1, "a": 2},
        data=data,
        results=tmp_path,
    )
    written = json.loads(path.read_text())
    assert path == tmp_path / "speed.json"
    assert written["ratio"] == 3.0
    assert written["baseline"]["name"] == "local judge"
    assert written["data"]["sha256"] == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"  # sha256sum
    assert written["versions"]["torch"].startswith("2.")
    assert written["machine"]["cores"] >= 1 and written["machine"]["cpu"]
    assert written["command"].startswith("python ")


def test_the_config_hash_ignores_the_order_of_keys_but_not_values(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "commit", lambda root: {"commit": "abc", "dirty": False})

    def hash_of(config):
        path = record.write_record(
            "x", unit="s", samples=[1], baseline="b", baseline_samples=[1], config=config, results=tmp_path
        )
        return json.loads(path.read_text())["config_hash"]

    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1}) != hash_of({"a": 1, "b": 3})


def test_no_record_without_a_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    with pytest.raises(record.UserError, match="run benchmarks in a git checkout"):
        record.checked_out()


def test_a_page_quotes_between_its_markers_and_keeps_the_rest():
    page = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb <!-- y:begin -->"
    assert record.quoted(page, "x", "new") == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb <!-- y:begin -->"
    assert record.quoted(record.quoted(page, "x", "new"), "x", "old") == page
