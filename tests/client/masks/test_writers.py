"""Masks written by the programs that hospitals use, in every geometry: pixel by pixel what was drawn, or a refusal that says why.

rt-utils writes RTSTRUCT, highdicom and dcmqi SEG, SimpleITK NIfTI. The truth has blobs without symmetry, a hole, an island in
the hole, and lesions of one and two pixels.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import pytest
import rt_utils
import SimpleITK
from numpy.typing import NDArray
from PIL import Image

from client.masks.match import match_masks, read_masks
from tests.support.dicom_files import ct_dataset, enhanced_ct, head_hu, write_ct
from tests.support.mask_files import KEY, read_one, refused, series_of, volume, write_seg

SLICES = 5


@dataclass(frozen=True)
class Geometry:
    """A series to draw on.

    Attributes:
      row, column: directions.
      spacing: distance of rows, of columns.
      shape: rows and columns.
      step: from slice to slice, in mm, times `heights`.
      straight: no program needs to straighten it: its slices are a regular grid.
    """

    row: tuple[float, ...] = (1.0, 0.0, 0.0)
    column: tuple[float, ...] = (0.0, 1.0, 0.0)
    spacing: tuple[float, float] = (1.0, 1.0)
    shape: tuple[int, int] = (64, 64)
    step: tuple[float, float, float] = (0.0, 0.0, 5.0)
    heights: tuple[float, ...] = field(default=tuple(range(SLICES)))
    straight: bool = True

    def settings(self, n: int) -> dict:
        corner = np.array((-30.0, -20.5, 7.25)) + np.array(self.step) * self.heights[n]
        return {
            "position": tuple(round(float(v), 4) for v in corner),
            "row": self.row,
            "column": self.column,
            "spacing": self.spacing,
            "sop": f"1.2.826.1.{n + 1}",
            "InstanceNumber": n + 1,
        }


TILT = np.deg2rad(20)
GEOMETRIES = {
    "straight": Geometry(),
    "from the head down": Geometry(step=(0, 0, -5.0)),
    "tilted": Geometry(column=(0.0, float(np.cos(TILT)), float(-np.sin(TILT))), straight=False),
    "tilted along its normal": Geometry(column=(0.0, 0.9396926, -0.3420201), step=(0.0, 5 * 0.3420201, 5 * 0.9396926)),
    "prone": Geometry(row=(-1.0, 0.0, 0.0), column=(0.0, -1.0, 0.0)),
    "columns flipped": Geometry(row=(-1.0, 0.0, 0.0)),
    "rows flipped": Geometry(column=(0.0, -1.0, 0.0)),
    "on the side": Geometry(row=(0.0, 1.0, 0.0), column=(-1.0, 0.0, 0.0)),
    "oblong pixels": Geometry(spacing=(0.7, 1.3)),
    "oblong pictures": Geometry(shape=(48, 80), spacing=(0.488281, 0.488281)),
    "uneven": Geometry(heights=(0, 1, 2, 4, 5), straight=False),
}


def drawn(shape: tuple[int, int]) -> NDArray[np.uint8]:
    """What the programs are given, (N, Y, X), in order of the slices' numbers."""
    masks = np.zeros((SLICES, *shape), np.uint8)
    masks[0, 10:30, 12:20], masks[0, 14:17, 20:36] = 1, 1
    masks[1, 8:34, 10:40], masks[1, 12:30, 14:36], masks[1, 18:22, 20:27] = 1, 0, 1  # an island in a hole
    masks[2, 40, 33] = masks[2, 20, 20:22] = 1
    masks[3, 5:40, 30] = 1  # one pixel wide
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    masks[3] |= (np.hypot(rows - 20, (columns - 55) / 1.4) < 9).astype(np.uint8)
    return masks


@pytest.fixture(params=GEOMETRIES)
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return GEOMETRIES[request.param]


@pytest.fixture
def paths(tmp_path: Path, geometry: Geometry) -> list[Path]:
    """The series' files; their names say nothing of the order."""
    return [
        write_ct(tmp_path / "dicom" / f"{7 * n % 5}.dcm", head_hu(geometry.shape, n), **geometry.settings(n))
        for n in range(SLICES)
    ]


def from_the_feet(masks: NDArray, paths: list[Path]) -> NDArray:
    """Masks in order of the slices' numbers, as the client orders slices."""
    (series,) = series_of(*paths)
    return masks[[paths.index(s.path) for s in series.slices]]


def test_rt_utils(tmp_path: Path, paths: list[Path], geometry: Geometry) -> None:
    truth = drawn(geometry.shape)
    with contextlib.redirect_stdout(io.StringIO()):
        builder = rt_utils.RTStructBuilder.create_new(dicom_series_path=str(tmp_path / "dicom"))
        numbers = [int(str(ds.SOPInstanceUID).split(".")[-1]) - 1 for ds in builder.series_data]
        builder.add_roi(mask=truth[numbers].transpose(1, 2, 0).astype(bool), name="clot")
        builder.save(str(tmp_path / "rt"))
    if geometry.straight and geometry.spacing[0] == geometry.spacing[1]:
        np.testing.assert_array_equal(volume(tmp_path / "rt.dcm", series_of(*paths)), from_the_feet(truth, paths))
        return
    refused(
        tmp_path / "rt.dcm",
        series_of(*paths),
        r"rt-utils, which misplaces .* (shifted|uneven|oblong).* SEG with highdicom",
    )


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_highdicom(tmp_path: Path, paths: list[Path], geometry: Geometry, kind: str) -> None:
    truth = drawn(geometry.shape)
    path = write_seg(tmp_path / "seg", [pydicom.dcmread(p) for p in paths], truth, kind=kind)
    np.testing.assert_array_equal(volume(path, series_of(*paths)), from_the_feet(truth, paths))


def test_highdicom_on_a_multi_frame_image(tmp_path: Path, geometry: Geometry) -> None:
    truth, order = drawn(geometry.shape), [3, 0, 4, 1, 2]
    singles = [ct_dataset(head_hu(geometry.shape, n), **geometry.settings(n)) for n in range(SLICES)]
    enhanced_ct(singles, order).save_as(tmp_path / "multi", enforce_file_format=True)
    path = write_seg(tmp_path / "seg", [pydicom.dcmread(tmp_path / "multi")], truth[order], omit_empty_frames=True)
    (series,) = series_of(tmp_path / "multi")
    expected = truth[[order[s.frame] for s in series.slices]]
    np.testing.assert_array_equal(volume(path, [series]), expected)


def test_a_png_for_every_slice(tmp_path: Path, paths: list[Path], geometry: Geometry) -> None:
    """What is recommended where nothing else helps."""
    truth, (series,) = drawn(geometry.shape), series_of(*paths)
    files = []
    for n, mask_YX in enumerate(truth):
        Image.fromarray(mask_YX * np.uint8(255)).save(tmp_path / f"1.2.826.1.{n + 1}.png")
        files.append(read_one(tmp_path / f"1.2.826.1.{n + 1}.png"))
    read = read_masks(files, series, KEY, ())
    found = np.stack([read.masks[s.image] for s in series.slices])
    np.testing.assert_array_equal(found, from_the_feet(truth, paths))


def read_itk(folder: Path) -> tuple[SimpleITK.Image, list[int]]:
    """A series as ITK sees it, and the slices' numbers in its order."""
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    numbers = [int(str(pydicom.dcmread(n).SOPInstanceUID).split(".")[-1]) - 1 for n in names]
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK.ReadImage(names), numbers


def itk_mask(folder: Path, truth: NDArray) -> SimpleITK.Image:
    image, numbers = read_itk(folder)
    mask = SimpleITK.GetImageFromArray(truth[numbers])
    mask.CopyInformation(image)
    return mask


def test_simple_itk(tmp_path: Path, paths: list[Path], geometry: Geometry) -> None:
    truth, path = drawn(geometry.shape), tmp_path / "mask.nii.gz"
    SimpleITK.WriteImage(itk_mask(tmp_path / "dicom", truth), str(path))
    if geometry.straight:
        np.testing.assert_array_equal(volume(path, series_of(*paths)), from_the_feet(truth, paths))
        return
    matched, (fault,) = match_masks([read_one(path)], series_of(*paths))
    assert matched == {}
    assert re.search(r"(tilted gantry|are uneven).* save it slice by slice as SOPInstanceUID.png", fault.reason)


META = {
    "ContentCreatorName": "A",
    "ClinicalTrialSeriesID": "1",
    "ClinicalTrialTimePointID": "1",
    "SeriesDescription": "S",
    "SeriesNumber": "300",
    "InstanceNumber": "1",
    "segmentAttributes": [
        [
            {
                "labelID": 1,
                "SegmentDescription": "clot",
                "SegmentAlgorithmType": "MANUAL",
                "SegmentedPropertyCategoryCodeSequence": {
                    "CodeValue": "49755003",
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": "Morphologically Abnormal Structure",
                },
                "SegmentedPropertyTypeCodeSequence": {
                    "CodeValue": "35566002",
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": "Hematoma",
                },
            }
        ]
    ],
}


def test_dcmqi(tmp_path: Path, paths: list[Path], geometry: Geometry) -> None:
    truth = drawn(geometry.shape)
    SimpleITK.WriteImage(itk_mask(tmp_path / "dicom", truth), str(tmp_path / "mask.nrrd"))
    (tmp_path / "meta.json").write_text(json.dumps(META))
    run = subprocess.run(
        [
            Path(sys.executable).parent / "itkimage2segimage",
            "--inputImageList",
            tmp_path / "mask.nrrd",
            "--inputDICOMDirectory",
            tmp_path / "dicom",
            "--inputMetadata",
            tmp_path / "meta.json",
            "--outputDICOM",
            tmp_path / "seg.dcm",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "seg.dcm").is_file(), run.stdout[-2000:] + run.stderr[-2000:]
    if geometry.straight:
        np.testing.assert_array_equal(volume(tmp_path / "seg.dcm", series_of(*paths)), from_the_feet(truth, paths))
        return
    refused(tmp_path / "seg.dcm", series_of(*paths), "straightened")
