"""What the experiments on real verdicts leave of a data set, and the rows they keep of an audit."""

import json

import pytest

from benchmarks import distil
from rubric_data.files import write_json
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

RUBRIC = Rubric(criteria=(Criterion(id="a", text="Is good."),))


def records(splits=("train", "validation", "test"), prompts=5, generators=7):
    return [
        JudgedResponse(
            prompt_id=f"{split}-{prompt}",
            prompt=f"Prompt {prompt}.",
            response_id=f"{split}-{prompt}-{name}",
            response="R.",
            rubric=RUBRIC,
            generator=f"g{name}",
            split=split,
        )
        for split in splits
        for prompt in range(prompts)
        for name in range(generators)
    ]


def test_a_cut_leaves_so_many_prompts_with_so_many_responses_and_the_other_splits_whole():
    kept = distil.kept(records(), {"validation": (2, 3), "test": (9, 4)})
    sizes = {split: [one.prompt_id for one in kept if one.split == split] for split in ("train", "validation", "test")}
    assert {split: len(names) for split, names in sizes.items()} == {"train": 35, "validation": 6, "test": 20}
    assert len(set(sizes["validation"])) == 2 and len(set(sizes["test"])) == 5
    assert distil.kept(list(reversed(records())), {"validation": (2, 3)})[-6:] == [
        one for one in kept if one.split == "validation"
    ]  # by a hash, whatever the order


def test_training_keeps_the_best_and_the_worst():
    values = [0.5, 0.1, 0.9, 0.4, 1.0, 0.6, None]
    some = [
        one.model_copy(
            update={"verdicts": (Verdict(criterion_id="a", value=value, judge="j", masked=None if value else "no"),)}
        )
        for one, value in zip(records(("train",), 1), values, strict=True)
    ]
    kept = distil.kept(some, {"train": (1, 4)})
    assert [one.values()[0] for one in kept] == [0.1, 0.4, 0.9, 1.0]
    assert len(distil.kept(some, {"train": (1, 9)})) == 7


def test_two_halves_of_the_generators_see_each_of_them_once():
    seen = [
        {one.generator for one in distil._of_half(records(), first) if one.split != "test"} for first in (True, False)
    ]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == {f"g{name}" for name in range(7)}
    assert {one.generator for one in distil._of_half(records(), True) if one.split == "test"} == seen[0] | seen[1]


def test_the_model_has_a_row_for_unseen_generators_where_there_are_some():
    one = {"value": 0.8, "low": 0.7, "high": 0.9}
    verdicts = {key: one for key in distil._VERDICTS}
    pairs = {key: {"half": {"value": 0.6, "low": 0.5, "high": 0.7}} for key in distil._PAIRS}
    audit = {
        "predictors": {"model": {"criterion": verdicts, "reward": pairs}, "bt": {"criterion": None, "reward": pairs}},
        "by_novelty": {"generator": {"seen": verdicts, "unseen": verdicts | {"auroc": {"value": 0.7}}}},
        "model_minus": {"bt": {"pair_accuracy": {"value": 0.1, "low": -0.1, "high": 0.3}, "auroc": {"value": None}}},
    }
    found = distil.numbers(audit)
    assert found["model"]["pair_accuracy"] == {"value": 0.6, "low": 0.5, "high": 0.7} and found["bt"]["auroc"] is None
    assert found["model, unseen generators"]["auroc"]["value"] == 0.7
    assert found["model, unseen generators"]["pair_accuracy"] is None
    spread = distil.over_seeds([found, found])
    assert spread["model, seen generators"]["auroc"]["median"] == pytest.approx(0.8)
    assert "model, seen generators" not in distil.numbers(audit | {"by_novelty": {"generator": {"seen": verdicts}}})
    lead = distil.leads(audit)["bt"]
    assert lead["pair_accuracy"]["low"] == -0.1 and lead["auroc"] is None and lead["tail_pair_accuracy"] is None


def test_whether_a_verdict_is_met_in_full_is_told_apart_from_whether_it_is_above_a_half(tmp_path):
    golds = {"p": (1.0, 0.75, None), "q": (1.0, 0.5)}
    predicted = {"p": (0.9, 0.4, 0.5), "q": (0.8, 0.85)}
    rows = [
        {"prompt_id": prompt, "gold": gold, "predicted": {"model": prob, "constant": 0.5}}
        for prompt in golds
        for gold, prob in zip(golds[prompt], predicted[prompt], strict=True)
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = distil.met_in_full(tmp_path)
    assert found["share"] == 0.5
    assert found["auroc"]["model"]["value"] == 0.75  # .9 and .8 against .4 and .85
    assert found["model_minus"]["constant"]["value"] == 0.25


def test_a_learning_curve_is_read_from_the_log_of_a_training(tmp_path):
    log = [{"step": 10, "loss": 0.7}, {"step": 10, "eval_auroc": 0.61, "eval_pair_accuracy": 0.5, "eval_loss": 0.66}]
    write_json(tmp_path / "train.json", {"log": log})
    assert distil.curve(tmp_path) == [{"step": 10, "auroc": 0.61, "pair_accuracy": 0.5, "loss": 0.66}]
