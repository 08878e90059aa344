from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pydicom
import pytest

from shared.site import read_site
from simulations.importers import IMPORTERS, SourceError
from simulations.importers.cq500 import FINDINGS, READERS
from tests.simulations.importers.conftest import Steps, counts, left_out, read_rows, snapshot, write_dicom

HEADER = ["name", "Category", *(f"{reader}:{finding}" for reader in READERS for finding in FINDINGS)]
GE, PHILIPS = ("GE MEDICAL SYSTEMS", "LightSpeed16"), ("Philips", "MX 16-slice")


def write_image(path: Path, patient: int, number: int, scanner: tuple[str, str] | None) -> str:
    """One image as published; returns its SOPInstanceUID."""
    own = {} if scanner is None else {"Manufacturer": scanner[0], "ManufacturerModelName": scanner[1]}
    series = f"1.2.276.0.7230010.3.1.3.{patient}.{path.parent.name.count('THIN')}"
    write_dicom(
        path,
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2",
        SOPInstanceUID=f"{series}.{number}",
        SeriesInstanceUID=series,
        PatientID=f"CQ500CT{patient}",
        Modality="CT",
        **own,
    )
    return f"{series}.{number}"


def folder_of(patient: int, series: str) -> Path:
    return Path(f"CQ500CT{patient} CQ500CT{patient}", "Unknown Study", series)


def read_line(patient: int, batch: str, **votes: str) -> str:
    """A row of reads.csv; votes by finding as "110" for the three readers, 0 for the others."""
    values = [votes.get(finding, "000")[READERS.index(reader)] for reader in READERS for finding in FINDINGS]
    return ",".join([f"CQ500-CT-{patient}", batch, *(value.strip() for value in values)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Patients 0 and 3 of a GE scanner, 12 of a Philips, 247 of an unknown one, in the folders that archives unpack to."""
    root = tmp_path / "source"
    for number in (0, 1):
        write_image(root / folder_of(0, "CT Plain") / f"CT00000{number}.dcm", 0, number, GE)
    write_image(root / folder_of(0, "CT PLAIN THIN") / "CT000000.dcm", 0, 5, GE)
    write_image(root / "CQ500-CT-3" / folder_of(3, "CT 5mm") / "CT000000.dcm", 3, 0, GE)
    write_image(root / "qct01" / folder_of(12, "CT Plain") / "CT000000.dcm", 12, 0, PHILIPS)
    write_image(root / folder_of(247, "CT Plain 3mm") / "CT000000.dcm", 247, 0, None)
    lines = [
        ",".join(HEADER),
        read_line(0, "B1", ICH="110", SDH="100"),
        read_line(3, "B2", ICH="111", IPH="011", MidlineShift="101"),
        read_line(12, "B1"),
        read_line(247, "B2", Fracture="010"),
    ]
    (root / "reads.csv").write_text("\n".join(lines) + "\n")
    return root


def test_one_hospital_per_scanner(source: Path, tmp_path: Path, steps: Steps) -> None:
    target = tmp_path / "target"
    paths = IMPORTERS["cq500"](source, target, steps)
    names = ["cq500-ge-medical-systems-lightspeed16", "cq500-philips-mx-16-slice", "cq500-unknown-scanner"]
    assert paths == [target / name / "site.yaml" for name in names]
    assert [read_site(path).name for path in paths] == names
    assert [read_site(path).images for path in paths] == [target / name / "dicom" for name in names]
    assert "does not name its centres" in paths[0].read_text()
    ge = target / names[0]
    assert counts(ge) == {"patients": 2, "images": 4, "patients_without_row": 0}
    linked = sorted((ge / "dicom").rglob("*.dcm"))
    assert [str(path.relative_to(ge / "dicom")) for path in linked] == [
        "CQ500-CT-3/CQ500CT3 CQ500CT3/Unknown Study/CT 5mm/CT000000.dcm",
        "CQ500CT0 CQ500CT0/Unknown Study/CT PLAIN THIN/CT000000.dcm",
        "CQ500CT0 CQ500CT0/Unknown Study/CT Plain/CT000000.dcm",
        "CQ500CT0 CQ500CT0/Unknown Study/CT Plain/CT000001.dcm",
    ]
    for path in linked:
        assert path.samefile(source / path.relative_to(ge / "dicom"))
        assert not path.is_symlink()
    assert steps.told[-1] == (12, 12)
    assert [done for done, _ in steps.told] == sorted(done for done, _ in steps.told)


def test_majority_of_three_readers(source: Path, tmp_path: Path, steps: Steps) -> None:
    IMPORTERS["cq500"](source, tmp_path / "target", steps)
    rows = read_rows(tmp_path / "target" / "cq500-ge-medical-systems-lightspeed16")
    assert {row["hypodensity"] for row in rows} == {""}
    by_patient = {row["sop_uid"].split(".")[-3]: row for row in rows}
    zero, three = by_patient["0"], by_patient["3"]
    assert len(rows) == 4
    assert (zero["batch"], zero["scan_ICH"], zero["scan_SDH"], zero["scan_MidlineShift"]) == ("B1", "1", "0", "0")
    assert (three["batch"], three["scan_ICH"], three["scan_IPH"], three["scan_MidlineShift"]) == ("B2", "1", "1", "1")
    assert (three["scan_IVH"], three["scan_BleedLocation-Left"]) == ("0", "0")
    image = pydicom.dcmread(source / "CQ500-CT-3" / folder_of(3, "CT 5mm") / "CT000000.dcm")
    assert (three["series_uid"], three["sop_uid"]) == (image.SeriesInstanceUID, image.SOPInstanceUID)
    (unknown,) = read_rows(tmp_path / "target" / "cq500-unknown-scanner")
    assert unknown["scan_Fracture"] == "0"


def test_a_patient_stays_in_one_hospital(source: Path, tmp_path: Path, steps: Steps) -> None:
    write_image(source / folder_of(0, "CT Post") / "CT000000.dcm", 0, 9, PHILIPS)
    write_image(source / folder_of(0, "CT Scout") / "CT000000.dcm", 0, 10, None)
    IMPORTERS["cq500"](source, tmp_path / "target", steps)
    folders = {row.parent for row in (tmp_path / "target").rglob("*/dicom/CQ500CT0 CQ500CT0")}
    assert {folder.parent.name for folder in folders} == {"cq500-ge-medical-systems-lightspeed16"}
    assert counts(tmp_path / "target" / "cq500-ge-medical-systems-lightspeed16")["images"] == 6


def test_one_scanner_stays_where_it_is(tmp_path: Path, steps: Steps) -> None:
    source = tmp_path / "source"
    write_image(source / folder_of(7, "CT Plain") / "CT000000.dcm", 7, 0, PHILIPS)
    (source / "reads.csv").write_text("\n".join([",".join(HEADER), read_line(7, "B1")]) + "\n")
    (path,) = IMPORTERS["cq500"](source, tmp_path / "target", steps)
    assert read_site(path).images == source
    assert {one.name for one in path.parent.iterdir()} == {"site.yaml", "labels.csv", "import.json"}


def test_what_does_not_fit_is_counted(source: Path, tmp_path: Path, steps: Steps) -> None:
    with open(source / "reads.csv", "a") as file:
        file.write(read_line(499, "B2") + "\n")  # no images
        file.write(read_line(12, "B2") + "\n")  # contradicts the first row
        file.write(read_line(3, "B2", ICH="111", IPH="011", MidlineShift="101") + "\n")  # the same again
        file.write(read_line(88, "B1", ICH="1 1") + "\n")  # one reader did not say
        file.write("Total,,\n")
    write_image(source / folder_of(88, "CT Plain") / "CT000000.dcm", 88, 0, PHILIPS)
    write_image(source / folder_of(90, "CT Plain") / "CT000000.dcm", 90, 0, PHILIPS)  # no row
    (source / folder_of(3, "CT 5mm")).mkdir(parents=True)
    (source / folder_of(3, "CT 5mm") / "CT000009.dcm").write_bytes(b"cut")
    (source / "notes.txt").write_text("mine")
    (source / ".DS_Store").write_text("")
    IMPORTERS["cq500"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "cq500-philips-mx-16-slice"
    assert left_out(folder) == {
        "its name is not as CQ500-CT-123": (1, ["reads.csv line 10"]),
        "two rows of reads.csv contradict each other; left blank": (1, ["CQ500-CT-12"]),
        "votes in reads.csv that are neither 0 nor 1; the finding is left blank": (1, ["CQ500-CT-88"]),
        "a row of reads.csv for which there is no image": (1, ["CQ500-CT-499"]),
        "lies in no patient's folder (as 'CQ500CT123 CQ500CT123')": (1, ["notes.txt"]),
        "cannot be read as DICOM (InvalidDicomError)": (1, ["CQ500CT3/CT 5mm/CT000009.dcm"]),
    }
    assert counts(folder) == {"patients": 3, "images": 3, "patients_without_row": 2}
    rows = {row["sop_uid"].split(".")[-3]: row for row in read_rows(folder)}
    assert (rows["12"]["batch"], rows["12"]["scan_ICH"]) == ("", "")
    assert (rows["90"]["batch"], rows["90"]["scan_ICH"]) == ("", "")
    assert (rows["88"]["batch"], rows["88"]["scan_ICH"], rows["88"]["scan_IPH"]) == ("B1", "", "0")


def test_a_second_import_writes_nothing(source: Path, tmp_path: Path, steps: Steps) -> None:
    target = tmp_path / "target"
    IMPORTERS["cq500"](source, target, steps)
    first = snapshot(target)
    assert len(first) == 6 + 3 * 3
    IMPORTERS["cq500"](source, target, steps)
    assert snapshot(target) == first


def test_a_file_that_left_the_source_is_told(source: Path, tmp_path: Path, steps: Steps) -> None:
    target = tmp_path / "target"
    IMPORTERS["cq500"](source, target, steps)
    (source / folder_of(0, "CT PLAIN THIN") / "CT000000.dcm").unlink()
    IMPORTERS["cq500"](source, target, steps)
    assert left_out(target / "cq500-ge-medical-systems-lightspeed16") == {
        "in dicom/ and no longer in the source: ingest will read it; delete it": (
            1,
            ["CQ500CT0 CQ500CT0/Unknown Study/CT PLAIN THIN/CT000000.dcm"],
        )
    }
    assert len(read_rows(target / "cq500-ge-medical-systems-lightspeed16")) == 3


def test_links_lead_to_files_and_follow_a_change(source: Path, tmp_path: Path, steps: Steps) -> None:
    place = folder_of(247, "CT Plain 3mm") / "CT000000.dcm"
    real = tmp_path / "store.dcm"
    (source / place).rename(real)
    (source / place).symlink_to(real)  # as a download cache leaves them; ingest refuses such links
    IMPORTERS["cq500"](source, tmp_path / "target", steps)
    linked = tmp_path / "target" / "cq500-unknown-scanner" / "dicom" / place
    assert not linked.is_symlink()
    assert linked.samefile(real)
    changed = real.read_bytes().replace(b"CQ500CT247", b"CQ500CT742")
    real.unlink()
    real.write_bytes(changed)  # another file of the same size
    os.utime(real, (1e9, 1e9))
    IMPORTERS["cq500"](source, tmp_path / "target", steps)
    assert linked.samefile(real)


def test_another_disk_gets_copies(source: Path, steps: Steps) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == source.stat().st_dev or not os.access(memory, os.W_OK):
        pytest.skip("needs a second file system in /dev/shm, from which files cannot be linked")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        IMPORTERS["cq500"](source, Path(name), steps)
        first = snapshot(Path(name))
        copy = Path(name) / "cq500-philips-mx-16-slice" / "dicom" / "qct01" / folder_of(12, "CT Plain") / "CT000000.dcm"
        original = source / "qct01" / folder_of(12, "CT Plain") / "CT000000.dcm"
        assert copy.read_bytes() == original.read_bytes()
        assert not copy.samefile(original)
        IMPORTERS["cq500"](source, Path(name), steps)
        assert snapshot(Path(name)) == first


def test_bad_sources_are_refused(source: Path, tmp_path: Path, steps: Steps) -> None:
    importer, target = IMPORTERS["cq500"], tmp_path / "target"
    mine = target / "cq500-philips-mx-16-slice" / "site.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("site: mine\n")
    with pytest.raises(SourceError, match="did not write it"):
        importer(source, target, steps)
    assert [path for path in target.rglob("*") if path.is_file()] == [mine]  # refused before anything is written
    mine.unlink()
    table = source / "reads.csv"
    table.write_text(table.read_text().replace("R2:SAH", "R2:Sah"))
    with pytest.raises(SourceError, match=r"reads.csv has no column 'R2:SAH'; it has 'name', 'Category'"):
        importer(source, target, steps)
    table.unlink()
    with pytest.raises(SourceError, match=r"has no 'reads\.csv'; it has CQ500-CT-3, "):
        importer(source, target, steps)
    empty = tmp_path / "empty"
    (empty / "CQ500CT1 CQ500CT1").mkdir(parents=True)
    (empty / "reads.csv").write_text(",".join(HEADER) + "\n")
    with pytest.raises(SourceError, match=r"no image in .* can be used; expected folders as 'CQ500CT123 CQ500CT123'"):
        importer(empty, target, steps)
