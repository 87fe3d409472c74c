"""What a synthetic set is worth in real images."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Equivalent:
    """How many random real images with target features give the same accuracy."""

    images: float  # interpolated; at a bound where it lies outside of the curve
    bound: str  # "" within the curve, "<" below its first point, ">" above its last
    ratio: float  # images divided by the size of the synthetic set

    def __str__(self) -> str:
        """The ratio, such as `1.52` or `> 20.00`."""
        return f"{self.bound} {self.ratio:.2f}".strip()


def equivalent_images(curve: Mapping[int, float], accuracy: float, count: int) -> Equivalent:
    """The equivalence ratio of a set of `count` images with an accuracy in %.

    The curve (number m of random real images -> their accuracy in %, measured the same way, at least
    two points) is made non-decreasing, then interpolated linearly in accuracy and log m.
    """
    if len(curve) < 2:
        raise ValueError("a curve needs two points")
    points = list(itertools.accumulate(sorted(curve.items()), lambda a, b: (b[0], max(a[1], b[1]))))
    if accuracy < points[0][1]:
        return Equivalent(points[0][0], "<", points[0][0] / count)
    if accuracy > points[-1][1]:
        return Equivalent(points[-1][0], ">", points[-1][0] / count)
    (low, a), (high, b) = next(pair for pair in itertools.pairwise(points) if accuracy <= pair[1][1])
    share = (accuracy - a) / (b - a) if b > a else 0.0
    images = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return Equivalent(images, "", images / count)
