"""How good an estimate of the policy gradient is, from its vectors for single questions: pure functions.

A method gives question q a vector f_q in R^P; the reference gives it g_q, drawn independently of f_q and
without bias. Let `mu = E f`, `G = E g` and `S = E |f|^2` over questions and samples. An estimate from N
questions has

    cosine(N) = <mu, G> / (|G| sqrt(|mu|^2 + (S - |mu|^2) / N)),   signal to noise = N |mu|^2 / (S - |mu|^2).

Inner products of means are U-statistics over pairs of different questions, so that the noise of single
vectors adds nothing to them: `sum_{q != r} <f_q, g_r> = <sum f, sum g> - sum_q <f_q, g_q>`. Questions stay in
K groups, since errors come from leaving out one group after the other (the jackknife). Every function takes
one metric, `<a, b> = sum_i w_i a_i b_i`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from at2po_agent.types import BoolArray, FloatArray, IntArray


class GroupSums(NamedTuple):
    """Sums of a method's vectors f and the reference's vectors g over K groups of questions.

    Attributes:
        questions: float[K], how many questions each group has.
        tokens: float[K], tokens that the method sampled.
        own: float[K, K], <sum of f in group a, sum of f in group b>.
        cross: float[K, K], <sum of f in group a, sum of g in group b>.
        reference: float[K, K], as `own` for g.
        own_squares: float[K], sum of |f_q|^2; f_q is the mean where a question has several vectors.
        second_moments: float[K], sum of E |f_q|^2, of single vectors.
        cross_products: float[K], sum of <f_q, g_q>.
        reference_squares: float[K], sum of |g_q|^2.
    """

    questions: FloatArray
    tokens: FloatArray
    own: FloatArray
    cross: FloatArray
    reference: FloatArray
    own_squares: FloatArray
    second_moments: FloatArray
    cross_products: FloatArray
    reference_squares: FloatArray


class Quality(NamedTuple):
    """Figures of one method in one metric, or their standard errors.

    Attributes:
        cosine: With the true gradient, of an estimate from the budget's tokens.
        signal_to_noise: Of the same estimate: squared length of the mean over the variance.
        bias: 1 - cosine of the estimate from infinitely many tokens.
        token_ratio: The budget over the tokens that give the baseline's cosine at the budget; above 1 is
            better than the baseline, 0 is never.
    """

    cosine: float
    signal_to_noise: float
    bias: float
    token_ratio: float


def sum_groups(
    vectors: FloatArray,
    reference: FloatArray,
    tokens: FloatArray,
    groups: IntArray,
    *,
    weights: FloatArray | None = None,
) -> GroupSums:
    """Sum up vectors of single questions.

    Args:
        vectors: float[Q, P], f_q; or float[Q, S, P], S vectors of each question, which may depend on one
            another: their mean is less noisy.
        reference: float[Q, P], g_q.
        tokens: float[Q], tokens that the method sampled for each question.
        groups: int[Q], group of each question, 0 to K - 1.
        weights: float[P], the metric; None is the Euclidean one.
    """
    member = (groups == np.arange(int(groups.max()) + 1)[:, None]).astype(np.float64)
    scale = np.ones(vectors.shape[-1]) if weights is None else weights
    samples = vectors if vectors.ndim == 3 else vectors[:, None]
    mean = samples.mean(axis=1)
    products = [
        (mean**2 * scale).sum(axis=1),
        (samples**2 * scale).sum(axis=2).mean(axis=1),
        (mean * scale * reference).sum(axis=1),
        (reference**2 * scale).sum(axis=1),
    ]
    return join_groups(
        member.sum(axis=1),
        member @ tokens,
        member @ mean,
        member @ reference,
        np.stack([member @ product for product in products]),
        weights=weights,
    )


def join_groups(
    questions: FloatArray,
    tokens: FloatArray,
    sums: FloatArray,
    reference_sums: FloatArray,
    products: FloatArray,
    *,
    weights: FloatArray | None = None,
) -> GroupSums:
    """Make `GroupSums` of vectors that were summed up group by group.

    Args:
        questions: float[K].
        tokens: float[K].
        sums: float[K, P], sums of f.
        reference_sums: float[K, P], sums of g.
        products: float[4, K] in the metric, in the order of `GroupSums`: sums of |f_q|^2, E |f_q|^2,
            <f_q, g_q> and |g_q|^2.
        weights: float[P], the metric; None is the Euclidean one.
    """
    f, g = np.asarray(sums, dtype=np.float64), np.asarray(reference_sums, dtype=np.float64)
    if weights is not None:
        f, g = f * np.sqrt(weights), g * np.sqrt(weights)
    return GroupSums(questions, tokens, f @ f.T, f @ g.T, g @ g.T, *products)


def measure(sums: GroupSums, baseline: GroupSums, *, budget: float, kept: BoolArray | None = None) -> Quality:
    """Figures of a method; nan where the sample is too small or too noisy to tell (a squared length below 0).

    Args:
        sums: The method.
        baseline: The method that `token_ratio` compares with, on the same questions and in the same metric.
        budget: Tokens of an estimate, T; `N = T / tokens per question`.
        kept: bool[K], the groups that count; None means all.
    """
    keep = np.ones(len(sums.questions), dtype=bool) if kept is None else kept
    count = sums.questions[keep].sum()

    def between(gram: FloatArray, same: FloatArray) -> float:
        """The U-statistic over pairs of different questions."""
        total = gram[np.ix_(keep, keep)].sum() - same[keep].sum()
        return float(total / (count * (count - 1)))

    def spread(method: GroupSums) -> tuple[float, float, float]:
        """<mu, G>, |mu|^2, and the variance per token, (S - |mu|^2) times tokens per question."""
        length = between(method.own, method.own_squares)
        tokens = method.tokens[keep].sum() / count
        variance = (method.second_moments[keep].sum() / count - length) * tokens
        return between(method.cross, method.cross_products), length, float(variance)

    product, length, variance = spread(sums)
    base_product, base_length, base_variance = spread(baseline)
    true_length = between(sums.reference, sums.reference_squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        norm = np.sqrt(true_length)
        cosine = product / (norm * np.sqrt(length + variance / budget))
        bias = 1 - product / (norm * np.sqrt(length))
        # The tokens t at which the method reaches the baseline's cosine c solve
        # <mu, G>^2 / (|G|^2 c^2) = |mu|^2 + variance / t; |G| cancels out.
        needed = product**2 * (base_length + base_variance / budget) / np.float64(base_product) ** 2
        ratio = np.maximum(budget * (needed - length) / np.float64(variance), 0.0) if product > 0 else 0.0
        ratio = ratio if base_product > 0 and variance > 0 else np.nan
        return Quality(
            float(cosine), float(budget * length / np.float64(variance)), float(bias), float(ratio)
        )


def with_errors(sums: GroupSums, baseline: GroupSums, *, budget: float) -> tuple[Quality, Quality]:
    """Figures of a method and their standard errors, from leaving out one group of questions at a time.

    The baseline leaves out the same group, so the error of `token_ratio` is that of a paired comparison.
    """
    groups = np.arange(len(sums.questions))
    errors = jackknife(lambda kept: np.array(measure(sums, baseline, budget=budget, kept=kept)), len(groups))
    return measure(sums, baseline, budget=budget), Quality(*errors.tolist())


def jackknife(statistic: Callable[[BoolArray], FloatArray], parts: int) -> FloatArray:
    """Standard errors of a statistic, `sqrt((K - 1) / K sum_k (t_k - mean t)^2)` without part k.

    Args:
        statistic: float[M] of the parts that are kept, bool[K].
        parts: K; nan is returned below 2.
    """
    everything = ~np.eye(parts, dtype=bool)
    values = np.stack([statistic(kept) for kept in everything])
    if parts < 2:
        return np.full(values.shape[1], np.nan)
    return np.asarray(np.sqrt((parts - 1) * values.var(axis=0)))


def minibatch_mean_square(
    total: FloatArray, squares: FloatArray, *, questions: int, minibatch: int
) -> FloatArray:
    """Mean square of each coordinate of a minibatch's gradient: what Adam's second moment follows.

    `E f^2 / n + (1 - 1 / n) (E f)^2` for a mean over n questions, the square of the mean without pairs of a
    question with itself.

    Args:
        total: float[P], sum of f over the questions.
        squares: float[P], sum of f^2, coordinate by coordinate.
        questions: How many, at least 2.
        minibatch: n.
    """
    mean_squared = np.maximum((total**2 - squares) / (questions * (questions - 1)), 0.0)
    return np.asarray(squares / questions / minibatch + (1 - 1 / minibatch) * mean_squared)


def correlation(truth: FloatArray, advantages: FloatArray) -> tuple[float, float]:
    """Pearson's correlation and its standard error, leaving out one entry (a question's turn) at a time.

    Args:
        truth: float[C], the turns' true advantages.
        advantages: float[C], those that a rule gave.

    Returns:
        nan where either is constant.
    """

    def pearson(kept: BoolArray) -> FloatArray:
        a, b = truth[kept] - truth[kept].mean(), advantages[kept] - advantages[kept].mean()
        norm = np.sqrt((a @ a) * (b @ b))
        return np.array([a @ b / norm if norm > 0 else np.nan])

    if len(truth) < 3:
        return float("nan"), float("nan")
    return float(pearson(np.ones(len(truth), dtype=bool))[0]), float(jackknife(pearson, len(truth))[0])
