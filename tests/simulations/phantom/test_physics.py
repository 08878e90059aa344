"""The phantom against numbers measured on real scans, and the measuring against cases known by hand."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import ndimage

import simulations.phantom.physics as physics
from simulations.heads.scanner import MATRIX, Scanner
from simulations.phantom.patient import Cohort, sample_case
from simulations.phantom.physics import (
    QUANTITIES,
    autocorrelation,
    edge_width_px,
    half_power,
    mean_frequency,
    measure,
    peak_frequency,
    physics_table,
    spectrum,
)

PATIENTS = {0.0: 8, -1.0: 3, 1.0: 3}


@pytest.fixture(scope="module")
def measured() -> dict[float, dict[str, list[float]]]:
    return {sharpness: measure(Scanner(sharpness=sharpness), Cohort(), n, 0) for sharpness, n in PATIENTS.items()}


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.name)
def test_every_quantity_lies_in_the_real_range(measured: dict, quantity: physics.Quantity) -> None:
    for sharpness in PATIENTS if quantity.kernel else [0.0]:
        values = measured[sharpness][quantity.name]
        assert len(values) >= 3
        assert quantity.low <= np.mean(values) <= quantity.high, sharpness


def test_kernels_differ(measured: dict) -> None:
    for name in ("noise SD", "noise power, mean"):
        assert np.mean(measured[-1.0][name]) < np.mean(measured[0.0][name]) < np.mean(measured[1.0][name])
    edges = [np.mean(measured[k]["skin edge, 10 to 90 %"][:3]) for k in (-1.0, 0.0, 1.0)]  # of the same heads
    assert edges[0] > edges[1] > edges[2]


def white_patches(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((24, 24)) for _ in range(200)]


def test_white_noise_has_no_autocorrelation_and_an_even_spectrum() -> None:
    assert autocorrelation(white_patches()) == pytest.approx([0, 0, 0], abs=0.02)
    frequency, power = spectrum(white_patches(), 0.5)
    assert frequency[-1] == pytest.approx(1.0, abs=0.02)
    rest = power[frequency > 0.1]  # near 0 a patch's mean is taken off
    assert rest.std() / rest.mean() < 0.1
    assert half_power(frequency, power) == pytest.approx(0.5, abs=0.05)
    assert mean_frequency(frequency, power) == pytest.approx(2 / 3, abs=0.02)  # over a disc


def test_a_mean_of_two_neighbours_correlates_by_a_half() -> None:
    patches = [(p[:, 1:] + p[:, :-1]) / 2 for p in white_patches()]
    assert autocorrelation(patches) == pytest.approx([0.5, 0, 0], abs=0.03)


def test_a_wave_peaks_at_its_frequency() -> None:
    columns = np.arange(24) * 0.45
    wave = np.sin(2 * np.pi * 0.3 * columns)[None, :] * np.ones((24, 1))
    frequency, power = spectrum([wave], 0.45)
    assert peak_frequency(frequency, power) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("sigma_px", [1.5, 3.0])
def test_the_edge_of_a_blurred_disc_is_as_wide_as_its_gaussian(sigma_px: float) -> None:
    step_mm = 0.45
    centres = (np.arange(MATRIX) + 0.5 - MATRIX / 2) * step_mm
    disc = np.where(np.hypot(centres[None, :], centres[:, None]) < 80, 40.0, -1000.0)
    patient = sample_case(np.random.default_rng(0), Cohort()).patient
    patient = replace(patient, head=replace(patient.head, shift_mm=(0.0, 0.0)))
    width = edge_width_px(ndimage.gaussian_filter(disc, sigma_px), patient, step_mm)
    assert width == pytest.approx(2 * 1.2816 * sigma_px, rel=0.1)  # 10 to 90 % of a normal distribution


def test_the_table_marks_what_lies_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(physics, "QUANTITIES", (replace(QUANTITIES[0], low=0, high=1), *QUANTITIES[1:]))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(physics_table(patients=1))
    lines = console.export_text().splitlines()
    (air,) = [line for line in lines if "air  " in line]
    assert "outside" in air
    assert sum("1/mm" in line for line in lines) == 3
