"""Interactions between criteria: the ridge by hand, what is fitted on, and the command."""

import json
import math

import numpy as np
import pytest

from policy import cli
from rubric_data.errors import UserError
from rubric_data.interactions import Interactions, fit_interactions, pair_products, ridge
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

A = Criterion(id="a", text="Is a.", tags=("x", "y"))
B = Criterion(id="b", text="Is b.", tags=("x",), weight=3)
C = Criterion(id="c", text="Is c.", tags=("z",), weight=-1)
OVERALL = Criterion(id="o", text="Is good.", tags=("overall",))


def response(number, values, criteria=(A, B, OVERALL), split="train"):
    verdicts = [Verdict(criterion_id=c.id, value=v) for c, v in zip(criteria, values, strict=True) if v is not None]
    return JudgedResponse(
        prompt_id=f"p{number}",
        prompt=f"p{number}",
        response_id=f"r{number}",
        response="r",
        rubric=Rubric(criteria=criteria),
        verdicts=tuple(verdicts),
        split=split,
    )


SQUARE = [(0, 0, 0.0), (1, 0, 0.25), (0, 1, 0.75), (1, 1, 0.8)]  # the mean, but for -.2 where both are met


def test_products_by_text_and_by_tag():
    rubric = Rubric(criteria=(A, B, C, OVERALL))
    values = np.array([1.0, 0.5, 0.75, 1.0])
    assert pair_products(rubric, values, "text") == {
        ("Is a.", "Is b."): 0.5,
        ("Is a.", "Is c."): 0.25,  # the pitfall's credit is 1 - .75
        ("Is b.", "Is c."): 0.125,
    }
    x = (1 * 1 + 3 * 0.5) / 4
    assert pair_products(rubric, values, "tag") == {("x", "y"): x, ("x", "z"): x / 4, ("y", "z"): 0.25}
    assert pair_products(rubric, np.array([1.0, math.nan, 0.5, 1.0]), "text") == {("Is a.", "Is c."): 0.5}


def test_ridge_by_hand():
    # centred: -1/4, -1/4, -1/4, 3/4 and .05, .05, .05, -.15; Z'Z = .75, Z'e = -.15
    products, residual = np.array([[0.0], [0], [0], [1]]), np.array([0, 0, 0, -0.2])
    assert ridge(products, residual, 0.25) == pytest.approx([-0.15])
    assert ridge(products, residual + 0.3, 0.25) == pytest.approx([-0.15])  # a constant is nobody's
    twins = ridge(np.repeat(products, 2, 1), residual, 0.25)
    assert twins[0] == pytest.approx(twins[1])


def test_the_fit_leaves_held_out_and_vetoed_responses_aside_and_clips():
    records = [response(number, row) for number, row in enumerate(SQUARE)]
    held = [response(9, (1, 1, 0.8), split="test"), response(10, (0, 0, 0.0), split="test")]
    veto = (A, B.model_copy(update={"veto": True}), OVERALL)
    aside = [response(11, (1, 0, 0.0), veto), response(12, (1, 1, None)), response(13, (None, None, 1))]
    found, report = fit_interactions([*records, *held, *aside], penalty=0.25, bound=1.0, least=4)
    assert found.weights == {("Is a.", "Is b."): pytest.approx(-0.15)}
    assert report["responses"] == {"fitted": 4, "held_out": 2, "vetoed": 1}
    # held out: residuals -.2 and 0, then -.05 and 0
    assert report["unexplained"]["held_out"] == pytest.approx({"mean": 0.1, "with_interactions": 0.025})
    found, report = fit_interactions(records, penalty=0.25, bound=0.1, least=4)
    assert found.weights == {("Is a.", "Is b."): -0.1} and report["clipped"] == 1
    assert found.bonus(records[0].rubric, np.array([1.0, 0.5, 1.0])) == pytest.approx(-0.05)


def test_nothing_to_fit_on_is_said_with_a_remedy():
    records = [response(number, row[:2], (A, B)) for number, row in enumerate(SQUARE)]
    with pytest.raises(UserError, match="no pair of criteria has 2 responses with a verdict tagged 'overall'"):
        fit_interactions(records, least=2)
    with pytest.raises(UserError, match="no pair of criteria has 20 responses"):
        fit_interactions([])


def test_the_command_writes_a_file_that_reads_back(tmp_path, capsys):
    data, output = tmp_path / "judged.jsonl", tmp_path / "interactions.json"
    write_judged(data, [response(number, row) for number, row in enumerate(SQUARE * 6)])
    command = ["rubric", "interactions", "--data", str(data), "--output", str(output)]
    assert cli.main(command) == 0
    assert "responses: fitted 24, held_out 0, vetoed 0" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert Interactions.load(output) == Interactions("text", {("Is a.", "Is b."): written["pairs"][0]["weight"]})
    assert -0.2 < written["pairs"][0]["weight"] < -0.15
    assert cli.main(command) == 2
    assert cli.main([*command, "--overwrite", "true", "--ridge", "0"]) == 2
    assert "ridge: must be positive" in capsys.readouterr().err
    for broken in ('{"by": "text", "pairs": [{}]}', '{"by": "words", "pairs": []}', "[]", "{"):
        output.write_text(broken)
        with pytest.raises(UserError, match="holds no interactions"):
            Interactions.load(output)
