import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from rm import metrics
from rm.metrics import value
from rubric_data.agreement import cohen_kappa
from rubric_data.pairs import same_prompt_pairs


def one_prompt(*columns):
    """The columns as arrays, with every item belonging to prompt 0 of 1."""
    arrays = [np.array(column, float) for column in columns]
    return *arrays, np.zeros(len(arrays[0]), int), 1


# --- one verdict at a time ---


def test_accuracy_leaves_out_undecided_verdicts_and_halves_undecided_predictions():
    # right, undecided prediction, verdict of exactly .5 left out, right, wrong: (1 + 1/2 + 1 + 0) / 4
    assert value(metrics.accuracy(*one_prompt([1, 0, 0.5, 1, 1], [0.9, 0.5, 0.9, 0.8, 0.2]))) == 0.625


def test_accuracy_puts_soft_verdicts_on_a_side():
    assert value(metrics.accuracy(*one_prompt([0.6, 0.4, 0.75], [0.9, 0.3, 0.1]))) == pytest.approx(2 / 3)


def test_nearest_answer_stays_halfway_between_two():
    levels = np.array([2, 2, 2, 3, 3, 3, 4])
    values = np.array([0.49, 0.5, 1.0, 0.2, 0.25, 0.5, 0.5])
    assert metrics.nearest_answer(values, levels).tolist() == [0, 0.5, 1, 0, 0.25, 0.5, 0.5]
    assert metrics.is_answer(values, levels).tolist() == [True, False, True, True, False, True, False]


def test_kappa_of_yes_and_no():
    # observed 3/4; by chance 1/2 of yes and 1/4 of yes: 1/8 + 3/8; the undecided verdict is left out
    sides = one_prompt([1, 1, 0, 0, 0.5], [0.8, 0.3, 0.3, 0.1, 0.9])
    assert value(metrics.kappa(*sides, np.full(5, 2))) == pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2))


def test_kappa_of_levels_weighs_how_far_apart_they_are():
    # nearest levels 0 ½ ½ 1: one half apart of four, against .5625 + .375 - 2 * .625 * .5 by chance
    sides = one_prompt([0, 0.5, 1, 1], [0.1, 0.6, 0.6, 0.9])
    assert value(metrics.kappa(*sides, np.full(4, 3))) == pytest.approx(1 - 0.0625 / 0.3125)


def test_kappa_of_one_answer_throughout_is_undefined():
    assert math.isnan(value(metrics.kappa(*one_prompt([1, 1, 1], [0.9, 0.7, 0.8]), np.full(3, 2))))
    assert value(metrics.kappa(*one_prompt([1, 1, 0], [0.9, 0.7, 0.8]), np.full(3, 2))) == pytest.approx(0)


def test_brier_takes_a_soft_verdict_as_the_number_it_is():
    assert value(metrics.brier(*one_prompt([0.5, 1], [1, 0.8]))) == pytest.approx((0.25 + 0.04) / 2)


def test_log_loss_is_in_nats_soft_and_finite():
    assert value(metrics.log_loss(*one_prompt([0.5], [0.5]))) == pytest.approx(math.log(2))
    expected = -(0.25 * math.log(0.8) + 0.75 * math.log(0.2))
    assert value(metrics.log_loss(*one_prompt([0.25], [0.8]))) == pytest.approx(expected)
    assert value(metrics.log_loss(*one_prompt([0], [1]))) == pytest.approx(-math.log(1e-6))


def test_auroc_counts_ties_half():
    # met .9 and .4 against unmet .4 and .1: wins 1, 1, 1/2, 1
    assert value(metrics.auroc(*one_prompt([1, 1, 0, 0], [0.9, 0.4, 0.4, 0.1]))) == pytest.approx(3.5 / 4)


def test_auroc_leaves_out_undecided_verdicts():
    assert value(metrics.auroc(*one_prompt([1, 0.5, 0.5, 0.1], [0.6, 0.1, 0.9, 0.5]))) == 1.0


@pytest.mark.parametrize("gold", [[1, 1], [0, 0], [0.5, 1], []])
def test_auroc_is_undefined_with_one_class(gold):
    assert math.isnan(value(metrics.auroc(*one_prompt(gold, [0.2] * len(gold)))))


def test_concordance_counts_pairs_by_how_far_apart_they_are():
    # gaps 1, ½, ½ of (1, 0), (1, ½), (½, 0): the first and the last in order, the middle one a tie
    assert value(metrics.concordance(*one_prompt([1, 0.5, 0], [0.7, 0.7, 0.1]))) == pytest.approx((1 + 0.25 + 0.5) / 2)
    # one of the three halves that lie between .5 and 1 is put below: only pairs of unequal verdicts count
    found = metrics.concordance(*one_prompt([0.5, 0.5, 0.5, 1], [0.1, 0.2, 0.9, 0.5]))
    assert value(found) == pytest.approx(2 / 3)


@pytest.mark.parametrize("gold", [[1, 1], [0.7, 0.7, 0.7], []])
def test_concordance_is_undefined_where_all_verdicts_are_the_same(gold):
    assert math.isnan(value(metrics.concordance(*one_prompt(gold, [0.1, 0.2, 0.3][: len(gold)]))))


def columns(rows, counts):
    """Prompt, verdict and prediction of every row, and how often its prompt is counted."""
    prompt, gold, prob = (np.array(column) for column in zip(*rows, strict=True))
    return prompt, gold, prob, np.array(counts)[prompt]


verdicts = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0]), st.sampled_from([0.1, 0.3, 0.3001, 0.5, 0.9])),
    min_size=2,
    max_size=30,
)


@given(verdicts, st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_auroc_under_prompt_counts_is_the_auroc_of_the_prompts_repeated(rows, counts):
    prompt, gold, prob, repeats = columns(rows, counts)
    repeated_gold, repeated_prob = np.repeat(gold, repeats), np.repeat(prob, repeats)
    assume(len(np.unique(repeated_gold)) == 2)
    found = metrics.auroc(gold, prob, prompt, 4).at(np.array([counts], float))[0]
    assert found == pytest.approx(roc_auc_score(repeated_gold, repeated_prob))
    assert metrics.concordance(gold, prob, prompt, 4).at(np.array([counts], float))[0] == found


graded = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)), min_size=2, max_size=30)


@given(graded, st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_concordance_of_graded_verdicts_is_the_mean_of_the_aurocs_above_each_level_by_their_pairs(rows, counts):
    prompt, level, prob, repeats = columns(rows, counts)
    repeated, repeated_prob = np.repeat(level, repeats), np.repeat(prob, repeats)
    assume(len(np.unique(repeated)) > 1)
    above = [repeated > step for step in range(4) if 0 < (repeated > step).sum() < len(repeated)]
    expected = np.average(
        [roc_auc_score(one, repeated_prob) for one in above], weights=[one.sum() * (~one).sum() for one in above]
    )
    found = metrics.concordance(level / 4, prob / 5, prompt, 4).at(np.array([counts], float))[0]
    assert found == pytest.approx(expected)


@given(verdicts, st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(max_examples=30, deadline=None)
def test_means_under_prompt_counts_are_the_means_of_the_prompts_repeated(rows, counts):
    prompt, gold, prob, repeats = columns(rows, counts)
    assume(repeats.sum())
    found = metrics.brier(gold, prob, prompt, 4).at(np.array([counts], float))[0]
    assert found == pytest.approx(((np.repeat(prob, repeats) - np.repeat(gold, repeats)) ** 2).mean())


@given(verdicts, st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_kappa_under_prompt_counts_is_the_kappa_of_the_prompts_repeated(rows, counts):
    prompt, gold, prob, repeats = columns(rows, counts)
    answers = np.repeat((1 + np.sign(prob - 0.5)) / 2, repeats)
    found = metrics.kappa(gold, prob, prompt, 4, np.full(len(gold), 2)).at(np.array([counts], float))[0]
    assert found == pytest.approx(cohen_kappa(np.repeat(gold, repeats), answers), nan_ok=True)


def test_calibration_error_of_two_bins():
    # bins {.1, .2} and {.8, .9}: |.3 - 1| and |1.7 - 2|, over 4 verdicts
    arguments = one_prompt([0, 1, 1, 1], [0.1, 0.9, 0.2, 0.8])
    assert value(metrics.calibration_error(*one_prompt([0, 1, 1, 1], [0.1, 0.2, 0.8, 0.9]), bins=2)) == pytest.approx(
        (0.7 + 0.3) / 4
    )
    # the order of the verdicts plays no part in the bins: {.1, .2} holds verdicts 0 and 1 again
    assert value(metrics.calibration_error(*arguments, bins=2)) == pytest.approx(0.25)


def test_bins_hold_equally_many_and_never_part_equal_values():
    assert metrics.equal_mass_bins(np.array([0.3, 0.1, 0.4, 0.2]), 2).tolist() == [1, 0, 1, 0]
    assert metrics.equal_mass_bins(np.full(7, 0.4), 5).tolist() == [2] * 7
    # midranks of 0, 0, 0, 1 are 2, 2, 2, 4
    assert metrics.equal_mass_bins(np.array([0, 0, 0, 1.0]), 4).tolist() == [1, 1, 1, 3]


def test_bins_of_equal_width_take_in_their_lower_bound():
    assert metrics.equal_width_bins(np.array([0, 0.0999, 0.1, 0.95, 1]), 10).tolist() == [0, 0, 1, 9, 9]


def test_reliability_curve():
    gold, prob, prompt, prompts = one_prompt([0, 1, 1, 1], [0.1, 0.2, 0.8, 0.9])
    first, second = metrics.reliability_curve(gold, prob, prompt, prompts, np.array([0, 0, 7, 7]))
    assert (first.count, first.low, first.high) == (2, 0.1, 0.2)
    assert value(first.predicted) == pytest.approx(0.15) and value(first.judged) == 0.5
    assert value(second.predicted) == pytest.approx(0.85) and value(second.judged) == 1.0


# --- rewards within a prompt ---


def test_a_difference_within_prompts_is_blind_to_their_levels():
    # prompt 0: (.9) - (.3 + .5)/2 = .5, weight 1*2/3; prompt 1, higher throughout: 1 - .9 = .1, weight 1*1/2
    value_B, group_B = np.array([0.9, 0.3, 0.5, 1.0, 0.9, 0.0]), np.array([1, 0, 0, 1, 0, 0], bool)
    found = metrics.difference_within_prompts(value_B, group_B, np.array([0, 0, 0, 1, 1, 2]), 3)
    assert value(found, 3) == pytest.approx((0.5 * 2 / 3 + 0.1 / 2) / (2 / 3 + 1 / 2))
    none = metrics.difference_within_prompts(value_B, np.zeros(6, bool), np.array([0, 0, 0, 1, 1, 2]), 3)
    assert math.isnan(value(none, 3))


def test_rank_correlations_average_over_the_prompts_the_judge_tells_apart():
    gold = np.array([1, 2, 3, 1, 2, 3, 1, 2, 5, 5], float)
    proxy = np.array([0.1, 0.2, 0.3, 0.1, 0.3, 0.2, 0.4, 0.4, 0.1, 0.9])
    prompt = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    # same order; one swap of three (Spearman 1/2, tau 1/3); constant prediction: 0; constant judge: left out
    assert value(metrics.spearman(gold, proxy, prompt, 4), 4) == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert value(metrics.kendall(gold, proxy, prompt, 4), 4) == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_rank_correlations_of_judge_and_prediction_with_ties():
    # midranks 1.5, 1.5, 3 and 1, 2.5, 2.5; tau-b: 1 concordant pair over sqrt(2 * 2)
    sides = one_prompt([1, 1, 2], [0.1, 0.2, 0.2])
    assert value(metrics.spearman(*sides)) == pytest.approx(0.5)
    assert value(metrics.kendall(*sides)) == pytest.approx(0.5)


def test_pairs_are_of_one_prompt():
    pairs = same_prompt_pairs(np.array([0, 1, 0, 1, 0]))
    assert {*zip(pairs.first_M.tolist(), pairs.second_M.tolist(), strict=True)} == {(0, 2), (0, 4), (2, 4), (1, 3)}
    kept = pairs.within(np.array([0, -1, 0, -1, 1]))
    assert (kept.first_M.tolist(), kept.second_M.tolist()) == ([0], [2])


@pytest.mark.parametrize(("rule", "expected"), [("half", 3.5 / 5), ("wrong", 3 / 5), ("excluded", 3 / 4)])
def test_pair_accuracy_under_each_rule_for_ties(rule, expected):
    # six pairs: three right (0-2, 0-3, 1-3), one wrong (2-3), one tied by the prediction (0-1), one by the judge (1-2)
    sides = one_prompt([1, 0.5, 0.5, 0], [0.9, 0.9, 0.1, 0.2])
    pairs = same_prompt_pairs(sides[2])
    assert value(metrics.pair_accuracy(*sides, pairs, rule)) == pytest.approx(expected)


def test_tie_rates():
    gold, proxy, prompt, prompts = one_prompt([1, 0.5, 0.5, 0], [0.9, 0.9, 0.1, 0.2])
    pairs = same_prompt_pairs(prompt)
    assert value(metrics.judge_ties(gold, prompt, prompts, pairs)) == pytest.approx(1 / 6)
    assert value(metrics.prediction_ties(gold, proxy, prompt, prompts, pairs)) == pytest.approx(1 / 5)


def test_pair_accuracy_counts_pairs_not_prompts():
    # three pairs all right, one pair wrong: 3/4, where a mean over prompts would be 1/2
    gold, proxy = np.array([1, 2, 3, 1, 2.0]), np.array([1, 2, 3, 2, 1.0])
    prompt = np.array([0, 0, 0, 1, 1])
    found = metrics.pair_accuracy(gold, proxy, prompt, 2, same_prompt_pairs(prompt), "half")
    assert value(found, 2) == pytest.approx(3 / 4)


def test_pair_accuracy_without_ordered_pairs_is_undefined():
    sides = one_prompt([1, 1], [0.2, 0.8])
    assert math.isnan(value(metrics.pair_accuracy(*sides, same_prompt_pairs(sides[2]), "half")))


@pytest.mark.parametrize(
    ("responses", "tail", "size"),
    [(12, 0.25, 3), (13, 0.25, 4), (4, 0.25, 2), (1, 0.25, 2), (100, 0.07, 7), (8, 1.0, 8)],
)
def test_tail_size(responses, tail, size):
    assert metrics.tail_size(responses, tail) == size


def test_the_tail_holds_what_ties_with_its_last():
    gold = np.array([0.9, 0.8, 0.8, 0.8, 0.1, 0.3, 0.2, 0.7])
    prompt = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    # prompt 0: top 2 of 5 end at .8, which three responses have; prompt 1: at least two; prompt 2: all it has
    assert metrics.in_tail(gold, prompt, 0.25).tolist() == [True, True, True, True, False, True, True, True]


def test_ties_share_the_last_places_among_the_best():
    prompt = np.array([0, 0, 0, 0, 1, 1])
    assert metrics.among_best(np.array([3, 2, 2, 1, 1, 1]), prompt, 2).tolist() == [1, 0.5, 0.5, 0, 1, 1]
    assert metrics.among_best(np.array([3, 2, 2, 1, 1, 1]), prompt, 1).tolist() == [1, 0, 0, 0, 0.5, 0.5]


def test_precision_at_k():
    gold, prompt = np.array([1, 0.8, 0.8, 0.2, 1, 0]), np.array([0, 0, 0, 0, 1, 1])
    proxy = np.array([0.1, 0.9, 0.5, 0.5, 0.3, 0.4])
    # the judge's two best are three, as two tie; taken are the second, and the third or the fourth
    assert value(metrics.precision_at(gold, proxy, prompt, 2, 2), 2) == (1 + 1 / 2) / 2
    # of prompt 1 everything is among the best two, so it says nothing; at 1 it does
    assert value(metrics.precision_at(gold, proxy, prompt, 2, 1), 2) == (0 + 0) / 2
    assert value(metrics.precision_at(gold, np.zeros(6), prompt, 2, 1), 2) == (1 / 4 + 1 / 2) / 2
    assert math.isnan(value(metrics.precision_at(gold, proxy, prompt, 2, 4), 2))


def test_correlation_is_pearsons_over_all_prompts():
    gold, proxy = np.array([0.1, 0.4, 0.9, 0.3]), np.array([0.2, 0.1, 0.8, 0.6])
    prompt = np.array([0, 0, 1, 2])
    assert value(metrics.correlation(gold, proxy, prompt, 3), 3) == pytest.approx(np.corrcoef(gold, proxy)[0, 1])
    assert math.isnan(value(metrics.correlation(gold, np.full(4, 0.3), prompt, 3), 3))


def test_exploitation_is_the_share_of_the_chosen_in_the_worse_half():
    gold, prompt = np.array([0.9, 0.5, 0.5, 0.1, 0, 0, 0, 1, 0.3, 0.3]), np.array([0] * 4 + [1] * 4 + [2] * 2)
    proxy = np.array([0.4, 0.9, 0.1, 0.9, 0.5, 0.1, 0.2, 0.6, 1, 0])
    # prompt 0: one of the second, at the median, and the last, below it; prompt 1: the last, the best there is; the
    # judge tells nothing apart in prompt 2
    assert value(metrics.exploitation(gold, proxy, prompt, 3, 0.25), 3) == (1 / 2 + 0) / 2
    # two of four: both of those; the last and the first, and of prompt 1 the three zeros are below the median
    assert value(metrics.exploitation(gold, proxy, prompt, 3, 0.5), 3) == (1 / 2 + 1 / 2) / 2
    assert value(metrics.exploitation(gold, np.zeros(10), prompt, 3, 0.25), 3) == (1 / 4 + 3 / 4) / 2
    assert math.isnan(value(metrics.exploitation(np.zeros(10), proxy, prompt, 3, 0.25), 3))


def test_best_of_n_regret():
    # pairs: 1 and .5 gives .5, 1 and 0 gives 1, .5 and 0 gives .5; by the judge 1, 1, .5
    gold, proxy, prompt, prompts = one_prompt([1, 0.5, 0], [0.2, 0.9, 0.1])
    assert value(metrics.best_of_n_regret(gold, proxy, prompt, prompts, 2)) == pytest.approx(5 / 6 - 2 / 3)
    assert value(metrics.best_of_n_regret(gold, proxy, prompt, prompts, 1)) == pytest.approx(0)
    assert math.isnan(value(metrics.best_of_n_regret(gold, proxy, prompt, prompts, 4)))


# --- intervals ---


def test_resamples_draw_as_many_prompts_as_there_are_and_repeat_with_the_seed():
    counts = metrics.resample_counts(7, 50, seed=3)
    assert counts.shape == (50, 7)
    assert (counts.sum(1) == 7).all()
    assert (counts == metrics.resample_counts(7, 50, seed=3)).all()
    assert (counts != metrics.resample_counts(7, 50, seed=4)).any()


def test_prompts_that_are_all_alike_give_an_interval_without_width():
    prompt = np.repeat(np.arange(5), 4)
    gold, prob = np.tile([1, 0, 1, 0.0], 5), np.tile([0.9, 0.2, 0.4, 0.6], 5)
    counts = metrics.resample_counts(5, 200, seed=0)
    for statistic in (metrics.brier, metrics.auroc, metrics.accuracy):
        found = metrics.estimate(statistic(gold, prob, prompt, 5), counts)
        assert found.low == pytest.approx(found.value) and found.high == pytest.approx(found.value)


def test_interval_holds_the_middle_of_the_resampled_values():
    # each prompt once: 1/2; resamples by hand: percentiles 2.5 and 97.5 of 0, 1/2, 1
    statistic = metrics.mean(np.array([0.0, 1.0]), np.array([0, 1]), 2)
    found = metrics.estimate(statistic, np.array([[2, 0], [1, 1], [0, 2]], float))
    assert (found.value, found.low, found.high) == (0.5, pytest.approx(0.025), pytest.approx(0.975))


def test_more_verdicts_of_the_same_prompts_do_not_narrow_the_interval():
    share, counts = np.array([0.1, 0.9, 0.4, 0.6, 0.2, 0.7]), metrics.resample_counts(6, 300, seed=0)
    few = metrics.estimate(metrics.mean(share, np.arange(6), 6), counts)
    many = metrics.estimate(metrics.mean(np.repeat(share, 50), np.repeat(np.arange(6), 50), 6), counts)
    assert (few.low, few.high) == (pytest.approx(many.low), pytest.approx(many.high))
    assert few.high - few.low > 0.2


def test_resamples_that_leave_it_undefined_are_left_out():
    statistic = metrics.auroc(np.array([1.0, 0.0]), np.array([0.9, 0.1]), np.array([0, 1]), 2)
    found = metrics.estimate(statistic, np.array([[2, 0], [1, 1]], float))
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    nothing = metrics.estimate(statistic, np.array([[2, 0]], float))
    assert nothing.value == 1.0 and math.isnan(nothing.low) and math.isnan(nothing.high)


def test_difference_is_paired():
    prompt, base = np.arange(6), np.array([0.1, 0.9, 0.4, 0.6, 0.2, 0.7])
    counts = metrics.resample_counts(6, 200, seed=0)
    found = metrics.difference(metrics.mean(base + 0.1, prompt, 6), metrics.mean(base, prompt, 6), counts)
    # a lead that every prompt shares has no uncertainty, however different the prompts are
    assert [found.value, found.low, found.high] == pytest.approx([0.1, 0.1, 0.1])
