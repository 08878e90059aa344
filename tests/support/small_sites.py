"""Hospitals of a few tiny images, written as real DICOM files."""

from __future__ import annotations

import csv
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from client.dicom.pseudonyms import Pseudonyms
from client.ingest.ingest import IngestError, IngestReport, ingest
from shared.site import Site, read_site
from shared.slices import SliceCache, read_cache
from tests.support.dicom_files import ct_dataset, enhanced_ct, write_ct

ROOT = Path(__file__).resolve().parents[2]
CLIENT = [sys.executable, "-c", "from client.cli import main; main()"]  # hemafed-client, to be run in ROOT
SERIES = "1.2.826.1"
SIDE, SPACING_MM = 48, 4.0
HEADER = "series_uid,sop_uid,hypodensity\n"  # of a table of labels


def tiny_head(brightness_hu: int = 40) -> NDArray[np.int16]:
    """A disc of 150 mm in air, int16 (48, 48)."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return np.where(np.hypot(y, x) * SPACING_MM < 75, brightness_hu, -1000).astype(np.int16)


def three(series: str = SERIES, **settings: object) -> dict[str, dict]:
    """Files of slices <series>.1 to .3 from the feet up; the files' names run the other way."""
    return {
        f"{9 - n}": {"position": (0.0, 0.0, 5.0 * n), "series": series, "sop": f"{series}.{n}", **settings}
        for n in (1, 2, 3)
    }


def patients(*numbers: int, slices: int = 2) -> dict[str, dict]:
    """Files of some patients, each with one study of one series."""
    return {
        f"p{number}/{n}": {
            "hu_YX": tiny_head(30 + number),
            "position": (0.0, 0.0, 5.0 * n),
            "series": f"1.2.826.1.{number}",
            "sop": f"1.2.826.1.{number}.{n}",
            "patient": f"patient-{number}",
            "StudyInstanceUID": f"1.2.826.9.{number}",
        }
        for number in numbers
        for n in range(1, slices + 1)
    }


def write_images(folder: Path, images: dict[str, dict]) -> None:
    """File name -> settings of write_ct."""
    for name, settings in images.items():
        write_ct(folder / name, **({"hu_YX": tiny_head(), "spacing": (SPACING_MM, SPACING_MM)} | settings))


def write_multi_frame(path: Path, frames: int, series: str = SERIES, **changes: object) -> None:
    """An enhanced CT image <series>.1, its frames 5 mm apart from the feet up, each a little brighter than the last."""
    place = {"spacing": (SPACING_MM, SPACING_MM), "series": series, **changes}
    singles = [ct_dataset(tiny_head(30 + n), position=(0.0, 0.0, 5.0 * (n + 1)), **place) for n in range(frames)]
    ds = enhanced_ct(singles, list(range(frames)))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{series}.1"
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def make_site(
    root: Path,
    images: dict[str, dict] | None = None,
    labels: str | None = None,
    data: dict[str, object] | None = None,
    **site: object,
) -> Path:
    """A hospital's site.yaml; images: file name -> settings of write_ct, by default three slices of one series."""
    (root / "dicom").mkdir(parents=True, exist_ok=True)
    write_images(root / "dicom", three() if images is None else images)
    content = {"images": "dicom"} | (data or {})
    for key in ("images", "masks"):
        if key in content:
            (root / str(content[key])).mkdir(exist_ok=True)
    if labels is not None:
        (root / "labels.csv").write_text(labels, encoding="utf-8")
        content["labels"] = "labels.csv"
    (root / "site.yaml").write_text(yaml.safe_dump({"site": "test-site", "data": content, **site}))
    return root / "site.yaml"


def edit_data(file: Path, **keys: object) -> None:
    """Change keys of site.yaml's data section."""
    content = yaml.safe_load(file.read_text())
    content["data"] |= keys
    file.write_text(yaml.safe_dump(content))


def ingested(file: Path, workers: int = 1) -> tuple[SliceCache, IngestReport]:
    site = read_site(file)
    report = ingest(site, workers)
    return read_cache(site.cache), report


def index(site: Site) -> list[dict[str, str]]:
    return list(csv.DictReader((site.cache / "index.csv").read_text().splitlines()))


def file_code(site: Site, name: str) -> str:
    """What messages call a file, by its place and path: "images/9"."""
    return f"file {Pseudonyms(site.key()).of('file', name)}"


def series_name(site: Site, uid: str = SERIES) -> str:
    return f"series {Pseudonyms(site.key()).of('series', uid)}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_process(work: Callable[[], object]) -> multiprocessing.Process:
    """Some work in a process of its own that is forked from this one, started."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def answer_of(work: Callable[[Connection], object]) -> tuple[Any, int | None]:
    """What some work in a process of its own has sent, None if nothing, and its exit status."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = in_process(partial(work, sender))
    process.join()
    return (receiver.recv() if receiver.poll() else None), process.exitcode


def draw(folder: Path, sop: str, value: int = 1) -> None:
    """A mask file with two segments: a square of `value`, a smaller one of the next number."""
    folder.mkdir(exist_ok=True)
    mask_YX = np.zeros((SIDE, SIDE), np.uint8)
    mask_YX[18:24, 18:24], mask_YX[28:30, 28:30] = value, value + 1
    Image.fromarray(mask_YX).save(folder / f"{sop}.png")


def counted(file: Path, workers: int = 1) -> tuple[int, int, dict[str, bytes]]:
    """An ingest: headers and series that it read, and the cache's bytes."""
    headers: list[int] = [0]
    site = read_site(file)
    report = ingest(site, workers, lambda what, done, total: headers.append(total) if what == "headers" else None)
    return headers[-1], report.read, contents(site.cache)


def fresh(file: Path) -> dict[str, bytes]:
    """The bytes of the cache that an ingest from nothing makes of the folder as it is; the state is kept."""
    site = read_site(file)
    shutil.rmtree(site.cache, ignore_errors=True)
    ingest(site, workers=1)
    return contents(site.cache)


def refusal(file: Path) -> str:
    with pytest.raises(IngestError) as caught:
        ingest(read_site(file), workers=1)
    return str(caught.value)
