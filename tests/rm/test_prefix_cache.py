import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from rm.layout import Branch, Tree, pack
from rm.model import RubricRewardModel
from rm.prefix_cache import PrefixCache, Reading
from rm.scorer import RubricScorer
from rubric_data.records import Criterion, Rubric
from tests.rm.trees import forests

PROMPTS, RESPONSES = ["Name a fruit.", "Name a stone."], ["A pear.", "Granite, of course."]


@pytest.fixture(scope="module", params=["cpu_tree", "sdpa"])
def model(request, tiny_backbone):
    made = RubricRewardModel.from_language_model(
        tiny_backbone, max_length=512, dtype="float32", attention=request.param
    )
    return made.eval()


def _other_criteria(forest):
    def asked(branch):
        return Branch(branch.tokens, [[n + 5, 7, n + 6] for n in range(len(branch.criteria) + 1)])

    return [Tree(tree.tokens, [asked(branch) for branch in tree.branches]) for tree in forest]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forests)
@torch.inference_mode()
def test_recalled_prefixes_give_what_reading_again_gives(model, forest):
    cache = PrefixCache(10_000)
    batch = pack(forest)
    reading = Reading(batch[2])
    torch.testing.assert_close(model(*batch, reading), model(*batch), atol=0, rtol=0)
    cache.store(forest, reading)
    again = _other_criteria(forest)
    assert all(cache.knows(tree) for tree in again)
    ids, positions, layout = pack(again)
    recalled = model(ids, positions, layout, cache.recall(again, layout))
    torch.testing.assert_close(recalled, model(ids, positions, layout), atol=1e-5, rtol=1e-5)


def test_a_scorer_with_a_cache_answers_the_same_and_reads_only_criteria(tiny_backbone):
    plain = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512)
    cached = RubricScorer(plain.model, plain.encoder, cache_tokens=10_000)
    rubrics = [
        Rubric(criteria=tuple(Criterion(id=f"c{k}", text=text) for k, text in enumerate(texts)))
        for texts in (["Is short.", "Is polite."], ["Names a fruit."])
    ]
    prompts, responses = [p for p in PROMPTS for _ in RESPONSES], RESPONSES * 2
    lengths = []
    backbone = plain.model.backbone
    hook = backbone.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for rubric in (*rubrics, rubrics[0]):
        want = plain.score(prompts, responses, [rubric] * 4)
        whole = lengths[-1]
        got = cached.score(prompts, responses, [rubric] * 4)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
        if rubric is not rubrics[0]:
            assert lengths[-1] < whole / 2  # of whole trees, only the criteria were read
    hook.remove()
    assert (cached.cache.misses, cached.cache.hits) == (4, 8)


def test_the_least_recently_used_leave_first_and_nothing_is_kept_beyond_the_capacity():
    def reading(trees):
        total = sum(tree.length for tree in trees)
        found = Reading(pack(trees)[2])
        found.seen[0] = (torch.zeros(total, 1, 4), torch.zeros(total, 1, 4))
        return found

    first, second, third = (Tree([n], [Branch([n, n], [[9]])]) for n in (3, 4, 5))
    cache = PrefixCache(7)  # two trees of 3 tokens, and one token
    for tree in (first, second):
        cache.store([tree], reading([tree]))
    assert cache.tokens == 6 and cache.knows(first) and cache.knows(second)
    cache.recall([first], pack([first])[2])
    cache.store([third], reading([third]))
    assert cache.tokens <= 7
    assert cache.knows(first) and cache.knows(third) and not cache.knows(second)
    huge = Tree([6] * 9, [Branch([6] * 9, [[9]])])
    cache.store([huge], reading([huge]))
    assert not cache.knows(huge) and cache.knows(third)
