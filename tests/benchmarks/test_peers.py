import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.peers import Best, Terms, Texts, drawn, evaluation_steps, ranked_pairs
from rm.backbone import load_tokenizer
from rm.encoding import Encoder
from rm.scores import read_scores
from rubric_data.errors import UserError
from rubric_data.files import write_json
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def judged_response(prompt, number, value):
    verdict = {"masked": "timeout: late"} if value is None else {"value": value}
    return JudgedResponse(
        prompt_id=prompt,
        prompt=f"prompt {prompt}",
        response_id=f"{prompt}-{number}",
        response=f"response {number}",
        rubric=Rubric(criteria=(Criterion(id="a", text="Is good."),)),
        verdicts=(Verdict(criterion_id="a", **verdict),),
    )


def test_pairs_are_those_of_one_prompt_that_the_judge_tells_apart_the_better_one_first():
    values = {"p": [0.5, 1.0, 0.5, None], "q": [0.0, 0.25], "r": [1.0]}
    records = [judged_response(prompt, n, value) for prompt, row in values.items() for n, value in enumerate(row)]
    assert sorted(ranked_pairs(records)) == [(1, 0), (1, 2), (5, 4)]
    assert ranked_pairs(records[4:5]) == []


def test_places_are_drawn_until_the_tokens_are_read_and_come_again_after_all_others():
    lengths = [10, 20, 30]
    assert sorted(drawn(lengths.__getitem__, 3, 60, 0, again=True)) == [0, 1, 2]
    twice = drawn(lengths.__getitem__, 3, 61, 0, again=True)
    assert sorted(twice[:3]) == [0, 1, 2] and len(twice) == 4
    assert sorted(drawn(lengths.__getitem__, 3, 61, 0, again=False)) == [0, 1, 2]
    assert len(drawn(lengths.__getitem__, 3, 1, 0, again=False)) == 1
    seeds = {tuple(drawn(lengths.__getitem__, 3, 60, seed, again=True)) for seed in range(20)}
    assert len(seeds) > 1 and tuple(twice[:3]) in seeds


def test_a_peer_is_looked_at_four_times_the_last_at_its_end():
    assert evaluation_steps(10) == {3, 5, 8, 10}
    assert evaluation_steps(2) == {1, 2}


def test_the_weights_with_the_least_validation_loss_come_back():
    model = torch.nn.Linear(1, 1)
    best = Best()
    for step, loss in ((1, 0.5), (2, 0.4), (3, 0.6)):
        torch.nn.init.constant_(model.weight, step)
        best.offer(model, step, loss)
    best.restore(model)
    assert model.weight.item() == 2 == best.step
    with pytest.raises(UserError, match="validation loss is nan after step 4; lower --learning_rate"):
        best.offer(model, 4, float("nan"))


@pytest.fixture
def our_run(tiny_backbone, judged, tmp_path):
    """A finished run as its folder tells of it: two passes over 300 tokens in 6 steps, adapters in the last layer."""
    write_judged(tmp_path / "judged.jsonl", judged)
    config = {
        "output": "run", "data": str(tmp_path / "judged.jsonl"), "model": tiny_backbone, "max_length": 128,
        "lora_rank": 2, "lora_alpha": 4, "lora_layers": 1, "learning_rate": 0.01, "head_learning_rate": 0.01,
    }  # fmt: skip
    write_json(tmp_path / "run" / "config.json", config)
    log = [{"step": 1, "epoch": 0.4, "loss": 1.0}, {"step": 6, "epoch": 2.0, "loss": 0.5}, {"train_loss": 0.7}]
    write_json(tmp_path / "run" / "train.json", {"steps": 6, "tokens_per_epoch": 300, "log": log})
    return tmp_path / "run"


def test_terms_are_those_of_the_run(our_run, tmp_path):
    terms = Terms.of(our_run)
    assert (terms.steps, terms.tokens, terms.lora_layers, terms.max_length) == (6, 600, 1, 128)
    assert (terms.scaled(200).steps, terms.scaled(200).tokens, terms.scaled(1).steps) == (2, 200, 1)
    with pytest.raises(UserError, match="is no finished training run"):
        Terms.of(tmp_path)
    config = json.loads((our_run / "config.json").read_text())
    write_json(our_run / "config.json", {**config, "lora_rank": 0})
    with pytest.raises(UserError, match="trained every weight"):
        Terms.of(our_run)


def test_texts_are_what_our_model_reads_cut_alike(tiny_backbone, judged):
    texts = Texts(judged, Encoder(load_tokenizer(tiny_backbone), 512))
    assert texts.text(0).startswith("Prompt:\nName fruit number 0.\n\nResponse:\nFruit 0 is a pear.\n\nDoes the")
    assert texts.text(0) == texts.encoder.tokenizer.decode(texts.reading(0).ids) and texts.reading(0).cut == 0
    long = judged[0].model_copy(update={"prompt": "begin " + "long " * 500 + "end."})
    cut = Texts([long], texts.encoder)
    assert cut.reading(0).cut > 0 and "begin" not in cut.text(0) and "end.\n\nResponse:\nFruit" in cut.text(0)
    assert len(cut.reading(0).ids) < 512


def test_a_scalar_reward_does_not_depend_on_who_is_in_the_batch(our_run, tiny_backbone, judged, monkeypatch):
    monkeypatch.setattr(peers, "native_dtype", lambda device: torch.float32)
    texts = Texts(judged, Encoder(load_tokenizer(tiny_backbone), 128))
    model, _ = peers.train_bradley_terry(Terms.of(our_run).scaled(100), texts, texts)
    together = peers.scalar_rewards(model, texts)
    monkeypatch.setattr(peers, "_TOKENS_PER_BATCH", 1)
    np.testing.assert_allclose(together, peers.scalar_rewards(model, texts), rtol=1e-4)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["peers", *map(str, arguments)])
    peers.main()


def test_both_peers_train_and_score_and_are_not_trained_again(our_run, judged, tmp_path, monkeypatch, capsys):
    pytest.importorskip("any2jev")
    facts = {}
    also = tmp_path / "also.jsonl"
    write_judged(also, [judged[0].model_copy(update={"response_id": "more"})])
    for peer in ("bt", "any2jev"):
        output = tmp_path / f"{peer}.jsonl"
        asked = ("--peer", peer, "--run", our_run, "--output", output, "--splits", "validation", "test", "--also", also)
        call(monkeypatch, *asked)
        before = output.read_bytes()
        call(monkeypatch, *asked)
        assert output.read_bytes() == before
        with pytest.raises(SystemExit, match="2"):
            call(monkeypatch, *asked, "--seed", 1)
        assert "exists already, with another seed; choose another --output" in capsys.readouterr().err
        facts[peer] = json.loads(output.with_suffix(".json").read_text())
        assert facts[peer]["scoring"]["responses"] == 5
        assert [entry["step"] for entry in facts[peer]["training"]["validation"]] == [2, 3, 5, 6]
    held_out = [*judged[8:], judged[0].model_copy(update={"response_id": "more"})]

    rows = [json.loads(line) for line in (tmp_path / "bt.jsonl").read_text().splitlines()]
    assert [row["response_id"] for row in rows] == [record.response_id for record in held_out]
    assert all(row["criteria"] is None and np.isfinite(row["reward"]) for row in rows)
    trained = facts["bt"]["training"]
    assert trained["steps"] == 6 and trained["different_pairs"] == 4 < trained["pairs"]
    assert 600 <= trained["tokens"] < 600 + 2 * 128
    assert rows[0]["reward"] > rows[1]["reward"] and rows[2]["reward"] > rows[3]["reward"]  # pears above stones

    probs = read_scores(tmp_path / "any2jev.jsonl", held_out)
    assert [row.shape for row in probs] == [(2,)] * 5 and probs[0][0] != probs[0][1]
    trained = facts["any2jev"]["training"]
    assert trained["steps"] == 6 and trained["verdicts"] == 2 * trained["responses"] and trained["temperature"] > 0
    assert facts["any2jev"]["versions"]["any2jev"].startswith("0.1")
