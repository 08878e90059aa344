"""No name, date or identifier of a patient is in anything that a command writes or says.

Identifiers that nothing else can contain are planted wherever DICOM has a place for them, in whole and in damaged files,
in names of files and folders and in the label table; the real commands are run, and every byte of what they leave is
searched.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import signal
import string
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import highdicom
import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.sr.codedict import codes
from pydicom.tag import Tag

from client.ingest.store import read_journal
from tests.support.dicom_files import ct_dataset
from tests.support.small_sites import (
    CLIENT,
    ROOT,
    SIDE,
    SPACING_MM,
    contents,
    make_site,
    patients,
    tiny_head,
    write_images,
)

FAMILY, GIVEN, OTHER_NAME, STAFF = "Zwiebelfisch", "Ottokarina", "Quastenflosser", "Knollenblatt"
PATIENT_ID, OTHER_ID, ACCESSION, STATION = "PXQ-884127", "KVNR-X99431207", "ACCQ5512098", "STATQVEST7"
BIRTH_DATE, STUDY_DATE, STUDY_TIME = "19470613", "20231127", "041559.731"
INSTITUTION, SERIES_TEXT, PRIVATE, COMMENT = (
    "Klinikum Wolkenkuckucksheim",
    "SchaedelNativVomMontag",
    "geheimratsecken",
    "lumpensammler",
)
FOLDER, FILE = "Trompetenkaefer", "Nachtigallenweg_13-06-1947"
ROOT_UID = "1.3.6.1.4.1.77191.60504"
STUDY, SERIES, FRAME, SEG_UID = (f"{ROOT_UID}.{n}8083" for n in (1, 2, 3, 4))

WORDS = (
    FAMILY, GIVEN, OTHER_NAME, STAFF, PATIENT_ID, OTHER_ID, ACCESSION, STATION, SERIES_TEXT, PRIVATE, COMMENT, FOLDER,
    "Nachtigallenweg", *INSTITUTION.split(),
)  # fmt: skip
DATES = (BIRTH_DATE, STUDY_DATE, STUDY_TIME, "1947-06-13", "2023-11-27", "13-06-1947", "13.06.1947", "27.11.2023")
PART = 6  # characters of a word that would give it away


def needles() -> set[bytes]:
    """Every part of the planted words, dates and UIDs in ASCII and UTF-16, lower case; and their plain hashes."""
    texts = {word[i : i + PART] for word in WORDS for i in range(len(word) - PART + 1)}
    texts -= {text for text in texts if set(text.lower()) <= set(string.hexdigits)}  # by chance in any hash
    texts |= {*WORDS, *DATES, ROOT_UID, ROOT_UID[-11:]}
    for identifier in (PATIENT_ID, f"{FAMILY}^{GIVEN}", STUDY, SERIES, f"{SERIES}.1", BIRTH_DATE):
        texts |= {hashlib.new(name, identifier.encode()).hexdigest()[:16] for name in ("sha256", "sha1", "md5")}
    return {text.lower().encode(encoding) for text in texts for encoding in ("ascii", "utf-16-le", "utf-16-be")}


BY_HEAD = defaultdict(list)  # their first six bytes -> needles
for _needle in needles():
    BY_HEAD[_needle[:PART]].append(_needle)
HEADS = np.sort([int.from_bytes(head, "little") for head in BY_HEAD]).astype(np.uint64)


def leaks(content: bytes) -> list[bytes]:
    """The needles in some bytes, whatever their case; pictures in a page are searched as the files that they are."""
    lower = re.sub(rb"base64,([A-Za-z0-9+/=]+)", lambda found: base64.b64decode(found[1]), content).lower()
    data = np.frombuffer(lower + bytes(PART), np.uint8).astype(np.uint64)
    windows = sum(data[i : len(lower) + i] << np.uint64(8 * i) for i in range(PART))
    near = np.searchsorted(HEADS, windows).clip(max=len(HEADS) - 1)
    places = np.nonzero(HEADS[near] == windows)[0]
    return sorted({n for at in places for n in BY_HEAD[lower[at : at + PART]] if lower.startswith(n, at)})


def plant(ds: Dataset) -> Dataset:
    """Identifiers wherever there is a place for them."""
    ds.PatientName, ds.PatientID = f"{FAMILY}^{GIVEN}", PATIENT_ID
    ds.OtherPatientNames, ds.OtherPatientIDs, ds.PatientBirthName = OTHER_NAME, OTHER_ID, OTHER_NAME
    ds.PatientBirthDate, ds.PatientAddress, ds.PatientComments = BIRTH_DATE, FOLDER, COMMENT
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = ds.InstanceCreationDate = STUDY_DATE
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = STUDY_TIME
    ds.AccessionNumber, ds.StudyID, ds.StudyDescription = ACCESSION, "ACCQ55", f"{OTHER_NAME} CT"
    ds.SeriesDescription, ds.ProtocolName, ds.ImageComments = SERIES_TEXT, SERIES_TEXT, COMMENT
    ds.InstitutionName, ds.InstitutionAddress, ds.StationName = INSTITUTION, INSTITUTION, STATION
    ds.ReferringPhysicianName = ds.PerformingPhysicianName = ds.OperatorsName = ds.RequestingPhysician = (
        f"{STAFF}^{GIVEN}"
    )
    ds.DeviceSerialNumber, ds.ContrastBolusAgent = STATION, ""
    ds.PatientSex, ds.PatientAge = "F", "076Y"
    item = Dataset()
    item.PatientID, item.IssuerOfPatientID = OTHER_ID, INSTITUTION
    ds.OtherPatientIDsSequence = [item]
    block = ds.private_block(0x0009, PRIVATE, create=True)
    block.add_new(0x01, "LO", f"{FAMILY}, {GIVEN}")
    block.add_new(0x02, "UN", f"{PATIENT_ID} {BIRTH_DATE}".encode())
    return ds


def image(number: int, series: str = SERIES, study: str = STUDY, **changes: object) -> Dataset:
    ds = ct_dataset(
        tiny_head(40 + number),
        position=(0.0, 0.0, 5.0 * number),
        spacing=(SPACING_MM, SPACING_MM),
        series=series,
        sop=f"{series}.{number}",
        StudyInstanceUID=study,
        FrameOfReferenceUID=FRAME,
    )
    plant(ds)
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return ds


def segmentation(images: list[Dataset], **changes: object) -> Dataset:
    mask_NYX = np.zeros((len(images), SIDE, SIDE), np.uint8)
    mask_NYX[:, 20:24, 20:24] = 1
    description = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Hematoma",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Hematoma,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
    )
    seg = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=mask_NYX,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description],
        series_instance_uid=f"{SEG_UID}.1",
        series_number=1,
        sop_instance_uid=f"{SEG_UID}.2",
        instance_number=1,
        manufacturer="maker",
        manufacturer_model_name="model",
        software_versions="1",
        device_serial_number=STATION,
    )
    plant(seg)
    seg.ContentCreatorName = f"{STAFF}^{GIVEN}"
    for keyword, value in changes.items():
        setattr(seg, keyword, value)
    return seg


def save(ds: Dataset, path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path.read_bytes()


def damaged(whole: bytes) -> list[bytes]:
    """Cuts, flipped bits and doubled pieces of a file, and values that are none."""
    rng = np.random.default_rng(0)
    found = [whole[:n] for n in np.linspace(100, len(whole) - 1, 12).astype(int)]
    head = len(whole) - 2 * SIDE * SIDE
    for _ in range(40):
        spoiled = bytearray(whole)
        for place in rng.integers(132, max(200, head), 3):
            spoiled[place] ^= 1 << int(rng.integers(8))
        found.append(bytes(spoiled))
    for _ in range(8):
        first, last = sorted(rng.integers(132, len(whole), 2))
        found.append(whole[:last] + whole[first:])
    found += [whole[132:], whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1)]
    found.append(whole.replace(FAMILY.encode(), b"\xff\xfe\x1b$B" + FAMILY[5:].encode()))
    return found


NONSENSE = {
    "PixelSpacing": f"{FAMILY}\\1",
    "ImagePositionPatient": f"{GIVEN}\\0\\0",
    "RescaleSlope": FAMILY,
    "SliceThickness": OTHER_NAME,
    "GantryDetectorTilt": f"{FAMILY} {GIVEN}",
    "SOPInstanceUID": f"{FAMILY}.{GIVEN}",
    "SeriesInstanceUID": f"{ROOT_UID}.{FAMILY}",
    "SOPClassUID": f"{ROOT_UID}.99",
    "StudyDate": f"{FAMILY}",
    "SpecificCharacterSet": "ZWIEBELFISCH",
    "PatientID": f"{PATIENT_ID}\\{OTHER_ID}",
    "BurnedInAnnotation": "YES",
    "LossyImageCompression": "01",
}


def planted_site(root: Path) -> None:
    """Three good series, one of them with masks, among files that are spoiled in every way."""
    images = root / "dicom" / f"{FAMILY}_{GIVEN}_{BIRTH_DATE}"
    masks = root / "masks" / FOLDER
    series = [image(n) for n in (1, 2, 3)]
    whole, *_ = [save(ds, images / f"{FILE}.{n}") for n, ds in enumerate(series)]
    others = {
        patient: [image(n, f"{SERIES}.{patient}", f"{STUDY}.{patient}") for n in (1, 2)] for patient in (5, 6, 7, 67)
    }
    for patient, datasets in others.items():
        for n, ds in enumerate(datasets):
            ds.PatientID = f"{PATIENT_ID}.{patient}"
            save(ds, images / FOLDER / f"{patient} {n}")
    save(image(1, f"{SERIES}.8"), images / "another series of the study")
    save(image(9, f"{SERIES}.9", f"{STUDY}.9"), images / "one of two patients")
    save(image(8, f"{SERIES}.9", f"{STUDY}.9", PatientID=OTHER_ID), images / "two of two patients")
    spoiled = save(image(1, f"{SERIES}.66", f"{STUDY}.66"), images / "to be damaged")
    for n, content in enumerate(damaged(spoiled)):
        (images / f"{FILE} damaged {n}").write_bytes(content)
    for number, (keyword, value) in enumerate(NONSENSE.items()):
        ds = image(1, f"{ROOT_UID}.{number}", f"{STUDY}.70{number}")
        raw = value.encode() + b" " * (len(value) % 2)  # as a broken exporter writes it, unchecked
        ds[keyword] = RawDataElement(Tag(keyword), dictionary_VR(keyword), len(raw), raw, 0, False, True)
        save(ds, images / f"{OTHER_NAME} {keyword}")
    (images / f"{FAMILY}.txt").write_text(f"Dear {STAFF}, {FAMILY} was born {BIRTH_DATE}")
    (images / f"{FAMILY}.link").symlink_to(FILE)
    (images / f".{FAMILY}").touch()
    (images / "twice").write_bytes(whole)
    (images / f"{GIVEN}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + COMMENT.encode())
    save(segmentation(series), masks / f"{FAMILY}.dcm")
    for n, content in enumerate(damaged(save(segmentation(others[67]), masks / "to be damaged"))):
        (masks / f"{FILE} damaged {n}").write_bytes(content)
    save(segmentation(others[7], FrameOfReferenceUID=f"{FRAME}.9"), masks / "another frame")
    absent = [image(n, f"{SERIES}.77") for n in (1, 2)]
    save(segmentation(absent), masks / "of absent images")
    Image.fromarray(np.ones((SIDE, SIDE), np.uint8)).save(masks / f"{SERIES}.5.1.png")
    Image.fromarray(np.ones((9, 9), np.uint8)).save(masks / f"{SERIES}.6.1.png")
    Image.fromarray(np.ones((9, 9), np.uint8)).save(masks / f"{FAMILY}.png")
    (masks / f"{FAMILY}.nii").write_bytes(f"{FAMILY} {GIVEN}".encode())
    lines = [
        f"{SERIES},{SERIES}.1,1",
        f"{SERIES}.5,{SERIES}.5.1,0",
        f"{SERIES}.404,{ROOT_UID}.4,1",
        f"{SERIES},{ROOT_UID}.5,0",
    ]
    table = "series_uid,sop_uid,hypodensity,comment\n" + "".join(f"{line},{COMMENT} {FAMILY}\n" for line in lines)
    make_site(root, {}, labels=table, data={"masks": "masks"})


def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*CLIENT, *map(str, arguments)], cwd=ROOT, capture_output=True, check=False)


def outputs(root: Path, *names: str) -> dict[str, bytes]:
    """Everything that the commands have written."""
    written = {
        n: c for n, c in contents(root).items() if not n.startswith(("dicom/", "masks/", "site.yaml", "labels.csv"))
    }
    assert {name.partition("/")[0] for name in written} == set(names)
    return written


def assert_silent(root: Path, result: subprocess.CompletedProcess[bytes], *names: str) -> None:
    found = {name: leaks(content) for name, content in outputs(root, *names).items()}
    found |= {"stdout": leaks(result.stdout), "stderr": leaks(result.stderr)}
    assert {name: parts for name, parts in found.items() if parts} == {}
    assert [name for name in outputs(root, *names) if leaks(name.encode())] == []


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the planted hospital; not to be changed."""
    root = tmp_path_factory.mktemp("planted")
    planted_site(root)
    return root


@pytest.fixture
def hospital(planted: Path, tmp_path: Path) -> Path:
    shutil.copytree(planted, tmp_path / "hospital", symlinks=True)
    return tmp_path / "hospital"


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of what is planted
def test_the_search_finds_what_is_planted(planted: Path) -> None:
    files = {
        name: content
        for name, content in contents(planted).items()
        if name.startswith("dicom/") and "damaged" not in name
    }
    assert len([name for name, content in files.items() if leaks(content)]) > 20
    for text in (f"... {FAMILY.upper()[2:9]} ...", "born 13.06.1947", f"uid {SERIES}.404", COMMENT[3:]):
        assert leaks(text.encode()) != []
        assert leaks(text.encode("utf-16")) != []
    assert leaks(hashlib.sha256(PATIENT_ID.encode()).hexdigest().encode()) != []


def test_ingest_names_nobody(hospital: Path) -> None:
    result = run("ingest", hospital / "site.yaml", "--workers", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert b": 1 with the marker, " in result.stdout
    assert b"another frame of reference" in result.stdout
    assert result.stdout.count(b"left out") > 15
    assert result.stderr == b""
    again = run("ingest", hospital / "site.yaml")
    assert b"(unchanged)" in again.stdout
    assert leaks(again.stdout + again.stderr) == []
    assert_silent(hospital, result, "cache", "state")


def test_a_refused_ingest_names_nobody(hospital: Path) -> None:
    table = (hospital / "labels.csv").read_text()
    (hospital / "labels.csv").write_text(table + f"{SERIES},{SERIES}.1,0,{COMMENT}\n")
    result = run("ingest", hospital / "site.yaml", "--workers", 2)
    assert result.returncode == 1
    assert b"different labels for one slice" in result.stdout
    assert_silent(hospital, result, "cache.partial", "state")


def test_a_killed_ingest_leaves_nobodys_name(hospital: Path) -> None:
    write_images(hospital / "dicom", patients(*range(20, 140)))  # so that it takes a while
    partial = hospital / "cache.partial"
    process = subprocess.Popen(
        [*CLIENT, "ingest", str(hospital / "site.yaml"), "--workers", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not read_journal(partial):
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    stdout, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was too fast to be killed"
    result = subprocess.CompletedProcess([], 0, stdout, stderr)
    assert_silent(hospital, result, "cache.partial", "state")
    assert {"files.jsonl", "parts.jsonl", "slices.npy"} <= {path.name for path in partial.iterdir()}


def test_check_names_nobody(hospital: Path) -> None:
    result = run("check", hospital / "site.yaml", "--workers", 2)
    assert result.returncode == 1, result.stdout + result.stderr
    assert b"not ready" in result.stdout
    assert_silent(hospital, result, "check.html", "check.json")
