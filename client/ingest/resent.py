"""Slices that were sent twice: the same picture at the same place of one series, under another SOP instance UID.

Archives that send a study twice give its images new UIDs. One of equal pictures is kept and answers to the names of all, so that
labels and masks find it under any of them. Stays in the hospital.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from client.dicom.faults import DicomError, Fault, Kind
from client.dicom.headers import CtSlice
from client.dicom.pixels import read_hu
from client.dicom.series import SAME_PLACE_MM
from client.ingest.workers import WorkerPool


def without_copies(images: Iterable[CtSlice], crew: WorkerPool) -> tuple[list[CtSlice], list[Fault]]:
    """Images without those that show what another one of their series shows at the same place.

    Only images that share a place are read, by workers, since a decoder may end its process.

    Returns:
      The images, those kept with the names of their copies; and a fault for each copy.
    """
    images = list(images)
    groups = list(_same_place(images))
    shared = [image for group in groups for image in group]
    digests = {image.image: digest for image, digest in crew.run(picture_digest, shared) if isinstance(digest, str)}
    alike: dict[tuple[int, str, str, str], list[CtSlice]] = defaultdict(list)
    for number, group in enumerate(groups):
        for image in sorted(group, key=lambda s: s.image):
            if digests.get(image.image):
                alike[number, digests[image.image], image.patient, image.study].append(image)
    kept: dict[str, CtSlice] = {}
    gone, faults = set(), []
    for first, *copies in alike.values():
        kept[first.image] = replace(first, copies=tuple(sorted({c.instance for c in copies} - {first.instance})))
        gone |= {c.image for c in copies}
        reason = f"the same picture at the same place as file {first.file}, under another SOPInstanceUID; counted once"
        faults += [Fault(f"file {c.file}", reason, Kind.COPY) for c in copies]
    return [kept.get(image.image, image) for image in images if image.image not in gone], faults


def _same_place(images: Iterable[CtSlice]) -> Iterator[list[CtSlice]]:
    """Groups of two or more images of one series at one place."""
    by_series: dict[str, list[CtSlice]] = defaultdict(list)
    for image in images:
        by_series[image.series].append(image)
    for _, members in sorted(by_series.items()):
        group: list[CtSlice] = []
        for image in sorted(members, key=lambda s: (s.height_mm, s.position_mm, s.image)):
            if group and np.abs(np.subtract(image.position_mm, group[0].position_mm)).max() < SAME_PLACE_MM:
                group.append(image)
                continue
            if len(group) > 1:
                yield group
            group = [image]
        if len(group) > 1:
            yield group


def picture_digest(image: CtSlice) -> str:
    """Hash of an image's HU; "" if it cannot be read."""
    try:
        return hashlib.sha256(read_hu(image).tobytes()).hexdigest()
    except DicomError:
        return ""
