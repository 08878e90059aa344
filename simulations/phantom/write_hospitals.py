"""Eleven hospitals on disk, as their PACS would export them.

In: the declarations of simulations/phantom/hospitals.py. Out, for each: valid DICOM CT series, DICOM SEG masks, a label table and site.yaml; a simulated hospital takes the same way through the reader as a
real export. The same seed gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import yaml

from shared.site import SiteError
from simulations.drawing import drawing_pool
from simulations.phantom.dicom_export import ct_image, segmentation, uid
from simulations.phantom.hospitals import HOSPITALS, Hospital
from simulations.phantom.patient import sample_case
from simulations.phantom.render import DRAWING, render_slice, with_feature

MARKER = "SYNTHETIC"  # a folder without this file is nobody's to delete
VERSION = 11  # of the files beside the slices; a folder of another version, or drawing, is written again


def write_hospitals(
    root: Path,
    seed: int,
    hospitals: tuple[Hospital, ...] = HOSPITALS,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Path]:
    """Write hospitals, unless they are there.

    Args:
      root: parent of one folder per hospital.
      seed: decides every byte.
      hospitals: which.
      workers: processes; by default one per core.
      progress: called with hospital, patients done and patients in all.
    Returns:
      The site.yaml of each hospital.
    Raises:
      SiteError: a folder of that name is there and was not written by this function.
    """
    with drawing_pool(workers) as pool:
        for hospital in hospitals:
            folder = root / hospital.name
            stamp = folder / "phantom.json"
            versions = {"version": VERSION, "drawing": DRAWING}
            content = json.dumps({**versions, "seed": seed, **asdict(hospital)}, sort_keys=True, indent=1)
            if stamp.is_file() and stamp.read_text() == content:
                progress(hospital.name, hospital.patients, hospital.patients)
                continue
            if folder.exists() and not (folder / MARKER).is_file():
                raise SiteError(f"{folder} was not written by the simulation; it is not replaced: name another folder")
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "dicom").mkdir(parents=True)
            (folder / MARKER).write_text("Written by the simulation, and replaced by it.\n")
            (folder / "masks").mkdir()
            jobs = [(folder, hospital, seed, number) for number in range(hospital.patients)]
            labels = []
            for done, rows in enumerate(pool.map(_write_patient, jobs, chunksize=2), start=1):
                labels += rows
                progress(hospital.name, done, hospital.patients)
            _write_tables(folder, hospital, seed, labels)
            stamp.write_text(content)  # last: a folder without it is written again
    return [root / hospital.name / "site.yaml" for hospital in hospitals]


def _write_patient(job: tuple[Path, Hospital, int, int]) -> list[tuple[str, str, str]]:
    """One patient's series and mask; returns label rows (series, image, label)."""
    folder, hospital, seed, number = job
    rng = np.random.default_rng([seed, hospital.number, number])
    patient, scanner = with_feature(sample_case(rng, hospital.cohort), hospital.scanner)
    hospital = replace(hospital, scanner=scanner)
    series_uid = uid(seed, hospital.name, number, "series")
    place = folder / "dicom" / f"{hashlib.sha256(series_uid.encode()).hexdigest()[:8]}"
    place.mkdir()
    rows, images, masks = [], [], []
    for index in range(hospital.slices):
        z_mm = hospital.height_mm(index)
        rendered = render_slice(patient, scanner, z_mm, rng, hospital.cohort)
        image = ct_image(hospital, seed, number, index, z_mm, rendered)
        image.save_as(place / f"IM{index:04d}", enforce_file_format=True)
        images.append(image)
        masks.append(rendered.hematoma_YX)
        rows.append((series_uid, str(image.SOPInstanceUID), "" if rendered.label is None else str(rendered.label)))
    seg = segmentation(images, np.stack(masks), hospital, seed, number)  # empty: somebody looked, and found nothing
    seg.save_as(folder / "masks" / f"{place.name}.dcm", enforce_file_format=True)
    return rows


def _write_tables(folder: Path, hospital: Hospital, seed: int, labels: list[tuple[str, str, str]]) -> None:
    """labels.csv, site.yaml and, so that hashes repeat with the seed, the site's key."""
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["series_uid", "sop_uid", "hypodensity"])
        writer.writerows(labels)
    site = {
        "site": hospital.name,
        "data": {"images": "dicom/", "masks": "masks/", "labels": "labels.csv"},
        "cache": "cache/",
        "role": hospital.role,
        "policy": {
            "release": ["encoder", "cls", "seg", "rec"],
            "metrics": True,
            "min_patients": 3,  # nobody stands behind them, and the demonstration has five patients for validation
            "evaluations_per_month": None,  # a researcher runs as many as there are questions
            "round_counts_per_month": None,
        },
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site, sort_keys=False))
    (folder / "state").mkdir(exist_ok=True)
    key = folder / "state" / "key"
    key.touch(mode=0o600)
    key.write_bytes(hashlib.sha256(f"hemafed/{seed}/{hospital.name}".encode()).digest())
