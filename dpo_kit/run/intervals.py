"""The 95 % interval of a share that was counted. Standard library only."""

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
