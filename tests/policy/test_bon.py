"""Best-of-n: what is chosen by hand and as a property, the run end to end, and TRL as the reader of its pairs."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from policy import bon, cli
from policy.bon import Candidate, accept, ranked, tied_best, trainable
from rm.backbone import load_tokenizer
from rm.model import RubricRewardModel
from rubric_data.formats.preferences import pair_up
from rubric_data.io import read_judged, write_judged, write_prompts
from rubric_data.records import Criterion, JudgedResponse, PromptRecord, Rubric, Verdict, Verifier

RUBRIC = Rubric(
    criteria=(
        Criterion(
            id="pear", text="Says pear.", weight=3, verifier=Verifier(name="mention_any", args={"words": ["pear"]})
        ),
        Criterion(id="digit", text="Has a digit.", weight=1, verifier=Verifier(name="has_digit")),
    )
)
PLAIN = Rubric(criteria=(Criterion(id="kind", text="Is kind."),))


def responses(prompt_id, *texts, rubric=RUBRIC, **more):
    return [
        JudgedResponse(
            prompt_id=prompt_id,
            prompt=f"Prompt {prompt_id}.",
            response_id=f"{prompt_id}-{place}",
            response=text,
            rubric=rubric,
            **more,
        )
        for place, text in enumerate(texts)
    ]


def candidate(text="a", proxy=0.5, gold=math.nan, finished=None):
    return Candidate(responses("p", text, rubric=PLAIN)[0], proxy, gold, finished)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model(tiny_backbone, tmp_path_factory):
    """Folder of an untrained reward model."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    RubricRewardModel.from_language_model(tiny_backbone, max_length=512).save(folder)
    load_tokenizer(tiny_backbone).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """By code p0 earns 1, 3/4, 1/4, 0, 1; p1 twice 0; p2 3/4 once."""
    records = responses("p0", "pear 1", "pear", "1", "no", "pear 2", source="orchard", licence="MIT", split="train")
    records += responses("p1", "x", "y", split="train") + responses("p2", "pear", split="test")
    write_judged(tmp_path / "in.jsonl", records)
    return str(tmp_path / "in.jsonl")


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_ties_are_broken_by_the_seed_and_counted():
    records = responses("p", "a", "b", "c", "a", rubric=PLAIN)
    orders = set()
    for seed in range(20):
        (found,) = ranked(records, [0.5, 0.7, 0.7 + 1e-12, math.nan], {}, seed)
        orders.add("".join(one.record.response for one in found))
        assert tied_best(found) == 2
    assert orders == {"bcaa", "cbaa"}  # the unrewarded one last
    (same,) = ranked(records, [0.5, 0.4, 0.4, 0.5], {}, 0)
    assert tied_best(same) == 1  # one text twice is no tie


def test_nothing_flawed_is_trained_on():
    found = [
        candidate("a", 0.9, finished=False),
        candidate(" ", 0.8, finished=True),
        candidate("b", 0.7, finished=True),
        candidate("b", 0.7),
        candidate("c", 0.1),
        candidate("d", math.nan),
    ]
    kept, left_out = trainable(found)
    assert [one.record.response for one in kept] == ["b", "c"]
    assert left_out == {"cut_off": 1, "empty": 1, "repeated": 1, "unrewarded": 1}


def test_shares_are_rounded_up_and_thresholds_include_their_end():
    found = [candidate(str(place), reward) for place, reward in enumerate([0.9, 0.8, 0.7, 0.6, 0.5])]

    def proxies(**rule):
        return [one.proxy for one in accept(found, **{"threshold": None, "share": None} | rule)]

    assert proxies() == [0.9, 0.8]  # 5 / 4 = 1.25
    assert proxies(share=0.6) == [0.9, 0.8, 0.7]  # 3.0000000000000004 without the tolerance
    assert proxies(share=0.01) == [0.9] and len(proxies(share=1.0)) == 5
    assert proxies(threshold=0.7) == [0.9, 0.8, 0.7] and proxies(threshold=0.95) == []
    assert accept([], threshold=None, share=0.5) == []


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef "), st.sampled_from([0.0, 0.3, 0.35, 0.6, 1.0, math.nan]), st.booleans()),
        min_size=1,
        max_size=9,
    ),
    st.sampled_from([0.0, 0.35, 1.0]),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.sampled_from(["best-worst", "all"]),
)
def test_the_accepted_meet_the_rule_and_pairs_are_in_order(rows, threshold, share, margin, pairs):
    records = responses("p", *(text for text, _, _ in rows), rubric=PLAIN)
    finished = {record.response_id: done for record, (_, _, done) in zip(records, rows, strict=True)}
    (found,) = ranked(records, [reward for _, reward, _ in rows], finished, 0)
    usable, left_out = trainable(found)
    assert len(usable) + left_out.total() == len(rows)
    texts = [one.record.response for one in usable]
    assert len(set(texts)) == len(texts) and all(one.finished and one.record.response.strip() for one in usable)

    over = accept(usable, threshold=threshold, share=None)
    assert all((one.proxy >= threshold) == (one in over) for one in usable)
    best = accept(usable, threshold=None, share=share)
    rest = [one.proxy for one in usable if one not in best]
    assert all(one.proxy >= other for one in best for other in rest)

    drawn, reasons = pair_up([(one.proxy, one.record) for one in usable], pairs, margin)
    assert all(better[0] > worse[0] and better[0] - worse[0] >= margin - 1e-9 for better, worse in drawn)
    together = sum(count for reason, count in reasons.items() if reason.startswith("pairs"))
    wanted = len(usable) * (len(usable) - 1) // 2 if pairs == "all" else int(len(usable) > 1)
    assert len(drawn) + together == wanted


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_by_hand(data, model, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["bon", "--data", data, "--reward_model", model, "--output", str(run), "--bootstrap", "50"]) == 0
    assert sorted(path.name for path in run.iterdir()) == [
        "accepted.jsonl", "best.jsonl", "bon.png", "config.json", "origin.json", "pairs.jsonl", "report.json",
        "scores.jsonl",
    ]  # fmt: skip
    best = read_lines(run / "best.jsonl")
    assert [(row["prompt_id"], row["reward"], row["gold"], row["among"], row["tied"]) for row in best] == [
        ("p0", 1.0, 1.0, 5, 2),
        ("p1", 0.0, 0.0, 2, 2),
        ("p2", 0.75, 0.75, 1, 1),
    ]
    assert (best[0]["source"], best[0]["licence"], best[0]["split"]) == ("orchard", "MIT", "train")
    accepted = read_lines(run / "accepted.jsonl")  # 5 / 4 rounded up, and one of each other prompt
    assert [(row["prompt_id"], row["reward"]) for row in accepted] == [("p0", 1), ("p0", 1), ("p1", 0), ("p2", 0.75)]
    assert accepted[-1]["messages"] == [
        {"role": "user", "content": "Prompt p2."},
        {"role": "assistant", "content": "pear"},
    ]
    (pair,) = read_lines(run / "pairs.jsonl")
    assert (pair["score_chosen"], pair["score_rejected"], pair["rejected_id"]) == (1.0, 0.0, "p0-3")
    assert pair["chosen_id"] == best[0]["response_id"] == accepted[0]["response_id"]
    assert pair["rejected"] == [{"role": "assistant", "content": "no"}] and pair["licence"] == "MIT"

    report = json.loads((run / "report.json").read_text())
    assert report["best"] == {"prompts": 3, "tied": 2, "mean_reward": 0.583333, "mean_gold": 0.583333}
    assert report["pairs"]["left_out"] == {
        "pairs that tie": 1,
        "prompts with fewer than two scored responses": 1,
        "responses between the best and the worst": 3,
    }
    assert report["licences"] == {"MIT": 1, "unknown": 2} and report["criteria"] == {"all": 16, "by_code": 16}
    # p0 alone has five; of its ten pairs one has at best 1/4, two 3/4, seven 1
    rows = report["curve"]["rows"]
    assert (report["curve"]["prompts"], report["curve"]["judged_prompts"]) == (1, 1)
    assert [(row["n"], row["proxy"]["value"]) for row in rows] == [(1, 0.6), (2, 0.875), (4, 1.0), (5, 1.0)]
    assert [row["gold"]["value"] for row in rows] == [0.6, 0.875, 1.0, 1.0]
    mass = 0.6**5  # of the three without a tie; the tied two share the rest
    kl = (1 - mass) * math.log((1 - mass) / 0.4) + mass * math.log(5) + 0.8 * (mass * math.log(mass) - mass)
    assert rows[-1]["kl"]["value"] == pytest.approx(kl, abs=1e-6)
    assert kl < rows[-1]["kl_bound"]
    assert imread(run / "bon.png").std() > 0.02
    out = capsys.readouterr().out
    assert "2 tie at the top" in " ".join(out.split()) and ".875 [.88 .88]" in out

    again = ["bon", "--data", data, "--reward_model", model]
    assert cli.main([*again, "--output", str(run)]) == 2
    others = ["--pairs", "all", "--margin", "0.5", "--threshold", "0.75", "--split", "train"]
    assert cli.main([*again, *others, "--output", str(tmp_path / "all")]) == 0
    scores = [(row["score_chosen"], row["score_rejected"]) for row in read_lines(tmp_path / "all" / "pairs.jsonl")]
    assert sorted(scores) == [(0.75, 0), (0.75, 0.25), (1, 0), (1, 0), (1, 0.25), (1, 0.25)]
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert report["pairs"]["left_out"] == {"pairs closer than the margin": 3, "pairs that tie": 2}
    assert [row["reward"] for row in read_lines(tmp_path / "all" / "accepted.jsonl")] == [1, 1, 0.75]
    capsys.readouterr()


def test_the_model_chooses_and_gold_stands_beside_where_there_are_verdicts(judged, model, tmp_path, capsys):
    bare = [r.model_copy(update={"verdicts": ()}) if r.prompt_id == "p0" else r for r in judged]
    write_judged(tmp_path / "in.jsonl", bare)
    run = tmp_path / "run"
    options = ["--reward_model", model, "--output", str(run), "--margin", "0"]
    assert cli.main(["bon", "--data", str(tmp_path / "in.jsonl"), *options]) == 0
    report = json.loads((run / "report.json").read_text())
    assert (report["curve"]["prompts"], report["curve"]["judged_prompts"]) == (6, 5)
    assert report["curve"]["rows"][0]["gold"]["value"] == pytest.approx(2 / 3, abs=1e-6)  # 1 and 1/3
    assert report["curve"]["rows"][1]["best_gold"]["value"] == 1.0
    scores = {row["response_id"]: row["reward"] for row in read_lines(run / "scores.jsonl")}
    for row in read_lines(run / "best.jsonl"):
        own = [reward for name, reward in scores.items() if name.startswith(row["prompt_id"])]
        assert row["reward"] == pytest.approx(max(own), abs=1e-8) and (row["gold"] is None) == (
            row["prompt_id"] == "p0"
        )
    assert "over 5 prompts" in " ".join(capsys.readouterr().out.split())


def test_a_killed_run_goes_on_where_it_stopped(model, tiny_backbone, tmp_path, monkeypatch, capsys):
    prompts = [
        PromptRecord(prompt_id=f"p{n}", prompt="Hi." + "!" * (n % 3), rubric=PLAIN, licence="MIT") for n in range(4)
    ]
    write_prompts(tmp_path / "in.jsonl", prompts)
    options = ["bon", "--data", str(tmp_path / "in.jsonl"), "--reward_model", model, "--policy", tiny_backbone]
    options += ["--samples", "3", "--response_length", "4", "--seed", "5"]
    monkeypatch.setattr(bon, "_AT_ONCE", 3)  # one prompt at a time
    assert cli.main([*options, "--output", str(tmp_path / "whole")]) == 0

    asked, sample = [], bon.sample

    def killed(*arguments, **more):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(arguments[2])
        return sample(*arguments, **more)

    monkeypatch.setattr(bon, "sample", killed)
    run = tmp_path / "run"
    assert cli.main([*options, "--output", str(run)]) == 130
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"prompt": "Hi.!')  # a line that a crash cut off
    monkeypatch.setattr(bon, "sample", sample)
    assert cli.main([*options, "--output", str(run)]) == 2
    assert "add --resume true" in capsys.readouterr().err
    assert cli.main([*options, "--output", str(run), "--resume", "true"]) == 0
    assert asked == [["Hi."], ["Hi.!"]]
    for name in ("samples.jsonl", "responses.jsonl", "best.jsonl", "pairs.jsonl", "accepted.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    found = read_judged(run / "responses.jsonl")
    assert [one.response_id for one in found[:4]] == ["p0-s0", "p0-s1", "p0-s2", "p1-s0"]
    assert {(one.generator, one.licence) for one in found} == {(tiny_backbone, "MIT")}
    texts = {name: [one.response for one in found if one.prompt_id == name] for name in ("p0", "p1", "p3")}
    assert texts["p0"] == texts["p3"] != texts["p1"]  # p3 asks what p0 asks
    report = json.loads((run / "report.json").read_text())
    cut = sum(not one["finished"] for line in read_lines(run / "samples.jsonl") for one in line["completions"])
    assert report["responses"]["all"] == 12 and report["left_out"]["cut_off"] >= cut > 0
    assert report["curve"]["rows"][0]["gold"]["value"] is None  # nobody can judge them


def test_samples_are_judged_by_code_where_it_can_answer_everything():
    records = responses("p", "pear 1", "x") + responses("q", "x", rubric=PLAIN)
    records += responses("r", "pear", verdicts=(Verdict(criterion_id="pear", value=0.0),))
    assert [one.values() for one in bon.judge_by_code(records)[:2]] == [[1.0, 1.0], [0.0, 0.0]]
    assert bon.judge_by_code(records)[2:] == records[2:]


FAULTS = [
    ("--threshold 0.5 --share 0.5", "give one of them"),
    ("--threshold 2", "threshold: must lie in [0, 1]"),
    ("--share 0", "share: must lie in (0, 1]"),
    ("--margin -1", "margin: must lie in [0, 1]"),
    ("--temperature 0", "temperature: must be positive"),
    ("--samples 0", "samples: must be at least 1"),
    ("--split validation", "has no prompts in split validation"),
    ("--policy nowhere/to/be/found", "cannot be loaded"),
]


@pytest.mark.parametrize(("options", "message"), FAULTS)
def test_bad_input_is_one_line_and_leaves_nothing(data, model, tmp_path, capsys, options, message):
    command = ["bon", "--data", data, "--reward_model", model, "--output", str(tmp_path / "run"), *options.split()]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("rubric-rm: error") == 1
    assert not (tmp_path / "run").exists()


def test_prompts_alone_need_a_policy_and_rubrics(model, tmp_path, capsys):
    for rubric, message in (
        (PLAIN, "give --policy to sample some"),
        (None, "1 of 1 prompts have no rubric, 'p' first"),
    ):
        write_prompts(tmp_path / "in.jsonl", [PromptRecord(prompt_id="p", prompt="Hi.", rubric=rubric)])
        options = ["--data", str(tmp_path / "in.jsonl"), "--reward_model", model, "--output", str(tmp_path / "run")]
        assert cli.main(["bon", *options]) == 2
        assert message in capsys.readouterr().err


# --- TRL as the reader -----------------------------------------------------------------------------------------------


def test_trl_trains_on_the_pairs(data, model, tiny_backbone, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    run = tmp_path / "run"
    options = ["--data", data, "--reward_model", model, "--output", str(run), "--pairs", "all"]
    assert cli.main(["bon", *options]) == 0
    pairs = load_dataset("json", data_files=str(run / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names) and len(pairs) == 9
    assert pairs[0]["prompt"] == [{"role": "user", "content": "Prompt p0."}]
    args = DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    policy = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    trainer = DPOTrainer(policy, args=args, train_dataset=pairs, processing_class=load_tokenizer(tiny_backbone))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # it still is its reference
