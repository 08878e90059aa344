from __future__ import annotations

import os
import shutil
from pathlib import Path

import pydicom
import pytest
import yaml
from typer.testing import CliRunner

from client.boundary.audit import record
from client.cli import app, report_text
from client.dicom.faults import Fault
from client.ingest.ingest import IngestReport
from shared.slices import read_cache
from tests.conftest import SmallHospitals, edit_site


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and output, its line breaks undone."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_ingest_says_what_it_took(copied_hospitals: SmallHospitals) -> None:
    file = copied_hospitals.files["hospital-05"]
    site = copied_hospitals.site("hospital-05")
    for path in site.cache.iterdir():
        path.unlink()
    status, text = run("ingest", file, "--workers", 2)
    assert status == 0
    labels = [line.split(",")[2] for line in site.labels.read_text().splitlines()[1:]]
    assert (
        f"hospital-05: 10 patients, 10 series, 30 slices: {labels.count('1')} with the marker, "
        f"{labels.count('')} without label, 30 with a mask" in text
    )
    assert "left out" not in text
    status, text = run("ingest", file)
    assert status == 0
    assert text.endswith("30 with a mask (unchanged)")


def test_what_ingest_writes_is_its_users_alone_and_serves_this_user(copied_hospitals: SmallHospitals) -> None:
    """Slices in a cache that everybody could read; at a hospital a machine has more users than one."""
    file = copied_hospitals.files["hospital-05"]
    site = copied_hospitals.site("hospital-05")
    for folder in (site.cache, site.state):
        shutil.rmtree(folder, ignore_errors=True)
    before = os.umask(0o022)
    try:
        assert run("ingest", file, "--workers", 1)[0] == 0
        assert os.umask(0o022) == 0o022, "the process goes on as it was"
    finally:
        os.umask(before)
    made = [path for folder in (site.cache, site.state) for path in (folder, *folder.rglob("*"))]
    assert len(made) > 4
    assert {str(path.name): path.stat().st_mode & 0o077 for path in made if path.stat().st_mode & 0o077} == {}
    if os.geteuid() == 0:
        _read_as_owner(site.cache, made)


def _read_as_owner(cache: Path, made: list[Path]) -> None:
    """That the owner of these files, who is another user than root, can read a cache."""
    for path in made:
        os.chown(path, 65534, 65534)
    if (child := os.fork()) == 0:
        try:
            for parent in cache.parents:
                if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                    parent.chmod(parent.stat().st_mode | 0o011)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os._exit(0 if len(read_cache(cache).label) == 30 else 2)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_identifier_is_in_the_output(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    paths = sorted(site.images.rglob("IM*"))
    identifiers = set()
    for path in paths:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        identifiers |= {str(ds.PatientID), str(ds.PatientName)}
        identifiers |= {str(ds.SOPInstanceUID), str(ds.SeriesInstanceUID), str(ds.StudyInstanceUID)}
    # Faults of every kind, so that there is something to say.
    cut = pydicom.dcmread(paths[0])
    cut.PixelData = cut.PixelData[:100]
    cut.save_as(paths[0])
    twice = pydicom.dcmread(paths[4])
    twice.PixelData = bytes(2) + twice.PixelData[2:]
    twice.SOPInstanceUID = "1.2.3"
    twice.save_as(site.images / "second")  # two slices at one position
    (site.images / "copy").write_bytes(paths[7].read_bytes())
    seg = next(site.masks.iterdir())
    (site.masks / "cut.dcm").write_bytes(seg.read_bytes()[:-100])
    edit_site(copied_hospitals.files["hospital-01"], data={"images": "dicom/", "masks": "masks/"})
    status, text = run("ingest", copied_hospitals.files["hospital-01"], "--workers", 2)
    assert status == 0
    for reason in (
        "100 bytes",
        "at the position of another",
        "byte for byte",
        "another mask file of its series cannot be used",
    ):
        assert reason in text
    assert "10 patients" not in text  # one series is gone
    unbroken = text.replace(" ", "")
    assert [identifier for identifier in identifiers if identifier in unbroken] == []


def test_a_missing_site_file(tmp_path: Path) -> None:
    status, text = run("ingest", tmp_path / "site.yaml")
    assert status == 1
    assert "SiteError: no site file" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"site": "a"}, "'data' is missing"),
        ({"site": "a", "data": {"images": "nowhere"}}, "there is no such folder"),
        ({"site": "a", "data": {"images": "."}, "polcy": {}}, "did you mean 'policy'"),
        ({"site": "a", "data": {"images": "."}}, "IngestError: site 'a': no usable CT series"),
    ],
)
def test_a_site_that_cannot_be_ingested(tmp_path: Path, content: dict, message: str) -> None:
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(content))
    status, text = run("ingest", tmp_path / "site.yaml")
    assert status == 1
    assert message in text


def test_a_wrong_label_table_lists_its_lines(copied_hospitals: SmallHospitals) -> None:
    labels = copied_hospitals.site("hospital-01").labels
    labels.write_text("series_uid,sop_uid,hypodensity\n1.2,1.2,1\n1.3,1.2,1\n")
    status, text = run("ingest", copied_hospitals.files["hospital-01"])
    assert status == 1
    assert "labels.csv: none of 2 lines belongs to an image" in text
    labels.write_text("series_uid,sop_uid,hypodensity\n1.2,1.2,2\n1.3,1.2,1\n1.3,1.3,x\n")
    status, text = run("ingest", copied_hospitals.files["hospital-01"])
    assert status == 1
    assert "line 2: hypodensity is neither 1, 0 nor blank line 4:" in text


def test_reasons_are_counted() -> None:
    faults = (Fault("a", "blurred"), Fault("b", "torn"), Fault("c", "torn"))
    lines = report_text("x", IngestReport(3, 1, 1, 1, 1, 0, 5, 1, faults)).splitlines()
    assert lines == [
        "x: 1 patients, 1 series, 3 slices: 1 with the marker, 1 without label, 0 with a mask",
        "  left out 2: torn (b, c)",
        "  left out 1: blurred (a)",
    ]


def test_the_audit_log_is_shown_and_checked(copied_hospitals: SmallHospitals) -> None:
    file, state = copied_hospitals.files["hospital-01"], copied_hospitals.site("hospital-01").state
    (state / "audit.jsonl").unlink(missing_ok=True)
    asked = {"asked": "train", "order": {"server-round": 3, "run": "study"}}
    tensors = [["encoder.a", [2], 136, 5.0], ["encoder.b", [2], 136, 1.0]]
    first = record(state, "released", asked | {"update": {"tensors": tensors, "sha256": "ab" * 32}})
    record(state, "refused", asked | {"reason": "policy.hours"})
    status, text = run("audit", file)
    assert status == 0
    assert "released train round 3 of run study: update: 2 tensors, 272 bytes, sha256 abababababab" in text
    assert "refused train round 3 of run study: policy.hours" in text
    assert "2 entries, the record is whole" in text
    assert run("audit", file, "--verify", "--known", first)[0] == 0
    log = state / "audit.jsonl"
    log.write_text(log.read_text().replace("policy.hours", "nothing"))
    status, text = run("audit", file, "--verify")
    assert status == 1
    assert "fault: line 2 was changed" in text


def test_without_a_command_there_is_help() -> None:
    status, text = run("--help")
    assert status == 0
    assert "ingest" in text
    assert run("nothing")[0] == 2
