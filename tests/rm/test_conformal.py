import math

import numpy as np
import pytest

from rm import conformal


def one_each(scores, coverage):
    return conformal.quantile(np.array(scores, float), np.arange(len(scores)), np.ones(len(scores)), coverage)


def test_one_score_a_prompt_gives_the_finite_sample_quantile():
    assert one_each(range(1, 20), 0.9) == 18  # ceil(20 * 0.9)
    assert one_each(range(1, 10), 0.9) == 9
    assert one_each(range(1, 9), 0.9) == math.inf  # nine tenths need nine prompts
    assert [conformal.prompts_needed(coverage) for coverage in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]


def test_scores_share_the_mass_of_their_prompt():
    scores, prompts = np.array([5.0, 1.0, 2.0]), np.array([7, 7, 3])
    # 1, 2, 5 have masses 1/6, 1/3, 1/6, and half of everything is reached at 2
    assert conformal.quantile(scores, prompts, np.ones(3), 0.5) == 2
    # of prompt 7's third, three quarters lie at 5: 1/12, 1/3, 1/4
    assert conformal.quantile(scores, prompts, np.array([3.0, 1.0, 1.0]), 0.5) == 5
    assert conformal.quantile(scores, prompts, np.array([6.0, 2.0, 9.0]), 0.5) == 5  # shares, not sizes


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_the_bound_holds_on_new_prompts_where_pooling_all_scores_fails(coverage):
    """Hard prompts have two responses, easy ones twenty: pooled, the easy ones outvote them."""
    generator = np.random.default_rng(0)

    def sample(prompts):
        hard = generator.random(prompts) < 0.3
        sizes = np.where(hard, 2, 20)
        own = np.where(hard, 3.0, 0.5) * np.abs(generator.normal(1, 0.3, prompts))
        prompt = np.repeat(np.arange(prompts), sizes)
        return np.abs(generator.normal(0, own[prompt])), prompt, 1 / sizes[prompt]

    held, pooled = [], []
    for _ in range(400):
        scores, prompt, _ = sample(25)
        new, _, share = sample(40)
        bound = conformal.quantile(scores, prompt, np.ones(len(scores)), coverage)
        held.append(np.average(new <= bound, weights=share))
        pooled.append(np.average(new <= np.quantile(scores, coverage), weights=share))
    assert coverage - 0.015 < np.mean(held) < coverage + 0.06
    assert np.mean(pooled) < coverage - 0.05
