"""The equivalence ratio on curves whose answer is known."""

import pytest

from evaluation.equivalent_images import equivalent_images

CURVE = {50: 40.0, 100: 42.0, 200: 44.0, 400: 46.0}


@pytest.mark.parametrize(
    ("accuracy", "count", "ratio", "shown"),
    [
        (42.0, 100, 1.0, "1.00"),
        (44.0, 100, 2.0, "2.00"),
        (43.0, 100, 2**0.5, "1.41"),  # half way in log m
        (40.0, 100, 0.5, "0.50"),
        (46.0, 20, 20.0, "20.00"),
        (39.9, 100, 0.5, "< 0.50"),
        (46.1, 100, 4.0, "> 4.00"),
    ],
)
def test_interpolation(accuracy, count, ratio, shown):
    found = equivalent_images(CURVE, accuracy, count)
    assert found.ratio == pytest.approx(ratio) and str(found) == shown


def test_a_dip_in_the_curve_is_not_a_second_answer():
    found = equivalent_images({50: 40.0, 100: 39.0, 200: 44.0}, 42.0, 100)
    assert 100 < found.images < 200
    assert equivalent_images({50: 40.0, 100: 40.0}, 40.0, 50).images == pytest.approx(50)


def test_a_curve_needs_two_points():
    with pytest.raises(ValueError, match="two points"):
        equivalent_images({50: 40.0}, 40.0, 50)
