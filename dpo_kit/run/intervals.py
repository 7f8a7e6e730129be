"""95 % intervals of a share that was counted. Standard library; scipy where an exact interval is asked for."""

import math
from statistics import NormalDist

Z95 = NormalDist().inv_cdf(0.975)


def wilson(share: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share seen in `count` trials (may be an effective number); (0, 1) without any."""
    if count <= 0:
        return 0.0, 1.0
    shrink = 1 / (1 + z * z / count)
    centre = shrink * (share + z * z / (2 * count))
    half = shrink * z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def clopper_pearson(successes: int, count: int) -> tuple[float, float]:
    """Clopper and Pearson's exact 95 % interval: it leaves ½ out just where the exact sign test rejects it at .05."""
    if not count:
        return 0.0, 1.0
    from scipy.stats import binomtest

    low, high = binomtest(successes, count).proportion_ci(0.95, "exact")
    return float(low), float(high)
