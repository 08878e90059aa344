"""Eleven hospitals on disk, as their PACS would export them.

Each hospital is one declaration below: who comes, what scans them, how the files are written. Written are valid DICOM CT
series, DICOM SEG masks, a label table and site.yaml; a simulated hospital takes the same way through the reader as a
real export. The same seed gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import highdicom
import numpy as np
import yaml
from pydicom import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
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

from simulations.phantom import Cohort, Scanner, Slice, render_slice, sample_patient

VERSION = 1  # of what is written; a folder of another version is written anew
_DATE, _TIME = "20240101", "120000"
TRANSFER_SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg2000": JPEG2000Lossless,
    "jpegls": JPEGLSLossless,
}


@dataclass(frozen=True)
class Hospital:
    """One simulated hospital.

    Attributes:
      number: 1 to 11; gives the name.
      role: train or held-out.
      patients: how many; one series each.
      scanner, cohort: what scans them, and who they are.
      maker: Manufacturer in the files.
      transfer_syntax: a key of TRANSFER_SYNTAXES.
      slices: per series, around the hematoma.
      signed: stored as signed HU with intercept 0, not as unsigned with -1024.
    """

    number: int
    role: str
    patients: int
    scanner: Scanner
    cohort: Cohort
    maker: str
    transfer_syntax: str = "explicit"
    slices: int = 6
    signed: bool = False

    @property
    def name(self) -> str:
        """Folder and site name, such as hospital-03."""
        return f"hospital-{self.number:02d}"


_SCANNER, _COHORT = Scanner(), Cohort()


def _trains(number: int, maker: str, syntax: str, scanner: dict, cohort: dict, **other) -> Hospital:
    return Hospital(
        number, "train", 64, replace(_SCANNER, **scanner), replace(_COHORT, **cohort), maker, syntax, **other
    )


def _held_out(number: int, maker: str, syntax: str, scanner: dict, cohort: dict, **other) -> Hospital:
    return Hospital(
        number, "held-out", 16, replace(_SCANNER, **scanner), replace(_COHORT, **cohort), maker, syntax, **other
    )


# Hospitals 1 to 4 train. 5 to 11 lie outside of what they cover, each for its own reason: sharp and noisy; old, thick
# slices; thin slices; miscalibrated and old patients; another field of view and prevalence; tilt and pose; smooth kernel.
HOSPITALS = (
    _trains(1, "Northlight", "explicit", {}, {}),
    _trains(
        2,
        "Meridian",
        "rle",
        {
            "field_of_view_mm": 245,
            "noise_hu": 3.4,
            "noise_peak_per_mm": 0.26,
            "blur_mm": 0.55,
            "offset_hu": 2,
            "holder_hu": 300,
        },
        {"atrophy": 1.3, "prevalence": 0.45},
    ),
    _trains(
        3,
        "Meridian",
        "jpeg2000",
        {"noise_hu": 2.3, "blur_mm": 0.8, "cupping_hu": 9, "padding_hu": -2000, "tilt_degree": -15},
        {"prevalence": 0.55, "lesion_radius_mm": 21},
        signed=True,
    ),
    _trains(
        4,
        "Kestrel",
        "implicit",
        {"field_of_view_mm": 220, "offset_hu": -3, "noise_hu": 3.0, "holder_hu": 0},
        {"lobar": 0.6, "pose_degree": 8},
    ),
    _held_out(5, "Kestrel", "jpegls", {"noise_hu": 4.2, "noise_peak_per_mm": 0.3, "blur_mm": 0.5}, {}),
    _held_out(6, "Oldham", "explicit", {"thickness_mm": 10, "spacing_mm": 10, "noise_hu": 1.8}, {}, slices=4),
    _held_out(
        7,
        "Northlight",
        "jpeg2000",
        {"thickness_mm": 2.5, "spacing_mm": 2.5, "noise_hu": 4.4},
        {"lesion_radius_mm": 16},
        slices=8,
    ),
    _held_out(8, "Oldham", "deflated", {"offset_hu": 7, "cupping_hu": 11}, {"atrophy": 1.7}),
    _held_out(
        9,
        "Meridian",
        "rle",
        {"offset_hu": -6, "field_of_view_mm": 250, "padding_hu": -3024},
        {"prevalence": 0.6},
        signed=True,
    ),
    _held_out(10, "Kestrel", "explicit", {"tilt_degree": -22, "holder_hu": 600}, {"pose_degree": 14}),
    _held_out(
        11,
        "Aster",
        "jpeg2000",
        {"blur_mm": 0.95, "noise_peak_per_mm": 0.14, "noise_hu": 2.0},
        {"atrophy": 0.6, "lesion_radius_mm": 23, "prevalence": 0.35},
    ),
)


def write_hospitals(
    root: Path,
    seed: int,
    hospitals: tuple[Hospital, ...] = HOSPITALS,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Path]:
    """Write hospitals, unless they are there.

    Args:
      root: parent of one folder per hospital.
      seed: decides every byte.
      hospitals: which.
      workers: processes; by default one per core.
      progress: told hospital, patients done and patients in all.
    Returns:
      The site.yaml of each hospital.
    """
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        for hospital in hospitals:
            folder = root / hospital.name
            stamp = folder / "phantom.json"
            content = json.dumps({"version": VERSION, "seed": seed, **asdict(hospital)}, sort_keys=True, indent=1)
            if stamp.is_file() and stamp.read_text() == content:
                progress(hospital.name, hospital.patients, hospital.patients)
                continue
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "dicom").mkdir(parents=True)
            (folder / "masks").mkdir()
            jobs = [(folder, hospital, seed, number) for number in range(hospital.patients)]
            labels = []
            for done, rows in enumerate(pool.map(_write_patient, jobs, chunksize=2), start=1):
                labels += rows
                progress(hospital.name, done, hospital.patients)
            _write_tables(folder, hospital, seed, labels)
            stamp.write_text(content)  # last: a folder without it is written anew
    return [root / hospital.name / "site.yaml" for hospital in hospitals]


def uid(*parts: object) -> str:
    """A UID made from names, derived from a UUID (PS3.5 B.2): the same parts give the same UID."""
    digest = hashlib.sha256("/".join(map(str, ("hemafed", *parts))).encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")


def _write_patient(job: tuple[Path, Hospital, int, int]) -> list[tuple[str, str, str]]:
    """One patient's series and mask; returns label rows (series, image, label)."""
    folder, hospital, seed, number = job
    rng = np.random.default_rng([seed, hospital.number, number])
    patient = sample_patient(rng, hospital.cohort)
    series_uid = uid(seed, hospital.name, number, "series")
    place = folder / "dicom" / f"{hashlib.sha256(series_uid.encode()).hexdigest()[:8]}"
    place.mkdir()
    rows, images, masks = [], [], []
    for index in range(hospital.slices):
        z_mm = patient.lesion_centre_mm[2] + (index - (hospital.slices - 1) / 2) * hospital.scanner.spacing_mm
        rendered = render_slice(patient, hospital.scanner, z_mm, rng)
        image = ct_image(hospital, seed, number, index, z_mm, rendered)
        image.save_as(place / f"IM{index:04d}", enforce_file_format=True)
        images.append(image)
        masks.append(rendered.hematoma_YX)
        rows.append((series_uid, str(image.SOPInstanceUID), "" if rendered.label is None else str(rendered.label)))
    if any(mask.any() for mask in masks):
        seg = segmentation(images, np.stack(masks), hospital, seed, number)
        seg.save_as(folder / "masks" / f"{place.name}.dcm", enforce_file_format=True)
    return rows


def ct_image(hospital: Hospital, seed: int, number: int, index: int, z_mm: float, rendered: Slice) -> Dataset:
    """One CT image (PS3.3 A.3), encoded in the hospital's transfer syntax."""
    scanner = hospital.scanner
    tilt = np.deg2rad(scanner.tilt_degree)
    step = scanner.field_of_view_mm / rendered.hu_YX.shape[0]
    first = (step - scanner.field_of_view_mm) / 2
    down = np.array([0.0, np.cos(tilt), np.sin(tilt)])
    # The slice's centre lies on the table's axis at z; its rows follow the gantry's tilt.
    corner = np.array([first, 0.0, z_mm]) + first * down
    intercept = 0 if hospital.signed else -1024
    stored = rendered.hu_YX.astype(np.int32) - intercept
    signed = hospital.signed or stored.min() < 0

    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = uid(seed, hospital.name, number, index)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = _DATE
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = _TIME
    ds.AccessionNumber = ""
    ds.Modality = "CT"
    ds.Manufacturer = hospital.maker
    ds.ManufacturerModelName = "Phantom"
    ds.ReferringPhysicianName = ""
    ds.SeriesDescription = "HEAD W/O BRAIN"
    ds.PatientName = f"Phantom^{hospital.number:02d}{number:03d}"
    ds.PatientID = f"{hospital.name}-{number:03d}"
    ds.PatientBirthDate = ""
    ds.PatientSex = ""
    ds.BodyPartExamined = "HEAD"
    ds.SliceThickness = scanner.thickness_mm
    ds.KVP = 120
    ds.GantryDetectorTilt = scanner.tilt_degree
    ds.ConvolutionKernel = f"H{round(100 * scanner.noise_peak_per_mm)}"
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = uid(seed, hospital.name, number, "study")
    ds.SeriesInstanceUID = uid(seed, hospital.name, number, "series")
    ds.FrameOfReferenceUID = uid(seed, hospital.name, number, "frame")
    ds.StudyID = "1"
    ds.SeriesNumber = 2
    ds.AcquisitionNumber = 1
    ds.InstanceNumber = hospital.slices - index  # head to feet, as scanners number; the reader must not rely on it
    ds.PositionReferenceIndicator = ""
    ds.ImagePositionPatient = [f"{v:.4f}" for v in corner]
    ds.ImageOrientationPatient = ["1", "0", "0", "0", f"{np.cos(tilt):.8f}", f"{np.sin(tilt):.8f}"]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = rendered.hu_YX.shape
    ds.PixelSpacing = [f"{step:.6f}", f"{step:.6f}"]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(signed)
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = intercept, 1, "HU"
    if scanner.padding_hu is not None:
        ds.add_new("PixelPaddingValue", "SS" if signed else "US", int(scanner.padding_hu) - intercept)
    ds.WindowCenter, ds.WindowWidth = 40, 80
    pixels = stored.astype(np.int16 if signed else np.uint16)
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = _file_meta(ds.SOPClassUID, ds.SOPInstanceUID)
    syntax = TRANSFER_SYNTAXES[hospital.transfer_syntax]
    if syntax.is_encapsulated:
        ds.compress(syntax, pixels, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


def _file_meta(sop_class: str, sop_instance: str) -> FileMetaDataset:
    """File meta information (PS3.10 7.1), little endian explicit until compressed."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = sop_instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = uid("implementation")
    return meta


def segmentation(images: list[Dataset], masks_NYX: np.ndarray, hospital: Hospital, seed: int, number: int) -> Dataset:
    """The reader's mask of one series as DICOM SEG, BINARY, empty frames left out (PS3.3 A.51)."""
    description = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Hematoma",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Hematoma,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
    )
    plain = [_uncompressed_header(image) for image in images]
    seg = highdicom.seg.Segmentation(
        source_images=plain,
        pixel_array=masks_NYX.astype(np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description],
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=[float(v) for v in images[0].PixelSpacing],
            slice_thickness=hospital.scanner.thickness_mm,
            spacing_between_slices=hospital.scanner.spacing_mm,
        ),
        series_instance_uid=uid(seed, hospital.name, number, "seg-series"),
        series_number=100,
        sop_instance_uid=uid(seed, hospital.name, number, "seg"),
        instance_number=1,
        manufacturer="hemafed",
        manufacturer_model_name="phantom",
        software_versions="1",
        device_serial_number="1",
    )
    # highdicom stamps the clock and draws a random UID; the same seed must give the same bytes.
    for element in ("ContentDate", "InstanceCreationDate", "SeriesDate"):
        if element in seg:
            setattr(seg, element, _DATE)
    for element in ("ContentTime", "InstanceCreationTime", "SeriesTime"):
        if element in seg:
            setattr(seg, element, _TIME)
    for equipment in seg.ContributingEquipmentSequence:
        if "ContributionDateTime" in equipment:
            equipment.ContributionDateTime = _DATE + _TIME
    organization = uid(seed, hospital.name, number, "dimension")
    seg.DimensionOrganizationSequence[0].DimensionOrganizationUID = organization
    for item in seg.DimensionIndexSequence:
        item.DimensionOrganizationUID = organization
    return seg


def _uncompressed_header(image: Dataset) -> Dataset:
    """An image's header without its pixels, for highdicom to refer to."""
    header = Dataset()
    for element in image:
        if element.keyword != "PixelData":
            header.add(element)
    header.file_meta = _file_meta(image.SOPClassUID, image.SOPInstanceUID)
    return header


def _write_tables(folder: Path, hospital: Hospital, seed: int, labels: list[tuple[str, str, str]]) -> None:
    """labels.csv, site.yaml and, so that hashes repeat with the seed, the site's key."""
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["series_uid", "sop_uid", "hypodensity"])
        writer.writerows(labels)
    site = {
        "site": hospital.name,
        "data": {"images": "dicom/", "masks": "masks/", "labels": "labels.csv"},
        "cache": "cache/",
        "role": hospital.role,
        "policy": {"release": ["encoder", "cls", "seg", "rec"], "metrics": True, "min_patients": 5},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site, sort_keys=False))
    (folder / "state").mkdir(exist_ok=True)
    key = folder / "state" / "key"
    key.touch(mode=0o600)
    key.write_bytes(hashlib.sha256(f"hemafed/{seed}/{hospital.name}".encode()).digest())
