"""Accuracies with their error bars. Every score matrix is questions x samples, 1.0 where the answer is correct."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t


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


def mean_interval(scores: np.ndarray) -> Interval:
    """Accuracy with a 95 % interval that knows that samples of one question are alike.

    The standard error is clustered by question: the standard deviation of the questions' means over √Q (Miller,
    arXiv 2411.00640, section 2.2). The interval is Wilson's with the number of independent answers that gives this
    standard error, m = p(1 - p)/se², kept between Q (samples of a question always agree) and Q·S (they are
    independent). So it stays inside [0, 1], is right for few questions and for accuracies of 0 and 1, and tends to
    mean ± 1.96 se for many questions. A single question has no spread between questions: its se is √(p(1 - p)).

    Args:
        scores: (Q questions, S samples), values in [0, 1].
    """
    questions, samples = scores.shape
    mean = float(scores.mean())
    se = float(np.sqrt(mean * (1 - mean)))
    answers = float(questions)
    if questions > 1:
        se = float(scores.mean(axis=1).std(ddof=1) / np.sqrt(questions))
        if 0 < mean < 1:
            answers = float(mean * (1 - mean) / max(se**2, mean * (1 - mean) / (questions * samples)))
            answers = max(answers, float(questions))
    z = float(norm.ppf(0.975))
    centre = (mean + z**2 / (2 * answers)) / (1 + z**2 / answers)
    half = z / (1 + z**2 / answers) * np.sqrt(mean * (1 - mean) / answers + z**2 / (4 * answers**2))
    # Rounding may leave the exact ends 0 and 1 by 1e-17.
    return Interval(mean, se, min(float(max(0.0, centre - half)), mean), max(float(min(1.0, centre + half)), mean))


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Accuracy of a minus accuracy of b on the same questions, with a 95 % interval and p from Student's t.

    Questions are the units (paired differences of the questions' means; Miller, arXiv 2411.00640, section 4.2).
    With one sample per question, or where all questions differ by the same, two questions are added, one on which a
    is better by one sample and one on which b is: the adjusted Wald interval of Bonett and Price (2012, doi
    10.3102/1076998611411915). It keeps the interval from shrinking to nothing where a and b agree on all of a few
    questions. `mean` is the plain difference; `se` is that of the data from which the interval and p come.

    Args:
        a, b: (Q, S) and (Q, S'), rows in the same order of questions.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} questions and b has {len(b)}; give the rows of the questions both have")
    samples = min(a.shape[1], b.shape[1])
    differences = a.mean(axis=1) - b.mean(axis=1)
    if samples == 1 or np.ptp(differences) == 0:
        differences = np.append(differences, [1 / samples, -1 / samples])
    centre = float(differences.mean())
    se = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    freedom = len(differences) - 1
    half = float(t.ppf(0.975, freedom)) * se
    p = float(2 * t.sf(abs(centre) / se, freedom))
    return Difference(float(a.mean() - b.mean()), se, max(-1.0, centre - half), min(1.0, centre + half), p)


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
