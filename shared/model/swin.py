"""The multi-task model: one Swin encoder, a classification head, two Swin decoders.

In: windowed slices, float32 (B, C, Y, X) in [0, 1]. Out: one hypodensity logit, one hematoma logit per
pixel, one reconstructed slice. The module exists so that exactly one place says what the encoder is:
every tensor under `encoder.` is the federated part, and everything else stays in the hospital.

Source: MTL-Swin-Unet (Hirata and Okita 2025, arXiv:2505.06185); encoder: Swin Transformer (Liu et al.
2021, arXiv:2103.14030) as in timm; decoders: Swin-Unet (Cao et al. 2021, arXiv:2105.05537).

Shape suffixes: B batch, C channel, Y row, X column, D feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from shared.errors import HemafedError

# What timm's pretrained weights were trained with: ImageNet's mean and SD, over the three colours.
IMAGE_MEAN, IMAGE_SD = 0.449, 0.226


class ModelError(HemafedError, ValueError):
    """A model cannot be built, or weights do not fit it."""


@dataclass(frozen=True)
class ModelShape:
    """Architecture of one variant; sizes in pixels or tokens, unitless otherwise."""

    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    channels: int = 96
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    image_size: int = 224
    patch_size: int = 4
    window_size: int = 7
    drop_path: float = 0.1
    decoder_depth: int = 2


# "default" and "tiny" are the two encoders of the paper; "small" sees the same pixels with a ninth of the weights;
# "demo" and "demo-deep" are for two CPU cores: 128 pixels, of 1.75 mm, where a thin subdural is one or two wide.
VARIANTS = {
    "default": ModelShape(),
    "tiny": ModelShape(depths=(2, 2, 6, 2)),
    "small": ModelShape(channels=32, heads=(1, 2, 4, 8), drop_path=0.0, decoder_depth=1),
    "demo": ModelShape(channels=16, heads=(1, 2, 4, 8), image_size=128, window_size=8, drop_path=0.0, decoder_depth=1),
    "demo-deep": ModelShape(
        (2, 2, 6, 2), channels=16, heads=(1, 2, 4, 8), image_size=128, window_size=8, drop_path=0.0, decoder_depth=1
    ),
}


@dataclass(frozen=True)
class Prediction:
    """One forward pass.

    Attributes:
      hypodensity: logit per slice, float (B,).
      hematoma: logit per pixel, float (B, Y, X); None if it was not asked for.
      reconstruction: slice in the input's windowed units, float (B, C, Y, X); None if it was not asked for.
    """

    hypodensity: Tensor
    hematoma: Tensor | None
    reconstruction: Tensor | None


class PatchExpand(nn.Module):
    """Upsample tokens: (B, Y, X, D) -> (B, scale Y, scale X, D_out); Swin-Unet section 3.5."""

    def __init__(self, dim: int, out_dim: int, scale: int):
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale * scale * out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x_BYXD: Tensor, then: nn.Module | None = None) -> Tensor:
        """(B, Y, X, D) to (B, scale Y, scale X, D_out); with `then`, a layer on single tokens, to its output.

        Norm and `then` see tokens where they are, and what comes out is put in its place: the same numbers, and at full
        resolution a copy of one channel in place of 96.
        """
        B, Y, X, _ = x_BYXD.shape
        s = self.scale
        x = self.norm(self.expand(x_BYXD).view(B, Y, X, s, s, -1))
        x = x if then is None else then(x)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(B, s * Y, s * X, -1)


class Decoder(nn.Module):
    """Swin-Unet decoder: three times expand, concatenate the encoder's stage, Swin blocks; then x4.

    Args:
      shape: the encoder's architecture.
      out_channels: 1 for a hematoma logit, the number of windows for a reconstruction.
    Source: Cao et al. 2021, figure 1 and sections 3.4, 3.5.
    """

    def __init__(self, shape: ModelShape, out_channels: int):
        super().__init__()
        dims = [shape.channels * 2**stage for stage in range(4)]
        tokens = shape.image_size // shape.patch_size
        self.expands = nn.ModuleList()
        self.fuses = nn.ModuleList()
        self.stages = nn.ModuleList()
        for stage in (2, 1, 0):
            side = tokens // 2**stage
            self.expands.append(PatchExpand(dims[stage + 1], dims[stage], scale=2))
            self.fuses.append(nn.Linear(2 * dims[stage], dims[stage]))
            self.stages.append(
                nn.Sequential(
                    *[
                        SwinTransformerBlock(
                            dim=dims[stage],
                            input_resolution=(side, side),
                            num_heads=shape.heads[stage],
                            window_size=shape.window_size,
                            shift_size=0 if block % 2 == 0 else shape.window_size // 2,
                        )
                        for block in range(shape.decoder_depth)
                    ]
                )
            )
        self.norm = nn.LayerNorm(dims[0])
        self.final = PatchExpand(dims[0], dims[0], scale=shape.patch_size)
        self.output = nn.Linear(dims[0], out_channels)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Decode.

        Args:
          stages: the encoder's four stages, each (B, Y, X, D), finest first.
        Returns:
          float (B, C, Y, X) at the input's resolution.
        """
        x_BYXD = stages[3]
        for expand, fuse, blocks, skip in zip(self.expands, self.fuses, self.stages, stages[2::-1], strict=True):
            x_BYXD = blocks(fuse(torch.cat([expand(x_BYXD), skip], dim=-1)))
        return self.final(self.norm(x_BYXD), then=self.output).permute(0, 3, 1, 2)


class BatchStatistics(nn.Module):
    """Batch normalisation of (B, D) without a scale and a shift of its own (Ioffe and Szegedy 2015, arXiv:1502.03167).

    nn.BatchNorm1d without its count of batches, an integer that no update could carry.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.frozen = False
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, D) to (B, D): by the batch's own statistics in training, by the running ones after, and if `frozen` always."""
        by_batch = self.training and not self.frozen
        return nn.functional.batch_norm(
            x_BD, self.running_mean, self.running_var, training=by_batch, momentum=0.1, eps=self.eps
        )


class ClassificationHead(nn.Linear):
    """Pooled features (B, D) to one logit per slice (B, 1), normalised over the batch first.

    Slices differ little beside what they have in common, and the common part is moved by every batch's share of
    positives: without the norm the features became the same for all slices and classification alone learned nothing.
    Source of the norm before a linear classifier: He et al. 2022 (arXiv:2111.06377), section A.1.
    """

    def __init__(self, features: int):
        super().__init__(features, 1)
        self.norm = BatchStatistics(features)

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, D) to (B, 1)."""
        return super().forward(self.norm(x_BD))


class MultiTaskSwin(nn.Module):
    """Encoder, classification head, segmentation and reconstruction decoder.

    Args:
      shape: a value of VARIANTS or another architecture.
      in_channels: number of windows.
    Input: float (B, C, Y, X) with Y = X = shape.image_size.
    """

    def __init__(self, shape: ModelShape, in_channels: int = 1):
        super().__init__()
        self.shape = shape
        self.encoder = SwinTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            in_chans=in_channels,
            num_classes=0,
            global_pool="",
            embed_dim=shape.channels,
            depths=shape.depths,
            num_heads=shape.heads,
            window_size=shape.window_size,
            drop_path_rate=shape.drop_path,
            weight_init="jax",
        )
        # The norm after the embedding removes a patch's scale: without a bias two flat patches of other brightness are one.
        nn.init.normal_(self.encoder.get_parameter("patch_embed.proj.bias"), std=0.5)
        self.cls = ClassificationHead(shape.channels * 8)
        self.seg = Decoder(shape, out_channels=1)
        self.rec = Decoder(shape, out_channels=in_channels)

    def forward(self, image_BCYX: Tensor, segment: bool = True, reconstruct: bool = True) -> Prediction:
        """All three tasks, or those that are asked for, from one pass of the encoder."""
        stages = self.encode(image_BCYX)
        return Prediction(
            hypodensity=self.classify(stages),
            hematoma=self.seg(stages)[:, 0] if segment else None,
            reconstruction=self.rec(stages) if reconstruct else None,
        )

    def last_shared(self) -> Tensor:
        """A weight of the last layer that all tasks share; where GradNorm compares their gradients."""
        last = len(self.shape.depths) - 1
        return self.encoder.get_parameter(f"layers.{last}.blocks.{self.shape.depths[last] - 1}.mlp.fc2.weight")

    def encode(self, image_BCYX: Tensor) -> list[Tensor]:
        """The encoder's four stages, (B, Y, X, D) each, finest first, before the final norm."""
        x_BYXD = self.encoder.patch_embed((image_BCYX - IMAGE_MEAN) / IMAGE_SD)
        stages = []
        for layer in self.encoder.layers:
            x_BYXD = layer(x_BYXD)
            stages.append(x_BYXD)
        return stages

    def classify(self, stages: list[Tensor]) -> Tensor:
        """Hypodensity logit per slice, float32 (B,): bfloat16 would give slices that differ one score."""
        with torch.autocast(stages[-1].device.type, enabled=False):
            return self.cls(self.pool([stages[-1].to(self.cls.weight.dtype)]))[:, 0]

    def pool(self, stages: list[Tensor]) -> Tensor:
        """What the classification head sees: the normalised last stage, averaged over tokens; (B, D)."""
        return self.encoder.norm(stages[-1]).mean((1, 2))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The precision of matrix products.

    Args:
      precision: "auto" is bfloat16 where the machine computes with it, float32 elsewhere; "bf16" and "fp32" force one.
      device: where the model is.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or (precision == "auto" and fast))


def load_pretrained(model: MultiTaskSwin, path: Path) -> list[str]:
    """Put timm Swin weights from a file into the encoder.

    Args:
      model: changed in place.
      path: safetensors file of a timm Swin; nothing is downloaded. Weights for three colour channels are summed over
        the channels for a model with one, as timm does.
    Returns:
      Names of the file's tensors that the encoder has no place for (its classifier).
    Raises:
      ModelError: no such file, or an encoder tensor is missing or of another shape.
    """
    if not path.is_file():
        raise ModelError(
            f"model.pretrained is {str(path)!r}, and there is no such file on the server; correct the path"
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ModelError(
            f"model.pretrained {path} is not a safetensors file ({error}); convert the weights first"
        ) from error
    own = model.encoder.state_dict()
    projection = "patch_embed.proj.weight"
    if projection in weights and weights[projection].shape[1] == 3 != own[projection].shape[1]:
        weights[projection] = adapt_input_conv(own[projection].shape[1], weights[projection])
    misfits = [n for n in own if n not in weights or weights[n].shape != own[n].shape]
    # A deeper encoder's file fits a shallower one but for blocks that would be lost without a word.
    misfits += [n for n in sorted(weights) if n.startswith("layers.") and n not in own]
    if misfits:
        name = misfits[0]
        found = tuple(weights[name].shape) if name in weights else "missing"
        expected = tuple(own[name].shape) if name in own else "no such tensor"
        raise ModelError(
            f"{path}: {len(misfits)} encoder tensors do not fit, first {name}: {found}, expected {expected}; "
            "choose the model.variant that the weights were made with"
        )
    model.encoder.load_state_dict({name: weights[name] for name in own})
    return sorted(weights.keys() - own.keys())
