"""An interval that holds however often one looks at it, so that comparisons may end when it says enough."""

from collections.abc import Sequence
from typing import Literal

LOOKING = 0.01  # of the 5 % that an interval may be wrong in: for looks on the way; the rest is for the end
GRID = 1001  # means that are tried
SHARE = 0.5  # of what a bet may lose

Settled = Literal["better", "worse", "within"]


class ConfidenceSequence:
    """Confidence sequence of the mean of values in [0, 1]: all its intervals at once hold the mean with probability
    1 − `level`, whenever one stops.

    The hedged capital process of Waudby-Smith and Ramdas (arXiv:2010.09686, theorem 3): for each mean m, what somebody
    has won who bet against it; those are left out against which 1 / `level` times the stake was won. `low` and `high`
    are its ends so far.
    """

    def __init__(self, level: float = LOOKING) -> None:
        import numpy as np

        self._log = np.log(2 / level)  # each of the two has half of the stake
        self._means = np.linspace(0, 1, GRID)
        self._won = np.zeros((2, GRID))  # logarithm of the capital of who bets on more, and on less
        self._left = np.ones(GRID, bool)
        self._count, self._sum, self._squares = 0, 0.0, 0.25
        self.low, self.high = 0.0, 1.0

    def add(self, values: Sequence[float]) -> None:
        """Further values in the order in which they came. ValueError outside [0, 1]."""
        import numpy as np

        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"values must lie in [0, 1], got {min(values)} to {max(values)}")
        with np.errstate(divide="ignore"):
            most = SHARE / self._means, SHARE / (1 - self._means)
        for value in values:
            variance = self._squares / (self._count + 1)
            self._count += 1
            bet = np.sqrt(2 * self._log / (variance * self._count * np.log(1 + self._count)))
            self._won[0] += np.log1p(np.minimum(bet, most[0]) * (value - self._means))
            self._won[1] += np.log1p(-np.minimum(bet, most[1]) * (value - self._means))
            self._left &= self._won.max(0) < self._log
            self._sum += value
            self._squares += (value - (0.5 + self._sum) / (self._count + 1)) ** 2
        left = self._means[self._left]
        if len(left):
            step = 1 / (GRID - 1)  # a mean between two that were tried
            self.low, self.high = max(0.0, float(left[0]) - step), min(1.0, float(left[-1]) + step)


def settled(low: float, high: float, within: float) -> Settled | None:
    """What an interval of a win rate settles: better or worse than ½, or within ± `within` of it; None: nothing yet."""
    if low > 0.5:
        return "better"
    if high < 0.5:
        return "worse"
    return "within" if 0.5 - within <= low and high <= 0.5 + within else None
