"""The adapter between ids and text, held against TRL's own `get_reward`."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from policy.adapter import RubricRewardAdapter, fill_missing
from policy.prompts import RubricPrompt, encode_prompt, rubric_prompts
from rm.posterior import Doubt
from rm.scorer import Scored
from rubric_data.errors import UserError
from rubric_data.records import Criterion, Rubric

pytest.importorskip("trl.experimental.ppo", reason="needs TRL with PPO")
from trl.experimental.utils import get_reward
from trl.trainer.utils import disable_dropout_in_model


def rubric(text):
    return Rubric(criteria=(Criterion(id="c", text=text),))


FRUIT = RubricPrompt("fruit", "Name a fruit.", rubric("names a fruit"))
LONGER = RubricPrompt("longer", "Name a fruit. And a question, please.", rubric("asks"))
PROMPTS = [FRUIT, LONGER]


class TableScorer:
    """Rewards by (response, criterion text), so that any mix-up of rows, texts or rubrics shows."""

    def __init__(self, table):
        self.table = table

    def score(self, prompts, responses, rubrics):
        rewards = [self.table[r, rubric.criteria[0].text] for r, rubric in zip(responses, rubrics, strict=True)]
        return [Scored(np.array([reward]), np.array([0.0]), reward, 0) for reward in rewards]


@pytest.fixture
def tokenizer(tiny_backbone):
    return AutoTokenizer.from_pretrained(tiny_backbone)


def batch(tokenizer, rows, width):
    """Rows of (prompt, response ids) as TRL lays them out: prompts padded left, responses right."""
    contexts = [encode_prompt(tokenizer, prompt.prompt) for prompt, _ in rows]
    longest = max(map(len, contexts))
    pad = tokenizer.pad_token_id
    ids = [
        [pad] * (longest - len(context)) + context + response + [pad] * (width - len(response))
        for context, (_, response) in zip(contexts, rows, strict=True)
    ]
    return torch.tensor(ids), longest


def reward_of(adapter, tokenizer, rows, width=12):
    ids, context_length = batch(tokenizer, rows, width)
    logits, final, lengths = get_reward(adapter, ids, tokenizer.pad_token_id, context_length)
    assert logits.shape == (*ids.shape, 1)
    return final.tolist(), (lengths - context_length + 1).tolist()


def test_trl_gets_the_scorers_reward_for_every_shape_of_row(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    eos = tokenizer.eos_token_id
    ended, cut, empty, silent = [*ids("pear"), eos], ids("apples a"), [eos], []
    table = {
        ("pear", "names a fruit"): 0.25,
        ("pear", "asks"): 0.5,
        ("apples a", "asks"): 0.75,
        ("", "names a fruit"): 0.0,
        ("", "asks"): 0.125,
    }
    adapter = RubricRewardAdapter(TableScorer(table), tokenizer, PROMPTS)
    rows = [(FRUIT, ended), (LONGER, ended), (LONGER, cut), (FRUIT, empty), (LONGER, silent)]
    final, lengths = reward_of(adapter, tokenizer, rows)
    assert final == [0.25, 0.5, 0.75, 0.0, 0.125]
    assert lengths == [len(ended), len(ended), len(cut), 1, 0]
    rollouts = adapter.take_rollouts()
    assert [one.response for one in rollouts] == ["pear", "pear", "apples a", "", ""]
    assert [one.finished for one in rollouts] == [True, True, False, True, False]
    assert [one.tokens for one in rollouts] == lengths
    assert [one.prompt.prompt_id for one in rollouts] == ["fruit", "longer", "longer", "fruit", "longer"]
    assert adapter.take_rollouts() == []


def test_a_response_that_fills_its_row_and_one_that_goes_on_after_the_end_token(tokenizer):
    word = tokenizer("pear", add_special_tokens=False)["input_ids"]
    adapter = RubricRewardAdapter(TableScorer({("pear", "names a fruit"): 0.5}), tokenizer, PROMPTS)
    after_end = [*word, tokenizer.eos_token_id, *word]
    assert reward_of(adapter, tokenizer, [(FRUIT, word)], width=len(word))[0] == [0.5]
    assert reward_of(adapter, tokenizer, [(FRUIT, after_end)])[0] == [0.5]


def test_a_pad_token_that_the_policy_wrote_ends_the_response_as_it_does_for_trl(tokenizer):
    word = tokenizer("pear", add_special_tokens=False)["input_ids"]
    adapter = RubricRewardAdapter(TableScorer({("pear", "asks"): 0.5}), tokenizer, PROMPTS)
    final, lengths = reward_of(adapter, tokenizer, [(LONGER, [*word, tokenizer.pad_token_id, *word])])
    assert final == [0.5]
    assert lengths == [len(word)]


def test_a_masked_reward_is_the_mean_of_the_others_and_stays_known_as_masked(tokenizer):
    words = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("pear", "apple", "stone")}
    table = {("pear", "asks"): 0.25, ("apple", "asks"): math.nan, ("stone", "asks"): 0.75}
    adapter = RubricRewardAdapter(TableScorer(table), tokenizer, PROMPTS)
    final, _ = reward_of(adapter, tokenizer, [(LONGER, ids) for ids in words.values()])
    assert final == [0.25, 0.5, 0.75]
    assert [math.isnan(one.reward) for one in adapter.take_rollouts()] == [False, True, False]


def test_a_response_that_never_ends_is_masked_if_asked(tokenizer):
    eos = tokenizer.eos_token_id
    words = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("pear", "apple", "stone")}
    table = {("pear", "asks"): 0.25, ("apple", "asks"): 1.0, ("stone", "asks"): 0.75}
    adapter = RubricRewardAdapter(TableScorer(table), tokenizer, PROMPTS, mask_unfinished=True)
    rows = [(LONGER, [*words["pear"], eos]), (LONGER, words["apple"]), (LONGER, [*words["stone"], eos])]
    assert reward_of(adapter, tokenizer, rows)[0] == [0.25, 0.5, 0.75]
    first, cut, _ = adapter.take_rollouts()
    assert (first.paid, cut.reward) == (0.25, 1.0) and math.isnan(cut.paid)
    none_ends = [(LONGER, words["pear"]), (LONGER, words["stone"])]
    assert reward_of(adapter, tokenizer, none_ends)[0] == [0.5, 0.5]  # all the same: pushed nowhere


TURNS = "system: Be brief.\n\nuser: Name a fruit."
DIALOGUE = f"{TURNS}\n\nassistant: Apple.\n\nuser: Another?"


def test_a_dialogue_is_told_from_the_one_it_begins_with(tokenizer):
    """The policy reads turns, the scorer the transcript; one prompt's tokens begin with all of the other's."""
    short, long = RubricPrompt("short", TURNS, rubric("a")), RubricPrompt("long", DIALOGUE, rubric("b"))
    words = tokenizer.decode(encode_prompt(tokenizer, DIALOGUE))
    assert words == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a fruit.<|im_end|>\n"
        "<|im_start|>assistant\nApple.<|im_end|>\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert words.startswith(tokenizer.decode(encode_prompt(tokenizer, TURNS)))
    eos, apple, cut = tokenizer.eos_token_id, *(tokenizer(text)["input_ids"] for text in ("Apple.", "A pe"))
    table = {("Apple.", "a"): 0.25, ("Apple.", "b"): 0.5, ("", "b"): 0.75, ("A pe", "a"): 1.0}
    adapter = RubricRewardAdapter(TableScorer(table), tokenizer, [long, short])
    rows = [(short, [*apple, eos]), (long, [*apple, eos]), (long, [eos]), (long, []), (short, cut)]
    final, lengths = reward_of(adapter, tokenizer, rows)
    assert final == [0.25, 0.5, 0.75, 0.75, 1.0]
    assert lengths == [len(apple) + 1, len(apple) + 1, 1, 0, len(cut)]
    rollouts = adapter.take_rollouts()
    assert [one.prompt.prompt_id for one in rollouts] == ["short", "long", "long", "long", "short"]
    assert [one.finished for one in rollouts] == [True, True, True, False, False]


def test_a_template_that_refuses_the_turns_is_told_with_the_prompt(tokenizer):
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(UserError, match=r"'system: Be brief.*its turns \(system, user\): no system; leave"):
        encode_prompt(tokenizer, TURNS)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"'Name a fruit\.': the model's chat template .*\(user\): .*leave the prompt"):
        encode_prompt(tokenizer, FRUIT.prompt)


def test_the_doubt_of_a_posterior_comes_with_the_rollout(tokenizer):
    class Doubting:
        def score(self, prompts, responses, rubrics):
            told = Doubt(np.zeros(1), np.zeros((1, 1)), 0.125)
            doubts = [told if "pear" in response else None for response in responses]
            return [Scored(np.zeros(1), np.zeros(1), 0.5, 0, doubt=doubt) for doubt in doubts]

    adapter = RubricRewardAdapter(Doubting(), tokenizer, PROMPTS)
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("pear", "stone")]
    reward_of(adapter, tokenizer, [(LONGER, ids) for ids in words])
    known, unknown = (one.doubt for one in adapter.take_rollouts())
    assert known == 0.125 and math.isnan(unknown)


def test_a_batch_without_any_reward_stops_the_run():
    with pytest.raises(UserError, match="gave no reward to any of 2 rollouts"):
        fill_missing([math.nan, math.nan], [math.nan, math.nan])


def test_it_is_a_module_without_weights_even_if_the_scorer_is_one(tokenizer):
    class ModuleScorer(torch.nn.Linear):
        def score(self, prompts, responses, rubrics):
            return [Scored(np.ones(1), np.ones(1), 1.0, 0) for _ in prompts]

    adapter = RubricRewardAdapter(ModuleScorer(2, 2), tokenizer, PROMPTS)
    disable_dropout_in_model(adapter)
    assert adapter.to("cpu") is adapter
    assert list(adapter.parameters()) == []
    assert adapter.state_dict() == {}


def test_an_unknown_prompt_is_named(tokenizer):
    adapter = RubricRewardAdapter(TableScorer({}), tokenizer, [FRUIT])
    with pytest.raises(UserError, match=r"no rubric is known for the prompt .*And a question"):
        reward_of(adapter, tokenizer, [(LONGER, [])])


def test_two_rubrics_for_one_prompt_are_refused(tokenizer):
    other = RubricPrompt("twin", FRUIT.prompt, rubric("something else"))
    with pytest.raises(UserError, match=r"'twin': has two rubrics \(the other is of 'fruit'\)"):
        RubricRewardAdapter(TableScorer({}), tokenizer, [FRUIT, other])


def test_the_same_rubric_under_two_ids_is_no_conflict(tokenizer):
    twin = RubricPrompt("twin", FRUIT.prompt, rubric("names a fruit"))
    RubricRewardAdapter(TableScorer({}), tokenizer, [FRUIT, twin])


def test_pad_equal_to_end_token_is_refused(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match=r"pad token '<\|im_end\|>' must differ .* set another pad_token"):
        RubricRewardAdapter(TableScorer({}), tokenizer, PROMPTS)


def test_a_prompt_that_holds_the_pad_token_is_refused(tokenizer):
    bad = RubricPrompt("bad", f"Explain {tokenizer.pad_token}", rubric("explains"))
    with pytest.raises(UserError, match="'bad': holds the pad token"):
        RubricRewardAdapter(TableScorer({}), tokenizer, [bad])


def test_prompts_whose_ids_start_one_another_are_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"  # nothing ends the turn
    start = RubricPrompt("start", "Name a fruit", rubric("a"))
    with pytest.raises(UserError, match="'longer': its tokens begin with all of 'start'"):
        RubricRewardAdapter(TableScorer({}), tokenizer, [LONGER, start])


def test_prompts_come_once_with_each_of_their_rubrics(judged):
    assert [prompt.prompt_id for prompt in rubric_prompts(judged)] == [f"p{number}" for number in range(6)]
    other = judged[0].model_copy(update={"rubric": rubric("new"), "verdicts": ()})
    assert len(rubric_prompts([*judged, other])) == 7
