from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.ingest.ingest import ingest
from shared.site import read_site
from shared.slices import SliceCache, read_cache
from simulations.phantom.draw_caches import View, draw_hospitals
from simulations.phantom.hospitals import HOSPITALS, Hospital
from simulations.phantom.write_hospitals import write_hospitals

# Signed, tilted and padded; lossless and not; a planted feature that changes the scanner.
SMALL = tuple(replace(HOSPITALS[n - 1], patients=2, slices=4) for n in (1, 3, 6, 9))
PLANTED = replace(SMALL[0], number=12, cohort=replace(SMALL[0].cohort, feature="field-of-view", rho=-0.9))


def slices_of(cache: SliceCache) -> set[tuple]:
    """Every slice with all that a study uses, in no order: an ingest orders by hashes."""
    return {
        (hu.tobytes(), mask.tobytes(), str(label), bool(looked))
        for hu, mask, label, looked in zip(cache.hu, cache.masks, cache.label, cache.has_mask, strict=True)
    }


@pytest.mark.parametrize("hospital", [*SMALL, PLANTED], ids=lambda h: h.name)
def test_a_drawn_cache_is_what_an_ingest_of_the_files_holds(hospital: Hospital, tmp_path: Path) -> None:
    (file,) = write_hospitals(tmp_path / "files", 5, (hospital,))
    ingest(read_site(file))
    ingested = read_cache(read_site(file).cache)
    drawn = draw_hospitals([hospital], 5, tmp_path / "store", workers=1)[hospital.name]
    assert len(ingested.label) == hospital.patients * hospital.slices
    assert slices_of(drawn) == slices_of(ingested)


def test_a_second_call_reads_the_store_and_another_seed_draws_anew(tmp_path: Path) -> None:
    first = draw_hospitals(SMALL[:1], 5, tmp_path)["hospital-01"]
    (folder,) = tmp_path.iterdir()
    stamp = (folder / "hu.npy").stat().st_mtime_ns
    again = draw_hospitals(SMALL[:1], 5, tmp_path)["hospital-01"]
    assert (folder / "hu.npy").stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(first.hu, again.hu)
    other = draw_hospitals(SMALL[:1], 6, tmp_path)["hospital-01"]
    assert len(list(tmp_path.iterdir())) == 2
    assert (other.hu != first.hu).any()


def test_role_and_maker_do_not_draw_a_hospital_twice(tmp_path: Path) -> None:
    draw_hospitals(SMALL[:1], 5, tmp_path)
    held_out = replace(SMALL[0], role="held-out", maker="Other", transfer_syntax="rle")
    cache = draw_hospitals([held_out], 5, tmp_path)["hospital-01"]
    assert len(list(tmp_path.iterdir())) == 1
    assert set(cache.split) == {"test"}


def test_patients_are_split_and_numbered(tmp_path: Path) -> None:
    hospital = replace(SMALL[0], patients=5, slices=1)
    cache = draw_hospitals([hospital], 5, tmp_path)["hospital-01"]
    assert set(cache.split) == {"train", "val", "test"}
    assert list(cache.patient) == [f"hospital-01-{n:03d}" for n in range(5)]


def test_a_counterfactual_differs_by_the_feature_alone(tmp_path: Path) -> None:
    hospital = replace(SMALL[0], cohort=replace(SMALL[0].cohort, feature="corner", rho=0.9))
    on, off = (
        draw_hospitals([hospital], 5, tmp_path, View(feature_on=state))["hospital-01"].hu.astype(int)
        for state in (True, False)
    )
    changed = np.argwhere(np.abs(on - off).max(axis=0) > 30)  # beyond the marker's blur and noise in brighter pixels
    assert len(changed)
    assert np.ptp(changed, axis=0).max() < 40
    assert (on[:, 80:140, 80:140] == off[:, 80:140, 80:140]).mean() > 0.99  # the brain, noise included


def test_without_noise_two_slices_of_a_seed_are_smooth(tmp_path: Path) -> None:
    noisy, clean = (
        draw_hospitals(SMALL[:1], 5, tmp_path, View(noiseless=flag))["hospital-01"].hu[:, 10:30, 10:30].astype(float)
        for flag in (False, True)
    )
    assert clean.std() == 0
    assert noisy.std() > 3
