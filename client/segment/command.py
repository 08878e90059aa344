"""`hemafed-client segment`: a folder of scans and a model in, files out."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from client.dicom.faults import Fault
from client.segment.page import write_page
from client.segment.segment import Choices, Progress, SegmentedSeries, SegmentError, segment_folder
from client.segment.written import write_arrays, write_seg, write_table
from shared.model.starting import read_model, starting_file

FORMS = ("npy", "seg", "both")
_OWN = ("masks", "seg", "segments.csv", "segments.html")  # what a call writes, and the next one replaces


@dataclass(frozen=True)
class Result:
    """What was done.

    Attributes:
      series, slices: how many were segmented.
      marked: slices with hematoma.
      faults: what was left out.
    """

    series: int
    slices: int
    marked: int
    faults: tuple[Fault, ...]


def segment_to_files(
    folder: Path,
    out: Path,
    model: str,
    form: str,
    threshold: float,
    least_mm2: float,
    workers: int | None,
    progress: Progress,
) -> Result:
    """Segment a folder and write masks, table and page.

    Args:
      folder: with DICOM files.
      out: outside of the folder; what an earlier call wrote there is replaced.
      model: a variant with a starting model, or a model file.
      form: one of FORMS.
      threshold, least_mm2: what counts as hematoma.
      workers, progress: as segment_folder takes them.
    Raises:
      SegmentError: a choice that is none, or a folder that does not fit.
      StartingModelError: the model cannot be used.
    """
    if form not in FORMS:
        raise SegmentError(f"--form is {form!r}, expected one of {', '.join(FORMS)}")
    folder, out = folder.resolve(), out.resolve()
    if out == folder or out.is_relative_to(folder) or folder.is_relative_to(out):
        raise SegmentError(f"{out} and {folder} lie within each other; name a folder of its own for the masks")
    file = Path(model) if model.endswith(".safetensors") else starting_file(model)
    network, card = read_model(file)
    about = {
        "name": f"{card.settings.variant} ({file.name})",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "data": card.facts.get("data", "not told"),
    }
    choices = Choices(threshold, least_mm2)
    out.mkdir(parents=True, exist_ok=True)
    for name in _OWN:
        old = out / name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    done: list[SegmentedSeries] = []
    faults: list[Fault] = []
    for one in segment_folder(folder, network, card.settings, choices, workers, progress):
        if isinstance(one, Fault):
            faults.append(one)
            continue
        faults += one.faults
        if not one.images:
            continue
        if form != "seg":
            write_arrays(one, folder, out / "masks")
        if form != "npy":
            fault = write_seg(one, out / "seg", about)
            faults += [fault] if fault else []
        done.append(_to_show(one))
    write_table(done, folder, out / "segments.csv")
    write_page(out / "segments.html", done, faults, choices, about)
    slices = [image for one in done for image in one.images]
    return Result(len(done), len(slices), sum(image.area_mm2 > 0 for image in slices), tuple(faults))


def _to_show(series: SegmentedSeries) -> SegmentedSeries:
    """A series without the pictures that the page does not show, or a folder of thousands would fill the memory."""
    areas = [one.area_mm2 for one in series.images]
    shown = int(np.argmax(areas)) if any(areas) else len(areas) // 2
    nothing = np.zeros((0, 0), np.int16)
    images = tuple(
        replace(
            one,
            mask=one.mask[:0],
            area_mm2=area,
            small_hu=one.small_hu if number == shown else nothing,
            small_mask=one.small_mask if number == shown else nothing.astype(np.uint8),
        )
        for number, (one, area) in enumerate(zip(series.images, areas, strict=True))
    )
    return replace(series, images=images)
