"""The slice cache: what a hospital's ingest writes and everything else reads.

A cache folder holds `slices.npy` (N, 224, 224) int16 HU and `masks.npy` (N, 224, 224) uint8, both memory-
mapped, `index.csv` (one row per slice) and `cache.json` (format, settings, source manifest, counts). A slice
is 224 mm wide at 1 mm per pixel, centred on the head, so a lesion has the same size in pixels everywhere.
Windowing happens when a batch is made (shared/model/batches.py): a new window needs no new ingest.

Nothing here identifies a patient: patients and series are keyed hashes made by client/ingest/ingest.py.

Shape suffixes: N slice, Y row, X column.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import HemafedError

FORMAT_VERSION = 1
SIDE_PX = 224
PIXEL_MM = 1.0
COLUMNS = ("patient", "series", "z_mm", "spacing_mm", "label", "has_mask", "split", "flags")
SPLITS = ("train", "val", "test")


class CacheError(HemafedError, ValueError):
    """A slice cache is missing, damaged or of another format; names the folder and the next step."""


@dataclass(frozen=True)
class SliceCache:
    """A hospital's slices.

    Attributes:
      hu: int16 (N, 224, 224), Hounsfield units, memory-mapped.
      masks: uint8 (N, 224, 224), 1 in the hematoma, memory-mapped.
      patient: str (N,), keyed hash.
      label: float32 (N,), 1 with hypodensity, 0 without, NaN unknown.
      has_mask: bool (N,), whether somebody looked for the hematoma in this slice.
      split: str (N,), train, val or test; one per patient.
    """

    hu: NDArray[np.int16]
    masks: NDArray[np.uint8]
    patient: NDArray[np.str_]
    label: NDArray[np.float32]
    has_mask: NDArray[np.bool_]
    split: NDArray[np.str_]

    def rows(self, *splits: str) -> NDArray[np.int64]:
        """Row numbers of the slices of these splits, in order of the index; all slices without an argument."""
        return np.nonzero(np.isin(self.split, splits or SPLITS))[0]

    def counts(self) -> dict[str, int]:
        """Patients, slices and positive slices."""
        return {
            "patients": len(np.unique(self.patient)),
            "slices": len(self.label),
            "positives": int(np.nansum(self.label)),
        }


def read_cache(folder: Path) -> SliceCache:
    """Open a slice cache.

    Args:
      folder: as written by ingest.
    Raises:
      CacheError: a file is missing, of another format version, or the parts do not belong together.
    """
    again = "run 'hemafed-client ingest SITE_YAML' to write it"
    if not (folder / "cache.json").is_file():
        raise CacheError(f"no slice cache in {folder}; {again}")
    try:
        head = json.loads((folder / "cache.json").read_text())
        if head["format"] != FORMAT_VERSION:
            raise CacheError(f"slice cache {folder} has format {head['format']!r}, expected {FORMAT_VERSION}; {again}")
        hu = np.load(folder / "slices.npy", mmap_mode="r")
        masks = np.load(folder / "masks.npy", mmap_mode="r")
        with open(folder / "index.csv", newline="") as file:
            index = list(csv.DictReader(file))
    except CacheError:
        raise
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CacheError(f"slice cache {folder} is damaged ({type(error).__name__}); {again}") from error
    expected = (len(index), SIDE_PX, SIDE_PX)
    if hu.shape != expected or masks.shape != expected or head["slices"] != len(index):
        raise CacheError(
            f"slice cache {folder}: slices {hu.shape}, masks {masks.shape}, index {len(index)} rows, "
            f"cache.json {head['slices']}; expected {expected} for all; {again}"
        )
    splits = {row["split"] for row in index}
    if not splits <= set(SPLITS):
        raise CacheError(f"slice cache {folder}: splits {sorted(splits)}, expected {', '.join(SPLITS)}; {again}")
    return SliceCache(
        hu=hu,
        masks=masks,
        patient=np.array([row["patient"] for row in index], dtype=np.str_),
        label=np.array([float(row["label"] or "nan") for row in index], dtype=np.float32),
        has_mask=np.array([row["has_mask"] == "1" for row in index], dtype=np.bool_),
        split=np.array([row["split"] for row in index], dtype=np.str_),
    )
