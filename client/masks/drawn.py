"""Masks as drawn in a file: the hematoma per image, and an account that covers every piece.

A piece is what a file is made of: a frame of a SEG, a contour of an RTSTRUCT, a layer of a NIfTI, a picture. Every piece is
taken or left out with a reason; Tally asserts it. Stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from client.dicom.elements import word
from client.dicom.faults import DicomError

PIECES = {"seg": "frames", "rtstruct": "contours", "nifti": "layers", "png": "pictures"}  # by kind of file
ABSENT = "on images that are not in data.images or were left out"
NOWHERE = "at a place where its series has no image"
OTHER_SEGMENT = "of another segment than data.segment"
EMPTY_LAYER = "empty, at a place where its series has no image"
EXPECTED = (OTHER_SEGMENT, EMPTY_LAYER)  # left out, and nobody misses it


class OtherSegment(DicomError):
    """A mask file holds none of the segments that site.yaml names."""


@dataclass(frozen=True)
class Tally:
    """The account of one mask file.

    Attributes:
      file: its keyed hash.
      kind: of its pieces, a value of PIECES.
      total: pieces in the file.
      taken: pieces that are in the series' masks.
      left: reason and number of those that are not.
    """

    file: str
    kind: str
    total: int
    taken: int
    left: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        out = sum(count for _, count in self.left)
        assert self.taken + out == self.total, f"{self.taken} {self.kind} taken and {out} left out of {self.total}"

    def left_out(self, count: int, reason: str) -> Tally:
        """The same file with some of the taken pieces left out after all."""
        left = Counter(dict(self.left))
        left[reason] += count
        return Tally(self.file, self.kind, self.total, self.taken - count, tuple(left.items())) if count else self


@dataclass(frozen=True)
class Drawn:
    """Masks that one file draws on one series.

    Attributes:
      masks: segment's name -> image name -> uint8 (Y, X) of 0 and 1.
      looked: images that somebody looked at; without a mask of their own they are empty.
      total: pieces in the file.
      taken: image name -> pieces that are in its mask.
      left: reason -> pieces left out.
    """

    masks: dict[str, dict[str, NDArray[np.uint8]]] = field(repr=False)
    looked: frozenset[str]
    total: int
    taken: Mapping[str, int]
    left: Mapping[str, int]

    def tally(self, file: str, kind: str) -> Tally:
        """The account, as the file's."""
        left = tuple((reason, count) for reason, count in self.left.items() if count)
        return Tally(file, PIECES[kind], self.total, sum(self.taken.values()), left)


def choose_segments(found: Mapping[int, tuple[str, ...]], segments: Sequence[str | int]) -> list[int]:
    """Choose the segments of a file that are the hematoma.

    Args:
      found: number -> its names.
      segments: data.segment of site.yaml; () if the hospital did not say.
    Raises:
      DicomError: none of several was named, or there is none.
      OtherSegment: none of those named is there.
    """
    if not segments and len(found) == 1:
        return list(found)
    wanted = {str(s).strip().casefold() for s in segments}
    chosen = [n for n, names in found.items() if wanted & {str(n), *(name.strip().casefold() for name in names)}]
    if chosen:
        return chosen
    shown = "; ".join(" ".join((str(n), *map(word, names))) for n, names in list(found.items())[:8]) or "none"
    named = any(found.values())
    label = (
        word(next(iter(found.values()))[0]) if named and len(found) == 1 and next(iter(found.values())) else "Hematoma"
    )
    example = f"data.segment: {label}" if named else f"data.segment: {next(iter(found), 1)}; a label map has no names"
    if segments:
        said = f"data.segment {list(segments)} is not among them"
        raise OtherSegment(f"{len(found)} segments ({shown}): {said}; name it in site.yaml, as {example}")
    raise DicomError(f"{len(found)} segments ({shown}): expected one, the hematoma; name it in site.yaml, as {example}")


def unite(drawn: Iterable[Drawn], shapes: Mapping[str, tuple[int, int]]) -> dict[str, NDArray[np.uint8]]:
    """The masks of one series from all of its files.

    Files add up: a file per segment or per lesion is how 3D Slicer and OHIF export. Two drawings of one segment that
    overlap without being equal are two opinions, and nobody can tell which counts.

    Args:
      drawn: what each file draws.
      shapes: image name -> rows and columns.
    Returns:
      Image name -> uint8 (Y, X), for every image that somebody looked at.
    Raises:
      DicomError: two files draw one segment in two ways on one image.
    """
    whole: dict[str, NDArray[np.uint8]] = {}
    by_segment: dict[tuple[str, str], NDArray[np.uint8]] = {}
    looked: set[str] = set()
    for one in drawn:
        looked |= one.looked
        for segment, masks in one.masks.items():
            for image, mask_YX in masks.items():
                before_YX = by_segment.get((segment, image))
                if before_YX is not None and (before_YX & mask_YX).any() and (before_YX != mask_YX).any():
                    raise DicomError(
                        "two mask files draw the same segment of one image differently, one over the other: which is right "
                        "is not known; keep one of them in data.masks"
                    )
                by_segment[segment, image] = mask_YX if before_YX is None else before_YX | mask_YX
                whole[image] = mask_YX | whole[image] if image in whole else mask_YX
    return {name: whole.get(name, np.zeros(shapes[name], np.uint8)) for name in looked | whole.keys()}
