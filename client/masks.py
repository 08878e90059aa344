"""Which mask belongs to which images, whatever file it comes in.

A mask belongs to an image when its file refers to the image: DICOM SEG and RTSTRUCT by SOP instance UID, PNG by a file
name that is one, NIfTI by a file name that is the series' UID or by an affine that fits one series alone. An image that
the file lists and shows nothing on has an empty mask: somebody looked and found nothing.

Everything here stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import RTStructureSetStorage

from client.contours import contour_references, read_contours
from client.dicom import DicomError, DicomFile, Fault, class_name, pseudonym, text
from client.labelmaps import fits, nifti_grid, read_nifti, read_png
from client.seg import SEG_CLASSES, read_seg, seg_references
from client.series import CtSeries

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
NIFTI_SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True)
class MaskFile:
    """A mask file and what it speaks of.

    Attributes:
      path: the file.
      file: its keyed hash, for messages.
      kind: "seg", "rtstruct", "nifti" or "png".
      name: keyed hash of what the file name would mean as a UID: "series" of a NIfTI, "image" of a PNG; "" otherwise.
      instances: keyed hashes of the SOP instances that a SEG or RTSTRUCT refers to.
      grid: shape (3) and affine (12, first three rows, patient's axes) of a NIfTI; () otherwise.
    """

    path: Path
    file: str
    kind: str
    name: str = ""
    instances: tuple[str, ...] = ()
    grid: tuple[float, ...] = ()


def is_picture(path: Path, head: bytes) -> bool:
    """Whether a file can be a mask without being DICOM."""
    return head.startswith(PNG_MAGIC) or path.name.endswith(NIFTI_SUFFIXES)


def picture_mask(path: Path, head: bytes, key: bytes, code: str) -> MaskFile:
    """A PNG or NIfTI file as a mask.

    Raises:
      DicomError: a NIfTI whose header cannot be read.
    """
    if head.startswith(PNG_MAGIC):
        return MaskFile(path, code, "png", pseudonym(key, "image", path.name.removesuffix(".png")))
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    return MaskFile(path, code, "nifti", pseudonym(key, "series", stem), grid=nifti_grid(path))


def is_mask(file: DicomFile) -> bool:
    """Whether a DICOM file is of a kind that holds masks."""
    return text(file.ds, "SOPClassUID") in (*SEG_CLASSES, RTStructureSetStorage)


def dicom_mask(file: DicomFile, path: Path, key: bytes, code: str) -> MaskFile:
    """A SEG or RTSTRUCT as a mask.

    Raises:
      DicomError: another kind of object, or it refers to no image.
    """
    sop_class = text(file.ds, "SOPClassUID")
    if not is_mask(file):
        raise DicomError(f"{class_name(sop_class)}, expected Segmentation or RT Structure Set Storage, NIfTI or PNG")
    kind = "rtstruct" if sop_class == RTStructureSetStorage else "seg"
    try:
        uids = contour_references(file.ds) if kind == "rtstruct" else seg_references(file.ds)
    except DicomError:
        raise
    except Exception as error:  # a damaged sequence fails in many ways
        raise DicomError(f"its references cannot be decoded ({type(error).__name__})") from error
    return MaskFile(path, code, kind, instances=tuple(sorted({pseudonym(key, "image", uid) for uid in uids})))


def match_masks(files: Iterable[MaskFile], series: Sequence[CtSeries]) -> tuple[dict[str, list[MaskFile]], list[Fault]]:
    """Which masks belong to which series.

    Returns:
      Series name -> its mask files: one file, or any number of PNG; and what belongs to none or is one too many.
    """
    owner = {s.instance: one.name for one in series for s in one.slices}
    matched: dict[str, list[MaskFile]] = defaultdict(list)
    faults = []
    for mask in sorted(files, key=lambda m: m.file):
        names, reason = _series_of(mask, series, owner)
        if len(names) != 1:
            faults.append(Fault(f"file {mask.file}", reason))
        elif matched[names[0]] and {mask.kind} | {m.kind for m in matched[names[0]]} != {"png"}:
            faults.append(
                Fault(f"file {mask.file}", "a second mask of the same series, expected one; remove one of them")
            )
        else:
            matched[names[0]].append(mask)
    return {name: found for name, found in matched.items() if found}, faults


def _series_of(mask: MaskFile, series: Sequence[CtSeries], owner: dict[str, str]) -> tuple[list[str], str]:
    """Names of the series that a mask can belong to, and what to say if they are not one."""
    if mask.kind == "png":
        names = [owner[mask.name]] if mask.name in owner else []
        return names, "named after no image in data.images; expected SOPInstanceUID.png"
    if mask.kind == "nifti":
        names = [one.name for one in series if one.name == mask.name]
        names = names or [one.name for one in series if fits(mask.grid, one)]
        return names, f"its grid is that of {len(names)} series, expected 1; name it SeriesInstanceUID.nii.gz"
    names = sorted({owner[name] for name in mask.instances if name in owner})
    if names:
        return names, f"refers to images of {len(names)} series, expected 1"
    return [], f"refers to {len(mask.instances)} images, none of which is in data.images or could be used"


def read_mask(
    mask: MaskFile, series: CtSeries, key: bytes, segments: Sequence[str | int]
) -> tuple[dict[str, NDArray[np.uint8]], list[Fault]]:
    """The hematoma on a series' images.

    Args:
      mask: a file that match_masks gave to this series.
      series: the images; the masks come in their pixel grid.
      key: the hospital's secret, to recognise images.
      segments: what is the hematoma: labels, codes as "SCT:35566002" or numbers; () where a file holds one thing only.
    Returns:
      Image name -> uint8 (Y, X) of 0 and 1, for every image of the series that the file speaks of; and what of the file
      could not be used.
    Raises:
      DicomError: the file is damaged, its segment is not told, or its grid or frame of reference is another.
    """
    try:
        if mask.kind == "png":
            return read_png(mask.path, mask.name, series, segments), []
        if mask.kind == "nifti":
            return read_nifti(mask.path, series, segments), []
        masks = (read_seg if mask.kind == "seg" else read_contours)(mask.path, series, key, segments)
    except DicomError:
        raise
    except Exception as error:  # readers raise many types for a damaged file
        raise DicomError(f"mask cannot be decoded ({type(error).__name__})") from error
    absent = len(set(mask.instances) - {s.instance for s in series.slices})
    reason = f"refers to {absent} images that are not there or were left out; the mask of the others is used"
    return masks, [Fault(f"file {mask.file}", reason)] if absent else []
