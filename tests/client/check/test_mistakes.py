"""Mistakes as a data manager makes them: none is "ready", none says nothing, and the message names the cause.

Each takes a good hospital of eight patients, makes one mistake, and looks at what `check` says. LOG.md has the table of all.
"""

from __future__ import annotations

import gzip
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import JPEG2000, JPEGLSNearLossless, MRImageStorage, SecondaryCaptureImageStorage

from client.check.check import Check, check
from client.dicom.elements import silence_readers
from shared.site import SiteError, read_site
from tests.support.mask_files import write_seg
from tests.support.mistakes import (
    PATIENTS,
    SLICES,
    both,
    clot,
    column,
    compress,
    counted,
    data,
    each,
    edit,
    empty,
    hu,
    images,
    larger,
    masks_gone,
    niftis,
    pngs,
    put,
    replace_images,
    second_copy,
    table,
    uid_png,
    words,
)
from tests.support.small_sites import SIDE, make_site, patients, tiny_head


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital without a fault: SEG for every patient, a label for every slice."""
    silence_readers()
    root = tmp_path_factory.mktemp("good")
    images = patients(*range(1, PATIENTS + 1), slices=SLICES)
    for name, settings in images.items():
        number, n = int(name[1 : name.index("/")]), int(name.rpartition("/")[2])
        settings["hu_YX"] = tiny_head(30 + number) + (np.arange(SIDE) % (n + 2) == 0).astype(np.int16)[None]
        settings |= {"PatientName": f"Doe^{number}", "PatientBirthDate": f"19500{number}01", "PatientSex": "F"}
        settings |= {
            "FrameOfReferenceUID": f"1.2.826.8.{number}",
            "ConvolutionKernel": "H31s",
            "BodyPartExamined": "HEAD",
        }
    lines = [
        f"1.2.826.1.{number},1.2.826.1.{number}.{n},{(number + n) % 2 if n < SLICES else 0}"
        for number in range(1, PATIENTS + 1)
        for n in range(1, SLICES + 1)
    ]
    labels = "series_uid,sop_uid,hypodensity\n" + "\n".join(lines) + "\n"
    make_site(root, images, labels, {"masks": "masks"})
    for number in range(1, PATIENTS + 1):
        datasets = [pydicom.dcmread(root / "dicom" / f"p{number}" / str(n)) for n in range(1, SLICES + 1)]
        masks = np.stack([clot(number, n) for n in range(1, SLICES + 1)])
        write_seg(root / "masks" / f"{number}.dcm", datasets, masks)
    return root


HALF = slice(0, 4)
# Mistake -> how it is made, and what the first problem or the refusal must say.
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    # The wrong folder, the wrong export
    "data.images is an empty folder": (
        lambda f: empty(f, "dicom"),
        "no slice can be used: there are no files in data.images",
    ),
    "data.images does not exist": (data(images="nowhere"), "there is no such folder"),
    "data.images is the masks folder": (
        data(images="masks", masks=None),
        "no slice can be used: a mask among the images",
    ),
    "the pictures were exported as JPEG": (
        replace_images(lambda p: Image.new("L", (64, 64)).save(p, "JPEG")),
        "no slice can be used: not a DICOM file",
    ),
    "half of the patients were exported as PNG": (
        replace_images(lambda p: Image.new("L", (64, 64)).save(p, "PNG"), HALF),
        "16 files among the images are not read: a PNG or NIfTI .* a CT image, export it as DICOM",
    ),
    "the patients were zipped": (
        replace_images(lambda p: zipfile.ZipFile(p, "w").close()),
        "no slice can be used: not a DICOM file",
    ),
    "every file was gzipped": (
        lambda f: [p.write_bytes(gzip.compress(p.read_bytes())) for p in (f / "dicom").rglob("*") if p.is_file()],
        "no slice can be used: not a DICOM file",
    ),
    "MR was exported in place of CT": (
        images(SOPClassUID=MRImageStorage, Modality="MR"),
        "no slice .* MR Image Storage",
    ),
    "localizers alone were exported": (
        images(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "no slice .* a localizer",
    ),
    "screenshots were exported": (images(SOPClassUID=SecondaryCaptureImageStorage), "no slice .* Secondary Capture"),
    "perfusion maps were exported": (
        images(ImageType=["DERIVED", "PRIMARY", "AXIAL", "CBF"]),
        "no slice .* computed map",
    ),
    "sagittal reformats were exported": (
        images(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        "no slice .* expected an axial slice",
    ),
    "chest CT was exported": (lambda f: edit(f, larger), r"tissue fills the edge .* CHEST.* are these heads"),
    "scans with contrast agent were exported": (
        images(ContrastBolusAgent="Iomeron"),
        "series taken have a contrast agent",
    ),
    "half of the scans have a contrast agent": (
        images(HALF, ContrastBolusAgent="IV"),
        "4 of 8 series taken have a contrast",
    ),
    "the export was lossy (JPEG 2000)": (
        compress(JPEG2000),
        "no slice .* lossy compression .* expected a lossless export",
    ),
    "half of the export was lossy (JPEG-LS)": (
        compress(JPEGLSNearLossless, HALF),
        "16 files of 32 .* lossy compression",
    ),
    "files were cut by a full disk": (
        lambda f: [p.write_bytes(p.read_bytes()[:3000]) for p in (f / "dicom").rglob("*") if p.is_file()],
        "no slice can be used: cut:",
    ),
    "half of the files are empty": (
        lambda f: [p.write_bytes(b"") for p in sorted((f / "dicom").rglob("*"))[:20] if p.is_file()],
        "files of .* are left out: an empty file",
    ),
    "data.images holds links to an archive": (
        lambda f: [
            (shutil.move(p, f / f"store-{p.parent.name}-{p.name}"), p.symlink_to(f / f"store-{p.parent.name}-{p.name}"))
            for p in sorted((f / "dicom").rglob("*"))
            if p.is_file()
        ],
        "no slice can be used: a symbolic link",
    ),
    # Values
    "the intercept was lost": (
        lambda f: edit(
            f, lambda ds: (put(RescaleIntercept=0)(ds), setattr(ds, "PixelData", (hu(ds) + 1024).tobytes()))
        ),
        "no slice .* values cannot be HU",
    ),
    "the intercept was lost in half of the patients": (
        lambda f: edit(f, lambda ds: setattr(ds, "PixelData", (hu(ds) + 1024).tobytes()), HALF),
        "4 of 8 patients are left out .* values cannot be HU",
    ),
    "the brain window was applied": (
        lambda f: edit(f, lambda ds: setattr(ds, "PixelData", np.clip(hu(ds), 0, 80).astype(np.int16).tobytes())),
        "no slice .* values cannot be HU.* A window that was applied",
    ),
    "rescale was applied twice": (images(RescaleIntercept=-1024), "no slice .* values cannot be HU.* applied twice"),
    "the pictures are of 8 bits": (images(BitsAllocated=8, BitsStored=8, HighBit=7), "no slice .* BitsAllocated 8"),
    "the anonymiser removed the geometry": (
        lambda f: edit(f, lambda ds: delattr(ds, "ImagePositionPatient")),
        "no slice .* ImagePositionPatient is missing",
    ),
    "half of the slices lost their position": (
        lambda f: edit(f, lambda ds: delattr(ds, "ImagePositionPatient"), HALF),
        "16 files of 32 .* ImagePositionPatient is missing",
    ),
    "every slice has the same position": (
        images(ImagePositionPatient=[0, 0, 0]),
        "no slice .* all 4 slices have one position, so ImagePositionPatient",
    ),
    "a name was drawn into the pictures": (
        images(BurnedInAnnotation="YES"),
        "no slice .* text is drawn into the picture",
    ),
    # Identities
    "all patients are named ANON": (images(PatientID="ANON"), "PatientID is 'ANON' in 8 studies"),
    "all patients are named anonymous": (images(PatientID="Anonymous"), "PatientID is 'Anonymous' in 8 studies"),
    "half of the patients are named ANON": (images(HALF, PatientID="ANON"), "PatientID is 'ANON' in 4 studies"),
    "all patients got the name of the study": (images(PatientID="HEMA-STUDY"), "all 8 studies have one PatientID"),
    "two patients got one identifier": (images(slice(0, 2), PatientID="same"), "1 PatientIDs have several birth dates"),
    "PatientID is empty": (images(PatientID=""), "no slice .* PatientID is empty"),
    "PatientID is empty in half": (images(HALF, PatientID=""), "16 files of 32 .* PatientID is empty"),
    "there is one patient": (
        lambda f: [shutil.rmtree(p) for p in sorted((f / "dicom").iterdir())[1:]],
        "there is one patient in all",
    ),
    "one series UID per slice": (
        each("SeriesInstanceUID", lambda d: f"{d.SOPInstanceUID}.5"),
        "SeriesInstanceUID is another",
    ),
    "one study UID and series UID per slice": (
        both(
            each("SeriesInstanceUID", lambda d: f"{d.SOPInstanceUID}.5"),
            each("StudyInstanceUID", lambda d: f"{d.SOPInstanceUID}.6"),
        ),
        "SeriesInstanceUID is another",
    ),
    "one patient ID, study and series per slice": (
        both(
            each("SeriesInstanceUID", lambda d: f"{d.SOPInstanceUID}.5"),
            each("StudyInstanceUID", lambda d: f"{d.SOPInstanceUID}.6"),
            each("PatientID", lambda d: d.SOPInstanceUID),
        ),
        "32 of 32 patients have one slice each",
    ),
    "one patient ID per slice": (
        each("PatientID", lambda d: d.SOPInstanceUID),
        "no slice .* several patients or studies",
    ),
    "one SOP UID for all": (images(SOPInstanceUID="1.2.3"), "no slice .* one SOPInstanceUID on 32 files that differ"),
    "one series UID for all": (images(SeriesInstanceUID="1.2.3"), "no slice .* several patients or studies"),
    "two studies were mixed under one UID": (
        images(slice(0, 2), StudyInstanceUID="1.2.3"),
        "1 studies belong to several",
    ),
    "half were exported again under other names": (second_copy, "pictures belong to several patients"),
    "UIDs were removed": (
        lambda f: edit(f, lambda ds: delattr(ds, "SeriesInstanceUID")),
        "no slice .* without SeriesInst",
    ),
    # Labels and Excel's work
    "a semicolon CSV": (words(lambda t: t.replace(",", ";")), "semicolons between its columns"),
    "a table with tabs": (words(lambda t: t.replace(",", "\t")), "tabs between its columns"),
    "an Excel workbook that is called labels.csv": (
        words(lambda t: b"PK\x03\x04" + bytes(99)),
        "a spreadsheet and no CSV",
    ),
    "a table in UTF-16": (words(lambda t: t.encode("utf-16")), "not a CSV table in UTF-8; save it as CSV UTF-8"),
    "UIDs rounded by a spreadsheet": (column("sop_uid", lambda v: "1.23457E+18"), "sop_uid is no UID: a spreadsheet"),
    "UIDs of fifteen digits and zeros": (column("series_uid", lambda v: "123456789012345000"), "series_uid is no UID"),
    "UIDs with an apostrophe": (column("sop_uid", lambda v: f"'{v}"), "sop_uid holds a quotation mark"),
    "slice numbers that begin with 1": (
        counted(1),
        "none of 32 lines .*slice_index counts from 1 to 4, expected 0 to 3",
    ),
    "slice numbers with one missing": (
        both(counted(0), table(lambda rows: rows[1:])),
        "3 lines of labels.csv match nothing: slice_index counts 3 slices",
    ),
    "the header has other names": (words(lambda t: t.replace("sop_uid", "SOP UID")), "rename 'SOP UID' to sop_uid"),
    "the header is missing": (words(lambda t: t.partition("\n")[2]), "its first line must name the columns"),
    "labels are yes and no": (column("hypodensity", lambda v: {"1": "yes", "0": "no"}[v]), "neither 1, 0 nor blank"),
    "labels are 1.0 and 0.0": (column("hypodensity", lambda v: f"{v}.0"), "neither 1, 0 nor blank"),
    "all labels are blank": (column("hypodensity", lambda v: ""), "labels no slice: hypodensity is blank"),
    "all labels are 0": (column("hypodensity", lambda v: "0"), "every labelled slice is without the marker"),
    "labels contradict each other": (
        table(lambda rows: [*rows, rows[0] | {"hypodensity": str(1 - int(rows[0]["hypodensity"]))}]),
        "contradicts itself",
    ),
    "another hospital's labels": (
        both(column("series_uid", lambda v: f"9.{v}"), column("sop_uid", lambda v: f"9.{v}")),
        "none of 32 lines belongs to an image .* is it this hospital's table",
    ),
    "half of the lines are another hospital's": (
        column("series_uid", lambda v: f"9.{v}", every=2),
        "16 lines of labels.csv match nothing: its series is not in data.images",
    ),
    "the columns of UIDs were swapped": (
        table(lambda rows: [r.update(series_uid=r["sop_uid"], sop_uid=r["series_uid"]) for r in rows] and None),
        "none of 32 lines belongs to an image",
    ),
    "the column was sorted alone": (
        table(
            lambda rows: (
                [
                    r.update(sop_uid=s)
                    for r, s in zip(rows, sorted((r["sop_uid"] for r in rows), reverse=True), strict=True)
                ]
                and None
            )
        ),
        "none of 32 lines belongs|lines of labels.csv match nothing",
    ),
    "the labels are of a series that was left out": (
        lambda f: edit(f, lambda ds: setattr(ds, "PixelData", (hu(ds) + 1024).tobytes()), HALF),
        "4 of 8 patients are left out",
    ),
    # Masks
    "half of the masks are missing": (
        masks_gone(4),
        r"16 of 32 slices have no mask, \d+ of them labelled with the marker",
    ),
    "the masks folder is empty": (masks_gone(0), "data.masks holds no file"),
    "the masks folder does not exist": (data(masks="nowhere"), "there is no such folder"),
    "the masks are in the images folder": (
        both(lambda f: [shutil.move(p, f / "dicom" / f"m{p.name}") for p in (f / "masks").iterdir()], data(masks=None)),
        "8 files among the images are not read: a mask among the images; name its folder",
    ),
    "the masks folder holds images": (
        lambda f: (empty(f, "masks"), shutil.copytree(f / "dicom" / "p1", f / "masks" / "p1")),
        "mask files are left out: CT Image Storage, expected Segmentation",
    ),
    "the masks are of another hospital": (
        lambda f: edit(
            f,
            lambda ds: (
                [
                    setattr(i, "ReferencedSOPInstanceUID", f"9.{i.ReferencedSOPInstanceUID}")
                    for s in ds.ReferencedSeriesSequence
                    for i in s.ReferencedInstanceSequence
                ]
                + [
                    setattr(i, "ReferencedSOPInstanceUID", f"9.{i.ReferencedSOPInstanceUID}")
                    for g in ds.PerFrameFunctionalGroupsSequence
                    for d in g.DerivationImageSequence
                    for i in d.SourceImageSequence
                ]
                + [delattr(ds, "SourceImageSequence")]
            ),
            where="masks",
        ),
        "8 of 8 mask files are left out: refers to 4 images, none of which",
    ),
    "the images got new UIDs, the masks did not": (
        each("SOPInstanceUID", lambda d: f"9.{d.SOPInstanceUID}"),
        "none of 32 lines|8 of 8 mask files are left out",
    ),
    "data.segment is misspelt": (data(segment="Hematoma of the brain"), "8 of 8 mask files .* is not among them"),
    "the segment is named by a number that is not there": (data(segment=7), "8 of 8 mask files .* is not among them"),
    "NIfTI shifted by half a voxel": (
        lambda f: niftis(f, shift=-2.0),
        "8 of 8 mask files .* no layer of the NIfTI's grid",
    ),
    "NIfTI of probabilities": (
        lambda f: niftis(f, lambda v: v * np.float32(0.7)),
        "8 of 8 .* numbers that are not whole",
    ),
    "NIfTI of brain and hematoma, no number named": (
        lambda f: niftis(f, lambda v: v + (np.roll(v, 9, axis=0) * 2).astype(np.uint8)),
        "8 of 8 mask files .* numbers 1, 2.* no names: which is the hematoma",
    ),
    "inverted masks": (
        lambda f: niftis(f, lambda v: (1 - v).astype(np.uint8)),
        "masks of 8 series (lie off|cover most)",
    ),
    "all masks are empty": (
        lambda f: niftis(f, lambda v: v * 0),
        "every mask is empty|labelled with the marker and have an empty",
    ),
    "masks drawn in air": (lambda f: niftis(f, lambda v: np.roll(v, 26, axis=0)), "masks of 8 series lie off the head"),
    "PNG of another size": (lambda f: pngs(f, uid_png, side=96), r"mask is \(96, 96\) pixels, its image \(48, 48\)"),
    "PNG in colour": (lambda f: pngs(f, uid_png, mode="RGB"), "a PNG of mode RGB, expected one channel"),
    "PNG named by number": (
        lambda f: pngs(f, lambda number, n: f"{number}_{n}"),
        "named after no image in data.images",
    ),
    "PNG of white, data.segment 1": (
        both(lambda f: pngs(f, uid_png, value=255), data(segment=1)),
        r"black and white mask \(0 and 255\).* add 255",
    ),
    "PNG for half of the slices": (
        lambda f: (pngs(f, uid_png), [p.unlink() for p in sorted((f / "masks").iterdir())[::2]]),
        "16 of 32 slices have no mask",
    ),
    "masks as NRRD": (
        lambda f: [
            p.rename(p.with_suffix(".nrrd")).write_bytes(b"NRRD0004\n" + bytes(300))
            for p in list((f / "masks").iterdir())
        ],
        "8 of 8 mask files are left out: a NRRD file, which is not read",
    ),
    "a second reader's masks beside the first's": (
        lambda f: [
            write_seg(
                f / "masks" / f"b{number}.dcm",
                [pydicom.dcmread(f / "dicom" / f"p{number}" / str(n)) for n in range(1, SLICES + 1)],
                np.roll(np.stack([clot(number, n) for n in range(1, SLICES + 1)]), 1, axis=1),
            )
            for number in range(1, PATIENTS + 1)
        ],
        "16 of 16 mask files .* draw the same segment of one image differently",
    ),
    "masks of the whole head": (
        lambda f: niftis(f, lambda v: np.broadcast_to((tiny_head() > -300).T[..., None], v.shape).astype(np.uint8)),
        "masks of 8 series cover most of the head",
    ),
}


def said(folder: Path) -> tuple[bool, list[str], Check | None]:
    """Whether check calls it ready, and what it says first."""
    try:
        found = check(read_site(folder / "site.yaml"), 1, lambda what, done, total: None)
    except SiteError as error:
        return False, [str(error)], None
    return found.ready, list(found.problems), found


def test_the_good_hospital_is_ready(good: Path) -> None:
    ready, problems, found = said(good)
    assert (ready, problems) == (True, [])
    assert found is not None
    assert found.faults == ()
    assert found.masks == {"frames": {"in": 24, "taken": 24, "left_out": []}} or found.masks["frames"]["in"] == 32
    assert [note.partition(" patients")[0] for note in found.notes] == [
        "split train will have 4",
        "split val will have 2",
        "split test will have 2",
    ] or len(found.notes) == 3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_ready(good: Path, tmp_path: Path, mistake: str) -> None:
    shutil.copytree(good, tmp_path / "site")
    make, expected = MISTAKES[mistake]
    make(tmp_path / "site")
    ready, problems, _ = said(tmp_path / "site")
    assert not ready
    assert re.search(expected, problems[0]), problems
    text = " ".join(problems)
    assert not any(name in text for name in ("Doe", "patient-", "1.2.826", str(tmp_path / "site" / "dicom")))
