import json

import numpy as np
import pytest
from scipy.special import expit

from rm.calibration import Calibration, choose, fit
from rubric_data.errors import UserError


def _sample(scale, shift, prompts=60, each=50, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, prompts * each)
    gold = (generator.random(len(logits)) < expit(scale * logits + shift)).astype(float)
    return logits, gold, np.repeat(np.arange(prompts), each)


def test_fit_finds_the_map_the_verdicts_were_drawn_from():
    logits, gold, _ = _sample(0.5, -1.0)
    platt = fit("platt", logits, gold)
    assert (platt.scale, platt.shift) == (pytest.approx(0.5, abs=0.08), pytest.approx(-1.0, abs=0.15))
    logits, gold, _ = _sample(2.0, 0.0)
    temperature = fit("temperature", logits, gold)
    assert (temperature.scale, temperature.shift) == (pytest.approx(2.0, abs=0.2), 0.0)


def test_soft_verdicts_count_as_the_number_they_are():
    logits = np.linspace(-3, 3, 200)
    platt = fit("platt", np.tile(logits, 20), np.tile(expit(0.7 * logits + 0.4), 20))
    assert (platt.scale, platt.shift) == (pytest.approx(0.7, abs=0.01), pytest.approx(0.4, abs=0.01))


def test_choose_takes_the_method_that_predicts_held_out_prompts_best():
    assert choose(*_sample(1.0, 0.0, seed=3))[0].scale == pytest.approx(1.0, abs=0.1)
    chosen, report = choose(*_sample(0.4, 1.5))
    assert chosen.method == "platt"
    assert report["held_out"]["platt"]["log_loss"] < report["held_out"]["temperature"]["log_loss"]
    assert report["held_out"]["platt"]["ece"] < 0.05 < report["held_out"]["identity"]["ece"]
    assert choose(*_sample(0.3, 0.0))[0].method == "temperature"


def test_separable_verdicts_give_a_finite_map_that_keeps_the_order():
    chosen = fit("platt", np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert 0 < chosen.scale < 20
    probs = chosen(np.array([-2.0, -1.0, 1.0, 2.0]))
    assert (np.diff(probs) > 0).all() and probs[0] > 0 and probs[-1] < 1


def test_one_prompt_is_not_enough():
    with pytest.raises(UserError, match="at least 2 validation prompts, got 1"):
        choose(np.zeros(4), np.ones(4), np.zeros(4, int))


def test_the_map_is_stored_beside_the_weights_and_missing_means_identity(tmp_path):
    assert Calibration.load(tmp_path) == Calibration()
    stored = Calibration("platt", 0.5, -0.25)
    stored.save(tmp_path, {"verdicts": 3})
    assert Calibration.load(tmp_path) == stored
    assert json.loads((tmp_path / "calibration.json").read_text())["report"] == {"verdicts": 3}
    assert stored(np.array([0.5])).tolist() == [0.5]  # sigmoid(0.25 - 0.25)
