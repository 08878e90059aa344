"""BHSD, Brain Hemorrhage Segmentation Dataset: 192 head CT scans with five kinds of hemorrhage outlined, one hospital.

Layout (label_192.zip): images/ID_0237f3c9_ID_40015688b9.nii.gz in HU, and a mask of the same name in `ground truths/`,
with 1 epidural, 2 intraparenchymal, 3 intraventricular, 4 subarachnoid, 5 subdural hemorrhage. What labels.csv tells of
a slice is what its mask shows. The scans of unlabel_1980.zip have no masks and are not taken.

The scans are rebuilt from RSNA's: the first part of a name is RSNA's PatientID, the second its StudyInstanceUID. So the
set is no other hospital than rsna-ich: never train on one and test on the other. Nor is the hospital of a scan
published. Slices of a tilted gantry were stacked along their normal, which moves slices against each other and changes
none. Masks whose affine is not their image's are left out, because which of the two is right cannot be told from the
files.

Source: Wu et al. 2023, MLMI 2023, doi:10.1007/978-3-031-45673-2_15 (arXiv:2308.11298);
huggingface.co/datasets/WuBiao/BHSD and huggingface.co/datasets/Wendy-Fly/BHSD (dataset.json: the labels);
github.com/White65534/BHSD.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulations.importers.hospital import CLASSES
from simulations.importers.scans import Reading, Scan, import_scans, list_volumes
from simulations.importers.source import DataSet, LeftOut, find_root

SET = DataSet(
    name="bhsd",
    title="BHSD, Brain Hemorrhage Segmentation Dataset (Wu et al. 2023, doi:10.1007/978-3-031-45673-2_15)",
    page="https://huggingface.co/datasets/WuBiao/BHSD",
    terms="published under the MIT licence; its scans are RSNA's, whose terms are non-commercial",
)
LABELS = {1: "epidural", 2: "intraparenchymal", 3: "intraventricular", 4: "subarachnoid", 5: "subdural"}
_IMAGES, _MASKS = "images", "ground truths"
_NAME = re.compile(r"(ID_[0-9a-f]+)_ID_[0-9a-f]+")


def import_bhsd(source: Path, target: Path, progress: Callable[[int, int], None]) -> list[Path]:
    """One hospital, `bhsd`, with the volumes as DICOM.

    Args:
      source: the unpacked label_192.zip, or the folder it was unpacked in.
      target: where the hospital's folder is written.
      progress: called with scans done and scans in all.
    Returns:
      Its site.yaml.
    Raises:
      SourceError: a folder is missing, no scan can be used with its mask, or somebody else's hospital is there.
    """
    root = find_root(SET, source, target, (_IMAGES, _MASKS))
    left_out = LeftOut()
    images, masks = list_volumes(root / _IMAGES, left_out), list_volumes(root / _MASKS, left_out)
    for name in sorted(masks.keys() - images.keys()):
        left_out.add(f"{_MASKS}/{masks[name].name}", f"a mask for which {_IMAGES}/ has no image")
    scans = []
    for name, path in images.items():
        found = _NAME.fullmatch(name)
        if found:
            scans.append(Scan(name, found[1], path, masks.get(name)))
        else:
            left_out.add(
                f"{_IMAGES}/{path.name}", "not named PATIENT_STUDY.nii.gz, as ID_0237f3c9_ID_40015688b9.nii.gz"
            )
    reading = Reading(segments=tuple(LABELS), binary=False, columns=CLASSES, label=_label)
    notes = ["The scans are RSNA's: never train on one of the two sets and test on the other."]
    return [import_scans(SET, target.absolute() / "bhsd", scans, reading, left_out, progress, notes)]


def _label(scan: Scan, mask_IJK: NDArray[np.uint8] | None, slices: int) -> list[dict[str, str]]:
    """Return the bleeding that a scan's mask shows on each slice; nothing is known without a mask."""
    if mask_IJK is None:
        return [{} for _ in range(slices)]
    rows = []
    for k in range(slices):
        present = set(np.unique(mask_IJK[:, :, k]).tolist()) - {0}
        shown = {name: str(int(value in present)) for value, name in LABELS.items()}
        rows.append({"any": str(int(bool(present)))} | shown)
    return rows
