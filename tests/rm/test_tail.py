import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from policy import cli
from rm import changes, tail
from rm.config import TailConfig
from rm.data import ReplaySampler, build_trees
from rm.encoding import Encoder
from rm.mining import mine
from rm.tail import run_tail, with_pairs
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict
from tests.rm.trained import train_tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ROOT = Path(__file__).resolve().parents[2]
FRUITS = ("apple", "pear", "plum")
RUBRIC = Rubric(criteria=tuple(Criterion(id=fruit, text=f"names {fruit}") for fruit in FRUITS))
SOME = [(), ("apple",), ("pear", "plum"), ("apple", "plum"), FRUITS]  # rewards 0, 1/3, 2/3, 2/3, 1


def _records(reverse_training=False):
    """Twelve prompts (8 train, 3 validation, 1 test) of five responses; a criterion is met if its fruit is named."""
    records = []
    for number, split in enumerate(["train"] * 8 + ["validation"] * 3 + ["test"]):
        for place, named in enumerate(SOME):
            flip = reverse_training and split == "train"
            verdicts = tuple(
                Verdict(criterion_id=fruit, value=float((fruit in named) != flip), judge="test") for fruit in FRUITS
            )
            records.append(
                JudgedResponse(
                    prompt_id=f"p{number}",
                    prompt=f"Shop number {number} sells?",
                    response_id=f"p{number}-{place}",
                    response=" ".join(named) or "nothing",
                    rubric=RUBRIC,
                    generator=f"g{place % 2}",
                    verdicts=verdicts,
                    split=split,
                )
            )
    return records


@pytest.fixture(scope="module")
def start(tiny_backbone, tmp_path_factory):
    """Folder of a trained model, and the file it was trained on."""
    folder = tmp_path_factory.mktemp("start")
    write_judged(folder / "judged.jsonl", _records())
    train_tiny(folder, "judged.jsonl", tiny_backbone, steps=60)
    return folder


@pytest.fixture
def options(start, tmp_path):
    return {
        "model": str(start / "run" / "model"),
        "output": str(tmp_path / "tail"),
        "data": str(start / "judged.jsonl"),
        "tail": 0.5,
        "dtype": "float32",
        "tokens_per_batch": 400,
        "max_steps": 6,
        "eval_steps": 2,
        "bootstrap": 50,
        "learning_rate": 2e-3,
        "tolerance": 0.05,
    }


def _weights(folder):
    return load_file(folder / "head.safetensors") | load_file(folder / "backbone" / "adapter_model.safetensors")


def _same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_the_stage_from_the_command_line(options, tmp_path, capsys):
    argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert cli.main(["tail", *argv]) == 0
    report = json.loads((tmp_path / "tail" / "tail.json").read_text())
    # a tail of three: 1, 2/3, 2/3; the two that tie are no pair
    assert report["pairs"] == {
        "mined": 16,
        "responses": 24,
        "prompts": 8,
        "with_pairs": 8,
        "alone": 0,
        "tied": 0,
        "too_close": 0,
        "across": 8,
        "mean_margin": pytest.approx(1 / 3, abs=1e-6),
        "in_trees": 16,
    }
    assert report["steps"] == 6 and report["validation"]["pairs"] == {"all": 27, "top_50": 6, "top_25": 6, "top_10": 6}
    assert sum(row["responses"] for row in report["validation"]["by_quantile"]) == 15
    assert (tmp_path / "tail" / "tail.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "16 pairs of 24 responses to 8 of 8 prompts, 8 of two generators" in shown
    assert max(len(line) for line in shown.splitlines() if "pair accuracy" in line) <= 80
    assert ("the model has the new weights" in shown) == report["kept"]
    changed = not _same(_weights(tmp_path / "tail" / "model"), _weights(tmp_path / ".." / options["model"]))
    assert changed == report["kept"]
    assert cli.main(["tail", *argv]) == 2  # holds a run already


def test_a_stage_that_makes_things_worse_keeps_the_old_weights(options, tmp_path):
    """Training verdicts are turned round, those of the validation prompts are not."""
    write_judged(tmp_path / "wrong.jsonl", _records(reverse_training=True))
    wrong = {"data": str(tmp_path / "wrong.jsonl"), "max_steps": 12, "eval_steps": 12}
    report = run_tail(TailConfig(**options | wrong))
    assert not report["kept"]
    assert any(phrase.startswith("tail pair accuracy fell from 1.0000 to 0.") for phrase in report["objections"])
    assert any(phrase.startswith("brier rose from") for phrase in report["objections"])
    assert report["validation"]["pair_accuracy"]["top_50"]["change"]["value"] < 0  # of what was refused
    assert _same(_weights(tmp_path / "tail" / "model"), _weights(tmp_path / ".." / options["model"]))


def test_no_pairs_and_numbers_out_of_range_are_refused_before_there_is_a_run(options, tmp_path):
    with pytest.raises(UserError, match=r"no pairs to train on, the best tie for 0 prompts, are closer .* for 8,"):
        run_tail(TailConfig(**options | {"min_margin": 0.5}))
    with pytest.raises(UserError, match=r"replay: must lie in \[0, 1\), got 1.0"):
        run_tail(TailConfig(**options | {"replay": 1.0}))
    with pytest.raises(UserError, match="is no reward model"):
        run_tail(TailConfig(**options | {"model": str(tmp_path)}))
    tied = [r.model_copy(update={"verdicts": r.verdicts[:0]}) if r.split == "validation" else r for r in _records()]
    write_judged(tmp_path / "tied.jsonl", tied)
    with pytest.raises(UserError, match="the judge ties the best responses to each of the 3 validation prompts"):
        run_tail(TailConfig(**options | {"data": str(tmp_path / "tied.jsonl")}))
    assert not (tmp_path / "tail").exists()


def _losses(report):
    return [(entry["step"], entry["loss"]) for entry in report["log"] if "loss" in entry]


def test_resuming_gives_the_losses_of_an_uninterrupted_run(options, tmp_path):
    options |= {"max_steps": 5, "eval_steps": 4}  # a pass over the mined trees is four steps
    whole = run_tail(TailConfig(**options))
    (tmp_path / "tail" / "checkpoints" / "checkpoint-5").rename(tmp_path / "gone")
    resumed = run_tail(TailConfig(**options, resume=True))
    assert [step for step, _ in _losses(whole)] == list(range(1, 6))
    assert [loss for _, loss in _losses(resumed)] == pytest.approx([loss for _, loss in _losses(whole)], abs=1e-5)


def test_a_step_does_not_depend_on_how_it_is_cut(options, tmp_path):
    """Eight mined trees in one pass, and one a pass: the loss of pairs and verdicts, and the gradient."""
    options |= {"replay": 0.0, "max_steps": 1, "eval_steps": 100}

    def first_step(name, **more):
        report = run_tail(TailConfig(**options | {"output": str(tmp_path / name)} | more))
        (entry,) = (entry for entry in report["log"] if "grad_norm" in entry)
        return entry["loss"], entry["grad_norm"]

    large = first_step("large", tokens_per_batch=100_000)
    small = first_step("small", tokens_per_batch=1, gradient_accumulation=8)
    assert small == pytest.approx(large, rel=1e-3)


def test_mined_trees_hold_the_mined_pairs_and_their_responses_only(tiny_backbone):
    from transformers import AutoTokenizer

    records = _records()[:10]  # two prompts; the top half of each are places 2, 3 and 4
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_backbone), 256)
    mined = mine(records, tail=0.5)
    trees = with_pairs(build_trees(records, encoder, responses_per_tree=8, seed=0, chosen=mined.responses), mined)
    assert [sorted(tree.places) for tree in trees] == [[2, 3, 4], [7, 8, 9]]
    for tree in trees:
        found = {(tree.places[better] % 5, tree.places[worse] % 5) for better, worse in tree.pairs}
        assert found == {(4, 2), (4, 3)}
        assert [tree.rewards[better] for better, _ in tree.pairs] == [1.0, 1.0]
    apart = build_trees(records, encoder, responses_per_tree=2, seed=0, chosen=mined.responses)
    assert sum(len(tree.pairs) for tree in with_pairs(apart, mined)) < 4  # the others are in two trees


def test_replay_fills_every_batch_with_other_trees_anew_every_epoch():
    mined, others = [30, 40, 20, 50, 10], [25, 10, 40]
    sampler = ReplaySampler(mined, others, 0.5, 120, seed=3)
    lengths = mined + others
    epochs = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert batches == list(sampler) and len(batches) == len(sampler)
        assert sorted(index for batch in batches for index in batch if index < 5) == list(range(5))
        for batch in batches:
            own, added = ([lengths[k] for k in batch if (k >= 5) == other] for other in (False, True))
            assert sum(own) <= 60 and sum(added) >= sum(own) > sum(added[:-1])
        epochs.append([[index for index in batch if index >= 5] for batch in batches])
    assert len({str(sorted(epoch)) for epoch in epochs}) > 1
    assert all(index < 5 for batch in ReplaySampler(mined, others, 0.0, 120, seed=3) for index in batch)


def test_what_is_lost_is_said_by_hand():
    before = {"brier": 0.2, "concordance": 0.8, "tail_pair_accuracy": 0.6, "pair_accuracy": 0.9}

    def objections(after, tolerance):
        return tail.objections({"validation": before}, {"validation": before | after}, tolerance)

    assert objections({"brier": 0.205, "concordance": 0.796}, 0.0051) == []
    assert objections({"brier": 0.1, "concordance": 0.9, "pair_accuracy": 0.95}, 0.0) == []
    assert objections({"pair_accuracy": 0.891}, 0.01) == []
    assert objections({"pair_accuracy": 0.889}, 0.01) == ["pair accuracy fell from 0.9000 to 0.8890"]
    assert objections({"brier": 0.206, "concordance": 0.79, "tail_pair_accuracy": 0.59}, 0.005) == [
        "tail pair accuracy fell from 0.6000 to 0.5900",
        "brier rose from 0.2000 to 0.2060",
        "concordance fell from 0.8000 to 0.7900",
    ]
    assert changes.forgotten({"brier": 0.2}, {"brier": 0.3}, 0.2) == []  # concordance undefined


def test_before_and_after_by_hand():
    """One prompt, rewards 0, 1/3, 2/3, 2/3, 1; the change puts the best response on its place."""
    records = _records()[:5]
    gold = [np.array(record.values()) for record in records]
    before = [*gold[:4], np.zeros(3)]
    found = changes.compare(records, before, gold, tail=0.5, bootstrap=20, seed=0)
    top = found["pair_accuracy"]["top_50"]  # two pairs, both wrong before
    assert [top[key]["value"] for key in ("before", "after", "change")] == [0.0, 1.0, 1.0]
    everything = found["pair_accuracy"]["all"]  # nine pairs: the best loses three and ties with "nothing"
    assert everything["before"]["value"] == pytest.approx(5.5 / 9, abs=1e-6)
    assert found["verdict"]["brier"]["before"]["value"] == pytest.approx(3 / 15)
    assert [row["responses"] for row in found["by_quantile"]] == [1, 1, 2, 1]
    best = found["by_quantile"][-1]
    assert (best["gold"]["value"], best["proxy"]["before"]["value"], best["error"]["change"]["value"]) == (1.0, 0.0, -1)
    assert best["brier"]["before"]["value"] == 1.0 and best["pair_accuracy"]["after"]["value"] is None
    assert found["pairs"] == {"all": 9, "top_50": 2, "top_25": 2, "top_10": 2}


@pytest.mark.slow
def test_two_processes_match_one_on_the_same_batches(options, tmp_path):
    options |= {"max_steps": 4, "eval_steps": 4}  # a pass is two steps
    flags = [
        part for key, value in (options | {"output": tmp_path / "two"}).items() for part in (f"--{key}", str(value))
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "policy.cli", "tail"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *flags], cwd=ROOT, check=True, capture_output=True, env=environment)
    two = json.loads((tmp_path / "two" / "tail.json").read_text())
    one = run_tail(TailConfig(**options, gradient_accumulation=2))
    assert (two["processes"], two["kept"]) == (2, one["kept"])
    assert [loss for _, loss in _losses(two)] == pytest.approx([loss for _, loss in _losses(one)], rel=1e-3)
