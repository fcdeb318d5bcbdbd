"""Curricula on a random model, through the command line: two stages, a filter between, a stop in the middle."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy import curriculum, group
from policy.cli import main
from policy.config import CurriculumConfig, GrpoConfig, PromptChoice
from policy.curriculum_report import Outcome, family_rows, read_rewards, stage_rows, summarise
from policy.options import build_parser, parse
from policy.plan import differing, plan
from policy.stage import StepLog
from policy.stage_prompts import StagePrompts, gather
from rm.backbone import load_causal_lm
from rm.scorer import RubricScorer
from rubric_data.errors import UserError
from rubric_data.files import start_run
from rubric_data.io import read_judged, write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verifier

COMMAS = Criterion(id="commas", text="has no comma", verifier=Verifier(name="ifeval:punctuation:no_comma"))
SHORT = Criterion(id="short", text="has two words or one", weight=2, verifier=Verifier(name="words", args={"max": 2}))
TONE = Criterion(id="tone", text="is friendly", tags=("tone",))


def record(number, kind, split):
    criteria = (COMMAS, SHORT) if kind == "form" else (COMMAS, TONE)
    return JudgedResponse(
        prompt_id=f"{kind}-{number}",
        prompt=f"Name {kind} number {number}.",
        response_id=f"{kind}-{number}-r",
        response="A pear.",
        rubric=Rubric(criteria=criteria),
        split=split,
        source="fruit",
    )


@pytest.fixture
def recipe(tmp_path, tiny_backbone, monkeypatch):
    """A recipe of two stages of one update: GRPO on what code answers, then PPO on the rest, filtered."""
    untrained = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512)
    monkeypatch.setattr(RubricScorer, "from_pretrained", lambda *_, **__: untrained)
    splits = ["train"] * 3 + ["validation"] + ["test"] * 2
    records = [record(n, kind, split) for kind in ("form", "tone") for n, split in enumerate(splits)]
    write_judged(tmp_path / "data.jsonl", records)
    return {
        "policy": tiny_backbone,
        "output": str(tmp_path / "run"),
        "stages": [
            {"name": "form", "algorithm": "grpo", "prompts": {"verifiable": True}, "group_size": 2},
            {
                "name": "tone",
                "algorithm": "ppo",
                "prompts": {"verifiable": False},
                "filter": {"samples": 2, "low": 0, "high": 0.7, "min_spread": 0},
                "critic_layers": 1,
                "aggregation": {"saturation": 3},
            },
        ],
        "common": {
            "reward_model": tiny_backbone,
            "data": str(tmp_path / "data.jsonl"),
            "steps": 1,
            "batch_size": 8,
            "micro_batch_size": 4,
            "response_length": 6,
            "learning_rate": 1e-2,
            "lora_rank": 2,
            "gold_sample": 2,
            "eval_samples": 2,
            "aggregation": {"dropout": 0.1},
        },
    }


@pytest.fixture
def run(tmp_path, recipe):
    """Run the recipe as it now is, with further arguments; the exit code."""

    def command(*arguments):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return main(["curriculum", "--config", str(tmp_path / "recipe.yaml"), *arguments])

    return command


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_two_stages_end_to_end_with_a_filter_between(run, recipe, tmp_path, tiny_backbone, capsys):
    recipe["stages"][1]["filter"]["min_spread"] = 0.5
    assert run() == 2
    assert "stage 2 (tone): " in (told := capsys.readouterr().err) and "no prompt is left" in told
    recipe["stages"][1]["filter"]["min_spread"] = 0
    assert run("--resume", "true") == 0
    folder = tmp_path / "run"
    report = read_json(folder / "curriculum.json")
    first, second = report["stages"]
    assert (first["name"], first["algorithm"], first["steps"]) == ("form", "grpo", 1)
    assert first["prompts"] == {"chosen": 4, "kept": 4, "dropped": {}}
    assert second["prompts"]["chosen"] == 4 and 0 < second["prompts"]["kept"] < 4
    assert second["prompts"]["dropped"] == {"too_high": 4 - second["prompts"]["kept"]}

    assert report["held_out"] == {"prompts": 4, "by": "stage", "families": {"form": 2, "tone": 2}}
    for stage, own in (("1-form", first), ("2-tone", second)):  # both are measured on the prompts of both
        lines = [json.loads(line) for line in (folder / stage / "samples.jsonl").read_text().splitlines()]
        assert [line["prompt_id"] for line in lines] == ["form-4", "form-5", "tone-4", "tone-5"]
        golds = [[one["gold"] for one in line["after"]] for line in lines]
        assert own["gold"]["after"]["value"] == pytest.approx(np.mean(golds), abs=1e-6)
        assert own["families"]["tone"]["after"]["value"] == pytest.approx(np.mean(golds[2:]), abs=1e-6)
    assert report["whole"]["gold"]["before"] == first["gold"]["before"]
    assert report["whole"]["gold"]["after"] == second["gold"]["after"]
    assert report["differing"] == [] and report["policy"] == str(folder / "2-tone" / "adapter")

    settings = read_json(folder / "2-tone" / "config.json")
    assert settings["policy"] == str(folder / "1-form" / "adapter")
    assert settings["aggregation"]["saturation"] == 3.0 and settings["aggregation"]["dropout"] == 0.1
    trained = [one for one in read_judged(folder / "prompts" / "2-tone" / "data.jsonl") if one.split != "test"]
    assert len(trained) == second["prompts"]["kept"] and "train" in {one.split for one in trained}
    answers = read_judged(folder / "prompts" / "2-tone" / "responses.jsonl")
    assert len(answers) == 8 and {one.generator for one in answers} == {str(folder / "1-form" / "adapter")}

    told = capsys.readouterr().out
    assert "stage 2 of 2: tone (ppo)" in told and "Gold reward by stage" in told

    inputs = AutoTokenizer.from_pretrained(folder / "2-tone" / "adapter")("Name form", return_tensors="pt")
    stacked = PeftModel.from_pretrained(
        load_causal_lm(str(folder / "1-form" / "adapter")), folder / "2-tone" / "adapter"
    )
    merged = load_causal_lm(str(folder / "2-tone" / "adapter"))  # finds its way down to the backbone
    plain = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    torch.testing.assert_close(merged(**inputs).logits, stacked(**inputs).logits, rtol=1e-4, atol=1e-4)
    with stacked.disable_adapter():  # the reference of the second stage is what the first one has left
        reference = stacked(**inputs).logits
    left = PeftModel.from_pretrained(plain, folder / "1-form" / "adapter")
    torch.testing.assert_close(reference, left(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert (stacked(**inputs).logits - reference).abs().max() > 1e-3
    with left.disable_adapter():
        assert (left(**inputs).logits - reference).abs().max() > 1e-3


def test_an_interrupted_curriculum_goes_on_where_it_was(run, recipe, tmp_path, monkeypatch, capsys):
    recipe["stages"][1] = {"name": "tone", "algorithm": "rloo", "group_size": 2, "steps": 2, "save_steps": 1}
    write, seen = StepLog.on_log, []

    def note(self, args, state, control, **rest):
        rows = len(self.rows)
        write(self, args, state, control, **rest)
        if len(self.rows) > rows:
            seen.append((Path(args.output_dir).parent.name, state.global_step))

    def stop(self, args, state, control, **_):  # a checkpoint is written
        if seen == [("1-form", 1), ("2-tone", 1)]:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepLog, "on_log", note)
    monkeypatch.setattr(StepLog, "on_save", stop)
    assert run() == 130
    assert not (tmp_path / "run" / "curriculum.json").exists()
    assert run() == 2 and "holds a run already" in capsys.readouterr().err

    recipe["common"]["learning_rate"] = 1e-3
    assert run("--resume", "true") == 2
    assert "stage 1 (form): " in (told := capsys.readouterr().err) and "learning_rate is 0.001 and was 0.01" in told
    recipe["common"]["learning_rate"] = 1e-2
    recipe["stages"].append({"name": "again", "algorithm": "grpo", "group_size": 2})
    assert run("--resume", "true") == 0
    assert seen == [("1-form", 1), ("2-tone", 1), ("2-tone", 2), ("3-again", 1)]
    report = read_json(tmp_path / "run" / "curriculum.json")
    assert [stage["steps"] for stage in report["stages"]] == [1, 2, 1]
    assert run("--resume", "true") == 0 and len(seen) == 4  # all finished: only the report is made again
    assert read_json(tmp_path / "run" / "curriculum.json") == report


def test_what_is_done_is_not_done_again_nor_otherwise(recipe, tmp_path, monkeypatch):
    config = CurriculumConfig(**recipe)
    first, second = plan(config)
    ran = []
    monkeypatch.setattr(curriculum, "_COMMANDS", {name: (None, ran.append) for name in ("grpo", "ppo")})

    def leave(stage, *files):
        start_run(stage.folder, asdict(stage.run))
        for name in files:
            (stage.folder / name).touch()

    leave(first, "result.json")
    leave(second, "metrics.jsonl")
    for stage in (first, second):
        curriculum.train(stage, Console())
    assert ran == [second.run] and second.run.resume and (second.folder / "metrics.jsonl").exists()
    whole, after = plan(replace(config, common={**config.common, "lora_rank": 0}))
    assert after.run.policy == whole.left == str(whole.folder / "model")  # no adapter: all weights are trained

    part, *_ = gather([first, second], None)
    counts = curriculum.prepare(first, part, part.held_out)
    assert counts == {"chosen": 4, "kept": 4, "dropped": {}} == curriculum.prepare(first, part, part.held_out)
    for change in ({"run": replace(first.run, steps=9)}, {"prompts": PromptChoice(tags=["x"])}):
        other = replace(first, **change)
        with pytest.raises(UserError, match=r"cannot resume, as (steps is 9 and was 1|prompts.tags is \['x'\])"):
            curriculum.prepare(other, part, part.held_out)
            curriculum.train(other, Console())

    curriculum.settle_held_out(tmp_path / "held_out.jsonl", part.held_out)
    curriculum.settle_held_out(tmp_path / "held_out.jsonl", part.held_out)
    with pytest.raises(UserError, match="the held-out prompts were others when this curriculum began"):
        curriculum.settle_held_out(tmp_path / "held_out.jsonl", part.held_out[:1])


TONE_STAGE = "stage 2 (tone)"


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, {"learning_rat": 1}, f"{TONE_STAGE}: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (1, {"lora_rank": "big"}, f"{TONE_STAGE}: 'lora_rank' must be a whole number, got 'big'"),
        (1, {"group_size": 2}, f"{TONE_STAGE}: unknown key 'group_size'"),
        (1, {"prompts": {"tag": ["x"]}}, f"{TONE_STAGE}, prompts: unknown key 'tag'; did you mean 'tags'?"),
        (1, {"prompts": {"tags": ["x"]}}, "has no prompts in split train or validation that 'prompts' would take"),
        (1, {"filter": {"samples": 1}}, f"{TONE_STAGE}: filter.samples: must be at least 2, got 1"),
        (1, {"filter": {"low": 0.9}}, f"{TONE_STAGE}: low, high: must be quantiles"),
        (1, {"filter": 3}, f"{TONE_STAGE}: 'filter' is a section"),
        (1, {"name": "form"}, "stage 2 (form): another stage has this name"),
        (1, {"name": "a/b"}, "stage 2: 'name' must be letters, digits"),
        (
            1,
            {"algorithm": ["ppo"]},
            f"{TONE_STAGE}: 'algorithm' must be one of ppo, grpo, rloo, online-dpo, got ['ppo']",
        ),
        (1, {"algorithm": "dpo"}, f"{TONE_STAGE}: 'algorithm' must be one of ppo, grpo, rloo, online-dpo, got 'dpo'"),
        (1, {"policy": "x"}, f"{TONE_STAGE}: 'policy' is of the whole curriculum; move it out"),
        (1, {"judge": "local"}, f"{TONE_STAGE}: 'judge' must be the same in all stages; move it to 'common'"),
        (1, {"batch_size": 6}, f"{TONE_STAGE}: batch_size: 6 is no multiple of micro_batch_size 4"),
        (1, {"data": "none.jsonl"}, "none.jsonl: no such file"),
        (1, {"reward_model": "none"}, f"{TONE_STAGE}: reward_model: none: no such folder"),
        ("common", {"grop_size": 2}, "common: unknown key 'grop_size'; did you mean 'group_size'?"),
        ("common", {"reward_model": None}, "common: 'reward_model' must be text, got None"),
        ("all", {"stages": []}, "stages: there are none"),
        ("all", {"eval_prompts": 0}, "eval_prompts: must be at least 1, got 0"),
        (
            "all",
            {"stages": [{"name": "a", "algorithm": "ppo"}], "common": {}},
            "stage 1 (a): 'reward_model' is missing",
        ),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_stage_and_leaves_nothing(
    run, recipe, tmp_path, capsys, place, change, message
):
    changed = recipe if place == "all" else recipe["common"] if place == "common" else recipe["stages"][place]
    changed.update(change)
    assert run() == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_stages_must_agree_on_what_is_held_out_and_on_ids(run, recipe, tmp_path, capsys):
    others = [record(0, "tone", "test"), record(9, "tone", "train")]
    write_judged(tmp_path / "others.jsonl", others)
    recipe["stages"][1]["data"] = str(tmp_path / "others.jsonl")
    recipe["stages"][0]["prompts"] = {}
    assert run() == 2
    assert "stage 1 (form): trains on the prompt 'tone-0', which stage 2 (tone) holds out" in capsys.readouterr().err
    write_judged(tmp_path / "others.jsonl", [one.model_copy(update={"prompt": one.prompt + "!"}) for one in others])
    assert run() == 2
    assert "stage 2 (tone): prompt_id 'tone-0' is another one in stage 1 (form)" in capsys.readouterr().err


def test_options_that_gold_depends_on_are_told_where_stages_differ(recipe):
    recipe["stages"][1] |= {"use_verifiers": False, "response_length": 7, "lora_rank": 4}
    stages = plan(CurriculumConfig(**recipe))
    assert differing(stages) == ["response_length"]  # code is the judge, whoever answers as the reward model
    for stage in stages:
        stage.run.judge = "local"
    assert differing(stages) == ["response_length", "use_verifiers"]


def test_the_report_by_hand():
    def done(name, before, after, kept):
        rewards = {(kind, "before"): before for kind in ("gold", "proxy")}
        rewards |= {(kind, "after"): after for kind in ("gold", "proxy")}
        return Outcome(name, "grpo", {"chosen": 8, "kept": kept, "dropped": {}}, {"kl_final": 1.5}, rewards)

    start, middle, end = np.array([0.0, 0.2, 0.4]), np.array([0.6, 0.8, 0.2]), np.array([0.4, 0.6, np.nan])
    families = {"code": [0, 1], "open": [2]}
    report = summarise([done("a", start, middle, 8), done("b", middle, end, 5)], families, by="tag")
    first, second = report["stages"]
    assert first["families"]["code"]["gain"] == {"value": 0.6, "low": 0.6, "high": 0.6}
    assert first["families"]["open"]["gain"]["value"] == -0.2  # the seesaw
    assert second["gold"]["gain"]["value"] == -0.2  # of the two prompts that have both
    assert second["families"]["open"]["after"] == {"value": None, "low": None, "high": None}
    assert report["whole"]["families"]["code"]["gain"]["value"] == 0.4
    rows = stage_rows(report)
    assert rows[1] == ("2 b", "grpo", "5/8", ".533", ".500", "-.200 [-.20 -.20]", "1.50")
    assert rows[2][:5] == ("whole", "", "", ".200", ".500")
    assert family_rows(report)[0] == ("code", "2", ".100", ".700", ".500", "+.400 [+.40 +.40]")


def test_masked_responses_count_for_nothing(tmp_path):
    def line(prompt_id, golds):
        answers = [{"gold": gold, "proxy": 0.5} for gold in golds]
        return json.dumps({"prompt_id": prompt_id, "before": answers, "after": answers}) + "\n"

    path = tmp_path / "samples.jsonl"
    path.write_text(line("a", [0.2, None, 0.6]) + line("b", [None]))
    found = read_rewards(path, ["a", "b"])["gold", "after"]
    assert found[0] == pytest.approx(0.4) and np.isnan(found[1])
    with pytest.raises(ValueError, match="other prompts"):
        read_rewards(path, ["b", "a"])


@pytest.mark.parametrize("name", ["curriculum", "curriculum-full"])
def test_the_packaged_curricula_pass_every_check_that_needs_no_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/train/model", "runs/tail/model"):
        Path(folder).mkdir(parents=True)
    config = parse(CurriculumConfig, ["--config", name], build_parser(CurriculumConfig, prog="x"))
    for stage in plan(config):
        curriculum.check_stage(stage, StagePrompts([record(0, "tone", "train")], [record(1, "tone", "test")]))


@pytest.mark.parametrize("name", ["grpo-tail", "grpo-tail-full"])
def test_the_packaged_settings_of_the_tail_pass_the_checks_of_their_options(name):
    group.check_groups(parse(GrpoConfig, ["--config", name], build_parser(GrpoConfig, prog="x")))
