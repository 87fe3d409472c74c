"""What a synthetic set is worth in real images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Equivalent:
    """How many random real images with target features give the same accuracy.

    Attributes:
        images: that number, interpolated; at a bound where it lies outside of the curve.
        bound: "" within the curve, "<" below its first point, ">" above its last.
        ratio: images divided by the size of the synthetic set.
    """

    images: float
    bound: str
    ratio: float

    def __str__(self) -> str:
        """The ratio, such as `1.52` or `> 20.00`."""
        return f"{self.bound} {self.ratio:.2f}".strip()


def equivalent_images(curve: Mapping[int, float], accuracy: float, count: int) -> Equivalent:
    """The equivalence ratio of a set.

    The curve is made non-decreasing first (the best accuracy with no more images), then
    interpolated linearly in accuracy and log m.

    Args:
        curve: number m of random real images -> their accuracy in %.
        accuracy: of the synthetic set, in %, measured the same way.
        count: images in the synthetic set.

    Raises:
        ValueError: fewer than two points.
    """
    if len(curve) < 2:
        raise ValueError("a curve needs two points")
    points, best = [], -math.inf
    for m in sorted(curve):
        best = max(best, curve[m])
        points.append((m, best))
    if accuracy < points[0][1]:
        return Equivalent(points[0][0], "<", points[0][0] / count)
    if accuracy > points[-1][1]:
        return Equivalent(points[-1][0], ">", points[-1][0] / count)
    for (low, a), (high, b) in itertools.pairwise(points):
        if a <= accuracy <= b:
            share = (accuracy - a) / (b - a) if b > a else 0.0
            images = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
            return Equivalent(images, "", images / count)
    raise AssertionError("unreachable: the points cover the range")
