from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from simulations.heads.anatomy import Plane, draw, to_template
from simulations.heads.bleeding import (
    INTRACEREBRAL,
    KINDS,
    Bled,
    Bleeding,
    Blob,
    Sign,
    bleed,
    displaced,
)
from simulations.heads.head import Head, sample_head
from simulations.heads.places import sample_bleeding
from simulations.heads.template import load_template, sample

STEP_MM = 0.9
_CENTRES = (torch.arange(256) + 0.5) * STEP_MM - 128 * STEP_MM
X, Y = _CENTRES[None, :].expand(256, 256), _CENTRES[:, None].expand(256, 256)


def plane_of(head: Head, z: float, bleedings: tuple[Bleeding, ...] = ()) -> tuple[Plane, Bled]:
    template = load_template()
    head = replace(head, turn=(0.0, 0.0, 0.0), warp_mm=1.0)  # so that heights of the template hold
    points = to_template(head, X, Y, torch.full_like(X, z))
    depth = sample(template.distances, points, template.first_distance_mm, 2.0)[0]
    plane = draw(head, template, points, displaced(points, depth, bleedings) if bleedings else None)
    return plane, bleed(plane, bleedings, Y)


def height(one: Bleeding) -> float:
    if one.kind in ("subdural", "epidural"):
        return 60 * one.centre[2] / float(np.linalg.norm(one.centre))
    return 0.0 if one.kind == "intraventricular" else one.centre[2] - 8


def mm2(share: Tensor) -> float:
    return float((share > 0.5).sum()) * STEP_MM**2


def test_a_head_without_bleeding_has_none() -> None:
    plane, bled = plane_of(sample_head(np.random.default_rng(0), 1.0), 5.0)
    assert bled.blood.max() == 0
    assert torch.equal(bled.hu, plane.hu)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_bleeds_inside_the_skull_in_the_hu_of_blood(kind: str) -> None:
    areas = []
    for seed in range(6):
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        one = sample_bleeding(rng, kind)
        plane, bled = plane_of(sample_head(rng, 1.0), height(one), (one,))
        areas.append(mm2(bled.blood))
        assert bled.blood[plane.depth < -0.8].sum() == 0
        if areas[-1] > 60:
            inside = bled.hu[bled.blood > 0.8]
            assert 30 < float(inside.median()) < 80  # an older collection is no brighter than brain
            assert set(bled.kinds) == {kind}
    assert max(areas) > 60
    if kind in INTRACEREBRAL:
        assert min(areas) > 20


def test_a_clot_pushes_the_brain_and_leaves_the_skull() -> None:
    rng = np.random.default_rng(3)
    head, one = sample_head(rng, 1.0), sample_bleeding(rng, "deep", 22.0)
    before, _ = plane_of(head, height(one))
    after, _ = plane_of(head, height(one), (one,))
    assert torch.equal(before.depth, after.depth)
    points = before.points
    moved = (points - displaced(points, before.depth, (one,))).norm(dim=-1)
    away = (points - torch.tensor(one.centre)).norm(dim=-1)
    assert float(moved[(away > 15) & (away < 25) & (before.depth > 15)].mean()) > 1.5
    assert float(moved[before.depth < -6].max()) == 0


def test_the_marker_lies_strictly_inside_the_clot() -> None:
    rng = np.random.default_rng(4)
    sign = Sign("hypodensity", (Blob((0.0, 0.0, 0.0), (0.4, 0.4, 0.5)),), drop_hu=25)
    one = sample_bleeding(rng, "deep", 20.0, sign)
    _, bled = plane_of(sample_head(rng, 1.0), height(one), (one,))
    assert mm2(bled.dark) > 60
    assert float(bled.hu[bled.dark > 0.9].mean()) < one.hu - 15
    edge = torch.nn.functional.max_pool2d((bled.blood < 0.5).float()[None, None], 3, 1, 1)[0, 0] > 0
    assert bled.dark[edge].max() < 0.5


def test_a_subdural_bleeding_stays_on_its_side_and_an_epidural_one_is_a_lens() -> None:
    rng = np.random.default_rng(5)
    head, one = sample_head(rng, 1.0), sample_bleeding(rng, "subdural")
    plane, bled = plane_of(head, height(one), (one,))
    side = plane.points[..., 0] * (1 if one.centre[0] > 0 else -1)
    assert bled.blood[side < 0].sum() == 0
    lens = sample_bleeding(np.random.default_rng(6), "epidural")
    plane, bled = plane_of(head, height(lens), (lens,))
    assert float(plane.depth[bled.blood > 0.5].max()) < lens.radii[0] + 1
