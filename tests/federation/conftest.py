"""Three hospitals on two small data sets, as a federation of real processes takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SmallHospitals
from tests.support.centres import need_nginx

NAMES = ["hospital-01", "hospital-02", "hospital-03"]


@pytest.fixture(scope="session")
def data(hospitals: SmallHospitals) -> dict[str, Path]:
    """Name -> site.yaml whose data it has; the third has those of the second, in another order of slices."""
    need_nginx()
    first, second = hospitals.files["hospital-01"], hospitals.files["hospital-02"]
    return dict(zip(NAMES, (first, second, second), strict=True))
