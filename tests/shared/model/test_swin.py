from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from shared.config import LossSettings
from shared.model.batches import Batch
from shared.model.losses import TaskBalance, slice_losses
from shared.model.swin import (
    IMAGE_MEAN,
    IMAGE_SD,
    VARIANTS,
    ClassificationHead,
    ModelError,
    MultiTaskSwin,
    autocast,
    load_pretrained,
)

DEMO = VARIANTS["demo"]


def timm_demo(channels: int, heads: tuple[int, ...] = DEMO.heads, **changes: object) -> SwinTransformer:
    """timm's own Swin, with a classifier of ten classes as published weights have one."""
    settings = {
        "img_size": DEMO.image_size,
        "embed_dim": DEMO.channels,
        "depths": DEMO.depths,
        "window_size": DEMO.window_size,
        "num_heads": heads,
    }
    return SwinTransformer(in_chans=channels, num_classes=10, **(settings | changes)).eval()


def save_weights(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return path


def as_timm_sees(image: torch.Tensor) -> torch.Tensor:
    return (image - IMAGE_MEAN) / IMAGE_SD


@torch.no_grad()
def test_the_tiny_encoder_is_timms() -> None:
    theirs = timm.create_model("swin_tiny_patch4_window7_224", in_chans=1, num_classes=0).eval()
    ours = MultiTaskSwin(VARIANTS["tiny"]).eval()
    ours.encoder.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 1, 224, 224)
    stages = ours.encode(image)
    seen = as_timm_sees(image)
    expected = theirs.forward_intermediates(seen, intermediates_only=True)
    assert [tuple(s.shape) for s in stages] == [(1, 56, 56, 96), (1, 28, 28, 192), (1, 14, 14, 384), (1, 7, 7, 768)]
    for stage, their_stage in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.permute(0, 3, 1, 2), their_stage)
    torch.testing.assert_close(ours.pool(stages), theirs(seen))


@torch.no_grad()
def test_weights_with_one_channel_load_as_they_are(tmp_path: Path) -> None:
    theirs, ours = timm_demo(1), MultiTaskSwin(DEMO).eval()
    left = load_pretrained(ours, save_weights(tmp_path / "swin.safetensors", theirs.state_dict()))
    assert left == ["head.fc.bias", "head.fc.weight"]
    image = torch.rand(2, 1, 128, 128)
    torch.testing.assert_close(
        ours.pool(ours.encode(image)), theirs.forward_head(theirs.forward_features(as_timm_sees(image)), True)
    )


@torch.no_grad()
def test_weights_with_three_channels_see_a_grey_slice_as_a_grey_picture(tmp_path: Path) -> None:
    theirs, ours = timm_demo(3), MultiTaskSwin(DEMO).eval()
    load_pretrained(ours, save_weights(tmp_path / "swin.safetensors", theirs.state_dict()))
    image = torch.rand(2, 1, 128, 128)
    grey = as_timm_sees(image).expand(2, 3, 128, 128)
    torch.testing.assert_close(
        ours.pool(ours.encode(image)), theirs.forward_head(theirs.forward_features(grey), True), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_weights_with_three_channels_keep_their_brightness_with_two_windows(tmp_path: Path) -> None:
    theirs, ours = timm_demo(3), MultiTaskSwin(DEMO, in_channels=2).eval()
    load_pretrained(ours, save_weights(tmp_path / "swin.safetensors", theirs.state_dict()))
    colour = theirs.patch_embed.proj.weight
    torch.testing.assert_close(ours.encoder.patch_embed.proj.weight, colour[:, :2] * 1.5)


@pytest.mark.parametrize("windows", [2, 3])
def test_weights_with_one_channel_do_not_fit_several_windows(tmp_path: Path, windows: int) -> None:
    path = save_weights(tmp_path / "swin.safetensors", timm_demo(1).state_dict())
    with pytest.raises(ModelError, match=r"patch_embed\.proj\.weight") as caught:
        load_pretrained(MultiTaskSwin(DEMO, in_channels=windows), path)
    assert str(path) in str(caught.value)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "swin.safetensors", timm_demo(1, embed_dim=64).state_dict())
    model = MultiTaskSwin(DEMO)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ModelError, match=r"patch_embed\.proj\.weight: \(64, 1, 4, 4\), expected \(16, 1, 4, 4\)"
    ) as caught:
        load_pretrained(model, path)
    assert str(path) in str(caught.value)
    assert "model.variant" in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = timm_demo(1).state_dict()
    del weights["layers.2.blocks.1.attn.qkv.weight"]
    with pytest.raises(ModelError, match=r"1 encoder tensors.*layers\.2\.blocks\.1\.attn\.qkv\.weight: missing"):
        load_pretrained(MultiTaskSwin(DEMO), save_weights(tmp_path / "swin.safetensors", weights))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.pretrained") as caught:
        load_pretrained(MultiTaskSwin(DEMO), tmp_path / "nowhere.safetensors")
    assert str(tmp_path / "nowhere.safetensors") in str(caught.value)


def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "swin.pth"
    path.write_bytes(b"PK\x03\x04 a pickle, for example")
    with pytest.raises(ModelError, match=r"swin\.pth"):
        load_pretrained(MultiTaskSwin(DEMO), path)


@torch.no_grad()
@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("variant", ["demo", "default"])
def test_output_shapes(variant: str, windows: int) -> None:
    model = MultiTaskSwin(VARIANTS[variant], in_channels=windows).eval()
    side = VARIANTS[variant].image_size
    prediction = model(torch.rand(2, windows, side, side))
    assert prediction.hypodensity.shape == (2,)
    assert prediction.hematoma.shape == (2, side, side)
    assert prediction.reconstruction.shape == (2, windows, side, side)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = MultiTaskSwin(DEMO).train()
    mask = torch.zeros(2, 128, 128)
    mask[:, 20:50, 30:60] = 1
    batch = Batch(torch.rand(2, 1, 128, 128), torch.tensor([1.0, 0.0]), mask, torch.tensor([True, True]))
    TaskBalance(LossSettings()).total(slice_losses(model(batch.image), batch)).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert idle == []


@pytest.mark.parametrize(
    ("variant", "windows", "expected"),
    [
        ("default", 1, {"encoder": 20_410_314, "cls": 2305, "seg": 6_754_747, "rec": 6_754_747}),
        ("tiny", 1, {"encoder": 27_516_282, "cls": 2305, "seg": 6_754_747, "rec": 6_754_747}),
        ("demo", 1, {"encoder": 576_878, "cls": 385, "seg": 125_816, "rec": 125_816}),
        # A second window: 16 x 4 x 4 weights more in the embedding, 16 weights and a bias more in the output.
        ("demo", 2, {"encoder": 577_134, "cls": 385, "seg": 125_816, "rec": 125_833}),
    ],
)
def test_sizes_and_groups(variant: str, windows: int, expected: dict[str, int]) -> None:
    state = MultiTaskSwin(VARIANTS[variant], windows).state_dict()
    sizes = Counter()
    for name, value in state.items():
        sizes[name.split(".", 1)[0]] += value.numel()
    assert sizes == expected
    assert all(name.startswith(("encoder.", "cls.", "seg.", "rec.")) for name in state)
    assert all(value.is_floating_point() for value in state.values())


@torch.no_grad()
def test_a_slice_is_predicted_alone() -> None:
    model = MultiTaskSwin(DEMO).eval()
    image = torch.rand(3, 1, 128, 128)
    together, alone = model(image), model(image[1:2])
    torch.testing.assert_close(together.hypodensity[1:2], alone.hypodensity, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.hematoma[1:2], alone.hematoma, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.reconstruction[1:2], alone.reconstruction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_can_be_forced(precision: str, dtype: torch.dtype) -> None:
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_decoder_that_is_not_asked_for_is_not_computed() -> None:
    model = MultiTaskSwin(VARIANTS["demo"]).eval()
    image = torch.rand(1, 1, 128, 128)
    whole, alone = model(image), model(image, segment=False, reconstruct=False)
    assert alone.hematoma is None
    assert alone.reconstruction is None
    torch.testing.assert_close(alone.hypodensity, whole.hypodensity)
    assert model.last_shared() is dict(model.named_parameters())["encoder.layers.3.blocks.1.mlp.fc2.weight"]


def test_the_head_normalises_over_the_batch_and_remembers() -> None:
    head = ClassificationHead(3).train()
    x_BD = torch.tensor([[100.0, 0.0, 5.0], [100.2, 1.0, 5.0], [100.1, 2.0, 5.0]])
    weight, bias = head.weight.detach(), head.bias.detach()
    expected = (x_BD - x_BD.mean(0)) / (x_BD.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(head(x_BD), expected @ weight.T + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.norm.running_mean, 0.1 * x_BD.mean(0))
    seen = (x_BD - head.norm.running_mean) / (head.norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(head.eval()(x_BD), seen @ weight.T + bias)


def test_flat_patches_of_different_brightness_differ_before_training() -> None:
    """The norm after the patch embedding removes a patch's scale; only a bias keeps how bright it is."""
    model = MultiTaskSwin(DEMO).eval()
    levels = torch.tensor([0.55, 0.75, 0.95])[:, None, None, None].expand(3, 1, 128, 128)
    tokens_BYXD = model.encoder.patch_embed((levels - IMAGE_MEAN) / IMAGE_SD)
    assert (tokens_BYXD[0] - tokens_BYXD[1]).abs().mean() > 0.1
    assert (tokens_BYXD[1] - tokens_BYXD[2]).abs().mean() > 0.03


def test_a_whole_model_loads_from_plain_tensors() -> None:
    one, two = MultiTaskSwin(DEMO), MultiTaskSwin(DEMO)
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    assert torch.equal(one.cls.weight, two.cls.weight)
