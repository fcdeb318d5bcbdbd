import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from policy import cli
from rm.backbone import load_tokenizer
from rm.config import FilterConfig
from rm.filtering import run_filter
from rm.model import RubricRewardModel
from rubric_data.errors import UserError
from rubric_data.io import read_judged, write_judged
from rubric_data.judges import masked_verdicts
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict, Verifier

RUBRIC = Rubric(criteria=(Criterion(id="c", text="Is good."),))


def prompt(name, *rewards, split=None):
    """A prompt whose responses earn ``rewards``; None masks the verdict."""
    return [
        JudgedResponse(
            prompt_id=name,
            prompt=f"prompt {name}",
            response_id=f"{name}-{place}",
            response=f"answer {place}",
            rubric=RUBRIC,
            split=split,
            verdicts=masked_verdicts(RUBRIC.criteria, "timeout", "60 s", judge="big")
            if reward is None
            else (Verdict(criterion_id="c", value=reward),),
        )
        for place, reward in enumerate(rewards)
    ]


@pytest.fixture
def records():
    rows = {"hard": (0.0, 0.1), "low": (0.2, 0.4), "same": (0.5, 0.5), "mid": (0.4, 0.8), "easy": (0.9, 1.0)}
    found = [record for name, rewards in rows.items() for record in prompt(name, *rewards, split="train")]
    found += prompt("masked", None, None, split="train") + prompt("one", 0.5, None, split="train")
    return found + prompt("held out", 1.0, 1.0, split="test")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_keeps_the_middle_and_counts_the_rest(records, tmp_path, capsys):
    write_judged(tmp_path / "in.jsonl", records)
    run = tmp_path / "run"
    assert cli.main(["data", "filter", "--data", str(tmp_path / "in.jsonl"), "--output", str(run)]) == 0
    assert "prompts: all 7, kept 2, unrewarded 1, too_few 1, too_low 1, too_high 1, too_alike 1" in (
        capsys.readouterr().out
    )
    report = json.loads((run / "report.json").read_text())
    # means .05 .3 .5 .6 .95
    assert (report["thresholds"]["low_reward"], report["thresholds"]["high_reward"]) == (0.3, 0.6)
    assert report["responses"] == {"all": 14, "kept": 4, "unrewarded": 3, "held_out": 2}
    assert report["mean_reward"]["kept"] == 0.45
    kept = read_judged(run / "kept.jsonl")
    assert [record.response_id for record in kept] == ["low-0", "low-1", "mid-0", "mid-1", "held out-0", "held out-1"]
    decisions = {line["prompt_id"]: line["decision"] for line in read_lines(run / "prompts.jsonl")}
    assert decisions == {
        "hard": "too_low", "low": "kept", "same": "too_alike", "mid": "kept", "easy": "too_high",
        "masked": "unrewarded", "one": "too_few",
    }  # fmt: skip
    assert np.ptp(imread(run / "histogram.png")) > 0.5  # something is drawn
    assert cli.main(["data", "filter", "--data", str(tmp_path / "in.jsonl"), "--output", str(run)]) == 2


class ByLength:
    """Stands for a reward model: reward = letters / 10."""

    options: dict

    def from_pretrained(self, path, **options):
        self.options = options
        return self

    def score_records(self, records, *, progress):
        return [SimpleNamespace(reward=len(record.response) / 10) for record in records]


def test_the_reward_model_s_rewards_decide_if_it_is_given(records, tmp_path, monkeypatch):
    scorer = ByLength()
    monkeypatch.setattr("rm.scorer.RubricScorer", scorer)
    bare = [r.model_copy(update={"verdicts": (), "response": "x" * (1 + place % 3)}) for place, r in enumerate(records)]
    write_judged(tmp_path / "in.jsonl", bare)
    config = FilterConfig(output=str(tmp_path / "run"), data=str(tmp_path / "in.jsonl"), reward_model="model")
    report = run_filter(config)
    assert report["rewards_by"] == "model" and report["responses"]["unrewarded"] == 0
    # lengths 1 2, 3 1, 2 3 ... : means .15 .2 .25 .15 .2 .25 .15, spreads .05 .1 .05 ...
    assert (report["thresholds"]["low_reward"], report["thresholds"]["high_reward"]) == (0.15, 0.225)
    assert report["prompts"]["kept"] == 5 and report["prompts"]["too_high"] == 2
    assert scorer.options["use_verifiers"]
    broken = Rubric(criteria=(Criterion(id="c", text="C.", verifier=Verifier(name="wordz")),))
    write_judged(tmp_path / "in.jsonl", [r.model_copy(update={"rubric": broken}) for r in bare])
    config.output = str(tmp_path / "second")
    with pytest.raises(UserError, match="response 'hard-0', criterion 'c': verifier 'wordz'"):
        run_filter(config)
    assert not (tmp_path / "second").exists()


def test_a_real_reward_model_reads_the_responses_and_code_its_own_criteria(tiny_backbone, judged, tmp_path):
    RubricRewardModel.from_language_model(tiny_backbone, max_length=512).save(tmp_path / "model")
    load_tokenizer(tiny_backbone).save_pretrained(tmp_path / "model")
    pear = Criterion(id="pear", text="Says pear.", verifier=Verifier(name="mention_any", args={"words": ["pear"]}))
    records = [r.model_copy(update={"rubric": Rubric(criteria=(pear,)), "verdicts": ()}) for r in judged]
    write_judged(tmp_path / "in.jsonl", records)
    options = ["--data", str(tmp_path / "in.jsonl"), "--reward_model", str(tmp_path / "model")]
    assert cli.main(["data", "filter", *options, "--output", str(tmp_path / "run")]) == 0
    # the first response of each of four prompts says pear, the second does not
    assert {(row["mean_reward"], row["spread"]) for row in read_lines(tmp_path / "run" / "prompts.jsonl")} == {
        (0.5, 0.5)
    }
    by_model = [*options, "--output", str(tmp_path / "model run"), "--use_verifiers", "false", "--min_spread", "0"]
    assert cli.main(["data", "filter", *by_model, "--low", "0", "--high", "1"]) == 0
    means = {row["mean_reward"] for row in read_lines(tmp_path / "model run" / "prompts.jsonl")}
    assert len(means) == 4 and not means & {0.0, 0.5, 1.0}
    veto = pear.model_copy(update={"veto": True})  # RL has code answer it all the same
    write_judged(tmp_path / "in.jsonl", [r.model_copy(update={"rubric": Rubric(criteria=(veto,))}) for r in records])
    guarded = [*options, "--output", str(tmp_path / "guarded"), "--use_verifiers", "false"]
    assert cli.main(["data", "filter", *guarded]) == 0
    assert {row["mean_reward"] for row in read_lines(tmp_path / "guarded" / "prompts.jsonl")} == {0.5}


def test_bad_input_says_what_to_change(records, tmp_path):
    write_judged(tmp_path / "in.jsonl", records)
    write_judged(tmp_path / "test.jsonl", records[-2:])

    def refused(match, **changes):
        options = {"output": str(tmp_path / "run"), "data": str(tmp_path / "in.jsonl")} | changes
        with pytest.raises(UserError, match=match):
            run_filter(FilterConfig(**options))

    refused("0 <= low < high <= 1, got 0.8, 0.2", low=0.8, high=0.2)
    refused(r"min_spread: must lie in \[0, 0.5\], got 0.7", min_spread=0.7)
    refused("min_responses: must be at least 1, got 0", min_responses=0)
    refused("every response is held out by its split", data=str(tmp_path / "test.jsonl"))
    assert not (tmp_path / "run").exists()
    refused(r"no prompt is left \(all 7, unrewarded 1, too_few 1, too_low 1, .*lower min_spread", min_spread=0.4)
    assert (tmp_path / "run" / "report.json").exists() and not (tmp_path / "run" / "kept.jsonl").exists()
