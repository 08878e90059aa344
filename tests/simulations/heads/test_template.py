from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from simulations.heads.template import Template, load_template, sample


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template()


def at(template: Template, *place: float) -> tuple[float, float, float, float]:
    """Grey, white, depth and depth in the ventricles at a place."""
    points = torch.tensor(place)[None, None]
    tissue = sample(template.tissue, points, template.first_mm, 1.0)
    distances = sample(template.distances, points, template.first_distance_mm, 2.0)
    return tuple(float(value) for value in (*tissue[:, 0, 0], *distances[:, 0, 0]))


@pytest.mark.parametrize("side", [-1, 1])
def test_tissue_lies_where_an_atlas_has_it(template: Template, side: int) -> None:
    grey, white, depth, ventricle = at(template, 12 * side, 10, 10)  # head of the caudate nucleus
    assert grey > 0.7
    assert depth > 30
    assert ventricle < 0
    grey, white, *_ = at(template, 26 * side, -25, 28)  # corona radiata
    assert white > 0.8
    assert at(template, 10 * side, -20, 24)[3] > 0  # body of the lateral ventricle
    assert at(template, 28 * side, -58, 6)[3] > -4  # near the occipital horn


def test_the_cavity_has_the_size_of_a_head(template: Template) -> None:
    depth = [at(template, x, -18, 10)[2] for x in range(-110, 111)]
    assert 130 < sum(value > 0 for value in depth) < 150
    assert all(a <= b + 1e-3 for a, b in pairwise(depth[:41]))  # rises towards the middle
    assert at(template, 0, 100, 10)[2] < -10
    assert at(template, 0, -2, -14)[2] > 0  # the cistern above the sella is fluid, no bone
    assert sum(at(template, 0, -2, -14)[:2]) < 0.3


def test_both_halves_are_alike(template: Template) -> None:
    for place in ((30.0, 20.0, 10.0), (45.0, -40.0, 20.0), (20.0, -60.0, -30.0)):
        left = at(template, -place[0], *place[1:])
        assert left == pytest.approx(at(template, *place), abs=0.35)


def test_outside_the_edge_counts(template: Template) -> None:
    assert at(template, 1000, 1000, 1000)[:2] == (0, 0)
