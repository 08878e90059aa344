from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file

from client.dicom.headers import read_images
from client.dicom.hounsfield import BIN_HU, BINS, LOW_HU, histogram, implausible
from client.dicom.pixels import PADDING_HU, read_hu
from client.dicom.pseudonyms import Pseudonyms
from tests.conftest import SmallHospitals
from tests.support.dicom_files import head_hu

HEAD = head_hu((256, 256)).astype(np.float32)


def test_a_histogram_counts_every_fourth_pixel_both_ways() -> None:
    values = np.full((8, 8), 1000.0, np.float32)
    values[0, 0], values[0, 4], values[4, 0], values[4, 4] = -2.5, 42.0, 42.0, 99999.0
    counts = histogram(values)
    assert counts.sum() == 4
    assert counts[(-5 - LOW_HU) // BIN_HU] == 1
    assert counts[(40 - LOW_HU) // BIN_HU] == 2
    assert counts[BINS - 1] == 1


def test_a_head_is_plausible() -> None:
    assert implausible(histogram(HEAD)) is None


def test_real_ct_is_plausible(real_dicom: Path) -> None:
    names = [
        real_dicom / "QIICR+dcmqi/data/segmentations/ct-3slice/01.dcm",
        real_dicom / "cornerstonejs+cornerstone3D/packages/dicomImageLoader/testImages/CTImage.dcm",
        Path(get_testdata_file("J2K_pixelrep_mismatch.dcm")),
    ]
    for path in names:
        assert implausible(histogram(read_hu(read_images(path, Pseudonyms(b"k" * 32))[0]))) is None


def test_simulated_hospitals_are_plausible(hospitals: SmallHospitals) -> None:
    site = hospitals.site("hospital-05")
    images = [i for path in sorted(site.images.rglob("IM*"))[:9] for i in read_images(path, Pseudonyms(b"k" * 32))]
    assert implausible(sum(histogram(read_hu(i)) for i in images)) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (HEAD + 1024, "most at 2"),  # a missing rescale: air at 24, brain at 1059
        (HEAD - 1024, "0% of the others"),  # applied twice
        (np.clip((HEAD + 40) / 160, 0, 1) * 255, "0.0% of pixels near air"),  # a windowed picture
        (HEAD / 2, "0.0% of pixels near air"),
        (HEAD * 2 + 1000, "most at"),
        (HEAD + 150, "most at 18"),  # calibrated wrongly
        (np.full((64, 64), 40.0, np.float32), "0.0% of pixels near air"),
        (np.full((64, 64), -1000.0, np.float32), "0% of the others"),
    ],
    ids=["missing", "twice", "windowed", "halved", "slope", "shifted", "tissue alone", "air alone"],
)
def test_what_cannot_be_hu_is_refused_with_the_measured_numbers(values: np.ndarray, said: str) -> None:
    reason = implausible(histogram(values.astype(np.float32)))
    assert reason is not None
    assert said in reason
    assert re.search("RescaleIntercept|applied twice", reason)


def test_declared_padding_is_no_air() -> None:
    """A missing rescale with padded corners: were padding air, air at 24 HU would pass as soft tissue."""
    values = HEAD + 1024
    values[:80] = PADDING_HU
    assert implausible(histogram(values)) is not None


def test_a_padded_circle_without_much_air_is_plausible() -> None:
    values = np.where(HEAD < -500, PADDING_HU, HEAD)
    values[120:136, :] = np.where(HEAD[120:136] < -500, -1000, values[120:136])
    assert implausible(histogram(values.astype(np.float32))) is None
