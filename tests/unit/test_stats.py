from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from workflow.stats import maj_at_n, mean_interval, paired_difference, pass_at_k


@pytest.mark.parametrize("correct", [0, 1, 15, 29, 30])
def test_one_sample_per_question_is_wilsons_interval(correct):
    scores = np.zeros((30, 1))
    scores[:correct] = 1
    interval = mean_interval(scores)
    wilson = binomtest(correct, 30).proportion_ci(method="wilson")
    assert interval.mean == correct / 30
    assert (interval.low, interval.high) == pytest.approx((wilson.low, wilson.high))


def test_many_questions_give_the_normal_interval():
    scores = (np.random.default_rng(0).random((5000, 4)) < 0.4).astype(float)
    interval = mean_interval(scores)
    se = scores.mean(axis=1).std(ddof=1) / np.sqrt(5000)
    assert interval.se == pytest.approx(se)
    assert (interval.low, interval.high) == pytest.approx(
        (interval.mean - 1.96 * se, interval.mean + 1.96 * se), abs=2e-4
    )


def test_samples_that_always_agree_add_nothing():
    once = (np.arange(40) % 3 == 0).astype(float)[:, None]
    assert mean_interval(np.repeat(once, 8, axis=1)) == mean_interval(once)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 4), (30, 64)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_alike(shape, value):
    interval = mean_interval(np.full(shape, value))
    assert (interval.mean, interval.se) == (value, 0)
    assert interval.low == 0 if value == 0 else interval.high == 1
    assert 0.05 < interval.high - interval.low < 0.9


def test_interval_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        accuracies = rng.beta(2, 3, size=(30, 1))
        interval = mean_interval((rng.random((30, 4)) < accuracies).astype(float))
        covered += interval.low <= 0.4 <= interval.high
    assert 0.93 < covered / 1000 < 0.97


def test_paired_difference_of_many_questions_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    hard = rng.random((2000, 1))
    a, b = (rng.random((2000, 4)) < hard).astype(float), (rng.random((2000, 4)) < hard - 0.05).astype(float)
    difference = paired_difference(a, b)
    reference = ttest_rel(a.mean(axis=1), b.mean(axis=1))
    bounds = reference.confidence_interval()
    assert difference.mean == pytest.approx(a.mean() - b.mean())
    assert (difference.low, difference.high) == pytest.approx((bounds.low, bounds.high), abs=2e-4)
    assert difference.p == pytest.approx(reference.pvalue, rel=0.1)


def test_paired_difference_says_the_same_by_interval_and_p():
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = ((rng.random((12, 2)) < rng.random()).astype(float) for _ in range(2))
        difference = paired_difference(a, b)
        assert (difference.p < 0.05) == (not difference.low <= 0 <= difference.high)


def test_same_answers_are_no_difference_but_some_uncertainty():
    scores = (np.arange(30) % 2 == 0).astype(float)[:, None]
    difference = paired_difference(scores, scores)
    assert (difference.mean, difference.p) == (0, 1)
    assert difference.low == -difference.high < -0.05


@pytest.mark.parametrize("questions", [1, 2])
def test_one_or_two_questions_prove_nothing(questions):
    difference = paired_difference(np.ones((questions, 4)), np.zeros((questions, 4)))
    assert difference.mean == 1
    assert difference.p > 0.05
    assert difference.low < 0


def test_other_questions_cannot_be_compared():
    with pytest.raises(ValueError, match="a has 3 questions and b has 2"):
        paired_difference(np.ones((3, 1)), np.ones((2, 1)))


def test_pass_at_k_is_the_share_of_draws_with_a_correct_one():
    scores = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        draws = [np.mean([row[list(draw)].any() for draw in combinations(range(5), k)]) for row in scores]
        assert pass_at_k(scores, k) == pytest.approx(draws)
    assert pass_at_k(scores[:, :1], 1).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("k", [0, 6])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match="write a k from 1 to 5"):
        pass_at_k(np.zeros((2, 5)), k)


def test_majority():
    answers = [["2", "3", "3"], ["2", "3", "4"], ["", "", "3"], ["", "", ""], ["5", "6", "6"]]
    scores = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]])
    assert maj_at_n(answers, scores).tolist() == [1, 1, 1, 0, 0]
