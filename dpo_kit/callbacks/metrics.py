"""Pure functions that measure preference tuning: the same definitions for every method.

Log-probabilities, logratios, margins and KL are in nats. A logratio is the summed completion log-probability (EOS in)
under the policy minus the one under the reference (the step-0 model). Imports torch and run.intervals alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpo_kit.run.intervals import wilson

DRAWS = 2000  # of a bootstrap


def implicit_reward(logratio: Tensor, beta: float) -> Tensor:
    """r = beta · logratio, up to a term of the prompt alone (DPO, arXiv:2305.18290, eq. 5). Any shape; beta·nats."""
    return beta * logratio


def margin(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Chosen minus rejected, pair by pair: of logratios in nats, of rewards in beta·nats. Shape (pairs,)."""
    return chosen - rejected


def correct(margins: Tensor) -> Tensor:
    """1 where the margin is positive, ½ where it is exactly 0, else 0. Shape (pairs,)."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def accuracy(margins: Tensor) -> float:
    """Share of pairs ranked as labelled, a tie counting ½ (TRL counts strict `>`, so 0 before the first step)."""
    return _mean(correct(margins))


def saturation_dpo(margins: Tensor, beta: float) -> float:
    """1 − 2·mean σ(−beta·margin): 0 while DPO's gradient weight is still ½, 1 when every pair is settled.

    The weight is the bracket of DPO's gradient (arXiv:2305.18290, section 4). Near 0 beta is not yet felt.
    `margins` (pairs,) in nats; per-token means for losses that use those.
    """
    return 1 - 2 * _mean(torch.sigmoid(-beta * margins.double()))


def saturation_ipo(gaps: Tensor, tau: float) -> float:
    """2·tau·mean gap: the share reached of IPO's target gap 1/(2 tau) (arXiv:2310.12036, eq. 17).

    `gaps` (pairs,) are differences of *per-token mean* logratios, in nats a token, as in TRL's loss.
    """
    return 2 * tau * _mean(gaps.double())


def displacement(logratio_chosen: Tensor, logratio_rejected: Tensor) -> tuple[float, float]:
    """Share of pairs whose chosen lost likelihood, and share where chosen and rejected both did (arXiv:2410.08847).

    Both (pairs,) in nats. Normal in good runs too: read the trend.
    """
    chosen_down = logratio_chosen < 0
    return _mean(chosen_down), _mean(chosen_down & (logratio_rejected < 0))


def log_loss_and_brier(reward_margins: Tensor) -> tuple[float, float]:
    """Calibration of σ(reward margin) as the probability that chosen wins: mean −log σ (nats) and mean (1 − σ)²."""
    margins = reward_margins.double()
    return _mean(-torch.nn.functional.logsigmoid(margins)), _mean((1 - torch.sigmoid(margins)) ** 2)


def auc(desirable: Tensor, undesirable: Tensor) -> float:
    """Chance that a desirable completion scores above an undesirable one, ties ½ (Mann–Whitney). Shapes (n,), (m,)."""
    return _mean(_wins(desirable, undesirable))


def class_gap(desirable: Tensor, undesirable: Tensor) -> float:
    """Mean of the desirable minus mean of the undesirable, in the unit of the scores (nats for logratios)."""
    return _mean(desirable) - _mean(undesirable)


def auc_interval(scores: Tensor, labels: Tensor, clusters: Sequence[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the AUC, whole clusters (prompts) resampled.

    `scores` (n,), `labels` (n,) bool, `clusters` n names. A draw without both classes is left out; (nan, nan)
    if all are.
    """
    weights = _cluster_weights(clusters)
    positive, negative = weights[:, labels], weights[:, ~labels]
    won = ((positive @ _wins(scores[labels], scores[~labels])) * negative).sum(1)
    total = positive.sum(1) * negative.sum(1)
    return _interval(won[total > 0] / total[total > 0])


def class_gap_interval(scores: Tensor, labels: Tensor, clusters: Sequence[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the class gap by prompt, in the unit of the scores; as `auc_interval`."""
    weights, values = _cluster_weights(clusters), scores.double()
    positive, negative = weights[:, labels], weights[:, ~labels]
    gaps = positive @ values[labels] / positive.sum(1) - negative @ values[~labels] / negative.sum(1)
    return _interval(gaps)


def longer_wins(length_chosen: Tensor, length_rejected: Tensor) -> float:
    """Accuracy of the trivial rule "the longer is better", equal lengths ½: what length alone explains."""
    return accuracy(length_chosen - length_rejected)


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation, ties given their mean rank; nan when either is constant. Shapes (n,)."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norm = centred.norm(dim=1).prod()
    return float(centred.prod(0).sum() / norm) if norm > 0 else math.nan


def length_corrected_accuracy(margins: Tensor, length_gaps: Tensor) -> float:
    """The accuracy expected at equal lengths: `length_controlled` of which pairs are ranked as labelled.

    `margins` and `length_gaps` (tokens, chosen − rejected) have shape (pairs,).
    """
    return length_controlled(correct(margins), length_gaps)


def length_controlled(points: Tensor, length_gaps: Tensor) -> float:
    """σ(a) of the fit logit P(win) = a + b·tanh(gap / sd): the mean of `points` expected at equal lengths.

    The form of length-controlled AlpacaEval (arXiv:2404.04475) without its instruction difficulty. `points` (0, ½, 1)
    and `length_gaps` have shape (n,).
    """
    return float(_fit_lengths(points, length_gaps, torch.ones(1, len(points), dtype=torch.float64)))


def length_controlled_interval(
    points: Tensor, length_gaps: Tensor, clusters: Sequence[str], draws: int = DRAWS
) -> tuple[float, float]:
    """95 % bootstrap interval of `length_controlled`, whole clusters (prompts) resampled and fitted again."""
    return _interval(_fit_lengths(points, length_gaps, _cluster_weights(clusters, draws)))


def _fit_lengths(points: Tensor, length_gaps: Tensor, weights: Tensor) -> Tensor:
    """σ(a) for each row of `weights` (fits, n), by Newton's method; a small ridge keeps separable data finite."""
    gaps = length_gaps.double()
    inputs = torch.stack([torch.ones_like(gaps), torch.tanh(gaps / gaps.std(correction=0).clamp(min=1e-9))])
    products = (inputs[:, None] * inputs[None, :]).flatten(0, 1)  # (4, n): what a Hessian sums
    penalty, fitted = 1e-2 * torch.eye(2, dtype=torch.float64), torch.zeros(len(weights), 2, dtype=torch.float64)
    for _ in range(50):
        predicted = torch.sigmoid(fitted @ inputs)
        gradient = (weights * (points.double() - predicted)) @ inputs.T - fitted @ penalty
        hessian = ((weights * predicted * (1 - predicted)) @ products.T).unflatten(1, (2, 2)) + penalty
        step = torch.linalg.solve(hessian, gradient).clamp(-2, 2)
        fitted = fitted + step
        if float(step.abs().max()) < 1e-10:
            break
    return torch.sigmoid(fitted[:, 0])


def effective_count(values: Tensor, clusters: Sequence[str]) -> float:
    """Rows that would carry as much evidence if they were independent: n / design effect (arXiv:2411.00640).

    The design effect is the cluster-robust variance of the mean over its plain variance: at least 1 (never
    narrower than plain), at most Kish's Σ sizes² / n (rows of a cluster all alike), which is taken where the
    values do not vary. `values` (n,), `clusters` n names.
    """
    groups, number = _group(clusters)
    residuals = values.double() - values.double().mean()
    largest = float((torch.bincount(groups) ** 2).sum()) / len(values)
    plain = float((residuals**2).sum())
    if plain == 0:
        return len(values) / largest
    sums = torch.zeros(number, dtype=torch.float64).index_add_(0, groups, residuals)
    design_effect = float((sums**2).sum()) / plain * number / max(1, number - 1)
    return len(values) / min(max(1.0, design_effect), largest)


def accuracy_interval(margins: Tensor, clusters: Sequence[str]) -> tuple[float, float]:
    """Wilson's 95 % interval of the accuracy on as many pairs as are effectively independent (clusters = prompts)."""
    return wilson(accuracy(margins), effective_count(correct(margins), clusters))


def bootstrap_means(values: Tensor, clusters: Sequence[str], draws: int = DRAWS) -> Tensor:
    """Means of `draws` resamples in which whole clusters (prompts) are drawn with replacement. Shape (draws,), float64.

    Seeded by a generator of its own: the global random state is left alone. `values` (n,), `clusters` n names.
    """
    weights = _cluster_weights(clusters, draws)
    return (weights @ values.double()) / weights.sum(1)


def bootstrap_interval(
    values: Tensor, clusters: Sequence[str], draws: int = DRAWS, level: float = 0.05
) -> tuple[float, float]:
    """Percentile interval of the mean (95 % at a `level` of .05), by bootstrap over clusters; in the values' unit."""
    return _interval(bootstrap_means(values, clusters, draws), level)


def bootstrap_se(values: Tensor, clusters: Sequence[str]) -> float:
    """Standard error of the mean, by bootstrap over clusters; in the unit of the values."""
    return float(bootstrap_means(values, clusters).std())


def rao_blackwell(logp_rows: Tensor, logq_rows: Tensor) -> Tensor:
    """Σ_v p(v)·[log p(v) − log q(v)] position by position: exact KL(p‖q) of each next-token distribution.

    Shapes (..., vocabulary) → (...,); normalised log-probabilities in nats. Summed along samples of p it is an unbiased
    estimate of the KL per response, never negative, and near q of far smaller variance than k1, the sum of
    log p(v) − log q(v) at the sampled tokens (arXiv:2504.10637).

    Σ (q − p) = 0 is added, so that each term is p·φ(log q − log p) with φ(u) = e^u − 1 − u ≥ 0: what is rounded enters
    squared, where the plain sum loses a KL of 1e-6 nats a token in the last bits of the log-probabilities.
    """
    p, q = logp_rows.exp(), logq_rows.exp()
    u = logq_rows - logp_rows
    far = torch.where(p > 0, q - p - p * u, q)  # where e^u may overflow
    return torch.where(u.abs() < 1, p * (torch.expm1(u) - u), far).sum(-1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _wins(first: Tensor, second: Tensor) -> Tensor:
    return correct(first[:, None].double() - second[None, :].double())


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


def _group(clusters: Sequence[str]) -> tuple[Tensor, int]:
    index = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    return torch.tensor([index[name] for name in clusters], dtype=torch.long), len(index)


def _cluster_weights(clusters: Sequence[str], draws: int = DRAWS) -> Tensor:
    """How often each row is drawn in each resample of whole clusters: shape (draws, n), float64."""
    groups, number = _group(clusters)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(number, (draws, number), generator=generator)
    counts = torch.zeros(draws, number, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, counts.new_ones(1, 1).expand_as(drawn))[:, groups]


def _interval(means: Tensor, level: float = 0.05) -> tuple[float, float]:
    finite = means[means.isfinite()]
    if not len(finite):
        return math.nan, math.nan
    low, high = torch.quantile(finite, torch.tensor([level / 2, 1 - level / 2], dtype=finite.dtype)).tolist()
    return low, high


SATURATION: dict[str, Callable[[Tensor, Tensor, float], float]] = {
    "dpo": lambda margins, gaps, beta: saturation_dpo(margins, beta),
    "dpo_norm": lambda margins, gaps, beta: saturation_dpo(gaps, beta),
    "ipo": lambda margins, gaps, beta: saturation_ipo(gaps, beta),
}
"""Saturation per family of losses: (margins, gaps of per-token means, beta or tau) → 0 (beta not felt) to 1.
"""
