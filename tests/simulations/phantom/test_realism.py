from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simulations.phantom.realism import RealismError, classify, draw_slices, read_slices
from simulations.phantom.realism import _patches as patches_of
from tests.support.dicom_files import head_hu, write_ct


def textured(slices: int, sigma: float, seed: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [(35 + sigma * draw.standard_normal((40, 24, 24))).astype(np.float32) for _ in range(slices)]


def test_what_differs_is_told_and_what_does_not_is_not() -> None:
    assert classify(textured(4, 3.0, 0), textured(8, 6.0, 1)).auc > 0.95
    assert abs(classify(textured(4, 3.0, 0), textured(8, 3.0, 1)).auc - 0.5) < 0.12


def test_one_real_slice_is_two_parts_and_none_is_too_few() -> None:
    assert classify(textured(1, 3.0, 0), textured(4, 6.0, 1)).real_slices == 1
    with pytest.raises(RealismError, match="give more real heads"):
        classify([], textured(4, 3.0, 1))


def test_real_and_drawn_slices_come_on_one_grid(tmp_path: Path) -> None:
    write_ct(tmp_path / "a", np.kron(head_hu(), np.ones((4, 4), np.int16)), spacing=(0.8, 0.8), patient="")
    (real,) = read_slices(tmp_path)
    (drawn,) = draw_slices(1, 3)
    assert real.shape == drawn.shape == (224, 224)
    assert len(patches_of(real)) > 10
