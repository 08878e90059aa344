from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml
from scipy import ndimage

from client.dicom import AIR_HU, find_files, read_header
from client.ingest import SPLIT_SHARES, IngestError, IngestReport, assign_splits, ingest, pseudonym
from client.masks import find_masks
from client.resample import resample
from shared.site import Site, read_site
from shared.slices import SIDE_PX, SliceCache, read_cache
from tests.client.test_dicom import write_ct
from tests.conftest import SmallHospitals, edit_site

DISC_MM = 100.0
SERIES = "1.2.826.1"


def disc(
    spacing: tuple[float, float] = (0.5, 0.5),
    shape: tuple[int, int] = (400, 400),
    centre_mm: tuple[float, float] | None = None,
    padding_hu: int = -1000,
) -> np.ndarray:
    """A disc of 100 mm and 40 HU; towards row 0 a small bright spot, towards column 0 a darker one (50, 60 mm apart).

    Args:
      centre_mm: row and column from the corner of the grid.
    """
    y, x = ((np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing, strict=True))
    cy, cx = centre_mm or (shape[0] * spacing[0] / 2, shape[1] * spacing[1] / 2)
    distance_mm = np.hypot(y[:, None] - cy, x[None, :] - cx)
    hu_YX = np.where(distance_mm < DISC_MM / 2, 40, padding_hu)
    hu_YX[np.hypot(y[:, None] - cy + 30, x[None, :] - cx) < 6] = 500
    hu_YX[np.hypot(y[:, None] - cy, x[None, :] - cx + 30) < 6] = 200
    return hu_YX


def make_site(root: Path, images: dict[str, dict] | None = None, labels: str | None = None, **site: object) -> Path:
    """A hospital; images: file name -> settings of write_ct, by default three slices of one series."""
    images = three() if images is None else images
    (root / "dicom").mkdir(parents=True, exist_ok=True)
    for name, settings in images.items():
        write_ct(root / "dicom" / name, **({"hu_YX": disc((2.0, 2.0), (100, 100)), "spacing": (2.0, 2.0)} | settings))
    data = {"images": "dicom"}
    if labels is not None:
        (root / "labels.csv").write_text(labels)
        data["labels"] = "labels.csv"
    (root / "site.yaml").write_text(yaml.safe_dump({"site": "test-site", "data": data, **site}))
    return root / "site.yaml"


def three(**settings: object) -> dict[str, dict]:
    """Slices 1.2.1 to 1.2.3 from the feet up; the files' names run the other way."""
    return {f"{9 - n}": {"position": (0, 0, 5.0 * n), "sop": f"1.2.{n}", **settings} for n in (1, 2, 3)}


def ingested(file: Path) -> tuple[SliceCache, IngestReport]:
    report = ingest(read_site(file), workers=1)
    return read_cache(read_site(file).cache), report


def attempt(file: Path) -> tuple[SliceCache | None, str]:
    """The cache, or None and the error's text."""
    try:
        return ingested(file)[0], ""
    except IngestError as error:
        return None, str(error)


def index(site: Site) -> list[dict[str, str]]:
    return list(csv.DictReader((site.cache / "index.csv").read_text().splitlines()))


def middle(mask_YX: np.ndarray) -> tuple[float, float]:
    return tuple(float(v) + 0.5 for v in ndimage.center_of_mass(mask_YX))


# Geometry


@pytest.mark.parametrize(
    ("spacing", "shape"),
    [((0.5, 0.5), (400, 400)), ((0.9, 0.9), (220, 240)), ((0.5, 1.0), (400, 220)), ((1.2, 0.6), (150, 300))],
)
def test_a_disc_keeps_its_size_and_comes_to_the_middle(tmp_path: Path, spacing: tuple, shape: tuple) -> None:
    off_centre = (shape[0] * spacing[0] / 2 + 15, shape[1] * spacing[1] / 2 - 20)
    image = {"hu_YX": disc(spacing, shape, off_centre), "spacing": spacing}
    cache, report = ingested(make_site(tmp_path, {"a": image}))
    assert (report.slices, report.faults) == (1, ())
    inside_YX = cache.hu[0] > -480  # half between air and tissue
    rows, columns = (np.nonzero(inside_YX.any(axis=a))[0] for a in (1, 0))
    assert rows[-1] - rows[0] + 1 == pytest.approx(DISC_MM, abs=1)
    assert columns[-1] - columns[0] + 1 == pytest.approx(DISC_MM, abs=1)
    assert inside_YX.sum() == pytest.approx(np.pi * (DISC_MM / 2) ** 2, rel=0.01)
    # The head is found on a 4 mm grid.
    assert middle(inside_YX) == pytest.approx((SIDE_PX / 2, SIDE_PX / 2), abs=4)


def test_values_inside_are_kept_and_padding_becomes_air(tmp_path: Path) -> None:
    image = {"hu_YX": disc((1.0, 1.0), (200, 200), padding_hu=-3024), "spacing": (1.0, 1.0)}
    cache, _ = ingested(make_site(tmp_path, {"a": image}))
    assert cache.hu.dtype == np.int16
    assert cache.hu.min() == AIR_HU
    assert cache.hu[0, 0, 0] == AIR_HU  # outside of the image altogether
    assert np.median(cache.hu[0][cache.hu[0] > -300]) == 40


DIRECTIONS = [
    pytest.param((1, 0, 0), (0, 1, 0), id="supine"),
    pytest.param((-1, 0, 0), (0, -1, 0), id="prone"),
    pytest.param((-1, 0, 0), (0, 1, 0), id="columns-flipped"),
    pytest.param((1, 0, 0), (0, -1, 0), id="rows-flipped"),
    pytest.param((0, 1, 0), (-1, 0, 0), id="quarter-turn"),
    pytest.param((0, -1, 0), (-1, 0, 0), id="quarter-turn-flipped"),
]


@pytest.mark.parametrize(("row", "column"), DIRECTIONS)
def test_every_direction_of_rows_and_columns_comes_to_the_same_picture(
    tmp_path: Path, row: tuple, column: tuple
) -> None:
    """Rows run to the back and columns to the patient's left, or the image is left out with a reason."""
    standard_YX = disc((1.0, 1.0), (200, 200))  # bright spot in front, darker spot on the patient's right
    turned_YX = standard_YX
    if row[0] == 0:  # a row of pixels runs along y: transposed
        turned_YX = turned_YX.T
        turned_YX = turned_YX[:: column[0], :: row[1]]
    else:
        turned_YX = turned_YX[:: column[1], :: row[0]]
    image = {"hu_YX": turned_YX, "spacing": (1.0, 1.0), "row": row, "column": column}
    cache, text = attempt(make_site(tmp_path, {"a": image}))
    if cache is None:
        assert row[0] == 0, "only a quarter turn may be refused"
        assert "1x" in text
        return
    bright = middle(cache.hu[0] > 350)
    dark = middle((cache.hu[0] > 150) & (cache.hu[0] < 250) & (np.indices((SIDE_PX, SIDE_PX))[1] < 100))
    assert bright == pytest.approx((SIDE_PX / 2 - 30, SIDE_PX / 2), abs=4)
    assert dark == pytest.approx((SIDE_PX / 2, SIDE_PX / 2 - 30), abs=4)


def test_one_centre_for_a_whole_series(tmp_path: Path) -> None:
    images = {
        str(n): {
            "hu_YX": disc((1.0, 1.0), (200, 200), (100 + shift, 100)),
            "spacing": (1.0, 1.0),
            "position": (0, 0, 5.0 * n),
            "sop": f"1.2.{n + 1}",
        }
        for n, shift in enumerate((0, 0, 16))
    }
    cache, _ = ingested(make_site(tmp_path, images))
    rows = [middle(hu > -480)[0] for hu in cache.hu]
    assert rows[1] - rows[0] == pytest.approx(0, abs=0.1)
    assert rows[2] - rows[0] == pytest.approx(16, abs=0.2)  # a head that moves still moves


def test_the_largest_region_is_the_head_not_the_table(tmp_path: Path) -> None:
    hu_YX = disc((1.0, 1.0), (300, 300), (130, 150))
    hu_YX[285:292] = 100  # the table, as wide as the image
    cache, _ = ingested(make_site(tmp_path, {"a": {"hu_YX": hu_YX, "spacing": (1.0, 1.0)}}))
    regions, _ = ndimage.label(cache.hu[0] > -480)
    head = regions == regions[SIDE_PX // 2, SIDE_PX // 2]
    assert middle(head) == pytest.approx((SIDE_PX / 2, SIDE_PX / 2), abs=4)


def test_a_slice_of_air_alone_is_kept(tmp_path: Path) -> None:
    cache, report = ingested(make_site(tmp_path, {"a": {"hu_YX": np.full((100, 100), -1000), "spacing": (2.0, 2.0)}}))
    assert report.slices == 1
    assert cache.hu.max() < -990


def test_a_cut_head_is_flagged(tmp_path: Path) -> None:
    images = {
        "cut": {"hu_YX": np.full((260, 260), 40), "spacing": (1.0, 1.0), "sop": "1.2.1"},
        "whole": {"sop": "1.2.2", "series": "1.2.5"},
    }
    site = read_site(make_site(tmp_path, images))
    ingest(site, workers=1)
    assert sorted(row["flags"] for row in index(site)) == ["", "head-cut"]


def test_mask_and_image_move_together(tmp_path: Path) -> None:
    hu_YX = disc((0.5, 1.0), (420, 230), (90, 130))
    write_ct(tmp_path / "a", hu_YX, spacing=(0.5, 1.0), row=(-1, 0, 0), column=(0, -1, 0))
    header = read_header(tmp_path / "a")
    moved_YX = resample(hu_YX, header, (100.0, 120.0), fill=AIR_HU)
    mask_YX = resample((hu_YX > 350).astype(np.uint8), header, (100.0, 120.0), fill=0) > 0.5
    assert 90 < mask_YX.sum() < 130  # pi 6^2 = 113 mm2
    assert middle(mask_YX) == pytest.approx(middle(moved_YX > 270), abs=0.3)


def test_masks_of_real_series_lie_on_the_clot(hospitals: SmallHospitals) -> None:
    cache = hospitals.cache("hospital-02")  # another field of view than 224 mm
    rows = np.nonzero(cache.masks.any(axis=(1, 2)))[0]
    assert len(rows) > 10
    step = 245 / 512
    areas = {}
    for mask in find_masks(hospitals.site("hospital-02").masks)[0].values():
        seg = pydicom.dcmread(mask.path)
        frames = seg.pixel_array.reshape(-1, 512, 512)
        areas[mask.series_uid] = frames.sum() * step**2
    assert cache.masks.sum() == pytest.approx(sum(areas.values()), rel=0.01)  # mm2 at 1 mm per pixel
    for row in rows:
        mask_YX = cache.masks[row].astype(bool)
        if mask_YX.sum() > 300:
            ring_YX = ndimage.binary_dilation(mask_YX, iterations=6) & ~ndimage.binary_dilation(mask_YX, iterations=2)
            soft_YX = ring_YX & (np.abs(cache.hu[row] - 40) < 60)
            assert cache.hu[row][mask_YX].mean() > cache.hu[row][soft_YX].mean() + 5


# Labels

HEADER = "series_uid,sop_uid,hypodensity\n"


def test_labels_by_image(tmp_path: Path) -> None:
    table = HEADER + f"{SERIES},1.2.3,1\n{SERIES},1.2.1,0\n"
    cache, report = ingested(make_site(tmp_path, labels=table))
    np.testing.assert_array_equal(cache.label, [0, np.nan, 1])
    assert (report.positives, report.unlabelled) == (1, 1)


@pytest.mark.parametrize("column", [(0, 1, 0), (0, -1, 0)], ids=["supine", "rows-flipped"])
def test_slice_index_counts_from_the_feet_up(tmp_path: Path, column: tuple) -> None:
    table = f"series_uid,slice_index,hypodensity\n{SERIES},0,1\n{SERIES},2,0\n"
    file = make_site(tmp_path, three(column=column), labels=table)
    ingest(read_site(file), workers=1)
    rows = sorted(index(read_site(file)), key=lambda row: abs(float(row["z_mm"])))  # 5, 10 and 15 mm above the feet
    assert [row["label"] for row in rows] == ["1", "", "0"]
    assert [float(row["z_mm"]) for row in rows] == [5, 10, 15]


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_label_is_unknown(tmp_path: Path, blank: str) -> None:
    cache, report = ingested(make_site(tmp_path, labels=HEADER + f"{SERIES},1.2.1,{blank}\n"))
    assert np.isnan(cache.label).all()
    assert report.unlabelled == 3


def test_a_table_from_a_spreadsheet(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, spaces, another order of columns and one more."""
    table = "﻿note,hypodensity,series_uid,sop_uid\r\nx, 1 ," + f" {SERIES} , 1.2.2 \r\n"
    cache, _ = ingested(make_site(tmp_path, labels=table))
    np.testing.assert_array_equal(cache.label, [np.nan, 1, np.nan])


def test_the_same_label_twice_is_no_fault(tmp_path: Path) -> None:
    cache, _ = ingested(make_site(tmp_path, labels=HEADER + f"{SERIES},1.2.1,1\n" * 2))
    assert cache.label[0] == 1


def test_all_faults_of_a_table_in_one_error(tmp_path: Path) -> None:
    lines = ["9.9,1.2.1,1", f"{SERIES},1.2.77,0", f"{SERIES},1.2.1,yes", f"{SERIES},1.2.2,1", f"{SERIES},1.2.2,0"]
    with pytest.raises(IngestError) as caught:
        ingest(read_site(make_site(tmp_path, labels=HEADER + "\n".join(lines))), workers=1)
    text = str(caught.value)
    assert "line 2: series 9.9 is not among the 1 series" in text
    assert "line 3: sop_uid 1.2.77 is not among the 3 slices" in text
    assert "line 4: hypodensity 'yes', expected 1, 0 or blank" in text
    assert "line 6: another label than an earlier line" in text
    assert "line 5" not in text
    assert not (tmp_path / "cache").exists()


def test_line_numbers_are_the_files_own(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match="line 4:"):
        ingest(read_site(make_site(tmp_path, labels=HEADER + f"{SERIES},1.2.1,1\n\n{SERIES},1.2.2,x\n")), workers=1)


@pytest.mark.parametrize("line", [f"{SERIES}", f"{SERIES},1.2.1", "", "x"])
def test_a_short_line_is_a_fault_or_blank_never_a_crash(tmp_path: Path, line: str) -> None:
    file = make_site(tmp_path, labels=HEADER + f"{SERIES},1.2.3,1\n{line}\n")
    cache, text = attempt(file)
    if cache is None:
        assert "line 3" in text
    else:
        np.testing.assert_array_equal(cache.label, [np.nan, np.nan, 1])


@pytest.mark.parametrize("place", ["3", "-1", "1.0", "²", "", "first"])
def test_a_slice_index_that_is_none_is_a_fault(tmp_path: Path, place: str) -> None:
    table = f"series_uid,slice_index,hypodensity\n{SERIES},{place},1\n"
    with pytest.raises(IngestError, match="line 2: slice_index"):
        ingest(read_site(make_site(tmp_path, labels=table)), workers=1)


@pytest.mark.parametrize("header", ["sop_uid,hypodensity", "series_uid,hypodensity", "series_uid,sop_uid", "a;b", ""])
def test_a_missing_column_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(IngestError, match="expected series_uid, sop_uid or slice_index, and hypodensity"):
        ingest(read_site(make_site(tmp_path, labels=header + "\n")), workers=1)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match="and 15 more"):
        ingest(read_site(make_site(tmp_path, labels=HEADER + "9.9,1.2.1,1\n" * 25)), workers=1)


def test_a_hospital_without_a_table(tmp_path: Path) -> None:
    cache, report = ingested(make_site(tmp_path))
    assert np.isnan(cache.label).all()
    assert (report.slices, report.unlabelled, report.masked) == (3, 3, 0)


# What is there and what is not


def test_a_hospital_without_ct_says_what_is_there(tmp_path: Path) -> None:
    file = make_site(tmp_path, {"a": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}})
    (tmp_path / "dicom" / "letter").write_text("Dear")
    with pytest.raises(IngestError, match="no CT series") as caught:
        ingest(read_site(file), workers=1)
    assert "2 files left out" in str(caught.value)
    assert "1x a localizer" in str(caught.value)
    assert "data.images" in str(caught.value)


def test_without_masks_no_slice_has_one(tmp_path: Path) -> None:
    cache, report = ingested(make_site(tmp_path))
    assert not cache.has_mask.any()
    assert not cache.masks.any()
    assert report.masked == 0


def test_a_seg_gives_every_image_it_lists_a_mask(hospitals: SmallHospitals) -> None:
    cache = hospitals.cache("hospital-01")
    assert cache.has_mask.all()  # those without a frame too
    masks, _ = find_masks(hospitals.site("hospital-01").masks)
    frames = sum(pydicom.dcmread(m.path, stop_before_pixels=True).NumberOfFrames for m in masks.values())
    assert abs(int(cache.masks.any(axis=(1, 2)).sum()) - frames) <= 2  # one of a few pixels may vanish


def test_a_mask_that_cannot_be_used_is_counted_and_its_slices_stay(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    first, second, *_ = sorted(site.masks.iterdir())
    seg = pydicom.dcmread(first)
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"
    seg.save_as(first)
    seg = pydicom.dcmread(second)
    seg.FrameOfReferenceUID = "1.2.3"
    seg.save_as(second)
    report = ingest(site, workers=2)
    assert (report.slices, report.masked) == (30, 24)
    reasons = {fault.what: fault.reason for fault in report.faults}
    assert "refers to series 1.2.3, which is not in data.images" in reasons[first.name]
    assert "frame of reference" in reasons[second.name]


def spoil(path: Path) -> None:
    """Break the pixels and leave the header."""
    ds = pydicom.dcmread(path)
    ds.PixelData = ds.PixelData[:100]
    ds.save_as(path)


def test_a_bad_slice_in_the_middle_is_left_out_and_counted(tmp_path: Path) -> None:
    file = make_site(tmp_path, labels=HEADER + f"{SERIES},1.2.1,0\n{SERIES},1.2.2,1\n{SERIES},1.2.3,1\n")
    whole, _ = ingested(file)
    spoil(tmp_path / "dicom" / "7")
    cache, report = ingested(file)
    assert (report.slices, report.positives) == (2, 1)
    (fault,) = report.faults
    assert fault.what == "7"
    assert "cannot be decoded" in fault.reason
    np.testing.assert_array_equal(cache.label, [0, 1])
    np.testing.assert_array_equal(cache.hu, whole.hu[[0, 2]])
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["faults"] == 1
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        "cache.json",
        "index.csv",
        "masks.npy",
        "slices.npy",
    ]


def test_a_hospital_of_bad_slices_alone_is_an_error(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    for path in find_files(tmp_path / "dicom"):
        spoil(path)
    with pytest.raises(IngestError, match="no slice of 1 series could be read; 3x pixels cannot be decoded"):
        ingest(read_site(file), workers=1)


def test_a_lossy_image_is_refused_or_flagged(real_dicom: Path, tmp_path: Path) -> None:
    folder = real_dicom / "cornerstonejs+cornerstone3D/packages/dicomImageLoader/testImages"
    (path,) = folder.glob("*_1.2.840.10008.1.2.4.50.dcm")
    file = make_site(tmp_path, {})
    shutil.copy(path, tmp_path / "dicom" / "a")
    cache, text = attempt(file)
    assert "lossy" in (text if cache is None else index(read_site(file))[0]["flags"])


# Patients


def test_the_pseudonym_depends_on_key_and_kind() -> None:
    one, other = b"1" * 32, b"2" * 32
    assert pseudonym(one, "patient", "4711") == pseudonym(one, "patient", "4711")
    assert len({pseudonym(key, kind, "4711") for key in (one, other) for kind in ("patient", "series")}) == 4
    assert len(pseudonym(one, "patient", "4711")) == 16


def test_another_key_gives_other_hashes(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    site = read_site(file)
    ingest(site, workers=1)
    before = index(site)
    (tmp_path / "state" / "key").write_bytes(b"k" * 32)
    assert not ingest(site, workers=1).unchanged
    after = index(site)
    for column in ("patient", "series"):
        assert {row[column] for row in before}.isdisjoint({row[column] for row in after})


def test_no_identifier_is_in_any_byte_of_the_cache(hospitals: SmallHospitals) -> None:
    for name in hospitals.files:
        site = hospitals.site(name)
        identifiers = set()
        for path in find_files(site.images):
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            identifiers |= {str(ds.PatientID), str(ds.PatientName), str(ds.PatientName.family_name), path.parent.name}
            identifiers |= {str(element.value) for element in ds if element.VR == "UI" and element.tag.group != 8}
            identifiers |= {str(ds.SOPInstanceUID), str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID)}
        assert len(identifiers) > 50
        files = list(find_files(site.cache))
        assert len(files) == 4
        for path in files:
            content = path.read_bytes() if path.suffix != ".npy" else path.read_bytes()[:4096]
            assert [text for text in identifiers if text.encode() in content] == []


def test_one_split_per_patient_and_all_three_occur(hospitals: SmallHospitals) -> None:
    for name in ("hospital-01", "hospital-02"):
        cache = hospitals.cache(name)
        splits = {patient: set(cache.split[cache.patient == patient]) for patient in np.unique(cache.patient)}
        assert len(splits) == 10
        assert all(len(found) == 1 for found in splits.values())
    assert {split for name in ("hospital-01", "hospital-02") for split in hospitals.cache(name).split} == {
        "train",
        "val",
        "test",
    }


def test_two_series_of_one_patient_share_hash_and_split(tmp_path: Path) -> None:
    images = {
        str(n): {"series": f"1.2.{n}", "sop": f"1.2.9.{n}", "patient": "same" if n < 4 else "other"}
        for n in range(1, 5)
    }
    cache, report = ingested(make_site(tmp_path, images))
    assert (report.patients, report.series) == (2, 4)
    assert len(set(cache.patient[:3])) == 1
    assert cache.patient[3] != cache.patient[0]
    assert len(set(cache.split[:3])) == 1


@pytest.mark.parametrize("role", ["held-out", "development"])
def test_a_hospital_that_does_not_train_is_all_test(tmp_path: Path, role: str) -> None:
    images = {str(n): {"series": f"1.2.{n}", "sop": f"1.2.9.{n}", "patient": str(n)} for n in range(1, 13)}
    cache, _ = ingested(make_site(tmp_path, images, role=role))
    assert set(cache.split) == {"test"}


def test_a_change_of_role_is_noticed(copied_hospitals: SmallHospitals) -> None:
    edit_site(copied_hospitals.files["hospital-01"], role="held-out")
    assert not ingest(copied_hospitals.site("hospital-01"), workers=2).unchanged
    assert set(copied_hospitals.cache("hospital-01").split) == {"test"}


def test_the_splits_shares_are_kept() -> None:
    patients = [pseudonym(b"k" * 32, "patient", str(n)) for n in range(100)]
    for count in (1, 2, 10, 47, 100):
        splits = list(assign_splits(patients[:count], {}).values())
        for split, share in SPLIT_SHARES.items():
            assert abs(splits.count(split) - share * count) <= 1


def test_nobody_moves_when_patients_are_added() -> None:
    patients = [pseudonym(b"k" * 32, "patient", str(n)) for n in range(60)]
    first = assign_splits(patients[:40], {})
    later = assign_splits(patients, first)
    assert {patient: later[patient] for patient in first} == first
    assert assign_splits(reversed(patients), first) == later, "the order of files decides nothing"


def test_splits_outlive_the_cache(copied_hospitals: SmallHospitals) -> None:
    site, before = copied_hospitals.site("hospital-01"), copied_hospitals.cache("hospital-01")
    kept = json.loads((site.state / "splits.json").read_text())
    shutil.rmtree(site.cache)
    ingest(site, workers=1)
    after = copied_hospitals.cache("hospital-01")
    assert after.split.tolist() == before.split.tolist() == [kept[patient] for patient in after.patient]


# Doing it again


def test_an_unchanged_second_ingest_reads_nothing(tmp_path: Path) -> None:
    file = make_site(tmp_path, labels=HEADER + f"{SERIES},1.2.1,1\n")
    site = read_site(file)
    first = ingest(site, workers=1)
    before = {path: path.stat().st_mtime_ns for path in site.cache.iterdir()}
    for path in find_files(site.images):  # same size and time, other content: only a reader would notice
        stat = path.stat()
        path.write_bytes(b"\0" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    calls: list[int] = []
    second = ingest(site, workers=1, progress=lambda done, total: calls.append(done))
    assert second == replace(first, unchanged=True)
    assert (calls, before) == ([], {path: path.stat().st_mtime_ns for path in site.cache.iterdir()})


def _grow(root: Path) -> None:
    write_ct(root / "dicom" / "new", disc((2.0, 2.0), (100, 100)), spacing=(2.0, 2.0), position=(0, 0, 20), sop="1.2.4")


def _touch(root: Path) -> None:
    os.utime(root / "dicom" / "7", ns=(1, 1))


def _drop(root: Path) -> None:
    (root / "dicom" / "6").unlink()


def _relabel(root: Path) -> None:
    (root / "labels.csv").write_text(HEADER + f"{SERIES},1.2.1,0\n")


@pytest.mark.parametrize("change", [_grow, _touch, _drop, _relabel])
def test_a_changed_file_is_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    file = make_site(tmp_path, labels=HEADER + f"{SERIES},1.2.1,1\n")
    ingest(read_site(file), workers=1)
    change(tmp_path)
    cache, report = ingested(file)
    assert not report.unchanged
    assert len(cache.label) == {_grow: 4, _drop: 2}.get(change, 3)
    assert cache.label[0] == (0 if change is _relabel else 1)


def test_faults_are_shown_again(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    (tmp_path / "dicom" / "letter").write_text("Dear")
    for _ in range(2):
        report = ingest(read_site(file), workers=1)
        assert [fault.what for fault in report.faults] == ["letter"]


def test_leftovers_of_an_interrupted_ingest_are_harmless(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    partial = tmp_path / "cache.partial"
    partial.mkdir()
    (partial / "slices.npy").write_bytes(b"half")
    (partial / "slices.npy.cut").write_bytes(b"half")
    cache, report = ingested(file)
    assert (len(cache.label), report.slices) == (3, 3)
    assert not partial.exists()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        "cache.json",
        "index.csv",
        "masks.npy",
        "slices.npy",
    ]


def test_a_failed_ingest_leaves_the_old_cache(tmp_path: Path) -> None:
    file = make_site(tmp_path, labels=HEADER + f"{SERIES},1.2.1,1\n")
    before, _ = ingested(file)
    for path in find_files(tmp_path / "dicom"):
        spoil(path)
    with pytest.raises(IngestError):
        ingest(read_site(file), workers=1)
    np.testing.assert_array_equal(read_cache(tmp_path / "cache").hu, before.hu)


@pytest.mark.parametrize("name", ["slices.npy", "masks.npy", "index.csv", "cache.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_cache_is_written_anew(tmp_path: Path, name: str, damage: str) -> None:
    file = make_site(tmp_path)
    ingest(read_site(file), workers=1)
    path = tmp_path / "cache" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cache, report = ingested(file)
    assert (len(cache.label), report.unchanged) == (3, False)


@pytest.mark.parametrize("cache", [".", "dicom", "state"])
def test_a_cache_over_the_hospitals_own_files_is_refused(tmp_path: Path, cache: str) -> None:
    """The cache's folder is deleted and made anew; the hospital's images and key must survive a wrong site.yaml."""
    file = make_site(tmp_path, cache=cache)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "key").write_bytes(b"k" * 32)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="cache"):  # SiteError or IngestError
        ingest(read_site(file), workers=1)
    assert {path: path.read_bytes() for path in files if path.is_file()} == files


def test_progress_counts_every_series(tmp_path: Path) -> None:
    images = {str(n): {"series": f"1.2.{n}", "sop": f"1.2.9.{n}"} for n in range(1, 4)}
    calls: list[tuple[int, int]] = []
    ingest(read_site(make_site(tmp_path, images)), workers=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    images = {str(n): {"series": f"1.2.{n}", "sop": f"1.2.9.{n}", "patient": str(n)} for n in range(1, 6)}
    parts = []
    for workers in (1, 3):
        site = read_site(make_site(tmp_path, images, cache=f"cache-{workers}"))
        ingest(site, workers=workers)
        parts.append([(site.cache / name).read_bytes() for name in ("slices.npy", "masks.npy", "index.csv")])
    assert parts[0] == parts[1]
