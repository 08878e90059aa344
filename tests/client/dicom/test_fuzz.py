"""Bytes of valid files flipped, cut, doubled and inserted: no crash, no hang, no changed HU without a word.

A series of five slices, one of which is damaged, goes the way of an ingest. What comes out of the damaged file has the HU
and the grid of the undamaged one, or it is left out with a reason. One exception is in the nature of DICOM, which has no
checksum: a byte changed inside the pixels themselves can be another valid picture, and so can any change within the one
stream of a deflated file. Then shape and grid must be right.
Where a slice lies has less redundancy than what it shows: a changed digit of its position that keeps the order of a
series' slices stays unnoticed, and its HU are right all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from client.dicom.elements import silence_readers
from client.dicom.headers import CtSlice
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import build_series, choose
from client.ingest.read_series import CachedSeries, SeriesJob, read_part
from client.ingest.scan import FileRecord, FoundFile, scan_file
from client.ingest.survey import read_parts
from client.ingest.workers import WorkerPool
from client.masks.match import match_masks, read_masks
from tests.support.dicom_files import ct_dataset, head_hu, save_as_syntax, write_series
from tests.support.mask_files import grid_of, truth, write_seg

KEY = Pseudonyms(b"k" * 32)
SIDE, VICTIM = 48, 2
NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
COMPRESSED = (RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)


@dataclass(frozen=True)
class Damage:
    """How a file is changed.

    Attributes:
      kind: flip, cut, double or insert.
      place: where, as a share of the file; small ones are more likely, as headers are short.
      length: of what is doubled, in bytes; how many bytes are flipped.
      bits: what a byte is flipped with, or what is inserted.
    """

    kind: str
    place: float
    length: int
    bits: bytes

    def apply(self, data: bytes) -> tuple[bytes, list[int]]:
        """The changed bytes, and where bytes were flipped."""
        at = min(int(self.place * len(data)), len(data) - 1)
        if self.kind == "cut":
            return data[:at], []
        if self.kind == "double":
            return data[:at] + data[at : at + self.length] + data[at:], []
        if self.kind == "insert":
            return data[:at] + self.bits + data[at:], []
        changed, places = bytearray(data), list(range(at, min(at + self.length % 4 + 1, len(data))))
        for number, place in enumerate(places):
            changed[place] ^= self.bits[number % len(self.bits)] or 1
        return bytes(changed), places


DAMAGE = st.builds(
    Damage,
    st.sampled_from(["flip", "flip", "flip", "cut", "double", "insert"]),
    st.one_of(st.floats(0, 0.3), st.floats(0, 1)),
    st.integers(1, 64),
    st.binary(min_size=1, max_size=8),
)


@lru_cache
def valid_files(syntax: str, place: Path) -> tuple[bytes, ...]:
    """Five slices in a transfer syntax."""
    files = []
    for n in range(5):
        ds = ct_dataset(
            head_hu((SIDE, SIDE), n), position=(0, 0, 5.0 * n), spacing=(4.0, 4.0), sop=f"1.2.826.1.{n + 1}"
        )
        ds.PixelPaddingValue, ds.RescaleIntercept, ds.ConvolutionKernel = -2000, -24, "H31s"
        files.append(save_as_syntax(ds, place / "file", syntax).read_bytes())
    return tuple(files)


def pixels_begin(path: Path) -> int:
    """Where a byte may be another valid pixel: after the header and, compressed, after the offset table."""
    with open(path, "rb") as file:
        ds = pydicom.dcmread(file, stop_before_pixels=True)
        start = file.tell()
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax == DeflatedExplicitVRLittleEndian:
        return 144 + int.from_bytes(path.read_bytes()[140:144], "little")
    return start + (8 if syntax.is_implicit_VR else 12) + (16 if syntax.is_encapsulated else 0)


@pytest.fixture(scope="module")
def crew() -> Iterator[WorkerPool]:
    with WorkerPool(1) as one:
        yield one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    silence_readers()
    return tmp_path_factory.mktemp("fuzz")


def scanned(path: Path) -> FileRecord:
    return scan_file(FoundFile(path, path.name, "images", ""), KEY, False)


@pytest.mark.parametrize("syntax", [*NATIVE, *COMPRESSED], ids=lambda uid: UID(uid).name)
@given(damage=DAMAGE)
def test_a_damaged_image_is_right_or_left_out(syntax: str, damage: Damage, place: Path, crew: WorkerPool) -> None:
    folder = place / syntax
    folder.mkdir(exist_ok=True)
    files = valid_files(syntax, place)
    for n, data in enumerate(files):
        (folder / f"{n}").write_bytes(data)
    begin = pixels_begin(folder / f"{VICTIM}")
    changed, flipped = damage.apply(files[VICTIM])
    (folder / f"{VICTIM}").write_bytes(changed)
    images = [image for n in range(5) for image in scanned(folder / f"{n}").images]
    series, _, _ = build_series(images)
    for one in choose(series, {})[0]:
        (part,) = _parts(one, syntax, crew)
        shown = {row.image for row in part.rows}
        damaged = [s for s in one.slices if s.file == f"{VICTIM}" and s.image in shown]
        in_pixels = damage.kind == "flip" and all(at >= begin for at in flipped)
        if syntax == DeflatedExplicitVRLittleEndian:  # bytes more or less can end at the same length, too
            in_pixels |= damage.kind != "cut" and int(damage.place * len(files[VICTIM])) >= begin
        for image in damaged:
            row = [r.image for r in part.rows].index(image.image)
            assert (image.shape, image.spacing_mm) == ((SIDE, SIDE), (4.0, 4.0))
            assert part.hu[row].shape == (224, 224)
            if not in_pixels:
                np.testing.assert_array_equal(part.hu[row], _expected(image, place, syntax))


def _parts(series: object, syntax: str, crew: WorkerPool) -> list[CachedSeries]:
    """In this process what Python reads, in another what C reads: it may end its process."""
    job = SeriesJob(series, (), KEY, ())
    return list(read_parts([job], crew)) if syntax in COMPRESSED else [read_part(job)]


@lru_cache
def _whole(place: Path, syntax: str) -> dict[str, np.ndarray]:
    """What the undamaged files give."""
    folder = place / f"{syntax}-whole"
    folder.mkdir(exist_ok=True)
    for n, data in enumerate(valid_files(syntax, place)):
        (folder / f"{n}").write_bytes(data)
    (series,), _, _ = build_series(image for n in range(5) for image in scanned(folder / f"{n}").images)
    part = read_part(SeriesJob(series, (), KEY, ()))
    return {image.file: part.hu[n] for n, image in enumerate(series.slices)}


def _expected(image: CtSlice, place: Path, syntax: str) -> np.ndarray:
    return _whole(place, syntax)[image.file]


@lru_cache
def mask_files(place: Path) -> tuple[tuple[Path, ...], dict[str, bytes]]:
    """A series and its masks in three forms."""
    images = tuple(write_series(place / "images"))
    datasets = [pydicom.dcmread(path) for path in images]
    write_seg(place / "seg.dcm", datasets, truth())
    write_seg(place / "map.dcm", datasets, truth(), kind="LABELMAP", syntax=RLELossless)
    nibabel.save(
        nibabel.Nifti1Image(truth().transpose(2, 1, 0), grid_of("LPS", (64, 64, 4), (1, 1, 5))),
        place / "1.2.826.1.nii.gz",
    )
    Image.fromarray(truth()[1]).save(place / "1.2.826.1.2.png")
    names = ("seg.dcm", "map.dcm", "1.2.826.1.nii.gz", "1.2.826.1.2.png")
    return images, {name: (place / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", ["seg.dcm", "map.dcm", "1.2.826.1.nii.gz", "1.2.826.1.2.png"])
@given(damage=DAMAGE)
def test_a_damaged_mask_is_a_mask_or_a_reason(name: str, damage: Damage, place: Path) -> None:
    images, files = mask_files(place)
    (series,), _, _ = build_series(image for path in images for image in scanned(path).images)
    folder = place / "masks"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(damage.apply(files[name])[0])
    record = scan_file(FoundFile(folder / name, "m", "masks", ""), KEY, False)
    if record.fault:
        return
    matched, faults = match_masks([record.mask], [series])
    assert bool(matched) != bool(faults)
    for (mask,) in matched.values():
        read = read_masks([mask], series, KEY, ())
        assert read.masks or read.faults
        for pixels_YX in read.masks.values():
            assert (pixels_YX.shape, pixels_YX.dtype) == ((64, 64), np.uint8)
            assert pixels_YX.max() <= 1
