from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage

from client.dicom.faults import Fault
from client.dicom.headers import CtSlice, read_images
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import CtSeries, build_series, choose, describe, sharpness
from tests.support.dicom_files import ct_dataset, head_hu, write_ct, write_series

KEY = Pseudonyms(b"k" * 32)


def read(folder: Path) -> list[CtSlice]:
    """All images of a folder, in an order that says nothing."""
    paths = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name[::-1])
    return [i for path in paths for i in read_images(path, KEY, True, path.name)]


def built(folder: Path) -> tuple[list[CtSeries], list[Fault]]:
    series, refused, faults = build_series(read(folder))
    assert {f"series {one.name}" for one in refused} == {f.what for f in faults if f.what.startswith("series ")}
    return series, faults


def series_name(uid: str) -> str:
    return KEY.of("series", uid)


@pytest.mark.parametrize(
    ("folder", "heights"),
    [
        ("QIICR+dcmqi/data/segmentations/ct-3slice", [-128.690002, -127.690002, -126.690002]),
        ("qurit+rt-utils/tests/mock_data", [60.0, 65.0]),
    ],
)
def test_real_slices_are_ordered_by_position_alone(
    real_dicom: Path, tmp_path: Path, folder: str, heights: list[float]
) -> None:
    expected = {}
    for number, path in enumerate(sorted((real_dicom / folder).glob("*.dcm"))):
        ds = pydicom.dcmread(path)
        if ds.SOPClassUID != CTImageStorage:
            continue
        expected[ds.ImagePositionPatient[2]] = KEY.of("image", str(ds.SOPInstanceUID))
        ds.InstanceNumber = (7 * number) % 5
        ds.save_as(tmp_path / f"{(11 * number + 3) % 13:02d}")
    ((series,), faults) = built(tmp_path)
    assert faults == []
    assert [s.height_mm for s in series.slices] == pytest.approx(heights)
    assert [s.image for s in series.slices] == [expected[z] for z in sorted(expected)]
    assert series.spacing_mm == pytest.approx(heights[1] - heights[0])


def test_a_real_single_slice(real_dicom: Path, tmp_path: Path) -> None:
    shutil.copy(real_dicom / "ImagingDataCommons+highdicom/data/test_files/ct_image.dcm", tmp_path / "x")
    ((series,), faults) = built(tmp_path)
    assert (len(series.slices), series.spacing_mm, faults) == (1, 0.0, [])


@pytest.mark.parametrize("direction", [1, -1])
def test_tilted_slices_are_ordered_along_their_normal(tmp_path: Path, direction: int) -> None:
    tilt = np.deg2rad(20)
    column = (0.0, direction * float(np.cos(tilt)), direction * float(np.sin(tilt)))
    for number, z in enumerate((10.0, 0.0, 5.0)):
        write_ct(tmp_path / f"{number}", position=(0, -100, z), column=column, sop=f"1.2.{number + 1}")
    ((series,), _) = built(tmp_path)
    assert [s.position_mm[2] for s in series.slices] == [0, 5, 10]
    assert series.spacing_mm == pytest.approx(5 * np.cos(tilt))
    assert series.tilt_degree == pytest.approx(20)


@pytest.mark.parametrize(
    ("tag", "orientation", "flagged"), [(0, 0, False), (-15, 15, False), (15, 0, True), (None, 15, True)]
)
def test_a_tilt_that_tag_and_orientation_tell_differently(
    tmp_path: Path, tag: float | None, orientation: float, flagged: bool
) -> None:
    angle = np.deg2rad(orientation)
    write_series(
        tmp_path,
        column=(0.0, float(np.cos(angle)), float(np.sin(angle))),
        **({} if tag is None else {"GantryDetectorTilt": tag}),
    )
    ((series,), _) = built(tmp_path)
    assert series.tilt_degree == pytest.approx(orientation, abs=0.01)
    assert ("tilt-differs" in series.flags) is flagged


def test_spacing_is_the_distance_of_positions_and_never_the_thickness(tmp_path: Path) -> None:
    write_series(tmp_path, SliceThickness=10)
    ((series,), _) = built(tmp_path)
    assert (series.spacing_mm, series.slices[0].thickness_mm) == (5.0, 10.0)


def test_a_missing_slice_and_uneven_gaps_are_flagged(tmp_path: Path) -> None:
    paths = write_series(tmp_path, count=6)
    assert built(tmp_path)[0][0].flags == ()
    paths[3].unlink()
    ((series,), faults) = built(tmp_path)
    assert (series.flags, len(series.slices), series.spacing_mm, faults) == (("uneven",), 5, 5.0, [])


def test_two_slices_at_one_position(tmp_path: Path) -> None:
    write_series(tmp_path, count=3)
    write_ct(tmp_path / "twin", head_hu(), position=(0, 0, 5.0), sop="1.2.9")
    write_series(tmp_path, series="1.2.7")
    ((series,), (fault,)) = built(tmp_path)
    assert series.name == series_name("1.2.7")
    assert fault.what == f"series {series_name('1.2.826.1')}"
    assert "1 of 4 slices at the position of another" in fault.reason


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"column": (0.0, 0.9396926, 0.3420201)}, "orientation"),
        ({"spacing": (0.9, 0.9)}, "pixel spacing"),
        ({"hu_YX": head_hu((32, 64))}, "pixel grid"),
        ({"ConvolutionKernel": "H70h"}, "kernel"),
        ({"FrameOfReferenceUID": "1.2.3"}, "frame of reference"),
    ],
)
def test_an_image_unlike_the_rest_of_its_series_is_left_out(tmp_path: Path, change: dict, differs: str) -> None:
    write_series(tmp_path)
    write_ct(tmp_path / "other", **({"hu_YX": head_hu()} | change), position=(0, 0, 30.0), sop="1.2.9")
    ((series,), (fault,)) = built(tmp_path)
    assert len(series.slices) == 4
    assert fault.what == "file other"
    assert fault.reason == f"differs from the 4 other images of its series in {differs}"


@pytest.mark.parametrize("cosines", [(1.0, 0.99999, 0.9999999), (0.980501, 0.980499, 0.980501)])
def test_directions_and_spacing_may_differ_by_rounding(tmp_path: Path, cosines: tuple[float, ...]) -> None:
    """The second set is 2e-6 apart, on both sides of where three digits are rounded."""
    for n, cosine in enumerate(cosines):
        column = (0, cosine, 0 if cosines[0] == 1 else 0.196)
        spacing = (0.4882813, 0.48828 + 1e-5 * n)
        write_ct(tmp_path / f"{n}", position=(0, 0, 5.0 * n), column=column, spacing=spacing, sop=f"1.2.{n + 1}")
    ((series,), faults) = built(tmp_path)
    assert (len(series.slices), faults) == (3, [])
    assert len({s.column_direction for s in series.slices}) == 1, "a height would depend on a slice's rounding"


def test_how_pixels_are_stored_and_rescaled_may_differ(tmp_path: Path) -> None:
    for n, (bits, intercept) in enumerate(((12, -1024), (13, -1024), (12, 0), (16, -8192))):
        settings = {"BitsStored": bits, "HighBit": bits - 1, "RescaleIntercept": intercept}
        write_ct(tmp_path / f"{n}", position=(0, 0, 5.0 * n), sop=f"1.2.{n + 1}", **settings)
    ((series,), faults) = built(tmp_path)
    assert (len(series.slices), faults) == (4, [])


def test_a_frame_of_reference_of_its_own_on_every_slice_says_nothing(tmp_path: Path) -> None:
    for n in range(4):
        write_ct(tmp_path / f"{n}", position=(0, 0, 5.0 * n), sop=f"1.2.{n + 1}", FrameOfReferenceUID=f"1.2.3.{n}")
    ((series,), faults) = built(tmp_path)
    assert (len(series.slices), series.flags, faults) == (4, ("space-per-slice",), [])


def test_a_series_without_a_majority_is_left_out(tmp_path: Path) -> None:
    for n in range(4):
        write_ct(
            tmp_path / f"{n}", position=(0, 0, 5.0 * n), sop=f"1.2.{n + 1}", ConvolutionKernel=("H31s", "H60s")[n % 2]
        )
    (series, (fault,)) = built(tmp_path)
    assert series == []
    assert "its 4 images differ in kernel" in fault.reason


@pytest.mark.parametrize("change", [{"patient": "other"}, {"StudyInstanceUID": "1.2.3"}])
def test_a_series_of_two_patients_or_studies_is_left_out(tmp_path: Path, change: dict) -> None:
    write_series(tmp_path)
    write_ct(tmp_path / "x", head_hu(), position=(0, 0, 30.0), sop="1.2.9", **change)
    (series, (fault,)) = built(tmp_path)
    assert series == []
    assert "several patients or studies" in fault.reason


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("H31s", "soft"),
        ("J40s", "soft"),
        ("Hr38f", "soft"),
        ("H70h", "sharp"),
        ("Hr69h", "sharp"),
        ("B60f", "sharp"),
        ("STANDARD", "soft"),
        ("SOFT", "soft"),
        ("BONEPLUS", "sharp"),
        ("EDGE", "sharp"),
        ("UB", "soft"),
        ("D", "sharp"),
        ("YC", "sharp"),
        ("FC26", "soft"),
        ("FC64", "soft"),
        ("FC30", "sharp"),
        ("FC81", "sharp"),
        ("", "unknown"),
        ("X", "unknown"),
    ],
)
def test_kernels_of_four_makers(tmp_path: Path, kernel: str, expected: str) -> None:
    (image,) = read_images(write_ct(tmp_path / "a", ConvolutionKernel=kernel), KEY)
    assert sharpness(image) == expected


def test_a_description_can_tell_of_bone(tmp_path: Path) -> None:
    for text, expected in (("Head 5.0 BONE", "sharp"), ("Schädel Knochen", "sharp"), ("Head brain 5.0", "unknown")):
        path = write_ct(tmp_path / "a", SeriesDescription=text, SpecificCharacterSet="ISO_IR 192")
        assert sharpness(read_images(path, KEY)[0]) == expected


STUDY = {
    "thick": {"ConvolutionKernel": "H31s", "count": 5},
    "thin": {"ConvolutionKernel": "H31s", "count": 20, "gap": 1.25},
    "bone": {"ConvolutionKernel": "H70h", "count": 5},
    "contrast": {"ConvolutionKernel": "H31s", "count": 5, "ContrastBolusAgent": "yes"},
    "derived": {"ConvolutionKernel": "H31s", "count": 8, "ImageType": ["DERIVED", "PRIMARY", "AXIAL"]},
    "unknown": {"count": 6},
}


def write_study(folder: Path, *names: str, **common: object) -> None:
    for name in names:
        settings = dict(STUDY[name])
        count, gap = settings.pop("count"), settings.pop("gap", 5.0)
        for n in range(count):
            write_ct(
                folder / name / f"{name}{n}",
                head_hu(seed=n),
                position=(0, 0, gap * n),
                series=f"1.2.{list(STUDY).index(name) + 1}",
                sop=f"1.2.{list(STUDY).index(name) + 1}.{n}",
                **(settings | common),
            )


def chosen(folder: Path, annotated: dict[str, str] | None = None) -> tuple[list[str], list[str], str]:
    """Names of the series taken, the reasons of those that were not, and the reason for the choice."""
    series, faults = built(folder)
    assert faults == []
    names = {series_name(f"1.2.{n + 1}"): name for n, name in enumerate(STUDY)}
    taken, (choice,), left = choose(
        series, {series_name(f"1.2.{list(STUDY).index(k) + 1}"): v for k, v in (annotated or {}).items()}
    )
    assert sorted(choice.taken) == sorted(s.name for s in taken)
    assert len(taken) + len(left) == len(series)
    return [names[s.name] for s in taken], [f"{names[f.what.split()[1]]}: {f.reason}" for f in left], choice.reason


def test_the_original_brain_kernel_series_near_5_mm_is_taken(tmp_path: Path) -> None:
    write_study(tmp_path, *STUDY)
    taken, left, reason = chosen(tmp_path)
    assert taken == ["thick"]
    assert reason == "best of 6: original, kernel H31s (soft), 5 slices every 5.0 mm"
    why = dict(line.split(": not chosen: ") for line in left)
    assert why["bone"].startswith("a sharp kernel; the study's original, kernel H31s (soft)")
    assert why["thin"].startswith("a distance of slices further from 5 mm")
    assert why["contrast"].startswith("a contrast agent")
    assert why["derived"].startswith("a derived image")
    assert why["unknown"].startswith("a sharp kernel") or why["unknown"].startswith("a kernel that is not known")


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("bone", "unknown"), "unknown"),
        (("bone", "thin"), "thin"),
        (("derived", "bone"), "bone"),
        (("contrast", "bone"), "bone"),
        (("bone",), "bone"),
    ],
)
def test_the_next_best_is_taken_where_the_best_is_not_there(tmp_path: Path, names: tuple, taken: str) -> None:
    write_study(tmp_path, *names)
    assert chosen(tmp_path)[0] == [taken]


def test_body_part_decides_nothing(tmp_path: Path) -> None:
    write_study(tmp_path, "thick", BodyPartExamined="FOOT")
    write_study(tmp_path, "bone", BodyPartExamined="HEAD")
    assert chosen(tmp_path)[0] == ["thick"]


def test_what_was_labelled_or_drawn_on_comes_first_and_all_of_it(tmp_path: Path) -> None:
    write_study(tmp_path, *STUDY)
    taken, left, reason = chosen(tmp_path, {"bone": "masks", "thin": "labels and masks"})
    assert sorted(taken) == ["bone", "thin"]
    assert reason == "has labels and masks"
    assert len([line for line in left if "labels and masks refer to another series" in line]) == 4


def test_a_lone_sharp_series_is_marked(tmp_path: Path) -> None:
    write_study(tmp_path, "bone", "derived")
    series, _ = built(tmp_path)
    flags = {describe(s).split(",")[0]: s.flags for s in series}
    assert flags == {"original": ("sharp-kernel",), "derived": ("derived",)}


def test_one_choice_per_study(tmp_path: Path) -> None:
    write_study(tmp_path / "a", "thick", "bone")
    for path in write_series(tmp_path / "b", series="1.9", StudyInstanceUID="1.2.99"):
        assert path.is_file()
    taken, choices, left = choose(built(tmp_path)[0], {})
    assert (len(taken), len(choices), len(left)) == (2, 2, 1)
    assert {c.reason for c in choices} >= {"the only one"}


def test_ct_dataset_and_its_files_are_what_they_say(tmp_path: Path) -> None:
    """The helpers of these tests write what pydicom reads back."""
    ds = ct_dataset(head_hu(), position=(1, 2, 3), RescaleIntercept=-5)
    write_ct(tmp_path / "a", head_hu(), position=(1, 2, 3), RescaleIntercept=-5)
    again = pydicom.dcmread(tmp_path / "a")
    assert again.ImagePositionPatient == ds.ImagePositionPatient
    np.testing.assert_array_equal(again.pixel_array, head_hu())
