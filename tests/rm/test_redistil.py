"""New verdicts into a finished model: who learns and who measures, what is kept, on a tiny model end to end."""

import json

import pytest
from safetensors.torch import load_file

from policy import cli
from rm.config import RedistilConfig
from rm.redistil import objections, part, run_redistil
from rubric_data.errors import LeakError, UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict
from tests.rm.trained import train_tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
OLD, NEW = ("apple", "pear"), ("plum", "fig")
SPLITS = ["train"] * 6 + ["validation"] * 3 + ["test"]


def records(fruits, splits, *, turned=False, texts="old", first=0):
    """Four responses to each prompt, one rubric; a criterion is met if its fruit is named, or else if ``turned``."""
    rubric = Rubric(criteria=tuple(Criterion(id=fruit, text=f"names {fruit}") for fruit in fruits))
    found = []
    for number, split in enumerate(splits, start=first):
        for place, named in enumerate([(), fruits[:1], fruits[1:], fruits]):
            verdicts = tuple(
                Verdict(criterion_id=fruit, value=float((fruit in named) != turned), judge="test") for fruit in fruits
            )
            found.append(
                JudgedResponse(
                    prompt_id=f"p{number}",
                    prompt=f"Shop number {number} sells?",
                    response_id=f"{texts}-{number}-{place}",
                    response=" ".join(named) or "nothing",
                    rubric=rubric,
                    verdicts=verdicts,
                    split=split,
                )
            )
    return found


def prompts(of):
    return sorted({record.prompt_id for record in of})


# --- who learns and who measures -------------------------------------------------------------------------------------


def test_new_responses_to_validation_prompts_measure_and_all_old_training_is_replayed():
    old, new = records(OLD, SPLITS), records(NEW, SPLITS[2:])  # p0 to p7 again: p4 and p5 by their place are elsewhere
    with pytest.raises(LeakError, match="stands in"):
        part(new, old, share=0.2, seed=0, name="new.jsonl")
    new = records(NEW, SPLITS[2:], first=2)
    parts = part(new, old, share=0.2, seed=0, name="new.jsonl")
    assert (prompts(parts.learnt), prompts(parts.held_out)) == (["p2", "p3", "p4", "p5"], ["p6", "p7", "p8"])
    assert prompts(parts.replayed) == [f"p{number}" for number in range(6)]
    assert (prompts(parts.validation), parts.cut, parts.left_out) == (["p6", "p7", "p8"], False, 4)


def test_without_them_a_part_of_the_new_prompts_is_held_out_of_everything():
    old, new = records(OLD, SPLITS), records(NEW, [None] * 6)  # new responses without a split: that of their prompt
    parts = part(new, old, share=0.34, seed=0, name="new.jsonl")
    assert parts.cut and len(prompts(parts.held_out)) == 2 and len(prompts(parts.learnt)) == 4
    assert prompts(parts.learnt) == prompts(parts.replayed)  # what is held out is not replayed either
    assert part(new[::-1], old, share=0.34, seed=0, name="new.jsonl").counts() == parts.counts()
    assert "held out 8 to 2 prompts" in parts.line()
    unknown = part(records(NEW, [None] * 3, first=50), old, share=0.2, seed=0, name="new.jsonl")
    assert len(prompts(unknown.learnt)) == 2 and len(prompts(unknown.replayed)) == 6
    with pytest.raises(UserError, match=r"new.jsonl: cannot be split: .* leaves 1 group\(s\) where 2 are needed"):
        part(records(NEW, ["train"]), old, share=0.2, seed=0, name="new.jsonl")
    with pytest.raises(UserError, match=r"new.jsonl: no response is to a training prompt"):
        part(records(NEW, SPLITS[6:], first=6), old, share=0.2, seed=0, name="new.jsonl")


def test_what_speaks_against_new_weights_by_hand():
    old, new = {"brier": 0.2, "concordance": 0.8}, {"brier": 0.3, "concordance": 0.6}

    def found(old_after, new_after):
        return objections({"old": old, "new": new}, {"old": old | old_after, "new": new | new_after}, 0.005)

    assert found({"brier": 0.204, "concordance": 0.796}, {"brier": 0.29, "concordance": 0.7}) == []
    assert found({}, {}) == ["brier on new verdicts did not fall: 0.3000 before, 0.3000 after"]
    assert found({"brier": 0.21}, {"brier": 0.29, "concordance": 0.59}) == [
        "brier rose from 0.2000 to 0.2100 on old ones",
        "concordance fell from 0.6000 to 0.5900 on new verdicts",
    ]


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tiny_backbone, tmp_path_factory):
    """Folder of a model that was trained on the old fruits, and of both files."""
    folder = tmp_path_factory.mktemp("start")
    write_judged(folder / "old.jsonl", records(OLD, SPLITS))
    write_judged(folder / "new.jsonl", records(NEW, SPLITS[:9], texts="new"))
    write_judged(folder / "wrong.jsonl", wrong := records(NEW, SPLITS[:6], turned=True, texts="new"))
    write_judged(folder / "wrong.jsonl", [*wrong, *records(NEW, SPLITS[6:9], texts="new", first=6)])
    train_tiny(folder, "old.jsonl", tiny_backbone, steps=40)
    return folder


@pytest.fixture
def options(start, tmp_path):
    return {
        "model": str(start / "run" / "model"),
        "output": str(tmp_path / "redistil"),
        "data": str(start / "old.jsonl"),
        "new": str(start / "new.jsonl"),
        "dtype": "float32",
        "tokens_per_batch": 400,
        "max_steps": 8,
        "eval_steps": 4,
        "bootstrap": 50,
        "learning_rate": 3e-3,
        "head_learning_rate": 3e-3,
        "tolerance": 0.05,
    }


def same_weights(one, other):
    files = ("head.safetensors", "backbone/adapter_model.safetensors")
    return all(
        all((first[name] == second[name]).all() for name in first)
        for first, second in ((load_file(one / file), load_file(other / file)) for file in files)
    )


def test_new_verdicts_are_learnt_and_the_old_kept_from_the_command_line(options, start, tmp_path, capsys):
    argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert cli.main(["redistil", *argv]) == 0
    report = json.loads((tmp_path / "redistil" / "redistil.json").read_text())
    assert report["kept"] and report["objections"] == []
    assert report["parts"]["learnt"] == {"prompts": 6, "responses": 24}
    assert report["parts"]["held_out"] == {"prompts": 3, "responses": 12} and not report["parts"]["held_out_cut"]
    assert report["new"]["verdict"]["brier"]["change"]["value"] < 0
    assert report["old"]["verdict"]["brier"]["change"]["value"] < 0.05
    assert {"eval_new_brier", "eval_old_concordance", "eval_selection"} < set().union(*report["log"])
    assert report["fresh_trees"] == 6 and report["ordinary_trees"] == 6
    assert not same_weights(tmp_path / "redistil" / "model", start / "run" / "model")
    assert not (tmp_path / "redistil" / "model" / "calibration.json").exists()
    assert (tmp_path / "redistil" / "redistil.png").stat().st_size > 10_000
    captured = capsys.readouterr()
    assert "responses: learnt 24 to 6 prompts, held out 12 to 3 prompts" in captured.out
    assert "the model has the new weights" in captured.out
    assert cli.main(["redistil", *argv]) == 2  # holds a run already


def test_verdicts_that_teach_the_wrong_thing_leave_the_old_weights(options, start, tmp_path):
    """New training verdicts are turned round, those held out are not."""
    report = run_redistil(RedistilConfig(**options | {"new": str(start / "wrong.jsonl"), "eval_steps": 8}))
    assert not report["kept"]
    assert any("on new verdicts" in phrase for phrase in report["objections"])
    assert report["new"]["verdict"]["auroc"]["change"]["value"] < 0  # of what was refused
    assert same_weights(tmp_path / "redistil" / "model", start / "run" / "model")


@pytest.mark.slow  # as in test_tail, whose machinery it is
def test_resuming_gives_the_losses_of_an_uninterrupted_run(options, tmp_path):
    options |= {"max_steps": 5, "eval_steps": 4}
    whole = run_redistil(RedistilConfig(**options))
    (tmp_path / "redistil" / "checkpoints" / "checkpoint-5").rename(tmp_path / "gone")
    resumed = run_redistil(RedistilConfig(**options, resume=True))
    losses = [[(row["step"], row["loss"]) for row in run["log"] if "loss" in row] for run in (whole, resumed)]
    assert [step for step, _ in losses[0]] == list(range(1, 6))
    assert [loss for _, loss in losses[1]] == pytest.approx([loss for _, loss in losses[0]], abs=1e-5)


def test_bad_input_is_refused_before_there_is_a_run(options, tmp_path):
    with pytest.raises(UserError, match=r"held_out: must lie between 0 and 1, got 1\.0"):
        run_redistil(RedistilConfig(**options | {"held_out": 1.0}))
    elsewhere = records(NEW, ["train"] * 2, first=0)
    write_judged(tmp_path / "two.jsonl", elsewhere)
    write_judged(tmp_path / "one.jsonl", records(OLD, ["train"]) + records(OLD, ["validation"], first=9))
    alone = {"new": str(tmp_path / "two.jsonl"), "data": str(tmp_path / "one.jsonl"), "held_out": 0.5}
    for seed in range(8):  # whichever seed holds the only old prompt out
        try:
            run_redistil(RedistilConfig(**options | alone | {"seed": seed, "model": str(tmp_path)}))
        except UserError as error:
            if "nothing is left to replay" in str(error):
                break
    else:
        pytest.fail("the only old prompt was never held out")
    assert not (tmp_path / "redistil").exists()
