"""A hospital's slice cache without its DICOM: what an ingest of its files would hold, drawn directly.

Studies need many variants of hospitals, and neither writing nor reading files changes a slice: a test draws a hospital
both ways and compares bit by bit. Caches are kept on disk under a name made from all that decides them.

Shape suffixes: N slice, Y row, X column.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.dicom.headers import CtSlice
from client.dicom.pixels import AIR_HU, clamp_hu
from client.ingest.labels import assign_splits
from client.ingest.resample import head_centre, resample
from shared.slices import SliceCache
from simulations.drawing import drawing_pool
from simulations.heads.scanner import MATRIX, Scanner
from simulations.phantom.dicom_export import slice_place
from simulations.phantom.hospitals import Hospital
from simulations.phantom.patient import sample_case
from simulations.phantom.render import DRAWING, Slice, render_slice, with_feature


@dataclass(frozen=True)
class View:
    """Ways to draw a hospital's patients again with a change.

    Attributes:
      noiseless: without the scanner's noise, for a reader who sees more than a network.
      feature_on: the planted feature forced on or off, for a counterfactual; None leaves it as drawn.
      tested: only the patients of the test split.
    """

    noiseless: bool = False
    feature_on: bool | None = None
    tested: bool = False


AS_DRAWN = View()


def draw_hospitals(
    hospitals: Sequence[Hospital],
    seed: int,
    store: Path,
    view: View = AS_DRAWN,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, SliceCache]:
    """Slice caches of hospitals, drawn unless they are in the store.

    Args:
      hospitals: which; the same number and seed give the same heads whatever scans them.
      seed: decides every bit.
      store: folder of drawn caches, safe to delete.
      view: how they are drawn.
      workers: processes; by default one per core.
      progress: called with hospital, patients done and patients in all.
    Returns:
      Name -> cache, memory-mapped.
    """
    draw_missing([(hospital, seed, view) for hospital in hospitals], store, workers, progress)
    return {hospital.name: _read(_folder(store, hospital, seed, view), hospital, view) for hospital in hospitals}


def draw_missing(
    wanted: Iterable[tuple[Hospital, int, View]],
    store: Path,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> None:
    """Draw what is not in the store, each once; arguments as for draw_hospitals."""
    missing = {_folder(store, *one): one for one in wanted}
    missing = {folder: one for folder, one in missing.items() if not folder.is_dir()}
    if not missing:
        return
    with drawing_pool(workers) as pool:
        for folder, (hospital, seed, view) in missing.items():
            parts, numbers = [], list(_splits(hospital, view))
            for part in pool.map(_draw_patient, repeat(hospital), repeat(seed), numbers, repeat(view)):
                parts.append(part)
                progress(f"{hospital.name}, seed {seed}", len(parts), len(numbers))
            _write(folder, parts)


def _splits(hospital: Hospital, view: View) -> dict[int, str]:
    """Number and split of each patient that is drawn; a training hospital's are split as an ingest would, by number."""
    names = [_patient_name(hospital, number) for number in range(hospital.patients)]
    splits = assign_splits(names, {}) if hospital.role == "train" else dict.fromkeys(names, "test")
    return {n: splits[name] for n, name in enumerate(names) if not view.tested or splits[name] == "test"}


def _patient_name(hospital: Hospital, number: int) -> str:
    return f"{hospital.name}-{number:03d}"


def _folder(store: Path, hospital: Hospital, seed: int, view: View) -> Path:
    """Named by all that decides the slices."""
    decisive = {"version": DRAWING, "seed": seed, **asdict(view), **asdict(hospital)}
    for key in ("maker", "transfer_syntax", "role"):
        del decisive[key]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return store / f"{hospital.name}-{digest}"


def _draw_patient(
    hospital: Hospital, seed: int, number: int, view: View
) -> tuple[NDArray[np.int16], NDArray[np.uint8], list[int | None]]:
    """One patient's series on the cache's grid: HU, masks and labels; as simulations/phantom/write_hospitals.py and an ingest make it."""
    rng = np.random.default_rng([seed, hospital.number, number])
    case = sample_case(rng, hospital.cohort)
    if view.feature_on is not None:
        case = replace(case, feature_on=view.feature_on)
    patient, scanner = with_feature(case, hospital.scanner)
    if view.noiseless:
        scanner = replace(scanner, dose=float("inf"))
    images, rendered = [], []
    for index in range(hospital.slices):
        z_mm = hospital.height_mm(index)
        rendered.append(render_slice(patient, scanner, z_mm, rng, hospital.cohort))
        images.append(ct_slice(scanner, z_mm))
    # An unsigned scale ends at -1024 HU, and declared padding is nothing below it: clamp_hu is all an ingest adds.
    stored = [np.float32(clamp_hu(one.hu_YX)) for one in rendered]
    centre_mm = head_centre(list(zip(images, stored, strict=True)))
    hu = [np.rint(resample(hu_YX, i, centre_mm, fill=AIR_HU)) for hu_YX, i in zip(stored, images, strict=True)]
    masks = [_resampled_mask(one, i, centre_mm) for one, i in zip(rendered, images, strict=True)]
    order = np.argsort([image.height_mm for image in images])
    return (
        np.array(hu, np.int16)[order],
        np.array(masks, np.uint8)[order],
        [rendered[i].label for i in order],
    )


def _resampled_mask(one: Slice, image: CtSlice, centre_mm: tuple[float, float]) -> NDArray[np.bool_]:
    """A hematoma on the cache's grid."""
    return resample(one.hematoma_YX, image, centre_mm, fill=0) > 0.5


def ct_slice(scanner: Scanner, z_mm: float) -> CtSlice:
    """Geometry of a slice, rounded as a file holds it."""
    place = slice_place(scanner, z_mm)
    spacing_mm = float(place.spacing_mm)
    return CtSlice(
        **dict.fromkeys(
            ("file", "image", "series", "study", "patient", "space", "syntax", "kernel", "scanner", "body"), ""
        ),
        **dict.fromkeys(("signed", "contrast", "derived", "bone", "lossy"), False),
        path=Path(),
        frame=0,
        shape=(MATRIX, MATRIX),
        spacing_mm=(spacing_mm, spacing_mm),
        position_mm=tuple(map(float, place.position_mm)),
        row_direction=(1.0, 0.0, 0.0),
        column_direction=tuple(map(float, place.column_direction)),
        thickness_mm=scanner.thickness_mm,
        tilt_degree=scanner.tilt_degree,
        pixel_offset=-1,
        frames=1,
        bits_allocated=16,
        bits_stored=16,
        slope=1.0,
        intercept=0.0,
        padding=None,
    )


def _write(folder: Path, parts: list) -> None:
    """Beside its place first, so that an interrupted drawing leaves nothing that looks whole."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / "hu.npy", np.concatenate([hu for hu, _, _ in parts]))
    np.save(partial / "masks.npy", np.concatenate([masks for _, masks, _ in parts]))
    labels = [[np.nan if label is None else label for label in part[2]] for part in parts]
    np.save(partial / "labels.npy", np.concatenate(labels).astype(np.float32))
    try:
        os.replace(partial, folder)
    except OSError:  # another process drew the same meanwhile
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def _read(folder: Path, hospital: Hospital, view: View) -> SliceCache:
    """A drawn hospital."""
    splits = _splits(hospital, view)
    label = np.load(folder / "labels.npy")
    slices = len(label) // len(splits)
    return SliceCache(
        hu=np.load(folder / "hu.npy", mmap_mode="r"),
        masks=np.load(folder / "masks.npy", mmap_mode="r"),
        patient=np.repeat([_patient_name(hospital, number) for number in splits], slices),
        label=label,
        has_mask=np.ones(len(label), np.bool_),
        split=np.repeat(list(splits.values()), slices),
    )
