"""The modules as a user of the evaluate library meets them: loaded by path, without a network."""

import math

import evaluate
import pytest

from rm.evaluate_metrics import metric_path


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Where evaluate copies modules to; one folder for all tests, as it is imported from and stays imported."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder)
        yield


@pytest.fixture
def load(tmp_path, monkeypatch, modules):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    return lambda name: evaluate.load(metric_path(name), cache_dir=str(tmp_path))


def test_verdict_agreement(load):
    metric = load("verdict_agreement")
    # the masked verdict is left out; .9 and .4 of the met, .4 and .1 of the unmet: AUROC (1 + 1 + ½ + 1) / 4
    found = metric.compute(predictions=[0.9, 0.4, 0.4, 0.1, 0.8], references=[1, 1, 0, 0, math.nan])
    assert found["accuracy"] == 3 / 4 and found["masked"] == 1
    assert found["auroc"] == found["concordance"] == 3.5 / 4
    assert found["kappa"] == pytest.approx(0.5)
    assert found["brier"] == pytest.approx((0.01 + 0.36 + 0.16 + 0.01) / 4)
    assert found["ece"] == pytest.approx((0.1 + 0.2 + 0.1) / 4)


def test_verdict_agreement_in_batches_and_on_levels(load):
    metric = load("verdict_agreement")
    metric.add_batch(predictions=[0.1, 0.6], references=[0, 0.5])
    metric.add_batch(predictions=[0.6, 0.9], references=[1, 1])
    assert metric.compute(levels=3)["kappa"] == pytest.approx(0.8)


def test_tail_pair_accuracy(load):
    metric = load("tail_pair_accuracy")
    columns = {
        "predictions": [0.9, 0.8, 0.7, 0.8, 0.5, 0.5, 0.1],
        "references": [0.7, 1.0, 0.2, 0.1, 1.0, 0.0, math.nan],
        "prompts": ["a", "a", "a", "a", "b", "b", "b"],
    }
    # prompt a: its two best are in the wrong order; b: a tie. Elsewhere in a: 0-2 0-3 1-2 right, 1-3 tied, 2-3 wrong
    found = metric.compute(**columns)
    assert found["tail_pair_accuracy"] == (0 + 1 / 2) / 2 and found["tail_pairs"] == 2
    assert found["pair_accuracy"] == pytest.approx((3 + 1 / 2 + 1 / 2) / 7)
    assert (found["prediction_ties"], found["judge_ties"], found["unrewarded"]) == (1 / 2, 0, 1)
    assert metric.compute(**columns, ties="excluded")["tail_pair_accuracy"] == 0
    assert metric.compute(**columns, tail=1.0)["tail_pair_accuracy"] == found["pair_accuracy"]


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("verdict_agreement", {"predictions": [1.2], "references": [1]}, "predictions: every P"),
        ("verdict_agreement", {"predictions": [math.nan], "references": [1]}, "predictions: every P"),
        ("verdict_agreement", {"predictions": [0.2], "references": [2]}, "references: every verdict"),
        ("tail_pair_accuracy", {"predictions": [0.2], "references": [1], "prompts": ["a"], "tail": 25}, "tail: must"),
        ("tail_pair_accuracy", {"predictions": [0.2], "references": [1], "prompts": ["a"], "ties": "x"}, "ties: must"),
    ],
)
def test_what_is_no_prediction_is_refused(load, name, columns, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(**columns)


def test_an_unknown_module_lists_those_there_are():
    with pytest.raises(ValueError, match="choose one of tail_pair_accuracy, verdict_agreement"):
        metric_path("accuracy")
