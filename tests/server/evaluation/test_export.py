from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.evaluation.evaluate import EvaluationError, load_model
from server.evaluation.export import export_model
from server.storage.run_folder import read_config
from shared.model.starting import read_model
from tests.conftest import SmallHospitals
from tests.support.rounds import run


def test_a_runs_final_model_is_the_one_that_is_read_again(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    folder, _ = run(copied_hospitals, tmp_path / "centre", federation__rounds=1)
    path = tmp_path / "mine.safetensors"
    export_model(folder, path)
    model, card = read_model(path)
    expected, (heads,) = load_model(folder, read_config(folder), "final")
    expected.load_state_dict(heads, strict=False)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.cpu()), name
    assert card.settings.variant == "demo"
    assert card.facts["rounds"] == "1"
    with pytest.raises(EvaluationError, match="should end in"):
        export_model(folder, tmp_path / "mine.pt")


def test_several_sets_of_heads_are_no_model(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    folder, _ = run(copied_hospitals, tmp_path / "centre", federation__rounds=1, federation__heads="ensemble")
    with pytest.raises(EvaluationError, match="expected 'average'"):
        export_model(folder, tmp_path / "mine.safetensors")
