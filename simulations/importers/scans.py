"""The hospital of a set that publishes NIfTI volumes with masks: every scan converted, checked and written.

In: scans as files, and a way to label their slices. Out: one hospital folder. A scan that cannot be read is left out; a
mask that does not lie on its image is left out while the image stays. A set without a single mask is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulations.importers.hospital import check_free, link, strays, write_bytes, write_labels, write_site
from simulations.importers.source import DataSet, LeftOut, SourceError
from simulations.importers.volume import Mask, Series, Volume, ct_images, mask_bytes, read_mask, read_volume, series_of

SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Scan:
    """One scan of a set.

    Attributes:
      name: in the set; UIDs come from it.
      patient: becomes the PatientID.
      image: NIfTI in HU.
      mask: NIfTI label map, None if there is none.
    """

    name: str
    patient: str
    image: Path
    mask: Path | None


# (scan, labels (I, J, K) of its mask or None, number of slices) -> the set's own columns, per slice
LabelSlices = Callable[[Scan, NDArray[np.uint8] | None, int], list[dict[str, str]]]


@dataclass(frozen=True)
class Reading:
    """Conventions of a set's masks and labels.

    Attributes:
      segments: numbers that are the hematoma, for site.yaml.
      binary: every number but 0 means hematoma, and becomes 1.
      columns: the set's own columns of labels.csv.
      label: what they hold for each slice.
    """

    segments: tuple[int, ...]
    binary: bool
    columns: Sequence[str]
    label: LabelSlices


def list_volumes(folder: Path, left_out: LeftOut) -> dict[str, Path]:
    """Scan name -> NIfTI file of a folder; hidden files are passed over, others counted as left out."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz").removesuffix(".nii")
        if path.name.startswith("."):
            continue
        if not path.name.endswith(SUFFIXES) or not path.is_file():
            left_out.add(f"{folder.name}/{path.name}", "no NIfTI file (.nii or .nii.gz)")
        elif name in found:
            left_out.add(f"{folder.name}/{path.name}", "a second file of one scan; the first by name is used")
        else:
            found[name] = path
    return found


def import_scans(
    data_set: DataSet,
    folder: Path,
    scans: Sequence[Scan],
    reading: Reading,
    left_out: LeftOut,
    progress: Callable[[int, int], None],
    notes: Sequence[str] = (),
) -> Path:
    """Write the hospital of a set of volumes.

    Args:
      data_set: where they come from.
      folder: of the hospital; its name is the site's.
      scans: all of them.
      reading: how masks and labels are read.
      left_out: what was not taken so far; more is added.
      progress: called with scans done and scans in all.
      notes: for site.yaml.
    Returns:
      The site.yaml.
    Raises:
      SourceError: somebody else's hospital is there, or no scan can be used with its mask.
    """
    check_free(folder, data_set)
    rows: list[dict[str, str]] = []
    written: list[Path] = []
    patients: set[str] = set()
    taken = masks = 0
    for number, scan in enumerate(scans, start=1):
        try:
            volume = read_volume(scan.image)
        except SourceError as error:
            left_out.add(scan.name, f"image: {error}")
        else:
            mask = _mask(scan, volume, reading, left_out)
            series = series_of(data_set.name, scan.name, volume.hu_IJK.shape[2])
            written += _write(data_set, folder, scan, series, volume, mask)
            labels = reading.label(scan, None if mask is None else mask.labels_IJK, len(series.images))
            rows += [
                {"series_uid": series.uid, "sop_uid": image} | own
                for image, own in zip(series.images, labels, strict=True)
            ]
            patients.add(scan.patient)
            taken, masks = taken + 1, masks + (mask is not None)
        progress(number, len(scans))
    if not masks:
        raise SourceError(
            f"{data_set.name}: none of {len(scans)} scans can be used with its mask; expected the set as published, see "
            f"{data_set.page}{left_out.text()}"
        )
    for kind in ("dicom", "masks"):
        strays(folder / kind, written, left_out)
    write_labels(folder, reading.columns, rows)
    counts = {"patients": len(patients), "scans": taken, "slices": len(rows), "masks": masks}
    segments = list(reading.segments) if len(reading.segments) > 1 else reading.segments[0]
    data = {"images": "dicom/", "masks": "masks/", "segment": segments}
    return write_site(folder, data_set, data, counts, left_out, notes)


def _mask(scan: Scan, volume: Volume, reading: Reading, left_out: LeftOut) -> Mask | None:
    """A scan's mask, None if it has none that can be used."""
    if scan.mask is None:
        left_out.add(scan.name, "mask: there is none")
        return None
    try:
        mask = read_mask(scan.mask, volume, reading.binary)
        strange = sorted(set(np.unique(mask.labels_IJK).tolist()) - {0, *reading.segments})
        if strange:
            raise SourceError(f"mask with the labels {strange}, expected 0 and {list(reading.segments)}")
    except SourceError as error:
        left_out.add(scan.name, f"mask: {error}")
        return None
    return mask


def _write(
    data_set: DataSet, folder: Path, scan: Scan, series: Series, volume: Volume, mask: Mask | None
) -> list[Path]:
    """A scan's DICOM files and its mask; returns where they are."""
    paths = []
    for k, content in enumerate(ct_images(volume, data_set.name, scan.name, scan.patient)):
        paths.append(folder / "dicom" / scan.name / f"{k + 1:04d}.dcm")
        write_bytes(paths[-1], content)
    if mask is not None:
        if mask.as_stored and scan.mask is not None:
            suffix = next(one for one in reversed(SUFFIXES) if scan.mask.name.endswith(one))
            paths.append(folder / "masks" / f"{series.uid}{suffix}")
            link(scan.mask, paths[-1])
        else:
            paths.append(folder / "masks" / f"{series.uid}.nii.gz")
            write_bytes(paths[-1], mask_bytes(mask, volume))
    return paths
