from __future__ import annotations

import pytest

from shared.config import parse_config
from simulations.benchmarks.train import flops_per_slice


@pytest.mark.parametrize("variant", ["demo", "demo-deep"])
def test_operations_of_a_slice_are_counted_for_every_model(variant: str) -> None:
    assert 0.05e9 < flops_per_slice(parse_config({"model.variant": variant})) < 5e9
