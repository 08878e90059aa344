"""Hospitals whose few patients and slices all have something to learn from."""

from __future__ import annotations

from dataclasses import replace

from simulations.phantom.hospitals import Hospital


def bleeding(hospital: Hospital, patients: int, slices: int) -> Hospital:
    """A hospital of few patients, nearly each with a large hematoma in the few slices around the middle, more than half with the marker."""
    cohort = replace(
        hospital.cohort,
        healthy=0.0,
        others=0.0,
        lobar=0.0,
        infratentorial=0.0,
        prevalence=0.6,
        disagreement=0.0,
        lesion_radius_mm=18.0,
    )
    return replace(hospital, patients=patients, slices=slices, cohort=cohort)
