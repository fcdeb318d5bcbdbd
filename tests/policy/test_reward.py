"""The reward function that TRL's group trainers call: by a scripted scorer, by the real one, and TRL's side of it."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from transformers import TrainerState
from trl import GRPOTrainer, RLOOTrainer

from policy import reward as module
from policy.reward import RubricReward, completion_text, from_environment, prompt_text
from policy.tally import MOST_TEXTS
from rm.scorer import RubricScorer, Scored
from rubric_data.errors import UserError
from rubric_data.records import Criterion, Rubric, Verifier

FRUIT = Rubric(
    criteria=(
        Criterion(id="a", text="names a fruit", weight=3.0, tags=("content",)),
        Criterion(id="b", text="is short", tags=("form", "content")),
        Criterion(id="c", text="ends well"),
    )
)
STONE = Rubric(criteria=(Criterion(id="a", text="names a stone", tags=("content",)),))


class Script:
    """A scorer that reads its answers off the response: "0.5 1 nan" are P(met) of the criteria."""

    def __init__(self):
        self.calls = []
        self.checked = []

    def score(self, prompts, responses, rubrics):
        self.calls.append((list(prompts), list(responses), list(rubrics)))
        found = []
        for response, rubric in zip(responses, rubrics, strict=True):
            probs = np.array([float(word) for word in response.split()] or [0.0] * len(rubric.criteria))
            found.append(Scored(probs, probs, float(probs[0]), 0))
        return found

    def check(self, rubrics):
        self.checked += rubrics


class Hooks:
    def __init__(self):
        self.metrics, self.extra = {}, {}

    def log_metric(self, name, value):
        assert name not in self.metrics
        self.metrics[name] = value

    def log_extra(self, column, values):
        self.extra[column] = values


def test_one_call_in_the_rows_order_with_metrics_by_tag_and_text():
    script, hooks = Script(), Hooks()
    rewards = RubricReward(script)(
        prompts=["p", "q", "p", "p"],
        completions=["0.5 1 0", " 0.25 ", "nan 0 1", "1 0.5 nan"],
        rubric=[FRUIT.model_dump_json(), STONE.model_dump(), FRUIT.model_dump_json(), FRUIT.model_dump_json()],
        completion_ids=[[1]] * 4,
        trainer_state=None,
        log_metric=hooks.log_metric,
        log_extra=hooks.log_extra,
    )
    assert rewards == [0.5, 0.25, None, 1.0]
    assert script.calls == [
        (["p", "q", "p", "p"], ["0.5 1 0", "0.25", "nan 0 1", "1 0.5 nan"], [FRUIT, STONE, FRUIT, FRUIT])
    ]
    assert hooks.metrics == {
        "criteria/content": pytest.approx((0.5 + 1 + 0.25 + 0 + 1 + 0.5) / 6),
        "criteria/form": pytest.approx((1 + 0 + 0.5) / 3),
        "criteria/ends well": pytest.approx(0.5),
        "rubric/unscored": 0.25,
    }
    assert [json.loads(told) for told in hooks.extra["criteria"]] == [
        {"a": 0.5, "b": 1.0, "c": 0.0},
        {"a": 0.25},
        {"a": None, "b": 0.0, "c": 1.0},
        {"a": 1.0, "b": 0.5, "c": None},
    ]


def test_rows_of_another_task_are_left_to_another_reward():
    script, hooks = Script(), Hooks()
    found = RubricReward(script)(["p", "q"], ["1", "1"], [None, STONE.model_dump()], log_metric=hooks.log_metric)
    assert found == [None, 1.0] and script.calls[0][0] == ["q"]
    assert RubricReward(script)(["p"], ["1"], [None], log_metric=Hooks().log_metric) == [None]


def test_messages_and_empty_completions():
    script = Script()
    turns = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "A stone."}]},
    ]
    answer = [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
        {"role": "tool", "content": "7", "name": "stones"},
        {"role": "assistant", "content": " 1.0\n"},
    ]
    rewards = RubricReward(script)([turns, turns[:1]], [answer, []], [STONE.model_dump_json()] * 2)
    assert rewards == [1.0, 0.0]
    assert script.calls[0][:2] == (["user: Hi.\n\nassistant: Yes?\n\nuser: A stone.", "Hi."], ["1.0", ""])
    assert (prompt_text("as it is "), completion_text(" cut ")) == ("as it is ", "cut")
    with pytest.raises(UserError, match="message: field role: is missing"):
        prompt_text([{"content": "Hi."}])


def test_an_aggregation_takes_the_place_of_the_scorers_reward():
    def least(rubric, probs):
        assert rubric in (FRUIT, STONE)
        return float(probs.min())

    reward = RubricReward(Script(), aggregate=least)
    rubrics = [FRUIT.model_dump_json(), FRUIT.model_dump_json(), STONE.model_dump_json()]
    assert reward(["p"] * 3, ["0.5 1 0.25", "1 nan 1", "0.75"], rubrics) == [0.25, None, 0.75]


def test_many_texts_share_one_metric_and_a_check_knows_them_from_the_start():
    rubrics = [
        Rubric(criteria=(Criterion(id="x", text=f"{number} " + "long " * 30),)).model_dump_json()
        for number in range(MOST_TEXTS + 1)
    ]
    hooks, script = Hooks(), Script()
    few = RubricReward(script)
    few(["p"] * 2, ["1", "0"], rubrics[:2], log_metric=hooks.log_metric)
    assert sorted(hooks.metrics) == [f"criteria/{n} {'long ' * 11}lo…" for n in (0, 1)] + ["rubric/unscored"]
    hooks.metrics.clear()
    few.check([*rubrics, None])
    assert len(script.checked) == len(rubrics)
    few(["p"] * 2, ["1", "0"], rubrics[:2], log_metric=hooks.log_metric)
    assert hooks.metrics == {"criteria/other": 0.5, "rubric/unscored": 0.0}


@pytest.mark.parametrize(
    ("rubric", "message"),
    [
        ("{", r"rubric 2: is no JSON \(Expecting"),
        ("[]", "rubric 2: must be an object with criteria, got \\[\\]; correct it"),
        ('{"criteria": [{"id": "a"}]}', r"rubric 2: field criteria\.0\.text: is missing; add it"),
        ({"criteria": []}, "rubric 2: rubric: needs at least one criterion"),
    ],
)
def test_a_rubric_that_cannot_be_read_stops_the_check(rubric, message):
    reward = RubricReward(Script())
    with pytest.raises(UserError, match=message):
        reward.check([STONE.model_dump_json(), rubric])
    with pytest.raises(UserError, match=r"rubric of the prompt 'Say it\.': "):
        reward(["Say it."], ["1"], [rubric])
    with pytest.raises(UserError, match="has no column 'rubric'"):
        reward(["Say it."], ["1"])


def test_tallies_of_all_processes_are_one(monkeypatch):
    def gather(out, mine):
        out[:] = [mine, {(True, "form"): (1.0, 3), (False, "elsewhere"): (0.5, 1), (True, ""): (1.0, 1)}]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    hooks = Hooks()
    RubricReward(Script())(["p"], ["1 1 0"], [FRUIT.model_dump_json()], log_metric=hooks.log_metric)
    assert hooks.metrics == {
        "criteria/content": 1.0,
        "criteria/form": 0.5,
        "criteria/ends well": 0.0,
        "criteria/elsewhere": 0.5,
        "rubric/unscored": 0.5,
    }


def test_code_answers_beside_the_model_and_a_groups_order_is_kept(tiny_backbone):
    scorer = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512)
    rubric = Rubric(
        criteria=(
            Criterion(id="commas", text="has no comma", verifier=Verifier(name="ifeval:punctuation:no_comma")),
            Criterion(id="tone", text="is friendly"),
        )
    )
    seen = []

    def keep(_, probs):
        seen.append(probs)
        return float(probs[1])

    texts = ["A pear.", "", "A pear, and a plum.", "A pear."]
    rewards = RubricReward(scorer, aggregate=keep)(["p"] * 4, texts, [rubric.model_dump_json()] * 4)
    assert [probs[0] for probs in seen] == [1.0, 0.0, 0.0, 1.0]  # to code, nothing meets nothing
    assert rewards[0] == rewards[3] != rewards[2]
    alone = [scorer.score(["p"], [text], [rubric])[0].probs[1] for text in texts]
    assert rewards == pytest.approx(alone, abs=1e-5)
    wrong = rubric.model_copy(update={"criteria": (Criterion(id="c", text="C.", verifier=Verifier(name="wordz")),)})
    with pytest.raises(UserError, match="criterion 'c': verifier 'wordz'"):
        RubricReward(scorer).check([wrong.model_dump_json()])


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
def test_trl_still_calls_reward_functions_as_we_read_them(trainer):
    """Fails if the installed TRL passes other names, drops a hook, or reads None as a number."""
    got, hooks = {}, Hooks()
    PartialState(cpu=True)  # which TRL's warning about None wants

    def spy(**given):
        got.update(given)
        return RubricReward(Script())(**given)

    inputs = [{"prompt": "p", "rubric": STONE.model_dump_json(), "place": place} for place in range(2)]
    host = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=True),
        args=SimpleNamespace(report_to=[]),
        reward_funcs=[spy],
        reward_processing_classes=[None],
        reward_func_names=["spy"],
        state=TrainerState(),
        environments=None,
        _log_completion_extra=hooks.log_extra,
        _log_metric=hooks.log_metric,
    )
    rewards = trainer._calculate_rewards(host, inputs, ["p", "p"], ["0.5", "nan"], [[1, 2], [3]])
    assert rewards[0].item() == 0.5 and math.isnan(rewards[1].item())
    assert got["completion_ids"] == [[1, 2], [3]] and got["place"] == [0, 1]
    assert {"prompts", "completions", "rubric", "trainer_state", "log_metric", "log_extra"} <= got.keys()
    assert hooks.metrics == {"criteria/content": 0.5, "rubric/unscored": 0.5}
    assert len(hooks.extra["criteria"]) == 2


def test_the_function_for_dotted_paths_reads_the_environment(monkeypatch):
    row = {"prompts": ["p"], "completions": ["0.5"], "rubric": [STONE.model_dump_json()]}

    def told(**environment):
        module._of_environment.cache_clear()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return from_environment(**row)

    loaded = []
    monkeypatch.setattr(
        RubricScorer, "from_pretrained", lambda path, **options: loaded.append((path, options)) or Script()
    )
    with pytest.raises(UserError, match="RUBRIC_RM_MODEL: is not set"):
        told()
    with pytest.raises(UserError, match="RUBRIC_RM_REWARD: must be one of proxy, calibrated, lower_bound, got 'gold'"):
        told(RUBRIC_RM_MODEL="runs/m", RUBRIC_RM_REWARD="gold")
    with pytest.raises(UserError, match="RUBRIC_RM_USE_VERIFIERS: must be true or false, got 'no'"):
        told(RUBRIC_RM_REWARD="calibrated", RUBRIC_RM_USE_VERIFIERS="no")
    assert told(RUBRIC_RM_USE_VERIFIERS="false") == [0.5] == from_environment(**row)
    ((path, options),) = loaded
    assert (path, options["reward"], options["use_verifiers"]) == ("runs/m", "calibrated", "vetoes")
    module._of_environment.cache_clear()
