"""CQ500: 491 head CT studies with the reads of three radiologists, one hospital per scanner model.

Layout: reads.csv, and per patient a folder as `CQ500CT123 CQ500CT123/Unknown Study/CT Plain/CT000001.dcm`, in a folder
of the archive's name (CQ500-CT-123, or qct01 and so on) or not; most studies have several series. reads.csv has name
(as CQ500-CT-123), Category (the batch, B1 or B2), and fourteen findings of three readers (R1:ICH to R3:MidlineShift), 1
or 0, for a whole study. The majority of the three goes into columns that begin with `scan_`: they say that a study has
a finding somewhere, never that a slice shows it.

Hospitals: the scans come from several centres, and no file or table says from which. A batch is a round of collection
and no centre. Scanner model (Manufacturer and ManufacturerModelName) is what files can tell. It is an honest split by
scanner, which is the shift that a model must survive, and a guess at the centre: two centres may own one model, one
centre two. Files that name no scanner are one hospital, `cq500-unknown-scanner`.

Files are hard-linked into their hospital, or copied to another disk; with one scanner in all, they stay where they are.

Source: Chilamkurthy et al. 2018, Lancet 392:2388-2396, doi:10.1016/S0140-6736(18)31645-3 (arXiv:1803.05854);
headctstudy.qure.ai/dataset, kaggle.com/datasets/crawford/qureai-headct (mirror), www.cq500.org (terms).
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simulations.importers.hospital import check_free, link, strays, write_labels, write_site
from simulations.importers.source import DataSet, LeftOut, SourceError, find_root, read_header, read_table

SET = DataSet(
    name="cq500",
    title="CQ500 (Chilamkurthy et al. 2018, doi:10.1016/S0140-6736(18)31645-3)",
    page="http://headctstudy.qure.ai/dataset",
    terms="CC BY-NC-SA 4.0 and qure.ai's end user licence: non-commercial, annotations to be shared alike",
)
FINDINGS = (
    "ICH",
    "IPH",
    "IVH",
    "SDH",
    "EDH",
    "SAH",
    "BleedLocation-Left",
    "BleedLocation-Right",
    "ChronicBleed",
    "Fracture",
    "CalvarialFracture",
    "OtherFracture",
    "MassEffect",
    "MidlineShift",
)
READERS = ("R1", "R2", "R3")
COLUMNS = ("batch", *(f"scan_{finding}" for finding in FINDINGS))
_TABLE = "reads.csv"
_PATIENT = re.compile(r"CQ500-?CT-?(\d+)(?!\d)")
_UNKNOWN = "unknown-scanner"


@dataclass(frozen=True, slots=True)
class Image:
    """One DICOM file of the set.

    Attributes:
      path: where it is.
      patient: number of the patient, from its folder.
      series, instance: SeriesInstanceUID and SOPInstanceUID.
      scanner: maker and model as part of a site's name; "" if the file names neither.
    """

    path: Path
    patient: int
    series: str
    instance: str
    scanner: str


def import_cq500(source: Path, target: Path, progress: Callable[[int, int], None]) -> list[Path]:
    """One hospital per scanner model, as `cq500-ge-medical-systems-lightspeed16`.

    Args:
      source: the unpacked archives and reads.csv.
      target: where the hospitals' folders are written.
      progress: called with files read plus files linked, and twice the number of files.
    Returns:
      Their site.yaml, in order of their names.
    Raises:
      SourceError: a file, folder or column is missing, no image can be read, or somebody else's hospital is there.
    """
    root = find_root(SET, source, target, (_TABLE,))
    left_out = LeftOut()
    reads = _read_reads(root / _TABLE, left_out)
    files = list(_files(root, left_out))
    images = list(_images(files, left_out, progress))
    if not images:
        raise SourceError(
            f"{SET.name}: no image in {root} can be used; expected folders as 'CQ500CT123 CQ500CT123' with DICOM files in "
            f"them{left_out.text()}"
        )
    patients = {image.patient for image in images}
    for patient in sorted(set(reads) - patients):
        left_out.add(f"CQ500-CT-{patient}", f"a row of {_TABLE} for which there is no image")
    hospitals = _by_scanner(images)
    for name in hospitals:
        check_free(target.absolute() / name, SET)
    done, split = len(files), len(hospitals) > 1
    for name, members in sorted(hospitals.items()):
        folder = target.absolute() / name
        places = [folder / "dicom" / image.path.relative_to(root) for image in members] if split else []
        for image, place in zip(members, places, strict=split):
            link(image.path, place)
            done += 1
            progress(done, 2 * len(files))
        strays(folder / "dicom", places, left_out)
        write_labels(folder, COLUMNS, (_row(image, reads) for image in members))
    progress(2 * len(files), 2 * len(files))
    return [
        _write_site(target.absolute() / name, "dicom/" if split else str(root.resolve()), members, reads, left_out)
        for name, members in sorted(hospitals.items())
    ]


def _write_site(
    folder: Path, where: str, members: list[Image], reads: Mapping[int, dict[str, str]], left_out: LeftOut
) -> Path:
    """Write import.json and site.yaml of one hospital; what was left out is listed for the whole set."""
    own = {image.patient for image in members}
    counts = {"patients": len(own), "images": len(members), "patients_without_row": len(own - set(reads))}
    notes = ["Patients of one scanner model: a stand-in for a hospital, because the set does not name its centres."]
    return write_site(folder, SET, {"images": where}, counts, left_out, notes)


def _read_reads(path: Path, left_out: LeftOut) -> dict[int, dict[str, str]]:
    """Patient -> batch and majorities, with the columns of COLUMNS; blank where the readers' votes are not known."""
    names = [f"{reader}:{finding}" for finding in FINDINGS for reader in READERS]
    votes: dict[int, tuple[str, ...]] = {}
    contradicted = set()
    for line, (name, batch, *values) in read_table(path, ("name", "Category", *names)):
        found = _PATIENT.fullmatch(name)
        if not found:
            left_out.add(f"{_TABLE} line {line}", "its name is not as CQ500-CT-123")
        elif votes.setdefault(int(found[1]), (batch, *values)) != (batch, *values):
            contradicted.add(int(found[1]))
    for patient in sorted(contradicted):
        votes.pop(patient)
        left_out.add(f"CQ500-CT-{patient}", f"two rows of {_TABLE} contradict each other; left blank")
    reads = {}
    for patient, (batch, *values) in votes.items():
        thirds = [values[i : i + len(READERS)] for i in range(0, len(values), len(READERS))]
        own = [_majority(three) for three in thirds]
        if "" in own:
            left_out.add(
                f"CQ500-CT-{patient}", f"votes in {_TABLE} that are neither 0 nor 1; the finding is left blank"
            )
        reads[patient] = dict(zip(COLUMNS, (batch, *own), strict=True))
    return reads


def _majority(votes: Iterable[str]) -> str:
    """Return the majority of three readers; "" if one of them gave neither 0 nor 1."""
    counts = Counter(votes)
    return "" if set(counts) - {"0", "1"} else "1" if counts["1"] > counts["0"] else "0"


def _files(root: Path, left_out: LeftOut) -> Iterator[tuple[Path, int]]:
    """Every file in a patient's folder, with the patient's number; hidden ones are passed over."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parts = Path(folder).relative_to(root).parts
        found = [match for match in map(_PATIENT.match, parts) if match]
        for name in sorted(name for name in names if not name.startswith(".")):
            if found:
                yield Path(folder, name), int(found[-1][1])
            elif name != _TABLE:
                left_out.add(str(Path(*parts, name)), "lies in no patient's folder (as 'CQ500CT123 CQ500CT123')")


def _images(files: list[tuple[Path, int]], left_out: LeftOut, progress: Callable[[int, int], None]) -> Iterator[Image]:
    """Find out what the files are."""
    keywords = ("SeriesInstanceUID", "SOPInstanceUID", "Manufacturer", "ManufacturerModelName")
    for number, (path, patient) in enumerate(files, start=1):
        try:
            series, instance, maker, model = read_header(path, keywords).values()
            if not (series and instance):
                raise SourceError("without SeriesInstanceUID or SOPInstanceUID, expected in every image")
            yield Image(path, patient, series, instance, _slug(f"{maker} {model}"))
        except SourceError as error:
            left_out.add(f"CQ500CT{patient}/{path.parent.name}/{path.name}", str(error))
        progress(number, 2 * len(files))


def _slug(text: str) -> str:
    """A text as part of a site's name: lower case, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _by_scanner(images: list[Image]) -> dict[str, list[Image]]:
    """Site name -> images. A patient's images stay together, with the scanner that most of them name."""
    scanners: dict[int, Counter[str]] = defaultdict(Counter)
    for image in images:
        if image.scanner:
            scanners[image.patient][image.scanner] += 1
    hospitals: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        counts = scanners.get(image.patient, Counter())
        usual = min(counts, key=lambda name: (-counts[name], name), default=_UNKNOWN)
        hospitals[f"cq500-{usual}"[:64].rstrip("-")].append(image)
    return hospitals


def _row(image: Image, reads: Mapping[int, dict[str, str]]) -> dict[str, str]:
    """An image's row of labels.csv."""
    return {"series_uid": image.series, "sop_uid": image.instance} | reads.get(image.patient, {})
