"""What a share of the judge's verdicts buys: a case by hand where width, and then value, must beat chance."""

import json

import numpy as np
import pytest

from policy import cli
from rm.config import TrainConfig
from rm.frontier import frontier
from rm.scorer import Scored
from rm.train import run_train
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict


def case(weights, probs, verdicts, prompts=8):
    """Records to so many prompts, a response for each row of ``verdicts``, and the model's answers to them."""
    rubric = Rubric(criteria=tuple(Criterion(id=str(k), text=f"c{k}", weight=w) for k, w in enumerate(weights)))
    records, scored = [], []
    for prompt in range(prompts):
        for place, row in enumerate(verdicts):
            given = [Verdict(criterion_id=str(k), value=v) for k, v in enumerate(row) if v is not None]
            texts = {"prompt_id": f"p{prompt}", "prompt": f"P{prompt}", "response_id": f"p{prompt}-{place}"}
            records.append(JudgedResponse(**texts, response=f"r{place}", rubric=rubric, verdicts=tuple(given)))
            found = np.array(probs[place] if isinstance(probs[0], list) else probs)
            scored.append(Scored(found, np.zeros(len(found)), 0.0, 0))
    return records, scored


def rows(records, scored, shares, **more):
    options = {"tail": 0.5, "draws": 40, "bootstrap": 50, "seed": 0} | more
    return frontier(records, scored, shares=shares, **options)["rules"]


def test_the_widest_half_holds_all_the_error_and_chance_finds_half_of_it():
    # the model knows the first criterion, and nothing of the second
    verdicts = [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    found = rows(*case([1.0, 1.0], [[row[0], 0.5] for row in verdicts], verdicts), [0.0, 0.5, 1.0])
    for rule in found:
        nothing, _, everything = found[rule]
        assert nothing["reward_mae"]["value"] == pytest.approx(0.25)  # .5 / 2
        # of the six pairs the judge ties one; three are right, and the two that the model ties count half
        assert nothing["pair_accuracy"]["value"] == pytest.approx((3 + 1) / 5)
        assert (everything["reward_mae"]["value"], everything["pair_accuracy"]["value"]) == (0.0, 1.0)
    by_width, by_chance = found["width"][1], found["random"][1]
    assert (by_width["asked"], by_width["narrowest"]) == (32, 1.0)
    assert (by_width["reward_mae"]["value"], by_width["pair_accuracy"]["value"]) == (0.0, 1.0)
    assert by_chance["reward_mae"]["value"] == pytest.approx(0.125, abs=0.01)  # over 40 draws
    assert by_width["minus_random"]["reward_mae"]["high"] < 0 < by_width["minus_random"]["pair_accuracy"]["low"]


def test_value_goes_by_weight_where_width_does_not():
    # the light criterion is a little wider, the heavy one nine times as much of the reward
    records, scored = case([1.0, 9.0], [0.5, 0.4], [[1.0, 1.0], [0.0, 0.0]])
    found = rows(records, scored, [0.5])
    assert found["width"][0]["reward_mae"]["value"] == pytest.approx((0.9 * 0.6 + 0.9 * 0.4) / 2)
    assert found["value"][0]["reward_mae"]["value"] == pytest.approx(0.05)


def test_masked_verdicts_are_never_asked_for_and_leave_both_rewards():
    records, scored = case([1.0, 1.0], [0.3, 0.5], [[1.0, None], [None, None], [0.0, 1.0]], prompts=2)
    report = frontier(records, scored, tail=0.5, draws=1, bootstrap=5, seed=0, shares=[0.0, 1.0])
    assert (report["verdicts"], report["responses"], report["prompts"]) == (6, 6, 2)
    first, last = report["rules"]["value"]
    assert first["reward_mae"]["value"] == pytest.approx((0.7 + 0.1) / 2)  # |.3 - 1|, |.4 - .5|
    assert (last["asked"], last["reward_mae"]["value"]) == (6, 0.0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_route_from_the_command_line(judged, tiny_backbone, tmp_path, capsys):
    write_judged(tmp_path / "judged.jsonl", judged)
    fixed = {"dtype": "float32", "max_length": 256, "max_steps": 1, "lora_rank": 2}
    run_train(
        TrainConfig(output=str(tmp_path / "run"), data=str(tmp_path / "judged.jsonl"), model=tiny_backbone, **fixed)
    )
    argv = ["route", "--model", tmp_path / "run" / "model", "--data", tmp_path / "judged.jsonl", "--bootstrap", 9]
    argv = [str(word) for word in [*argv, "--output", tmp_path / "route"]]
    assert cli.main(argv) == 0
    report = json.loads((tmp_path / "route" / "route.json").read_text())
    assert (report["verdicts"], report["pairs"]["pair_accuracy"], report["split"]) == (4, 1, "test")
    assert report["intervals"] == "two standard deviations"
    assert [row["asked"] for row in report["rules"]["value"]] == [0, 0, 0, 1, 1, 2, 3, 4]
    assert (tmp_path / "route" / "route.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "by share of 4 verdicts asked for" in shown
    assert cli.main(argv) == 2  # holds a run already
    assert cli.main([*argv, "--draws", "0"]) == 2 and "draws: must be at least 1" in capsys.readouterr().err
