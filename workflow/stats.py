"""Accuracies with their error bars. Every score matrix is questions x samples, 1.0 where the answer is correct.

What the intervals cover and what the power figures achieve is measured in bench/stats.py.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from scipy.stats import t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint


@dataclass(frozen=True)
class Interval:
    """An estimate between 0 and 1 (or -1 and 1 for a difference) with its 95 % interval."""

    mean: float
    se: float  # standard error
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A difference between two models; p is two-sided, for no difference."""

    p: float

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not distinguishable` where the interval holds 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not distinguishable"


@dataclass(frozen=True)
class Variances:
    """Where the noise of a paired difference comes from: with S samples its variance per question is q + s / S."""

    questions: float  # q, of the true difference, between questions
    samples: float  # s, of one sample of each model, within a question


def mean_interval(scores: np.ndarray) -> Interval:
    """Accuracy with a 95 % interval that knows that samples of one question are alike.

    It is about the mean success chance of all questions that could have been asked (Miller, arXiv 2411.00640).
    The standard error is clustered by question: the standard deviation of the questions' means over √Q (section
    2.2). The interval is Wilson's with Q/f independent answers, where f is the part of an answer's variance that lies
    between questions: from 1/S (samples are independent) to 1 (samples of a question always agree). f is estimated
    with one question more, on which the chance is even and all samples agree. It counts only where few questions
    were asked or nearly all were answered alike, so that the data cannot rule out a few questions of another kind. A
    single question has no spread between questions: its se is √(p(1 - p)).

    Args:
        scores: (Q questions, S samples), values in [0, 1].
    """
    questions, samples = scores.shape
    mean = float(scores.mean())
    chance = mean * (1 - mean)
    between = float(scores.mean(axis=1).var(ddof=1)) if questions > 1 else chance
    share = (questions * between + 0.25) / (questions * chance + 0.25)
    answers = questions / min(max(share, 1 / samples), 1)
    low, high = proportion_confint(mean * answers, answers, method="wilson")
    # Rounding may leave a mean of 0 or 1 outside by 1e-17.
    return Interval(mean, float(np.sqrt(between / questions)), min(low, mean), max(high, mean))


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Accuracy of a minus accuracy of b on the same questions, with a 95 % interval and p from one paired t test.

    Questions are the units: differences of the questions' means (Miller, arXiv 2411.00640, section 4.2). To their sum
    of squares is added what two questions with even chances give on average, (1/S + 1/S') / 2. Without it the interval
    shrinks to nothing where a and b agree on all of a few questions, and t rejects a little too often where each
    question has one sample. There the test decides as McNemar's mid-p test does, but for a handful of outcomes that it
    lets pass; McNemar's exact test finds fewer real gains and has no interval. A single question has no spread between
    questions: the largest there is, 1, stands in.

    Args:
        a, b: (Q, S) and (Q, S'), rows in the same order of questions.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} questions and b has {len(b)}; give the rows of the questions both have")
    questions = len(a)
    differences = a.mean(axis=1) - b.mean(axis=1)
    mean = float(differences.mean())
    freedom = max(questions - 1, 1)
    variance = float(differences.var(ddof=1)) if questions > 1 else 1.0
    se = float(np.sqrt((variance + _added(a.shape[1], b.shape[1]) / freedom) / questions))
    half = float(t.ppf(0.975, freedom)) * se
    p = float(2 * t.sf(abs(mean) / se, freedom))
    return Difference(mean, se, max(-1.0, mean - half), min(1.0, mean + half), p)


def holm(p_values: list[float]) -> list[float]:
    """The p-values of several comparisons, adjusted so that all are right together (Holm 1979)."""
    return multipletests(p_values, method="holm")[1].tolist()


def difference_variances(a: np.ndarray, b: np.ndarray) -> Variances:
    """Split the variance of a paired difference into what more samples reduce and what only more questions do.

    Unbiased for two samples or more, so `questions` may come out a little below 0. One sample cannot tell the two
    apart: all the variance of that model then counts as the questions', and figures for more samples are pessimistic.

    Args:
        a, b: (Q, S) and (Q, S'), rows in the same order of questions, Q at least 2.
    """
    within = [float(one.var(axis=1, ddof=1).mean()) if one.shape[1] > 1 else 0.0 for one in (a, b)]
    total = float((a.mean(axis=1) - b.mean(axis=1)).var(ddof=1))
    return Variances(total - within[0] / a.shape[1] - within[1] / b.shape[1], sum(within))


def smallest_gain(n_questions: int, n_samples: int, variances: Variances) -> float:
    """The true gain that `paired_difference` finds 80 times in 100 (Miller, arXiv 2411.00640, section 5).

    Args:
        n_questions: at least 2.
        n_samples: per question, of both models.
        variances: of these two models or of two that differ as much.
    """
    variance = max(variances.questions, 0.0) + variances.samples / n_samples
    sd = np.sqrt(variance + _added(n_samples, n_samples) / (n_questions - 1))
    effect = TTestPower().solve_power(nobs=n_questions, alpha=0.05, power=0.8, alternative="two-sided")
    return float(sd * np.squeeze(effect))  # one of the solvers in statsmodels returns an array


def questions_needed(gain: float, n_samples: int, variances: Variances) -> int:
    """How many questions `paired_difference` needs to find a true gain 80 times in 100.

    Args:
        gain: at least 0.001, a tenth of a point.
        n_samples, variances: as for `smallest_gain`.
    """
    if gain < 0.001:
        raise ValueError(f"a gain of {gain} cannot be planned for; write one of at least 0.001")
    counts = range(2, 10**7)
    return counts[bisect_left(counts, True, key=lambda n: smallest_gain(n, n_samples, variances) <= gain)]


def _added(samples_a: int, samples_b: int) -> float:
    """The squared difference of two questions on which both models have an even chance, on average."""
    return (1 / samples_a + 1 / samples_b) / 2


def pass_at_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Chance that at least one of k samples is correct, per question: 1 - C(n - c, k) / C(n, k), unbiased.

    Source: Chen et al. 2021, arXiv 2107.03374, section 2.1.

    Args:
        scores: (Q, n) of 0 and 1.
        k: at most n.

    Returns:
        (Q,) values in [0, 1].
    """
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per question and there are {n}; write a k from 1 to {n}")
    wrong = n - scores.sum(axis=1)
    # C(w, k) / C(n, k) is the product of (w - i) / (n - i), and 0 as soon as w < k.
    drawn = np.arange(k)
    return 1 - np.prod(np.maximum(wrong[:, None] - drawn, 0) / (n - drawn), axis=1)


def maj_at_n(answers: list[list[str]], scores: np.ndarray) -> np.ndarray:
    """Whether the most frequent answer of a question is correct (self-consistency, Wang et al., arXiv 2203.11171).

    Samples without an answer ("") do not vote; a tie goes to the answer that came first; no answer at all is wrong.

    Args:
        answers: Q lists of n extracted answers.
        scores: (Q, n) of 0 and 1; the winner counts as correct if its first sample does.

    Returns:
        (Q,) of 0.0 and 1.0.
    """
    majority = np.zeros(len(answers))
    for question, row in enumerate(answers):
        votes = [answer for answer in row if answer]
        if votes:
            majority[question] = scores[question, row.index(max(votes, key=votes.count))]
    return majority
