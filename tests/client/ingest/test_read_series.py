from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from client.dicom.headers import read_images
from client.dicom.pixels import AIR_HU
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import CtSeries, build_series
from client.ingest import read_series as reading
from client.ingest.read_series import MOST_FOR_CENTRE, CachedSeries, SeriesJob, can_read, image_name, read_part
from client.masks.match import MaskFile, picture_mask
from shared.slices import SIDE_PX
from tests.support.small_sites import SERIES, SIDE, SPACING_MM, three, tiny_head, write_images, write_multi_frame

KEY = Pseudonyms(b"k" * 32)
ROOT = Path(__file__).resolve().parents[3]


def series_of(folder: Path) -> CtSeries:
    images = [i for path in sorted(folder.rglob("*")) for i in read_images(path, KEY, code=path.name)]
    (series,), _, faults = build_series(images)
    assert faults == []
    return series


def part_of(folder: Path, *masks: MaskFile, segments: tuple = ()) -> CachedSeries:
    return read_part(SeriesJob(series_of(folder), masks, KEY, segments))


def png(folder: Path, sop: str, mask_YX: np.ndarray) -> MaskFile:
    folder.mkdir(exist_ok=True)
    path = folder / f"{sop}.png"
    Image.fromarray(mask_YX.astype(np.uint8)).save(path)
    return picture_mask(path, path.read_bytes()[:132], KEY, f"mask-{sop}")


def said(part: CachedSeries) -> list[tuple[str, str]]:
    return [(fault.what, fault.reason) for fault in part.faults]


def test_a_series_becomes_a_part(tmp_path: Path) -> None:
    write_images(tmp_path, three())
    series = series_of(tmp_path)
    part = part_of(tmp_path)
    assert (part.series, part.patient, part.spacing_mm) == (series.name, series.slices[0].patient, 5.0)
    assert (part.hu.shape, part.hu.dtype) == ((3, SIDE_PX, SIDE_PX), np.int16)
    assert (part.masks.shape, part.masks.dtype) == ((3, SIDE_PX, SIDE_PX), np.uint8)
    assert [(row.z_mm, row.has_mask, row.flags) for row in part.rows] == [(z, False, ()) for z in (5.0, 10.0, 15.0)]
    assert [row.image for row in part.rows] == [s.image for s in series.slices]
    assert said(part) == []
    assert part.hu[:, 112, 112].tolist() == [40, 40, 40]
    assert part.hu[:, 0, 0].tolist() == [AIR_HU] * 3  # beyond the picture
    assert not part.masks.any()


def test_a_slice_that_cannot_be_read_is_left_out_and_the_others_stay_as_they_are(tmp_path: Path) -> None:
    write_images(tmp_path, three())
    whole, series = part_of(tmp_path), series_of(tmp_path)
    with open(tmp_path / "7", "r+b") as file:  # between reading its header and reading its pixels
        file.truncate(series.slices[1].pixel_offset + 100)
    part = read_part(SeriesJob(series, (), KEY, ()))
    np.testing.assert_array_equal(part.hu, whole.hu[[0, 2]])
    assert part.rows == (whole.rows[0], whole.rows[2])
    ((what, reason),) = said(part)
    assert what == "file 7"
    assert f"expected {SIDE * SIDE * 2}" in reason


def test_files_that_vanish_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, three())
    series = series_of(tmp_path)
    (tmp_path / "8").unlink()
    part = read_part(SeriesJob(series, (), KEY, ()))
    assert len(part.rows) == 2
    assert said(part) == [("file 8", "cannot be opened (No such file or directory)")]
    assert not can_read(series.slices[0])
    assert can_read(series.slices[1])


def test_of_a_series_without_a_readable_slice_nothing_is_left(tmp_path: Path) -> None:
    write_images(tmp_path, three())
    series = series_of(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    part = read_part(SeriesJob(series, (), KEY, ()))
    assert (part.rows, part.hu.shape, part.masks.shape) == ((), (0, SIDE_PX, SIDE_PX), (0, SIDE_PX, SIDE_PX))
    assert len(part.faults) == 3


def test_values_that_cannot_be_hu_leave_out_the_series_with_the_numbers(tmp_path: Path) -> None:
    write_images(tmp_path, three(hu_YX=tiny_head() + 1024))  # a missing rescale
    part = part_of(tmp_path)
    assert len(part.rows) == len(part.hu) == len(part.masks) == 0
    ((what, reason),) = said(part)
    assert what == f"series {part.series}"
    assert reason.startswith("values cannot be HU: 0.0% of pixels near air's -1000")


def test_a_slice_beside_the_head_is_left_out(tmp_path: Path) -> None:
    """A wrong position would ask for a picture of any size, or give one of air alone."""
    for number, x_mm in enumerate((1e9, -5000.0, 1e300)):
        images = three()
        images["7"] |= {"position": (x_mm, 0.0, 10.0)}
        write_images(tmp_path / str(number), images)
        part = part_of(tmp_path / str(number))
        assert [row.z_mm for row in part.rows] == [5.0, 15.0]
        ((what, reason),) = said(part)
        assert what == "file 7"
        assert "mm beside the head of its series" in reason


def test_a_head_that_moves_still_moves(tmp_path: Path) -> None:
    images = three()
    images["7"] |= {"position": (16.0, 0.0, 10.0)}
    write_images(tmp_path, images)
    part = part_of(tmp_path)
    assert said(part) == []
    columns = [np.nonzero(hu_YX[112] > -480)[0].mean() for hu_YX in part.hu]
    assert columns[1] - columns[0] == pytest.approx(16, abs=0.5)
    assert columns[2] == columns[0]


def test_a_long_series_is_read_whole_and_in_order(tmp_path: Path) -> None:
    """The head's place is measured on some slices; the others are read one at a time."""
    count = 2 * MOST_FOR_CENTRE + 3
    write_images(
        tmp_path,
        {
            f"{997 * n % 1000}": {"hu_YX": tiny_head(n), "position": (0.0, 0.0, float(n)), "sop": f"1.2.{n + 1}"}
            for n in range(count)
        },
    )
    part = part_of(tmp_path)
    assert part.hu[:, 112, 112].tolist() == list(range(count))
    assert [row.z_mm for row in part.rows] == list(range(count))
    assert len({row.content for row in part.rows}) == count


def test_masks_move_with_their_images(tmp_path: Path) -> None:
    write_images(tmp_path / "dicom", three())
    mask_YX = np.zeros((SIDE, SIDE), bool)
    mask_YX[20:26, 22:30] = True
    mask = png(tmp_path / "masks", f"{SERIES}.2", mask_YX)
    empty = png(tmp_path / "masks", f"{SERIES}.3", np.zeros((SIDE, SIDE)))
    part = part_of(tmp_path / "dicom", mask, empty)
    assert [row.has_mask for row in part.rows] == [False, True, True]
    assert part.masks[1].sum() == pytest.approx(6 * 8 * SPACING_MM**2, rel=0.02)  # mm2 at 1 mm per pixel
    assert (part.hu[1][part.masks[1] == 1] == 40).all()
    assert not part.masks[[0, 2]].any()
    assert said(part) == []


def test_a_mask_that_cannot_be_used_costs_no_image(tmp_path: Path) -> None:
    write_images(tmp_path / "dicom", three())
    part = part_of(tmp_path / "dicom", png(tmp_path / "masks", f"{SERIES}.2", np.ones((20, 20))))
    assert len(part.rows) == 3
    assert not any(row.has_mask for row in part.rows)
    assert said(part) == [
        (f"file mask-{SERIES}.2", "mask is (20, 20) pixels, its image (48, 48); expected the same: save it unscaled")
    ]


def test_a_mask_in_air_is_told(tmp_path: Path) -> None:
    write_images(tmp_path / "dicom", three())
    corner_YX = np.zeros((SIDE, SIDE), bool)
    corner_YX[:5, :5] = True
    part = part_of(tmp_path / "dicom", png(tmp_path / "masks", f"{SERIES}.2", corner_YX))
    assert said(part) == [
        (f"series {part.series}", "25 of 25 pixels of its mask lie in air; the mask may belong to another series")
    ]


def test_a_cut_head_is_flagged(tmp_path: Path) -> None:
    head_YX = tiny_head()
    head_YX[: SIDE // 2] = 40  # fills the picture's front half, beyond the field of view
    write_images(tmp_path, three(hu_YX=np.kron(head_YX, np.ones((2, 2)))))
    assert [row.flags for row in part_of(tmp_path).rows] == [("head-cut",)] * 3


def test_frames_of_one_file_have_names_of_their_own(tmp_path: Path) -> None:
    write_multi_frame(tmp_path / "a", 3)
    series = series_of(tmp_path)
    part = part_of(tmp_path)
    assert part.hu[:, 112, 112].tolist() == [30, 31, 32]
    assert [row.image.partition(".")[2] for row in part.rows] == ["1", "2", "3"]
    assert [image_name(s) for s in series.slices] == ["file a frame 1", "file a frame 2", "file a frame 3"]


def test_equal_pictures_have_equal_content_and_blank_ones_none(tmp_path: Path) -> None:
    images = three(hu_YX=tiny_head(40))
    images["7"] |= {"hu_YX": tiny_head(41)}
    images["6"] |= {"hu_YX": np.full((SIDE, SIDE), -1000)}
    write_images(tmp_path / "one", images)
    write_images(tmp_path / "other", three("1.2.9", patient="another name"))
    rows, others = part_of(tmp_path / "one").rows, part_of(tmp_path / "other").rows
    assert rows[0].content == others[0].content
    assert len({row.content for row in rows}) == 3
    assert rows[2].content == ""


def test_what_nobody_foresaw_costs_one_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(image: object) -> None:
        raise MemoryError

    write_images(tmp_path, three())
    monkeypatch.setattr(reading, "read_hu", break_down)
    part = part_of(tmp_path)
    assert part.rows == ()
    assert said(part) == [
        (
            f"series {part.series}",
            "too large for this machine's memory; use fewer processes (--workers 1), or export it in parts",
        )
    ]


_PEAK = """
import resource, sys
from client.ingest.ingest import ingest
from pathlib import Path
from shared.site import read_site
for file in sys.argv[1:]:
    report = ingest(read_site(Path(file)), workers=1)
    print(report.slices, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_memory_stays_bounded_in_a_long_series(tmp_path: Path) -> None:
    """300 slices of 512 x 512 would be 315 MB as float32, 30 are 31 MB; the cache's own pictures are 45 and 5 MB."""
    ds = pydicom.Dataset()
    for name, count in (("short", 30), ("long", 300)):
        folder = tmp_path / name / "dicom"
        write_images(
            folder, {"0": {"hu_YX": np.kron(tiny_head(), np.ones((11, 11)))[8:520, 8:520], "spacing": (0.4, 0.4)}}
        )
        ds = pydicom.dcmread(folder / "0")
        assert ds.Rows == ds.Columns == 512
        for n in range(1, count):
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.{n + 1}"
            ds.ImagePositionPatient = [0, 0, n]
            ds.save_as(folder / str(n))
        (tmp_path / name / "site.yaml").write_text("site: a\ndata: {images: dicom}\n")
    files = [str(tmp_path / name / "site.yaml") for name in ("short", "long")]
    command = [sys.executable, "-c", _PEAK, *files]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    (few, low), (many, high) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert (few, many) == (30, 300)
    assert high - low < 200e6
