from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import ModelSettings
from shared.model.gradcam import grad_cam
from shared.model.scoring import build_model
from shared.model.swin import MultiTaskSwin


@pytest.fixture
def model() -> MultiTaskSwin:
    return build_model(ModelSettings(variant="demo"), seed=0).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 1, 128, 128, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logit_of(model: MultiTaskSwin, x_BYXD: Tensor, stage: int) -> Tensor:
    for layer in model.encoder.layers[stage + 1 :]:
        x_BYXD = layer(x_BYXD)
    return model.cls(model.pool([x_BYXD]))[:, 0]


def enlarge(small: np.ndarray, side: int) -> np.ndarray:
    """Bilinear, pixel centres aligned; beyond the outermost centres the edge's value."""
    n = len(small)
    at = (np.arange(side) + 0.5) * n / side - 0.5
    rows = np.array([np.interp(at, np.arange(n), column) for column in small.T]).T
    return np.array([np.interp(at, np.arange(n), row) for row in rows])


@torch.no_grad()
def by_finite_differences(model: MultiTaskSwin, image: Tensor, stage: int, step: float = 1e-5) -> np.ndarray:
    """Grad-CAM without gradients: the mean slope over a channel is how the logit answers when the channel rises."""
    features = model.encode(image)[stage]
    _, Y, X, D = features.shape
    raised = torch.eye(D, dtype=features.dtype)[:, None, None, :] * step
    maps = []
    for slice_YXD in features:
        rise = logit_of(model, slice_YXD + raised, stage) - logit_of(model, slice_YXD - raised, stage)
        weight_D = (rise / (2 * step) / (Y * X)).numpy()
        cam = enlarge(np.maximum((slice_YXD.numpy() * weight_D).sum(-1), 0), image.shape[-1])
        maps.append(cam / cam.max())
    return np.array(maps)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_map_is_that_of_finite_differences(model: MultiTaskSwin, image: Tensor, stage: int) -> None:
    model, image = model.double(), image.double()
    found = grad_cam(model, image, stage).numpy()
    assert np.ptp(found) > 0.5
    np.testing.assert_allclose(found, by_finite_differences(model, image, stage), atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shape_and_range(model: MultiTaskSwin, image: Tensor, stage: int) -> None:
    cam = grad_cam(model, image, stage)
    assert cam.shape == (2, 128, 128)
    assert cam.dtype == torch.float32
    assert cam.min() >= 0
    assert cam.amax((1, 2)).tolist() == pytest.approx([1.0, 1.0])
    assert not cam.requires_grad


def test_evidence_is_for_the_marker_only(model: MultiTaskSwin, image: Tensor) -> None:
    """What speaks for it with a classifier speaks against it with the opposite one."""
    cam = grad_cam(model, image)
    with torch.no_grad():
        model.cls.weight.neg_()
    opposite = grad_cam(model, image)
    assert cam.any()
    assert opposite.any()
    both_at_peak = (cam == 1) & (opposite == 1)
    assert not both_at_peak.any()


def test_nothing_speaks_for_it(model: MultiTaskSwin, image: Tensor) -> None:
    with torch.no_grad():
        model.cls.weight.zero_()
    assert not grad_cam(model, image).any()


def test_a_slices_map_does_not_depend_on_its_neighbours(model: MultiTaskSwin, image: Tensor) -> None:
    torch.testing.assert_close(grad_cam(model, image)[1:], grad_cam(model, image[1:]), rtol=1e-3, atol=1e-4)


def test_parameters_and_their_gradients_are_left_alone(model: MultiTaskSwin, image: Tensor) -> None:
    named = dict(model.named_parameters())
    half = list(named)[::2]
    for name in half:
        named[name].grad = torch.full_like(named[name], 2.0)
    before = {name: value.detach().clone() for name, value in named.items()}
    grad_cam(model, image)
    assert all(torch.equal(before[name], value) for name, value in named.items())
    assert all(value.requires_grad for value in named.values())
    assert all((named[name].grad == 2.0).all() for name in half)
    assert all(named[name].grad is None for name in named if name not in half)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(model: MultiTaskSwin, image: Tensor, training: bool) -> None:
    model.train(training)
    grad_cam(model, image)
    assert model.training == training


def test_it_works_where_gradients_are_off_and_parameters_frozen(model: MultiTaskSwin, image: Tensor) -> None:
    expected = grad_cam(model, image)
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(model.requires_grad_(False), image), expected)
