"""RSNA Intracranial Hemorrhage Detection: the labelled images of four institutions as one hospital.

Layout (Kaggle, stage 2): stage_2_train.csv with rows as `ID_12cadc6af_epidural,0`, six per image, some of them twice;
the images in stage_2_train/ as ID_12cadc6af.dcm. The images of stage_2_test/ have no published labels and are not
taken. Which institution an image comes from is not published, and neither are maker and model: anything finer than one
hospital would be invented. BHSD is made from scans of this set: never train on one and test on the other.

The files are as Kaggle's anonymizer left them: SOP, series, study and patient are identifiers as ID_12cadc6af, which
are no valid UIDs, and there is no SOPClassUID, frame of reference, kernel or thickness. Some unsigned 12-bit images
have a RescaleIntercept of 0 or 1 where -1024 was expected, and values below 0 HU are wrapped to 3096 and above; they
are counted and not corrected, because no pixel is copied or changed, and ingest refuses series whose values are no HU.
ID_6431af929.dcm has too few pixels, which ingest finds.

Source: Flanders et al. 2020, Radiology: Artificial Intelligence 2(3):e190211, doi:10.1148/ryai.2020190211
(pmc.ncbi.nlm.nih.gov/articles/PMC8082297); kaggle.com/c/rsna-intracranial-hemorrhage-detection/data;
github.com/RSNA/AI-Challenge-Data/wiki/RSNA-Intracranial-Hemorrhage-Detection (terms); wrapped values:
kaggle.com/code/jhoward/cleaning-the-data-for-rapid-prototyping-fastai.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from simulations.importers.hospital import CLASSES, check_free, write_labels, write_site
from simulations.importers.source import DataSet, LeftOut, SourceError, find_root, read_header, read_table

SET = DataSet(
    name="rsna",
    title="RSNA Intracranial Hemorrhage Detection (Flanders et al. 2020, doi:10.1148/ryai.2020190211)",
    page="https://www.kaggle.com/c/rsna-intracranial-hemorrhage-detection/data",
    terms="non-commercial research and education only; no attempt to identify anybody; cite the paper",
)
_TABLE, _IMAGES, _SITE = "stage_2_train.csv", "stage_2_train", "rsna-ich"
_HEADER = ("SOPInstanceUID", "SeriesInstanceUID", "PixelRepresentation", "RescaleIntercept")
_LEAST_INTERCEPT = -100.0  # unsigned pixels with an intercept above it cannot hold air's -1000
_WRAPPED = (
    "unsigned pixels with a RescaleIntercept above -100: values below 0 HU are wrapped; ingest refuses its series"
)
_UNKNOWN, _CONTRADICTED = ord("?"), ord("!")


def import_rsna(source: Path, target: Path, progress: Callable[[int, int], None]) -> list[Path]:
    """One hospital, `rsna-ich`, whose images are the source's own folder.

    Args:
      source: the unpacked competition data.
      target: where the hospital's folder is written.
      progress: called with images read and images in all.
    Returns:
      Its site.yaml.
    Raises:
      SourceError: a file, folder or column is missing, no image can be read, or somebody else's hospital is there.
    """
    images = find_root(SET, source, target, (_TABLE, _IMAGES)) / _IMAGES
    folder = target.absolute() / _SITE
    check_free(folder, SET)
    paths = sorted(path for path in images.iterdir() if path.suffix == ".dcm" and not path.name.startswith("."))
    if not paths:
        raise SourceError(f"{SET.name}: no .dcm file in {images}; expected images as ID_12cadc6af.dcm, unpack them all")
    left_out = LeftOut()
    labels = _read_labels(images.parent / _TABLE, left_out)
    counts = {"images": 0, "images_without_row": 0, "images_wrapped": 0}
    rows = _rows(paths, labels, counts, left_out, progress)
    write_labels(folder, CLASSES, rows)
    if not counts["images"]:
        raise SourceError(f"{SET.name}: none of {len(paths)} files in {images} can be used{left_out.text()}")
    for image in labels:  # those that have an image are gone
        left_out.add(image, f"labelled in {_TABLE}, and {_IMAGES}/ has no such image")
    notes = ["BHSD is made from scans of this set: never train on one and test on the other."]
    return [write_site(folder, SET, {"images": str(images.resolve())}, counts, left_out, notes)]


def _read_labels(path: Path, left_out: LeftOut) -> dict[str, bytearray]:
    """Image -> one character per class of CLASSES: 1, 0, _UNKNOWN or, where two rows differ, _CONTRADICTED."""
    labels: dict[str, bytearray] = {}
    places = {name: place for place, name in enumerate(CLASSES)}
    for line, (identifier, label) in read_table(path, ("ID", "Label")):
        image, _, kind = identifier.rpartition("_")
        if not image or kind not in places or label not in ("0", "1"):
            left_out.add(f"{_TABLE} line {line}", f"no row as ID_12cadc6af_KIND,0 with KIND of {', '.join(CLASSES)}")
            continue
        values = labels.setdefault(image, bytearray([_UNKNOWN]) * len(CLASSES))
        place = places[kind]
        if values[place] == _UNKNOWN:
            values[place] = ord(label)
        elif values[place] not in (ord(label), _CONTRADICTED):
            values[place] = _CONTRADICTED
            left_out.add(identifier, f"two rows of {_TABLE} contradict each other; left blank")
    return labels


def _rows(
    paths: list[Path],
    labels: dict[str, bytearray],
    counts: dict[str, int],
    left_out: LeftOut,
    progress: Callable[[int, int], None],
) -> Iterator[dict[str, str]]:
    """A row of labels.csv for each image; takes what it finds out of `labels`, and counts."""
    for number, path in enumerate(paths, start=1):
        values = labels.pop(path.stem, None)
        try:
            header = read_header(path, _HEADER)
            if header["SOPInstanceUID"] != path.stem or not header["SeriesInstanceUID"]:
                raise SourceError(
                    "its SOPInstanceUID is not its file name, or it has no SeriesInstanceUID; not as published"
                )
        except SourceError as error:
            left_out.add(path.name, str(error))
        else:
            counts["images"] += 1
            counts["images_without_row"] += values is None
            if _is_wrapped(header):
                counts["images_wrapped"] += 1
                left_out.add(path.stem, _WRAPPED)
            own = {} if values is None else _known(values)
            yield {"series_uid": header["SeriesInstanceUID"], "sop_uid": path.stem} | own
        progress(number, len(paths))


def _known(values: bytearray) -> dict[str, str]:
    """The classes that a label is known for."""
    return {name: chr(value) for name, value in zip(CLASSES, values, strict=True) if value in b"01"}


def _is_wrapped(header: dict[str, str]) -> bool:
    """Whether values below 0 HU cannot be what they are (see the module's documentation)."""
    try:
        return header["PixelRepresentation"] == "0" and float(header["RescaleIntercept"]) > _LEAST_INTERCEPT
    except ValueError:
        return False
