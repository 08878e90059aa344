"""Small CT files, synthesised: what a test says of an image is what the file says."""

from __future__ import annotations

from pathlib import Path

import gdcm
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)


def head_hu(shape: tuple[int, int] = (64, 64), seed: int = 0) -> NDArray[np.int16]:
    """A head: air around, a skull ring, brain at 35 HU with some noise, so that no two seeds are equal."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    radius = np.hypot((y - shape[0] / 2) / shape[0], (x - shape[1] / 2) / shape[1])
    brain = 35 + np.random.default_rng(seed).normal(0, 3, shape)
    return np.where(radius < 0.33, brain, np.where(radius < 0.37, 900, -1000)).round().astype(np.int16)


def ct_dataset(
    hu_YX: NDArray | None = None,
    *,
    position: tuple[float, ...] = (0.0, 0.0, 0.0),
    spacing: tuple[float, ...] = (1.0, 1.0),
    row: tuple[float, ...] = (1.0, 0.0, 0.0),
    column: tuple[float, ...] = (0.0, 1.0, 0.0),
    series: str = "1.2.826.1",
    sop: str = "1.2.826.1.1",
    patient: str = "Doe-4711",
    **changes: object,
) -> Dataset:
    """A CT image; `changes` sets attributes, None removes one."""
    hu_YX = np.full((16, 16), 40) if hu_YX is None else hu_YX
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, sop
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.826.9", series, "1.2.826.8"
    ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = patient, "Doe^Jane", "", ""
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ds.StudyID = ""
    ds.Rows, ds.Columns = hu_YX.shape
    ds.PixelSpacing, ds.ImagePositionPatient = list(spacing), list(position)
    ds.ImageOrientationPatient, ds.SliceThickness = [*row, *column], 5
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.InstanceNumber = 1
    ds.PixelData = hu_YX.astype(np.int16).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", CTImageStorage)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", sop)
    return ds


def write_ct(path: Path, hu_YX: NDArray | None = None, **settings: object) -> Path:
    """Write ct_dataset into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ct_dataset(hu_YX, **settings).save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, count: int = 4, shape: tuple[int, int] = (64, 64), **settings: object) -> list[Path]:
    """Slices of one series, 5 mm apart from the feet up."""
    series = str(settings.pop("series", "1.2.826.1"))
    return [
        write_ct(
            folder / f"{series}-{n}",
            head_hu(shape, n),
            position=(0.0, 0.0, 5.0 * n),
            series=series,
            sop=f"{series}.{n + 1}",
            **settings,
        )
        for n in range(count)
    ]


def jpeg_lossless(path: Path, first_order: bool = True) -> Path:
    """Rewrite a file in JPEG Lossless: process 14, selection value 1 (.70) or any (.57), with GDCM."""
    syntax = gdcm.TransferSyntax.JPEGLosslessProcess14_1 if first_order else gdcm.TransferSyntax.JPEGLosslessProcess14
    reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return path


def save_as_syntax(ds: Dataset, path: Path, syntax: str) -> Path:
    """Write an uncompressed dataset in a native or encapsulated transfer syntax."""
    uid = pydicom.uid.UID(syntax)
    if uid in (pydicom.uid.JPEGLossless, pydicom.uid.JPEGLosslessSV1):
        ds.save_as(path, enforce_file_format=True)
        return jpeg_lossless(path, uid == pydicom.uid.JPEGLosslessSV1)
    if uid.is_encapsulated:
        ds.compress(uid, generate_instance_uid=False)
        ds.save_as(path, enforce_file_format=True)
        return path
    ds.file_meta.TransferSyntaxUID = uid
    if not uid.is_little_endian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    ds.save_as(path, implicit_vr=uid.is_implicit_VR, little_endian=uid.is_little_endian, enforce_file_format=True)
    return path


def enhanced_ct(singles: list[Dataset], order: list[int]) -> Dataset:
    """One multi-frame file of single images (PS3.3 A.38), its frames in a given order, geometry and rescale per frame."""
    ds = Dataset()
    for element in singles[0]:
        if element.keyword not in (
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
            "SliceThickness",
            "RescaleSlope",
            "RescaleIntercept",
            "PixelData",
            "InstanceNumber",
        ):
            ds.add(element)
    ds.SOPClassUID, ds.SOPInstanceUID = EnhancedCTImageStorage, generate_uid(entropy_srcs=["enhanced"])
    ds.NumberOfFrames = len(order)
    orientation, measures, shared = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = singles[0].ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = singles[0].PixelSpacing, singles[0].SliceThickness
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for index in order:
        one, group = singles[index], Dataset()
        place, values, kind = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = one.ImagePositionPatient
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = one.RescaleSlope, one.RescaleIntercept, "HU"
        kind.FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        group.PlanePositionSequence, group.CTImageFrameTypeSequence = [place], [kind]
        group.PixelValueTransformationSequence = [values]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    ds.PixelData = b"".join(singles[index].PixelData for index in order)
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    return ds
