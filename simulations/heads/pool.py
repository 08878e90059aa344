"""Slices of random heads on the cache's grid: what a starting encoder is trained on.

In: a seed. Out: shards of slices in HU with the mask and kind of every bleeding, as an ingest of the same series would hold
them. A shard is drawn whole or not at all, and the same seed and number give the same bytes.

Shape suffixes: N slice, Y row, X column.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.dicom.pixels import AIR_HU, clamp_hu
from client.ingest.resample import head_centre, resample
from simulations.drawing import drawing_pool
from simulations.heads.bleeding import INTRACEREBRAL, Bleeding
from simulations.heads.scan import Patient, Scanned, marker_label, sample_patient, sample_scan, scan_slice
from simulations.heads.template import load_template
from simulations.phantom.draw_caches import ct_slice

DRAWING = 4  # raised with every change of a drawn slice
PATIENTS, SLICES = 32, 8  # of a shard, and of a patient
_LOWEST_MM, _HIGHEST_MM = -56.0, 68.0  # of slices, from the centre of the head
_NECK_MM, _NECK_SHARE = -190.0, 0.2  # lowest slice where the neck is scanned too, and how often it is

Shard = dict[str, NDArray]


def draw_pool(
    folder: Path,
    seed: int,
    shards: int,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Draw the shards that are not in the folder yet.

    Args:
      folder: of the pool; safe to delete.
      seed: decides every bit.
      shards: how many there are to be; each has PATIENTS x SLICES slices.
      workers: processes.
      progress: called with shards done and shards in all.
    Returns:
      The shards' files; each holds hu int16 (N, 224, 224), mask uint8 (N, 224, 224), kinds uint8 (N, 9), marker int8
      (N,) of 1, 0 and -1 for unknown, patient int32 (N,).
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{DRAWING}-{seed}-{number:05d}.npz" for number in range(shards)]
    missing = [(file, number) for number, file in enumerate(files) if not file.is_file()]
    with drawing_pool(workers) as pool:
        jobs = pool.map(partial(_write_shard, seed), *zip(*missing, strict=True)) if missing else ()
        for done, _ in enumerate(jobs, start=1):
            progress(shards - len(missing) + done, shards)
    return files


def _write_shard(seed: int, file: Path, number: int) -> None:
    """Draw a shard beside its place, then move it there."""
    patients = [draw_patient(np.random.default_rng([seed, number, n])) for n in range(PATIENTS)]
    shard = {name: np.concatenate([one[name] for one in patients]) for name in patients[0]}
    shard["patient"] = np.repeat(np.arange(PATIENTS, dtype=np.int32) + PATIENTS * number, SLICES)
    partial_file = file.with_suffix(f".{os.getpid()}.partial")
    with open(partial_file, "wb") as out:
        np.savez_compressed(out, **shard)
    os.replace(partial_file, file)


def draw_patient(rng: np.random.Generator) -> Shard:
    """One patient's slices: hu, mask and kind (SLICES, 224, 224)."""
    patient, scanner = sample_scan(rng, sample_patient(rng))
    template = load_template()
    heights = sorted(_heights(rng, patient))
    scanned = [scan_slice(patient, template, scanner, z, rng) for z in heights]
    images = [ct_slice(scanner, z) for z in heights]
    stored = [np.float32(clamp_hu(one.hu_YX)) for one in scanned]
    centre_mm = head_centre(list(zip(images, stored, strict=True)))
    hu = [np.rint(resample(hu_YX, i, centre_mm, fill=AIR_HU)) for hu_YX, i in zip(stored, images, strict=True)]
    blood = [resample(one.blood_YX, i, centre_mm, fill=0) > 0.5 for one, i in zip(scanned, images, strict=True)]
    return {
        "hu": np.array(hu, np.int16),
        "mask": np.array(blood, np.uint8),
        "kinds": np.array([_kinds(one) for one in scanned], np.uint8),
        "marker": np.array([_marker(one) for one in scanned], np.int8),
    }


def _marker(one: Scanned) -> int:
    """1 with the marker, 0 without, -1 unknown."""
    label = marker_label(bool(one.blood_YX.any()), one.hypodensity_mm2)
    return -1 if label is None else label


def _kinds(one: Scanned) -> list[bool]:
    """Which kinds of bleeding a slice shows, at least 20 pixels of each."""
    counts = np.bincount(one.kind_YX.ravel(), minlength=10)[1:10]
    return list(counts >= 20)


def _heights(rng: np.random.Generator, patient: Patient) -> Iterator[float]:
    """Heights of slices; about half of them where a bleeding is."""
    lowest = _NECK_MM if rng.random() < _NECK_SHARE else _LOWEST_MM
    for number in range(SLICES):
        if patient.bleedings and number % 2:
            one = patient.bleedings[int(rng.integers(len(patient.bleedings)))]
            yield float(np.clip(rng.normal(_middle(one), 12), _LOWEST_MM, _HIGHEST_MM))
        else:
            yield float(rng.uniform(lowest, _HIGHEST_MM))


def _middle(one: Bleeding) -> float:
    """Height of a bleeding's middle in the scanner, about."""
    if one.kind in (*INTRACEREBRAL, "subarachnoid", "contusion"):
        return one.centre[2] - 8
    if one.kind == "intraventricular":
        return 0.0
    return 60 * one.centre[2] / float(np.linalg.norm(one.centre))
