"""The models that come with hemafed, on heads that they were not trained on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from client.segment.segment import Choices, probabilities, without_spots
from shared.model.scoring import best_device
from shared.model.starting import read_card, read_model, starting_file
from simulations.phantom.draw_caches import draw_hospitals
from simulations.phantom.hospitals import HOSPITALS
from tests.support.cohorts import bleeding

SHIPPED = ("demo", "small")
MOST_BYTES = 12_000_000


@pytest.mark.parametrize("variant", SHIPPED)
def test_its_card_says_what_it_is(variant: str) -> None:
    path = starting_file(variant)
    card = read_card(path)
    assert path.stat().st_size <= MOST_BYTES
    assert card.settings.variant == variant
    assert "synthetic" in card.facts["data"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    table = (path.parent / "README.md").read_text()
    assert digest in table, f"the card beside {path.name} names another file"
    assert card.facts["dice"] in table


@pytest.mark.parametrize("variant", SHIPPED)
def test_it_marks_hematomas_and_little_else(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, card = read_model(starting_file(variant))
    cache = draw_hospitals([bleeding(HOSPITALS[0], 6, 8)], 4711, tmp_path_factory.mktemp("drawn"))["hospital-01"]
    found = probabilities(model.to(best_device()), card.settings, cache.hu[:], best_device())
    masks = np.array([without_spots(one > Choices().threshold, Choices().least_mm2) for one in found])
    truth = cache.masks[:] > 0
    bled = truth.any(axis=(1, 2))
    overlap = 2 * (masks & truth).sum(axis=(1, 2)) / np.maximum(masks.sum(axis=(1, 2)) + truth.sum(axis=(1, 2)), 1)
    assert bled.sum() > 15
    assert overlap[bled].mean() > 0.5
    assert (masks[~bled].sum(axis=(1, 2)) == 0).mean() > 0.5
