from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm, ttest_rel
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower

from workflow.stats import (
    Difference,
    Variances,
    difference_variances,
    holm,
    maj_at_n,
    mean_interval,
    paired_difference,
    pass_at_k,
    questions_needed,
    smallest_gain,
)

# Populations of questions, those of bench/stats.py: mean accuracy x part of an answer's variance between questions.
# From 0.5 on the chances have a U shape; in LUMPS half of the questions are always or never solved.
LUMPS = 0.0
MEANS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
POPULATIONS = [(mean, spread) for mean in MEANS for spread in (0.05, 0.2, 0.5, 0.8, LUMPS)]


def chances(rng: np.random.Generator, mean: float, spread: float, size: tuple[int, int]) -> np.ndarray:
    if spread == LUMPS:
        lump, draw = rng.random(size) < 0.5, rng.random(size)
        return np.where(lump, draw < mean, chances(rng, mean, 0.2, size))
    both = 1 / spread - 1
    return rng.beta(mean * both, (1 - mean) * both, size)


def answers(rng: np.random.Generator, chance: np.ndarray, samples: int) -> np.ndarray:
    """Score matrices (repeats, Q, samples); the order of a question's answers does not matter."""
    return (np.arange(samples) < rng.binomial(samples, chance)[..., None]).astype(float)


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


@pytest.mark.parametrize("samples", [1, 4, 64])
@pytest.mark.parametrize("questions", [30, 500, 1319])
def test_interval_holds_the_truth_93_to_97_times_in_100(questions, samples):
    # 35 populations x 120 benchmarks: the simulation's standard error is √(0.95 x 0.05 / 4200) = 0.0034. The limits are
    # those of the promise, with nothing added: every cell covers 0.948 to 0.964 (bench/results/statistics.json).
    rng = np.random.default_rng([questions, samples])
    covered = []
    for mean, spread in POPULATIONS:
        for scores in answers(rng, chances(rng, mean, spread, (120, questions)), samples):
            interval = mean_interval(scores)
            covered.append(interval.low <= mean <= interval.high)
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize("mean", [0.05, 0.1])
def test_few_very_skewed_questions(mean):
    # Most questions are never solved. The clustered standard error does not see that a few would be: mean ± 1.96 se
    # holds the truth 75 to 88 times in 100. 1000 benchmarks: the standard error is 0.007 to 0.014.
    rng = np.random.default_rng(0)
    drawn = answers(rng, chances(rng, mean, 0.5, (1000, 30)), 64)
    intervals = [mean_interval(scores) for scores in drawn]
    assert 0.92 < np.mean([one.low <= mean <= one.high for one in intervals]) < 0.98
    assert np.mean([abs(one.mean - mean) <= 1.96 * one.se for one in intervals]) < 0.90


def test_interval_is_inside_its_bounds_and_narrower_with_more_questions():
    rng = np.random.default_rng(0)
    for mean, spread in POPULATIONS:
        for questions, samples in ((1, 1), (1, 3), (2, 2), (7, 1), (30, 5)):
            scores = answers(rng, chances(rng, mean, spread, (1, questions)), samples)[0]
            one, twice = mean_interval(scores), mean_interval(np.tile(scores, (2, 1)))
            assert 0 <= one.low <= one.mean <= one.high <= 1
            assert twice.high - twice.low < one.high - one.low
            assert one == mean_interval(scores)


def test_interval_is_the_same_for_right_and_wrong_answers():
    scores = answers(np.random.default_rng(3), np.full((1, 20), 0.2), 4)[0]
    right, wrong = mean_interval(scores), mean_interval(1 - scores)
    assert (wrong.mean, wrong.low, wrong.high) == pytest.approx((1 - right.mean, 1 - right.high, 1 - right.low))
    assert wrong.se == pytest.approx(right.se)


def test_samples_never_count_as_more_than_independent():
    # On every question 4 of 8 samples are right, so that the questions' means do not differ at all.
    interval = mean_interval(np.tile([0.0, 1.0], (30, 4)))
    wilson = binomtest(120, 240).proportion_ci(method="wilson")
    assert (interval.mean, interval.se) == (0.5, 0)
    assert (interval.low, interval.high) == pytest.approx((wilson.low, wilson.high))


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


@pytest.mark.parametrize("samples", [1, 4, 64])
@pytest.mark.parametrize("questions", [30, 500])
@pytest.mark.parametrize("redrawn", [0, 0.2, 1])
def test_no_difference_is_found_5_times_in_100(redrawn, questions, samples):
    # 1000 comparisons of models that share none, some or all of their chances: three standard errors are 0.021.
    rng = np.random.default_rng([questions, samples])
    found = []
    for mean, spread in ((0.1, 0.5), (0.3, 0.2), (0.5, 0.5), (0.9, 0.8)):
        b = chances(rng, mean, spread, (250, questions))
        a = np.where(rng.random(b.shape) < redrawn, chances(rng, mean, spread, b.shape), b)
        drawn = zip(answers(rng, a, samples), answers(rng, b, samples), strict=True)
        found += [paired_difference(*pair).verdict != "not distinguishable" for pair in drawn]
    assert np.mean(found) < 0.05 + 0.021


@pytest.mark.parametrize("samples", [1, 4, 64])
@pytest.mark.parametrize("questions", [30, 500])
def test_interval_holds_the_true_gain(questions, samples):
    # 1000 comparisons: three standard errors are 0.021. One sample of 30 questions is so coarse that it is held more
    # often. A gain on very few questions only is held less often, see bench/stats.py.
    rng = np.random.default_rng([questions, samples])
    held = []
    for mean, spread in ((0.1, 0.5), (0.3, 0.2), (0.5, 0.5), (0.9, 0.2)):
        b = chances(rng, mean, spread, (250, questions))
        a = np.where(rng.random(b.shape) < 0.2, chances(rng, mean, spread, b.shape), b)
        drawn = zip(answers(rng, a + 0.1 * (1 - a), samples), answers(rng, b, samples), strict=True)
        differences = [paired_difference(*pair) for pair in drawn]
        held += [one.low <= 0.1 * (1 - mean) <= one.high for one in differences]
    assert 0.929 < np.mean(held) < 0.99


@pytest.mark.parametrize("questions", [5, 30, 100])
def test_one_sample_per_question_decides_like_mcnemar(questions):
    """Every possible outcome: n questions that only a solved, m that only b did."""
    without_mid_p = missing = 0
    for n in range(questions + 1):
        for m in range(questions + 1 - n):
            a, b = np.zeros((2, questions, 1))
            a[:n], b[n : n + m] = 1, 1
            ours = paired_difference(a, b)
            exact = mcnemar([[0, n], [m, 0]], exact=True).pvalue
            mid_p = min(1, 2 * binom.cdf(min(n, m), n + m, 0.5) - binom.pmf(min(n, m), n + m, 0.5))
            assert ours.p < 0.05 or exact > 0.05
            without_mid_p += ours.p < 0.05 < mid_p
            missing += mid_p < 0.05 < ours.p
            assert (ours.p < 0.05) == (ours.verdict != "not distinguishable")
    assert without_mid_p == 0
    assert missing <= 4


def test_numbers_of_samples_may_differ():
    rng = np.random.default_rng(0)
    a, b = answers(rng, np.full((1, 40), 0.6), 8)[0], answers(rng, np.full((1, 40), 0.4), 2)[0]
    difference, opposite = paired_difference(a, b), paired_difference(b, a)
    assert difference.mean == pytest.approx(a.mean() - b.mean())
    assert (opposite.mean, opposite.low, opposite.high) == (-difference.mean, -difference.high, -difference.low)
    assert opposite.p == difference.p
    assert (difference.verdict, opposite.verdict) == ("better", "worse")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "better"),
        (-0.2, -0.01, "worse"),
        (-0.1, 0.1, "not distinguishable"),
        (0, 0.2, "not distinguishable"),
    ],
)
def test_verdict_follows_the_interval(low, high, verdict):
    assert Difference((low + high) / 2, 0.1, low, high, p=0.5).verdict == verdict


def test_other_questions_cannot_be_compared():
    with pytest.raises(ValueError, match="a has 3 questions and b has 2"):
        paired_difference(np.ones((3, 1)), np.ones((2, 1)))


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04]) == [0.04]
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


def test_difference_variances_are_unbiased():
    rng = np.random.default_rng(0)
    b = chances(rng, 0.5, 0.5, (2000, 50))
    a = np.where(rng.random(b.shape) < 0.2, chances(rng, 0.5, 0.5, b.shape), b)
    # Beta(½, ½): the chances have variance 1/8, E p(1 - p) = 1/8.
    questions, samples = 2 * 0.2 / 8, 2 / 8
    for shape in ((2, 2), (4, 3)):
        drawn = zip(answers(rng, a, shape[0]), answers(rng, b, shape[1]), strict=True)
        found = [difference_variances(*pair) for pair in drawn]
        assert np.mean([one.questions for one in found]) == pytest.approx(questions, abs=0.002)
        assert np.mean([one.samples for one in found]) == pytest.approx(samples, abs=0.002)


def test_one_sample_has_only_the_total_variance():
    rng = np.random.default_rng(0)
    a, b = answers(rng, np.full((2, 100), 0.5), 1)
    variances = difference_variances(a, b)
    assert variances == Variances((a - b).var(ddof=1), 0)
    both = difference_variances(a, np.hstack([b, 1 - b]))
    assert both.samples == 0.5  # of b alone
    assert both.questions + both.samples / 2 == pytest.approx(a.var(ddof=1))


def test_power_of_the_published_example():
    # Miller, arXiv 2411.00640, section 5, by the normal distribution: questions with uniform chances, correlation ½.
    assert questions_needed(0.03, 10**9, Variances(1 / 9, 1 / 3)) == pytest.approx(969, abs=3)
    normal = (norm.ppf(0.975) + norm.ppf(0.8)) * np.sqrt((1 / 9 + 1 / 30) / 198)
    assert smallest_gain(198, 10, Variances(1 / 9, 1 / 3)) == pytest.approx(normal, rel=0.01)


@pytest.mark.parametrize("gain", [0.01, 0.02, 0.05, 0.3])
@pytest.mark.parametrize("samples", [1, 4, 64])
def test_questions_needed_and_smallest_gain_are_inverse(gain, samples):
    variances = Variances(0.02, 0.25)
    questions = questions_needed(gain, samples, variances)
    assert smallest_gain(questions, samples, variances) <= gain < smallest_gain(questions - 1, samples, variances)
    for n, enough in ((questions - 1, False), (questions, True)):
        effect = gain / np.sqrt(0.02 + (0.25 + 1 / (n - 1)) / samples)
        power = TTestPower().power(effect, n, 0.05)
        assert power > 0.7999 if enough else power < 0.8001


def test_more_samples_and_more_questions():
    variances = Variances(0.02, 0.25)
    needed = [questions_needed(0.02, samples, variances) for samples in (1, 4, 64, 1000)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] / needed[-1] == pytest.approx((0.02 + 0.25) / 0.02, rel=0.03)
    assert smallest_gain(500, 4, variances) == pytest.approx(2 * smallest_gain(2000, 4, variances), rel=0.005)
    assert smallest_gain(30, 4, Variances(-0.001, 0.0)) == smallest_gain(30, 4, Variances(0.0, 0.0)) > 0


def test_planned_power_is_reached():
    # Each question gains 4 points of a chance of 0.4 to 0.5. 1000 comparisons: three standard errors are 0.038.
    rng = np.random.default_rng(0)
    within = 0.45 * 0.55 + 0.49 * 0.51 - 2 * 0.1**2 / 12  # E p(1 - p) of both
    questions = questions_needed(0.04, 4, Variances(0.0, within))
    b = rng.uniform(0.4, 0.5, (1000, questions))
    drawn = zip(answers(rng, b + 0.04, 4), answers(rng, b, 4), strict=True)
    assert np.mean([paired_difference(*pair).verdict == "better" for pair in drawn]) == pytest.approx(0.8, abs=0.038)


def test_a_gain_of_nothing_cannot_be_planned_for():
    with pytest.raises(ValueError, match=r"at least 0\.001"):
        questions_needed(0, 4, Variances(0.02, 0.25))


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
