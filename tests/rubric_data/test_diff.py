import pytest

from policy.cli import main
from rubric_data.diff import diff_rubrics
from rubric_data.io import write_prompts
from rubric_data.records import Criterion, PromptRecord, Rubric


def rubric(**criteria):
    return Rubric(criteria=tuple(Criterion(id=key, text=t, weight=w) for key, (t, w) in criteria.items()))


TIDES = "Why are\nthere [tides]? " + 9 * "Please tell. "
BEFORE = rubric(
    moon=("Names the Moon.", 1), short=("Has at most 40 words.", 1), kind=("Is kind.", 1), ask=("Asks a question.", 2)
)
AFTER = rubric(
    moon=("Names the Moon.", 3),
    short=("Has at most 30 words.", 1),
    ask=("Asks a question.", 2),
    new=("Pictures the water as a bulge.", 2),
)


def test_added_removed_reworded_reweighted():
    diff = diff_rubrics(BEFORE, AFTER)
    assert [c.id for c in diff.added] == ["new"]
    assert [c.id for c in diff.removed] == ["kind"]
    assert [(a.id, b.text) for a, b in diff.reworded] == [("short", "Has at most 30 words.")]
    assert [(a.weight, b.weight) for a, b in diff.reweighted] == [(1, 3)]


@pytest.mark.parametrize(("before", "after"), [(BEFORE, BEFORE), (None, None)])
def test_nothing_changed(before, after):
    assert not diff_rubrics(before, after)


def test_a_rubric_that_was_not_there_is_all_added():
    assert len(diff_rubrics(None, AFTER).added) == 4 and len(diff_rubrics(BEFORE, None).removed) == 4


def test_each_criterion_is_matched_once_with_its_closest():
    old = rubric(a=("Mentions the pull of the Moon.", 1))
    new = rubric(b=("Mentions the strong pull of the Moon.", 1), c=("Mentions the pull of the Moon on water today.", 1))
    diff = diff_rubrics(old, new)
    assert [(a.id, b.id) for a, b in diff.reworded] == [("a", "b")] and [c.id for c in diff.added] == ["c"]


def test_the_command_prints_every_change_as_plain_text(tmp_path, capsys):
    odd = rubric(x=("[red]Names[/red] the Moon\x1b[31m.", 1))
    write_prompts(
        tmp_path / "a.jsonl",
        [
            PromptRecord(prompt_id="p", prompt=TIDES, rubric=BEFORE),
            PromptRecord(prompt_id="gone", prompt="!", rubric=odd),
        ],
    )
    write_prompts(tmp_path / "b.jsonl", [PromptRecord(prompt_id="p", prompt=TIDES, rubric=AFTER)])
    command = ["rubric", "diff", "--before", str(tmp_path / "a.jsonl"), "--after", str(tmp_path / "b.jsonl")]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        "p: Why are there [tides]? Please tell. Please tell. Please tel…",
        "  - [1] Is kind.",
        "  + [2] Pictures the water as a bulge.",
        "  ~ [1] Has at most 40 words.",
        "    [1] Has at most 30 words.",
        "  = [1 -> 3] Names the Moon.",
        "gone, only before: !",
        "  - [1] [red]Names[/red] the Moon\\x1b[31m.",
        "",
        "prompts: 2",
        "changed: 2",
        "added: 1",
        "removed: 2",
        "reworded: 1",
        "reweighted: 1",
    ]
