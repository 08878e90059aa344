from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from server.cli import app
from server.evaluation.evaluate import EvaluationError, open_held_out
from server.federation.heads import ProbeError, fit_probe
from shared.config import RunConfig
from shared.model.batches import read_batch
from shared.model.scoring import build_model, score_slices
from tests.conftest import SmallHospitals, edit_site


def test_a_probe_is_scikit_learns_logistic_regression(hospitals: SmallHospitals, config: RunConfig) -> None:
    cache, model = hospitals.cache("hospital-01"), build_model(config.model, 0).eval()
    probe = {name: torch.from_numpy(value) for name, value in fit_probe(model, cache, config).items()}
    rows = cache.rows()
    with torch.no_grad():
        batch = read_batch(cache, rows, config.model.windows(), model.shape.image_size)
        features = model.pool(model.encode(batch.image)).numpy()
    known = ~np.isnan(cache.label)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    reference.fit(features[known], cache.label[known].astype(int))
    scores = score_slices(model, [probe], cache, rows, config.model, "fp32")
    np.testing.assert_allclose(scores.logit, reference.decision_function(features), atol=1e-3)
    assert np.isnan(scores.dice).all()


def test_a_probe_needs_both_labels(copied_hospitals: SmallHospitals, config: RunConfig) -> None:
    cache = copied_hospitals.cache("hospital-01")
    cache.label[:] = np.where(np.isnan(cache.label), np.nan, 0)
    with pytest.raises(ProbeError, match="all alike"):
        fit_probe(build_model(config.model, 0), cache, config)


def test_only_held_out_sites_are_tests(hospitals: SmallHospitals) -> None:
    site, cache = open_held_out(hospitals.files["hospital-05"])
    assert (site.name, set(cache.split)) == ("hospital-05", {"test"})
    with pytest.raises(EvaluationError, match="expected 'held-out'"):
        open_held_out(hospitals.files["hospital-01"])


def test_the_command_says_what_is_wrong_and_fails(copied_hospitals: SmallHospitals, tmp_path) -> None:
    site = str(copied_hospitals.files["hospital-05"])
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), site])
    assert result.exit_code == 1
    assert "is not a run" in result.output.replace("\n", " ")
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 1


def test_a_site_that_was_not_ingested_is_named(copied_hospitals: SmallHospitals) -> None:
    edit_site(copied_hospitals.files["hospital-05"], cache="elsewhere/")
    with pytest.raises(ValueError, match="hemafed-client ingest"):
        open_held_out(copied_hospitals.files["hospital-05"])
