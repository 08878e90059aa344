"""Lines of a run are read as they were written, by this version and by one that knows less or more."""

from __future__ import annotations

import json

import pytest

from server.storage.lines import RoundLine, RunStatus, SiteLine

SITE = SiteLine(weight=1.0, bytes_up=5, norm=0.5, audit="ab", cls=0.0, withheld="policy.metrics is false")
ROUND = RoundLine(3, 17.5, 1.5, 10, 5, {"hospital-01": SITE}, {"hospital-02": "late"})


@pytest.mark.parametrize("line", [SITE, ROUND, RunStatus(), RunStatus("waiting", 1.0, "a quorum", ["hospital-01"])])
def test_a_line_is_read_as_it_was_written(line: SiteLine | RoundLine | RunStatus) -> None:
    assert type(line).from_json(json.loads(json.dumps(line.to_json()))) == line


def test_what_is_not_known_has_no_key() -> None:
    assert SITE.to_json().keys() == {"weight", "bytes_up", "norm", "audit", "cls", "withheld"}
    assert ROUND.to_json()["sites"]["hospital-01"] == SITE.to_json()
    assert RunStatus().to_json() == {}


def test_a_key_of_another_version_is_left_out() -> None:
    assert RoundLine.from_json(ROUND.to_json() | {"energy": 3}) == ROUND


def test_a_line_that_a_crash_cut_off_names_what_is_missing() -> None:
    content = ROUND.to_json()
    del content["seconds"]
    with pytest.raises(ValueError, match="seconds"):
        RoundLine.from_json(content)
