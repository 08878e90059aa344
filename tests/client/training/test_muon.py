"""Muon in float32 takes the steps of torch's, and is taken where bfloat16 is slow."""

from __future__ import annotations

import pytest
import torch

from client.training.muon import Float32Muon, build_muon


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_its_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    ends = []
    for kind in (torch.optim.Muon, Float32Muon):
        parameter = torch.nn.Parameter(start.clone())
        optimiser = kind([parameter], lr=0.1, weight_decay=0.05, momentum=0.9)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimiser.step()
        ends.append((parameter.detach() - start, optimiser.state_dict()))
    (torchs, its_state), (ours, our_state) = ends
    # bfloat16 has eight bits: its rounding is all that may differ.
    assert float((torchs - ours).norm() / torchs.norm()) < 0.02
    torch.testing.assert_close(our_state["state"], its_state["state"])
    assert our_state["param_groups"] == its_state["param_groups"]


def test_it_makes_singular_values_alike() -> None:
    torch.manual_seed(1)
    parameter = torch.nn.Parameter(torch.zeros(40, 20))
    parameter.grad = torch.randn(40, 20) @ torch.diag(torch.logspace(-1, 1, 20))
    Float32Muon([parameter], lr=1.0, weight_decay=0.0).step()
    values = torch.linalg.svdvals(parameter.detach()) / 2**0.5  # rows / columns is 2
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.5


def test_a_parameter_without_gradient_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    Float32Muon([parameter], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(parameter.detach(), torch.ones(3, 4))


@pytest.mark.parametrize(("device", "fast", "kind"), [("cpu", False, Float32Muon), ("cpu", True, torch.optim.Muon)])
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, device: str, fast: bool, kind: type) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2, 3))]}]
    assert type(build_muon(groups, torch.device(device), lr=0.1)) is kind
