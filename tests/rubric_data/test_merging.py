import json

import numpy as np
import pytest

from policy import cli
from rubric_data.config import MergeConfig
from rubric_data.errors import UserError
from rubric_data.io import read_judged, write_judged
from rubric_data.merging import run_merge
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric, Verdict, Verifier

LEVELS = tuple(Level(label=label) for label in ("bad", "fair", "good"))
CLEAR, WITTY = Criterion(id="clear", text="Is clear."), Criterion(id="witty", text="Is witty.", levels=LEVELS, weight=2)


def file(folder, judge, answers, *, prefix="", human=None, criteria=(CLEAR, WITTY)):
    """A judge's file: ``answers[i]`` are its verdicts on response i, None where masked, (value, count) where merged."""

    def verdict(criterion, answer, row):
        known = human[row] if human and criterion is CLEAR else None
        if answer is None:
            return Verdict(criterion_id=criterion.id, masked=f"timeout: {judge}", judge=judge, human=known)
        value, count = answer if isinstance(answer, tuple) else (answer, 1)
        return Verdict(criterion_id=criterion.id, value=value, judge=judge, count=count, human=known)

    records = [
        JudgedResponse(
            prompt_id=f"p{row // 2}",
            prompt=f"prompt {row // 2}",
            response_id=f"{prefix}r{row}",
            response=f"response {row}",
            rubric=Rubric(criteria=criteria),
            verdicts=tuple(verdict(c, answer, row) for c, answer in zip(criteria, given, strict=True)),
            split="test",
        )
        for row, given in enumerate(answers)
    ]
    path = folder / f"{judge or 'anonymous'}{prefix}.jsonl"
    write_judged(path, records)
    return str(path)


def test_the_mean_of_two_judges_on_the_command_line(tmp_path, capsys):
    a = file(tmp_path, "a", [[1, 0.5], [(0.5, 3), None], [1, None]], human=[None, 1.0, None])
    b = file(tmp_path, "b", [[0, 1], [1, 0], [1, None]], prefix="other-", human=[0.0, 0.0, None])
    assert cli.main(["data", "merge", "--data", f"[{a}, {b}]", "--output", str(tmp_path / "panel")]) == 0
    merged = read_judged(tmp_path / "panel" / "judged.jsonl")
    assert [record.response_id for record in merged] == ["r0", "r1", "r2"]  # all else is the first file's
    assert [record.values() for record in merged[:2]] == [[0.5, 0.75], [0.75, 0]]
    assert merged[1].counts() == pytest.approx([4 / (1 / 3 + 1), 1])
    assert [verdict.human for verdict in (record.verdicts[0] for record in merged)] == [0.0, 1.0, None]
    assert merged[2].verdicts[1].masked == "timeout: a; timeout: b"
    assert {verdict.judge for record in merged for verdict in record.verdicts} == {"mean(a, b)"}
    report = json.loads((tmp_path / "panel" / "report.json").read_text())
    assert report["questions"] == 6 and report["masked"] == {"timeout": 1}
    assert report["mean_verdict"] == pytest.approx((0.5 + 0.75 + 0.75 + 0 + 1) / 5)
    assert report["judges"] == {"a": {"answered": 4, "mean": 0.75}, "b": {"answered": 5, "mean": 0.6}}
    shown = capsys.readouterr().out
    assert "agreement, worst first" in shown and "Is witty." in shown and "mean_count: 2\n" in shown


def test_dawid_skene_trusts_the_judge_that_the_others_bear_out(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    paths = []
    for name, accuracy in (("sharp", 0.95), ("fair", 0.8), ("dull", 0.7)):
        answers = np.where(rng.random(200) < accuracy, truth, 1 - truth).astype(float)
        paths.append(file(tmp_path, name, answers[:, None].tolist(), criteria=(CLEAR,)))
    report = run_merge(MergeConfig(data=paths, output=str(tmp_path / "panel"), method="dawid-skene"))
    values = np.array([record.values()[0] for record in read_judged(tmp_path / "panel" / "judged.jsonl")])
    assert ((values > 0.5) == truth).mean() > 0.9
    accuracies = [report["judges"][name]["accuracy"]["2"] for name in ("sharp", "fair", "dull")]
    assert accuracies == sorted(accuracies, reverse=True)
    assert 1 < report["mean_count"] < 3
    assert report["agreement"]["flagged"] == 1 and len(report["agreement"]["pairs"]) == 3


@pytest.mark.parametrize(
    ("files", "changes", "said"),
    [
        ("a", {}, "data: mean needs 2 files or more, one a judge, got 1; add others"),
        ("ab", {"method": "dawid-skene"}, "data: dawid-skene needs 3 files or more, one a judge, got 2"),
        ("aa", {}, r"a\.jsonl: is by a, as .*a\.jsonl is; give one file a judge, and ask a judge several times with"),
        ("ac", {}, r"a\.jsonl: lacks 1 of the 3 questions of .*c\.jsonl, the first being response 'r2', criterion"),
        ("am", {}, r"m\.jsonl: holds verdicts of 2 judges \(x, y\); give one file a judge"),
        ("an", {}, r"n\.jsonl: holds no verdicts; run 'rubric-rm judge --data .*n\.jsonl' first"),
        ("ab", {"min_alpha": 2.0}, r"min_alpha: must lie in \[-1, 1\]"),
        ("ab", {"min_questions": 0}, "min_questions: must be at least 1"),
    ],
)
def test_a_panel_that_cannot_be_merged_is_one_line_and_leaves_no_run(tmp_path, files, changes, said):
    made = {name: file(tmp_path, name, [[1], [0]], criteria=(CLEAR,)) for name in "ab"}
    made["c"] = file(tmp_path, "c", [[1], [0], [1]], criteria=(CLEAR,))
    records = read_judged(made["a"])
    for name, verdicts in {"m": ["x", "y"], "n": [None, None]}.items():
        made[name] = str(tmp_path / f"{name}.jsonl")
        write_judged(
            made[name],
            [
                record.model_copy(
                    update={"verdicts": (Verdict(criterion_id="clear", value=1.0, judge=judge),) if judge else ()}
                )
                for record, judge in zip(records, verdicts, strict=True)
            ],
        )
    config = MergeConfig(data=[made[name] for name in files], output=str(tmp_path / "panel"), **changes)
    with pytest.raises(UserError, match=said):
        run_merge(config)
    assert not (tmp_path / "panel").exists()


def test_questions_match_by_what_is_asked(tmp_path):
    """Another id or weight asks the same; other words, or other levels, do not."""
    a = file(tmp_path, "a", [[1]], criteria=(CLEAR,))
    b = file(tmp_path, "", [[0]], criteria=(Criterion(id="x", text="Is clear.", weight=7),))
    run_merge(MergeConfig(data=[a, b], output=str(tmp_path / "panel")))
    (merged,) = read_judged(tmp_path / "panel" / "judged.jsonl")
    assert merged.values() == [0.5] and merged.rubric.criteria == (CLEAR,)
    assert merged.verdicts[0].judge == f"mean(a, {b})"  # whoever has no name goes by the file's
    with pytest.raises(UserError, match="holds a run already"):
        run_merge(MergeConfig(data=[a, b], output=str(tmp_path / "panel")))
    c = file(tmp_path, "c", [[0]], criteria=(Criterion(id="clear", text="Is clear.", levels=LEVELS),))
    with pytest.raises(UserError, match="lacks 1 of the 1 questions"):
        run_merge(MergeConfig(data=[a, c], output=str(tmp_path / "other")))


def test_what_code_answered_passes_through_and_is_nobody_s_opinion(tmp_path):
    digit = Criterion(id="digit", text="Has a digit.", verifier=Verifier(name="has_digit"))
    paths = []
    for judge, value in (("a", 1.0), ("b", 0.0)):
        path = file(tmp_path, judge, [[value, 1.0], [value, 0.0]], criteria=(CLEAR, digit))
        by_code = [
            record.model_copy(
                update={"verdicts": (record.verdicts[0], record.verdicts[1].model_copy(update={"judge": "verifier"}))}
            )
            for record in read_judged(path)
        ]
        write_judged(path, by_code)
        paths.append(path)
    report = run_merge(MergeConfig(paths, str(tmp_path / "panel")))
    merged = read_judged(tmp_path / "panel" / "judged.jsonl")
    assert [record.values() for record in merged] == [[0.5, 1.0], [0.5, 0.0]]
    assert [verdict.judge for verdict in merged[0].verdicts] == ["mean(a, b)", "verifier"]
    assert report["questions"] == 2 and set(report["judges"]) == {"a", "b"}
