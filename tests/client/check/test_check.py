from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.check.check import check
from client.check.page import contact_sheet
from client.cli import app
from client.ingest.ingest import ingest
from shared.site import Site
from tests.conftest import SmallHospitals, edit_site

RUNNER = CliRunner()


def look(site: Site):
    return check(site, 2, lambda what, done, total: None)


def run_check(file: Path):
    return RUNNER.invoke(app, ["check", str(file), "--workers", "2"])


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def edit_labels(site: Site, change: Callable[[list[dict]], None]) -> None:
    with open(site.labels, newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with open(site.labels, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def edit_images(site: Site, change: Callable[[pydicom.Dataset], None], patients: set[str] | None = None) -> None:
    for path in sorted(site.images.rglob("IM*")):
        ds = pydicom.dcmread(path)
        if patients is None or ds.PatientID in patients:
            change(ds)
            ds.save_as(path)


def test_a_good_hospital_is_ready(copied_hospitals: SmallHospitals) -> None:
    file = copied_hospitals.files["hospital-01"]
    result = run_check(file)
    assert result.exit_code == 0, result.output
    assert "hospital-01: ready" in result.output
    content = json.loads((file.parent / "check.json").read_text())
    cache = copied_hospitals.cache("hospital-01")
    assert content["ready"]
    assert content["problems"] == content["left_out"] == []
    assert content["counts"]["slices"] == len(cache.label) == 30
    assert content["counts"]["patients"] == 10
    assert content["counts"]["positives"] == int(np.nansum(cache.label))
    assert content["counts"]["labelled"] == int((~np.isnan(cache.label)).sum())
    assert content["counts"]["hematoma"] == int(cache.masks.any(axis=(1, 2)).sum())
    assert sum(s["patients"] for s in content["splits"].values()) == 10
    assert content["tables"]["matrix"] == {"512 x 512": 10}
    page = (file.parent / "check.html").read_text()
    assert "Ready." in page
    assert page.count("data:image/png;base64") == 1
    assert 'src="http' not in page
    assert 'href="http' not in page


@pytest.mark.parametrize("with_key", [True, False])
def test_a_check_writes_its_two_files_and_nothing_else(copied_hospitals: SmallHospitals, with_key: bool) -> None:
    file = copied_hospitals.files["hospital-01"]
    shutil.rmtree(file.parent / "cache")
    if not with_key:
        shutil.rmtree(file.parent / "state")
    before = tree(file.parent)
    assert run_check(file).exit_code == 0
    after = tree(file.parent)
    assert set(after) - set(before) == {"check.html", "check.json"}
    assert {name: after[name] for name in before} == before
    assert json.loads((file.parent / "check.json").read_text())["temporary"] is not with_key


def test_a_check_takes_what_an_ingest_takes(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-02")
    victim = sorted(site.images.rglob("IM*"))[4]
    victim.write_bytes(victim.read_bytes()[:3000])
    found, report = look(site), ingest(site, workers=2)
    assert found.faults == report.faults
    assert (found.counts["slices"], found.counts["series"]) == (report.slices, report.series)
    assert found.counts["masked"] == report.masked
    assert found.ready  # a file that is left out does not spoil the rest


def test_labels_that_match_nothing(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    edit_labels(site, lambda rows: rows[2].update(sop_uid="2.25.999"))
    result = run_check(copied_hospitals.files["hospital-01"])
    assert result.exit_code == 1
    assert (
        "problem: 1 lines of labels.csv match nothing: its sop_uid is no image of its series, or was left out; first, labels.csv line 4"
    ) in result.output


def test_a_label_table_that_cannot_be_read(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    edit_labels(site, lambda rows: rows[0].update(hypodensity="maybe"))
    found = look(site)
    assert not found.ready
    assert "line 2: hypodensity is neither 1, 0 nor blank" in found.problems[0]
    assert found.counts["slices"] == 30  # the rest is looked at all the same


def test_one_patient_with_two_identifiers_in_two_splits(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    first = sorted(p for p in site.images.iterdir())[0]
    for copy in range(8):  # the shares of the splits put eight new patients into all of them
        shutil.copytree(first, site.images / f"copy-{copy}")
        for path in (site.images / f"copy-{copy}").iterdir():
            ds = pydicom.dcmread(path)
            ds.PatientID = f"other-{copy}"
            for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
                setattr(ds, name, f"{getattr(ds, name)[:-3]}{copy}")
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.save_as(path)
    found = look(site)
    assert not found.ready
    leak, bare = found.problems
    assert "24 of 54 slices have no mask" in bare
    assert "3 pictures belong to several patients that are in different splits" in leak


def test_one_patient_with_two_identifiers_before_splits_are_known(copied_hospitals: SmallHospitals) -> None:
    """The first ingest makes the key that splits follow, so where two patients go is not known before."""
    site = copied_hospitals.site("hospital-01")
    shutil.rmtree(site.state)
    folders = sorted(site.images.iterdir())
    scan = pydicom.dcmread(sorted(folders[0].iterdir())[0])
    for path in folders[1].iterdir():
        ds = pydicom.dcmread(path)
        ds.StudyInstanceUID = scan.StudyInstanceUID
        ds.save_as(path)
    (problem,) = look(site).problems
    assert "1 studies belong to several patients that may come into different splits" in problem
    assert look(replace(site, role="held-out")).ready, "where all are tested nobody is trained on"


def test_masks_off_the_head(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    shutil.rmtree(site.masks)
    site.masks.mkdir()
    corner = np.zeros((512, 512), np.uint8)
    corner[:40, :40] = 1
    for path in sorted(site.images.rglob("IM*")):
        uid = pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID
        Image.fromarray(corner).save(site.masks / f"{uid}.png")
    found = look(site)
    assert [p for p in found.problems if p.startswith("masks of 10 series lie off the head")]


def test_all_positives_from_one_of_two_scanners(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    positive = {
        pydicom.dcmread(p, stop_before_pixels=True).PatientID
        for p in site.images.rglob("IM*")
        if pydicom.dcmread(p, stop_before_pixels=True).SOPInstanceUID in _positive_images(site)
    }
    assert look(site).ready
    edit_images(site, lambda ds: setattr(ds, "ManufacturerModelName", "Other"), positive)
    found = look(site)
    assert len(found.positives_by_scanner) == 2
    (problem,) = found.problems
    assert "positives are from one of 2 scanners" in problem
    assert "Other" in problem


def _positive_images(site: Site) -> set[str]:
    with open(site.labels, newline="") as file:
        return {row["sop_uid"] for row in csv.DictReader(file) if row["hypodensity"] == "1"}


def test_labels_against_masks(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    shutil.rmtree(site.masks)
    site.masks.mkdir()
    for path in sorted(site.images.rglob("IM*")):
        uid = pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID
        Image.fromarray(np.zeros((512, 512), np.uint8)).save(site.masks / f"{uid}.png")
    positives = len(_positive_images(site))
    assert positives > 0
    problems = look(site).problems
    assert f"{positives} slices are labelled with the marker and have an empty mask" in problems
    assert "every mask is empty: is data.segment the hematoma?" in problems


def test_one_class_alone_and_nothing_to_learn(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    edit_labels(site, lambda rows: [row.update(hypodensity="0") for row in rows] and None)
    assert "every labelled slice is without the marker: a classifier needs both" in look(site).problems
    edit_site(copied_hospitals.files["hospital-01"], data={"images": "dicom/"})
    bare = look(copied_hospitals.site("hospital-01"))
    assert "neither labels nor masks: there is nothing to learn but reconstruction" in bare.problems


def test_a_folder_without_ct_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "notes.txt").write_text("nothing here")
    (tmp_path / "site.yaml").write_text("site: empty\ndata: {images: dicom/}\n")
    result = run_check(tmp_path / "site.yaml")
    assert result.exit_code == 1
    assert "no slice can be used" in result.output
    assert "not a DICOM file" in result.output


def test_what_cannot_be_looked_at_ends_with_two(tmp_path: Path) -> None:
    assert run_check(tmp_path / "site.yaml").exit_code == 2
    (tmp_path / "site.yaml").write_text("site: a\ndata: {images: nowhere/}\n")
    result = run_check(tmp_path / "site.yaml")
    assert result.exit_code == 2
    assert "there is no such folder" in result.output


def test_the_contact_sheet_shows_the_mask_and_hides_nothing_of_it(
    copied_hospitals: SmallHospitals, tmp_path: Path
) -> None:
    found = look(copied_hospitals.site("hospital-01"))
    assert len(found.pictures) == 10
    assert all(picture.mask.any() for picture in found.pictures)
    (tmp_path / "sheet.png").write_bytes(contact_sheet(found.pictures))
    rgb = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    orange = (rgb[..., 0] - rgb[..., 2]) > 60
    assert 200 < orange.sum() < 0.02 * orange.size


def test_find_turns_codes_back(copied_hospitals: SmallHospitals) -> None:
    file = copied_hospitals.files["hospital-01"]
    site = copied_hospitals.site("hospital-01")
    victim = sorted(site.images.rglob("IM*"))[4]
    good = pydicom.dcmread(victim, stop_before_pixels=True)
    victim.write_bytes(b"not DICOM")
    found = look(site)
    (fault,) = [f for f in found.faults if "not a DICOM file" in f.reason]
    patient = next(p.title[:8] for p in found.pictures)
    result = RUNNER.invoke(app, ["find", str(file), fault.what.removeprefix("file "), patient])
    assert result.exit_code == 0, result.output
    assert str(victim) in result.output
    assert "patient hospital-01-" in result.output
    assert good.SeriesInstanceUID not in result.output
    assert RUNNER.invoke(app, ["find", str(file), "00000000"]).exit_code == 1


def test_find_knows_the_codes_of_a_check_before_the_first_ingest(copied_hospitals: SmallHospitals) -> None:
    file = copied_hospitals.files["hospital-01"]
    shutil.rmtree(file.parent / "state")
    site = copied_hospitals.site("hospital-01")
    victim = sorted(site.images.rglob("IM*"))[0]
    victim.write_bytes(b"not DICOM")
    (fault,) = [f for f in look(site).faults if "not a DICOM file" in f.reason]
    result = RUNNER.invoke(app, ["find", str(file), fault.what.removeprefix("file ")])
    assert str(victim) in result.output.replace("\n", "")
    assert not (file.parent / "state").exists()


def test_series_that_are_left_out_are_drawn_too(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site("hospital-01")
    patients = {pydicom.dcmread(p, stop_before_pixels=True).PatientID for p in site.images.rglob("IM*")}
    lost, twice = sorted(patients)[:2]
    edit_images(site, lambda ds: setattr(ds, "RescaleIntercept", ds.RescaleIntercept + 1024), {lost})
    edit_images(site, lambda ds: setattr(ds, "ImagePositionPatient", [0, 0, 0]), {twice})
    found = look(site)
    assert [picture.refused for picture in found.pictures] == [False] * 8 + [True] * 2
    assert all(picture.title.startswith("left out ") for picture in found.pictures[8:])
    assert all(len(np.unique(picture.hu)) > 20 for picture in found.pictures)
    assert contact_sheet(found.pictures)
    assert found.problems[0].startswith("2 of 10 patients are left out with all they have: ")


def test_the_account_of_masks_closes_and_stands_in_the_answer(copied_hospitals: SmallHospitals) -> None:
    file = copied_hospitals.files["hospital-01"]
    site = copied_hospitals.site("hospital-01")
    frames = sum(int(pydicom.dcmread(p).NumberOfFrames) for p in site.masks.iterdir())
    one, *_ = sorted(site.masks.iterdir())
    inside = int(pydicom.dcmread(one).NumberOfFrames)
    one.write_bytes(one.read_bytes()[:-200])
    run_check(file)
    (kind,) = json.loads((file.parent / "check.json").read_text())["masks"].items()
    assert kind[0] == "frames"
    assert (kind[1]["in"], kind[1]["taken"]) == (frames, frames - inside)
    (group,) = kind[1]["left_out"]
    assert group["count"] == inside
    assert "Pixel Data" in group["reason"] or "damaged" in group["reason"]
    assert "<td>frames</td>" in (file.parent / "check.html").read_text()


def test_small_splits_say_what_stays_in_the_hospital(copied_hospitals: SmallHospitals) -> None:
    file = copied_hospitals.files["hospital-01"]
    edit_site(file, policy={"release": ["encoder"], "metrics": True, "min_patients": 5})
    result = run_check(file)
    assert result.exit_code == 0, "a small hospital is ready all the same"
    assert (
        "note: split test has 2 patients, fewer than policy.min_patients (5): the numbers of its test stay"
        in result.output
    )
    assert "the encoder takes part all the same" in result.output
    assert "split train" not in result.output


def test_codes_are_explained_where_they_stand(copied_hospitals: SmallHospitals) -> None:
    file = copied_hospitals.files["hospital-01"]
    site = copied_hospitals.site("hospital-01")
    next(site.images.rglob("IM*")).write_bytes(b"not DICOM")
    output = run_check(file).output.replace("\n", " ")
    assert "what a code of 16 letters and digits stands for: hemafed-client find" in output
    assert "shows on your screen what a code stands for" in (file.parent / "check.html").read_text()
