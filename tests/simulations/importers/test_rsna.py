from __future__ import annotations

from pathlib import Path

import pytest

from shared.site import read_site
from simulations.importers import IMPORTERS, SourceError
from tests.simulations.importers.conftest import (
    Steps,
    counts,
    left_out,
    read_rows,
    read_site_yaml,
    snapshot,
    write_dicom,
)

KINDS = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
WRAPPED = "unsigned pixels with a RescaleIntercept above -100: values below 0 HU are wrapped; ingest refuses its series"


def write_image(folder: Path, name: str, series: str, signed: int = 1, intercept: str = "-1024") -> None:
    """The elements that the published files have, and no others."""
    write_dicom(
        folder / "stage_2_train" / f"{name}.dcm",
        SOPInstanceUID=name,
        Modality="CT",
        PatientID="ID_eeaf99e7",
        StudyInstanceUID="ID_134d398b61",
        SeriesInstanceUID=series,
        StudyID="",
        ImagePositionPatient=["-125.000000", "-141.318451", "62.720940"],
        ImageOrientationPatient=["1.000000", "0.000000", "0.000000", "0.000000", "0.968148", "-0.250380"],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        PixelSpacing=["0.488281", "0.488281"],
        BitsStored=16 if signed else 12,
        PixelRepresentation=signed,
        WindowCenter="30",
        RescaleIntercept=intercept,
        RescaleSlope="1",
    )


def rows_of(name: str, positive: tuple[str, ...]) -> list[str]:
    return [f"{name}_{kind},{int(kind in positive)}" for kind in KINDS]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three images: one with a hemorrhage and its rows twice, one without, one with wrapped values and without rows."""
    root = tmp_path / "source"
    write_image(root, "ID_12cadc6af", "ID_5f8484c3e0")
    write_image(root, "ID_38fd7baa0", "ID_5f8484c3e0")
    write_image(root, "ID_6c5d82413", "ID_d0b3a5a1c2", signed=0, intercept="1")
    table = [
        "ID,Label",
        *rows_of("ID_12cadc6af", ("any", "subdural")),
        *rows_of("ID_38fd7baa0", ()),
        *rows_of("ID_12cadc6af", ("any", "subdural")),
    ]
    (root / "stage_2_train.csv").write_text("\n".join(table) + "\n")
    return root


def edit_table(source: Path, *lines: str) -> None:
    with open(source / "stage_2_train.csv", "a") as file:
        file.write("\n".join(lines) + "\n")


def test_labels_and_places(source: Path, tmp_path: Path, steps: Steps) -> None:
    (path,) = IMPORTERS["rsna"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "rsna-ich"
    assert path == folder / "site.yaml"
    assert read_rows(folder) == [
        {
            "series_uid": "ID_5f8484c3e0",
            "sop_uid": "ID_12cadc6af",
            "hypodensity": "",
            "any": "1",
            "epidural": "0",
            "intraparenchymal": "0",
            "intraventricular": "0",
            "subarachnoid": "0",
            "subdural": "1",
        },
        {"series_uid": "ID_5f8484c3e0", "sop_uid": "ID_38fd7baa0", "hypodensity": "", **dict.fromkeys(KINDS, "0")},
        {"series_uid": "ID_d0b3a5a1c2", "sop_uid": "ID_6c5d82413", "hypodensity": "", **dict.fromkeys(KINDS, "")},
    ]
    site = read_site(path)
    assert (site.name, site.role, site.images) == ("rsna-ich", "held-out", source / "stage_2_train")
    assert site.labels == folder / "labels.csv"
    assert read_site_yaml(path)["policy"] == {"release": ["encoder"], "metrics": True, "min_patients": 10}
    assert "the other choice is train" in path.read_text()
    assert not list(folder.rglob("*.dcm"))
    assert counts(folder) == {"images": 3, "images_without_row": 1, "images_wrapped": 1}
    assert left_out(folder) == {WRAPPED: (1, ["ID_6c5d82413"])}
    assert steps.told == [(1, 3), (2, 3), (3, 3)]


def test_what_does_not_fit_is_counted(source: Path, tmp_path: Path, steps: Steps) -> None:
    edit_table(
        source,
        "ID_38fd7baa0_any,1",  # contradicts the first row
        "ID_38fd7baa0_any,0",  # and does not correct it
        "ID_ffffffff0_any,0",  # no such image
        "ID_12cadc6af_frontal,0",
        "ID_12cadc6af_any,yes",
    )
    (source / "stage_2_train" / "ID_000000001.dcm").write_bytes(b"not DICOM")
    write_image(source, "ID_999999999", "ID_5f8484c3e0")
    (source / "stage_2_train" / "ID_999999999.dcm").rename(source / "stage_2_train" / "ID_000000002.dcm")
    IMPORTERS["rsna"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "rsna-ich"
    found = left_out(folder)
    assert found.pop(WRAPPED)[0] == 1
    assert found == {
        "no row as ID_12cadc6af_KIND,0 with KIND of any, epidural, intraparenchymal, intraventricular, subarachnoid, subdural": (
            2,
            ["stage_2_train.csv line 23", "stage_2_train.csv line 24"],
        ),
        "two rows of stage_2_train.csv contradict each other; left blank": (1, ["ID_38fd7baa0_any"]),
        "labelled in stage_2_train.csv, and stage_2_train/ has no such image": (1, ["ID_ffffffff0"]),
        "cannot be read as DICOM (InvalidDicomError)": (1, ["ID_000000001.dcm"]),
        "its SOPInstanceUID is not its file name, or it has no SeriesInstanceUID; not as published": (
            1,
            ["ID_000000002.dcm"],
        ),
    }
    rows = {row["sop_uid"]: row for row in read_rows(folder)}
    assert rows.keys() == {"ID_12cadc6af", "ID_38fd7baa0", "ID_6c5d82413"}
    assert (rows["ID_38fd7baa0"]["any"], rows["ID_38fd7baa0"]["subdural"]) == ("", "0")
    assert rows["ID_12cadc6af"]["any"] == "1"


def test_the_folder_in_the_archive_is_found(source: Path, tmp_path: Path, steps: Steps) -> None:
    inner = tmp_path / "download" / "rsna-intracranial-hemorrhage-detection"
    inner.parent.mkdir()
    source.rename(inner)
    (path,) = IMPORTERS["rsna"](inner.parent, tmp_path / "target", steps)
    assert read_site(path).images == inner / "stage_2_train"


def test_a_second_import_writes_nothing(source: Path, tmp_path: Path, steps: Steps) -> None:
    target = tmp_path / "target"
    IMPORTERS["rsna"](source, target, steps)
    first = snapshot(target)
    IMPORTERS["rsna"](source, target, steps)
    assert snapshot(target) == first
    assert first.keys() == {"rsna-ich/site.yaml", "rsna-ich/labels.csv", "rsna-ich/import.json"}


def test_a_second_import_keeps_what_the_owner_decided(source: Path, tmp_path: Path, steps: Steps) -> None:
    (path,) = IMPORTERS["rsna"](source, tmp_path / "target", steps)
    path.write_text(path.read_text().replace("role: held-out\n", "role: train\n").replace(": 10", ": 20"))
    IMPORTERS["rsna"](source, tmp_path / "target", steps)
    site = read_site(path)
    assert (site.role, site.policy.min_patients) == ("train", 20)


def test_a_killed_import_is_finished(source: Path, tmp_path: Path, steps: Steps) -> None:
    folder = tmp_path / "target" / "rsna-ich"
    (path,) = IMPORTERS["rsna"](source, tmp_path / "target", steps)
    whole = {name: content for name, (content, *_) in snapshot(folder).items()}
    path.unlink()
    (folder / "labels.csv").unlink()
    (folder / ".labels.csv.partial").write_text("series_uid")  # what the killed one was writing
    IMPORTERS["rsna"](source, tmp_path / "target", steps)
    assert {name: content for name, (content, *_) in snapshot(folder).items()} == whole


@pytest.mark.parametrize("first_line", ["site: mine", "# Written by hemafed-sim import cq500", ""])
def test_somebody_elses_hospital_is_refused(source: Path, tmp_path: Path, steps: Steps, first_line: str) -> None:
    path = tmp_path / "target" / "rsna-ich" / "site.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(first_line + "\n")
    with pytest.raises(SourceError, match=r"site\.yaml exists and does not begin with .*import rsna'"):
        IMPORTERS["rsna"](source, tmp_path / "target", steps)
    assert path.read_text() == first_line + "\n"


def test_bad_sources_are_refused(source: Path, tmp_path: Path, steps: Steps) -> None:
    importer, target = IMPORTERS["rsna"], tmp_path / "target"
    with pytest.raises(SourceError, match=r"SOURCE is .*nowhere, and there is no such folder"):
        importer(tmp_path / "nowhere", target, steps)
    with pytest.raises(SourceError, match=r"TARGET .*hospitals lies in SOURCE"):
        importer(source, source / "hospitals", steps)
    table = source / "stage_2_train.csv"
    content = table.read_text()
    table.write_text(content.replace("ID,Label", "id,Label"))
    with pytest.raises(SourceError, match=r"stage_2_train.csv has no column 'ID'; it has 'id', 'Label'"):
        importer(source, target, steps)
    table.write_bytes(b"ID,Label\n\xff\xfe_any,0\n")
    with pytest.raises(SourceError, match=r"stage_2_train.csv is not a CSV table in UTF-8"):
        importer(source, target, steps)
    table.unlink()
    with pytest.raises(SourceError, match=r"has no 'stage_2_train.csv'; it has stage_2_train\. Expected"):
        importer(source, target, steps)
    table.write_text(content)
    for path in (source / "stage_2_train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SourceError, match=r"none of 3 files .* can be used\n  left out 3: cannot be read as DICOM"):
        importer(source, target, steps)
    assert not (target / "rsna-ich" / "site.yaml").exists()
