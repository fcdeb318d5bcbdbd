from hypothesis import given
from hypothesis import strategies as st

from policy import cli
from rubric_data.grading import find_levels
from rubric_data.io import read_judged, write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

RUBRIC = Rubric(criteria=(Criterion(id="a", text="Is deep."), Criterion(id="b", text="Is short.")))


def record(number, deep, short):
    values = {"a": deep, "b": short}
    verdicts = tuple(Verdict(criterion_id=key, value=value) for key, value in values.items() if value is not None)
    return JudgedResponse(
        prompt_id="p", prompt="P", response_id=f"r{number}", response="x", rubric=RUBRIC, verdicts=verdicts
    )


def test_the_scale_is_the_fewest_even_levels_that_hold_every_value():
    assert find_levels([0, 0.5, 1]) == 3
    assert find_levels([1, 0.75, 0.5]) == 5
    assert find_levels([0.333, 1]) == 4
    assert find_levels([0, 1]) is find_levels([0.123, 0.9]) is find_levels([]) is None


@given(st.integers(3, 11), st.data())
def test_values_of_a_scale_are_found_on_it_or_a_coarser_one(levels, data):
    steps = data.draw(st.lists(st.integers(0, levels - 1), min_size=1))
    found = find_levels([step / (levels - 1) for step in steps])
    assert found is None if set(steps) <= {0, levels - 1} else found <= levels


def test_criteria_judged_between_yes_and_no_get_levels(tmp_path, capsys):
    write_judged(tmp_path / "in.jsonl", [record(0, 0.75, 1.0), record(1, 0.0, 0.0), record(2, None, 1.0)])
    data = ["data", "levels", "--data", str(tmp_path / "in.jsonl")]
    assert cli.main([*data, "--output", str(tmp_path / "out.jsonl")]) == 0
    deep, short = read_judged(tmp_path / "out.jsonl")[2].rubric.criteria
    assert [level.label for level in deep.levels] == ["0", "0.25", "0.5", "0.75", "1"] and short.levels == ()
    assert [r.values()[0] for r in read_judged(tmp_path / "out.jsonl")][:2] == [0.75, 0.0]
    labels = ["--labels", "[bad, half, good]", "--output", str(tmp_path / "three.jsonl")]
    assert cli.main([*data, *labels]) == 0
    out = capsys.readouterr().out
    assert "between_levels: 1" in out and "levels: bad; half; good" in out
    assert cli.main([*data, *labels]) == 2 and "exists already" in capsys.readouterr().err
    assert (
        cli.main(["data", "levels", "--data", str(tmp_path / "out.jsonl"), "--output", str(tmp_path / "x.jsonl")]) == 2
    )
    assert "use the file as it is" in capsys.readouterr().err
    write_judged(tmp_path / "odd.jsonl", [record(0, 0.77, 1.0)])
    assert (
        cli.main(["data", "levels", "--data", str(tmp_path / "odd.jsonl"), "--output", str(tmp_path / "x.jsonl")]) == 2
    )
    assert "name the levels with --labels" in capsys.readouterr().err
