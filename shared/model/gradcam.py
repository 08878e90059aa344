"""Where the classifier looks: Grad-CAM on one stage of the encoder.

Source: Selvaraju et al. 2017 (arXiv:1610.02391), equations 1 and 2. Shape suffixes: B batch, Y row, X column, D feature.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from shared.model.swin import MultiTaskSwin

STAGE = 2  # 1/16 of the resolution; the last stage of a small model has too few tokens for a picture


def grad_cam(model: MultiTaskSwin, image_BCYX: Tensor, stage: int = STAGE) -> Tensor:
    """Evidence for a hypodensity, per pixel.

    Args:
      model: in any mode; its parameters and their gradients are left alone.
      image_BCYX: windowed input.
      stage: encoder stage, 0 (finest) to 3.
    Returns:
      float32 (B, Y, X) in [0, 1], each slice scaled to its own maximum; all 0 where nothing speaks for it.
    """
    with torch.enable_grad():
        stages = [s.detach() for s in model.encode(image_BCYX)[: stage + 1]]
        x_BYXD = features = stages[stage].requires_grad_(True)
        for layer in model.encoder.layers[stage + 1 :]:
            x_BYXD = layer(x_BYXD)
        logit = model.classify([x_BYXD]).sum()
        (slope_BYXD,) = torch.autograd.grad(logit, features)
    weight = slope_BYXD.mean((1, 2), keepdim=True)
    cam_BYX = (weight * features).sum(-1).relu().detach()
    cam_BYX = functional.interpolate(cam_BYX[:, None], image_BCYX.shape[-2:], mode="bilinear", align_corners=False)[
        :, 0
    ]
    return cam_BYX / cam_BYX.amax((1, 2), keepdim=True).clamp_min(1e-12)
