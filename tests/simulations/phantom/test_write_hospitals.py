from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from client.dicom.headers import CtSlice, read_images
from client.dicom.pixels import PADDING_HU, read_hu
from client.dicom.pseudonyms import Pseudonyms
from shared.site import read_site
from simulations.phantom.dicom_export import TRANSFER_SYNTAXES, ct_image, uid
from simulations.phantom.hospitals import HOSPITALS, Hospital
from simulations.phantom.patient import sample_case
from simulations.phantom.render import render_slice
from simulations.phantom.write_hospitals import write_hospitals
from tests.support.cohorts import bleeding

SEED = 7
# One per transfer syntax: 1 explicit, 2 rle, 3 jpeg2000 (signed, tilted), 4 implicit, 5 jpegls, 8 deflated.
SMALL = tuple(bleeding(HOSPITALS[n - 1], 1, 2) for n in (1, 2, 3, 4, 5, 8))

# PS3.3 A.3.3: modules of the CT Image IOD that are mandatory. Type 1 must have a value, type 2 must be there.
TYPE_1 = [
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "Modality",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ImageType",
    "RescaleIntercept",
    "RescaleSlope",
    "PixelData",
]
TYPE_2 = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "SeriesNumber",
    "Manufacturer",
    "PositionReferenceIndicator",
    "InstanceNumber",
    "SliceThickness",
    "KVP",
    "AcquisitionNumber",
    "PatientPosition",
]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def dataset(path: Path) -> pydicom.Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


def header(path: Path) -> CtSlice:
    (image,) = read_images(path, Pseudonyms(b"k" * 32))
    return image


def images(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "dicom").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    write_hospitals(root, SEED, SMALL, workers=2)
    return root


def test_eleven_hospitals_of_which_four_train() -> None:
    assert [h.number for h in HOSPITALS] == list(range(1, 12))
    assert [h.role for h in HOSPITALS] == ["train"] * 4 + ["held-out"] * 7
    assert HOSPITALS[2].name == "hospital-03"


def test_scanners_differ_between_any_two_hospitals() -> None:
    for one, other in combinations(HOSPITALS, 2):
        assert one.scanner != other.scanner, (one.name, other.name)


def test_every_transfer_syntax_is_written_by_some_hospital() -> None:
    assert {h.transfer_syntax for h in HOSPITALS} == set(TRANSFER_SYNTAXES)


def test_same_seed_same_bytes(written: Path, tmp_path: Path) -> None:
    again = (SMALL[0], SMALL[4])
    write_hospitals(tmp_path, SEED, again, workers=1)
    assert len(hashes(tmp_path)) >= 2 * 7
    assert hashes(tmp_path) == {
        name: value for name, value in hashes(written).items() if name.split("/")[0] in {h.name for h in again}
    }


def test_another_seed_gives_another_patient(written: Path, tmp_path: Path) -> None:
    write_hospitals(tmp_path, SEED + 1, SMALL[:1], workers=1)
    one, other = ({header(p).image for p in images(r / "hospital-01")} for r in (written, tmp_path))
    assert len(one) == len(other) == 2
    assert not one & other
    pixels = [{read_hu(header(p)).tobytes() for p in images(r / "hospital-01")} for r in (written, tmp_path)]
    assert not pixels[0] & pixels[1]


def test_patients_of_two_hospitals_differ(written: Path) -> None:
    series = {header(p).series for h in SMALL for p in images(written / h.name)}
    assert len(series) == len(SMALL)


def test_a_second_call_writes_nothing(tmp_path: Path) -> None:
    files = write_hospitals(tmp_path, SEED, SMALL[:1], workers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_hospitals(tmp_path, SEED, SMALL[:1], workers=1) == files
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("fault", ["no stamp", "other seed", "other declaration"])
def test_a_folder_without_its_stamp_is_written_anew(tmp_path: Path, fault: str) -> None:
    write_hospitals(tmp_path, SEED, SMALL[:1], workers=1)
    whole = hashes(tmp_path)
    images(tmp_path / "hospital-01")[0].unlink()
    stamp = tmp_path / "hospital-01" / "phantom.json"
    if fault == "no stamp":
        stamp.unlink()
    else:
        changed = {"seed": 99} if fault == "other seed" else {"maker": "Other"}
        stamp.write_text(json.dumps(json.loads(stamp.read_text()) | changed, sort_keys=True, indent=1))
    write_hospitals(tmp_path, SEED, SMALL[:1], workers=1)
    assert hashes(tmp_path) == whole


@pytest.mark.parametrize("hospital", SMALL, ids=lambda h: f"{h.name}-{h.transfer_syntax}")
def test_images_are_valid_ct(written: Path, hospital: Hospital) -> None:
    assert len(images(written / hospital.name)) == 2
    for path in images(written / hospital.name):
        ds = pydicom.dcmread(path)
        assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == CTImageStorage
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
        assert ds.PatientID.startswith(hospital.name)
        image = header(path)
        step = hospital.scanner.field_of_view_mm / 512
        assert image.spacing_mm == pytest.approx((step, step), abs=1e-5)
        tilt = np.deg2rad(hospital.scanner.tilt_degree)
        assert image.row_direction == (1, 0, 0)
        assert image.column_direction == pytest.approx((0, np.cos(tilt), np.sin(tilt)), abs=1e-6)


def test_images_have_every_attribute_that_ct_must_have(written: Path) -> None:
    for hospital in SMALL:
        for path in images(written / hospital.name):
            ds = pydicom.dcmread(path)
            assert [key for key in TYPE_1 if ds.get(key) in (None, "")] == []
            assert [key for key in TYPE_2 if key not in ds] == []


def test_every_transfer_syntax_is_the_one_declared(written: Path) -> None:
    expected = {
        "hospital-01": ExplicitVRLittleEndian,
        "hospital-02": RLELossless,
        "hospital-03": JPEG2000Lossless,
        "hospital-04": ImplicitVRLittleEndian,
        "hospital-05": JPEGLSLossless,
        "hospital-08": DeflatedExplicitVRLittleEndian,
    }
    found = {n: {pydicom.dcmread(p).file_meta.TransferSyntaxUID for p in images(written / n)} for n in expected}
    assert found == {name: {syntax} for name, syntax in expected.items()}


def test_slices_lie_one_spacing_apart(written: Path) -> None:
    for hospital in SMALL:
        positions = [header(p).position_mm for p in images(written / hospital.name)]
        step = np.abs(np.subtract(*positions))
        assert step == pytest.approx((0, 0, hospital.scanner.spacing_mm), abs=1e-3)


@pytest.mark.parametrize("hospital", SMALL, ids=lambda h: f"{h.name}-{h.transfer_syntax}")
def test_every_transfer_syntax_decodes_to_the_rendered_hu(hospital: Hospital, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rendered = render_slice(sample_case(rng, hospital.cohort).patient, hospital.scanner, 6.0, rng)
    ct_image(hospital, 0, 0, 0, 1.5, rendered).save_as(tmp_path / "image", enforce_file_format=True)
    expected_YX = rendered.hu_YX if header(tmp_path / "image").signed else np.maximum(rendered.hu_YX, -1024)
    hu_YX = read_hu(header(tmp_path / "image"))
    np.testing.assert_array_equal(hu_YX[hu_YX != PADDING_HU], expected_YX[hu_YX != PADDING_HU])
    assert (hu_YX != PADDING_HU).mean() > 0.7


@pytest.mark.parametrize("signed", [True, False])
def test_padding_is_declared_as_it_is_stored(signed: bool, tmp_path: Path) -> None:
    hospital = replace(HOSPITALS[8], signed=signed)
    rng = np.random.default_rng(3)
    rendered = render_slice(sample_case(rng, hospital.cohort).patient, hospital.scanner, 0.0, rng)
    ct_image(hospital, 0, 0, 0, 0.0, rendered).save_as(tmp_path / "image", enforce_file_format=True)
    ds = pydicom.dcmread(tmp_path / "image")
    assert ds.pixel_array[0, 0] == ds.PixelPaddingValue
    assert read_hu(header(tmp_path / "image"))[0, 0] == PADDING_HU


def test_segmentation_opens_with_highdicom_and_refers_to_the_images(written: Path) -> None:
    outlined = []
    for hospital in SMALL:
        folder = written / hospital.name
        headers = {str(dataset(p).SOPInstanceUID): header(p) for p in images(folder)}
        (path,) = sorted((folder / "masks").iterdir())
        seg = highdicom.seg.segread(path)
        assert seg.segmentation_type == highdicom.seg.SegmentationTypeValues.BINARY
        assert [d.segment_label for d in seg.SegmentSequence] == ["Hematoma"]
        (series,) = seg.ReferencedSeriesSequence
        assert {series.SeriesInstanceUID} == {dataset(p).SeriesInstanceUID for p in images(folder)}
        assert {i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence} == headers.keys()
        assert {seg.FrameOfReferenceUID} == {dataset(p).FrameOfReferenceUID for p in images(folder)}
        assert (seg.Rows, seg.Columns) == (512, 512)
        for instance in headers:
            (mask_YX,) = seg.get_pixels_by_source_instance(
                [instance], combine_segments=True
            )  # of every image, empty or not
            outlined.append(read_hu(headers[instance])[mask_YX > 0])
    assert 35 < np.concatenate(outlined).mean() < 75  # the masks lie on the clots


def test_labels_speak_of_every_image(written: Path) -> None:
    for hospital in SMALL:
        table = list(csv.DictReader((written / hospital.name / "labels.csv").read_text().splitlines()))
        found = [dataset(p) for p in images(written / hospital.name)]
        assert {(r["series_uid"], r["sop_uid"]) for r in table} == {
            (d.SeriesInstanceUID, d.SOPInstanceUID) for d in found
        }
        assert {r["hypodensity"] for r in table} <= {"0", "1", ""}


def test_site_yaml_is_read_as_written(written: Path) -> None:
    for hospital in SMALL:
        site = read_site(written / hospital.name / "site.yaml")
        assert (site.name, site.role) == (hospital.name, hospital.role)
        assert (site.state / "key").stat().st_mode & 0o077 == 0


def test_uids_follow_from_their_parts_and_are_valid() -> None:
    assert uid(1, "a") == uid(1, "a") != uid(1, "b")
    for part in range(20):
        made = uid(part)
        assert UID(made).is_valid
        # PS3.5 B.2: below 2.25 stands a UUID as one decimal number, 128 bits.
        assert made.startswith("2.25.")
        assert int(made.removeprefix("2.25.")) < 2**128
