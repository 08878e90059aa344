from __future__ import annotations

import json
import multiprocessing
import resource
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from client.boundary.audit import CUT, FILE, START, AuditError, contents, record, verify
from shared.wire.records import to_record


def filled(folder: Path, entries: int = 5) -> list[str]:
    return [record(folder, "released", {"number": number}) for number in range(entries)]


def lines(folder: Path) -> list[bytes]:
    return (folder / FILE).read_bytes().splitlines(keepends=True)


def test_a_whole_record_is_whole(tmp_path: Path) -> None:
    hashes = filled(tmp_path)
    verdict = verify(tmp_path, tuple(hashes))
    assert (verdict.entries, verdict.newest, verdict.faults) == (5, hashes[-1], ())
    entries = [json.loads(line) for line in lines(tmp_path)]
    assert [entry["before"] for entry in entries] == [START, *hashes[:-1]]
    assert verify(tmp_path / "none").newest == START


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda old: [*old[:2], old[2].replace(b'"number": 2', b'"number": 7'), *old[3:]], "line 3 was changed"),
        (lambda old: [*old[:2], *old[3:]], "line 3 does not follow"),
        (lambda old: [*old[:2], old[3], old[2], old[4]], "line 3 does not follow"),
        (lambda old: [*old[:2], old[1], *old[2:]], "line 3 does not follow"),
        (lambda old: [*old[:2], b"nothing\n", *old[2:]], "line 3 is no entry"),
        (lambda old: old[1:], "line 1 does not follow"),
    ],
)
def test_an_edit_shows(tmp_path: Path, change: object, told: str) -> None:
    filled(tmp_path)
    (tmp_path / FILE).write_bytes(b"".join(change(lines(tmp_path))))
    assert any(fault.startswith(told) for fault in verify(tmp_path).faults)


def test_a_shortened_record_shows_by_the_hash_that_the_centre_has(tmp_path: Path) -> None:
    hashes = filled(tmp_path)
    (tmp_path / FILE).write_bytes(b"".join(lines(tmp_path)[:-2]))
    assert verify(tmp_path).faults == ()
    (fault,) = verify(tmp_path, (hashes[2], hashes[4])).faults
    assert hashes[4][:12] in fault


@pytest.mark.parametrize("kept", [1, 40, -2, -1])
def test_a_line_cut_by_a_crash_is_kept_and_explained(tmp_path: Path, kept: int) -> None:
    filled(tmp_path)
    whole = lines(tmp_path)
    (tmp_path / FILE).write_bytes(b"".join(whole[:-1]) + whole[-1][:kept])
    record(tmp_path, "released", {"number": 5})
    verdict = verify(tmp_path)
    assert verdict.faults == ()
    events = [json.loads(line)["event"] for line in lines(tmp_path) if line.endswith(b"}\n")]
    complete = kept == -1  # all but the line's end had been written
    assert events.count(CUT) == (0 if complete else 1)
    assert verdict.entries == 6  # four and the new one, and the fifth or the word that it was cut


def _append(folder: Path) -> None:
    filled(folder, 50)


def test_two_processes_share_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_append, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    verdict = verify(tmp_path)
    assert (verdict.entries, verdict.faults) == (100, ())


def test_a_record_that_cannot_be_written_is_an_error_without_a_path(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    filled(tmp_path)
    size = (tmp_path / FILE).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))  # as a full disk would: 20 bytes fit
    try:
        with pytest.raises(AuditError, match="nothing leaves") as caught:
            record(tmp_path, "released", {"number": 5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) not in str(caught.value)
    record(tmp_path, "released", {"number": 5})
    assert verify(tmp_path).faults == ()


def test_what_left_is_described_and_not_kept(tmp_path: Path) -> None:
    tensors = to_record({"encoder.a": np.array([3.0, 4.0], np.float32), "encoder.b": np.zeros((2, 2), np.float32)})
    described = contents(RecordDict({"update": tensors, "facts": ConfigRecord({"site": "hospital-03"})}))
    (group,) = described["update"]["tensors"]
    assert (group[0], group[1], group[3]) == ("encoder", [6], 5.0)
    assert described["facts"] == {"site": "hospital-03"}
    record(tmp_path, "released", described)
    assert b"NUMPY" not in (tmp_path / FILE).read_bytes()
