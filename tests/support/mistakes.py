"""What mistakes are made with: changes of a small hospital's images, masks, label table and site.yaml."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import yaml
from PIL import Image
from pydicom import Dataset
from pydicom.uid import JPEG2000

from tests.support.small_sites import SIDE

PATIENTS, SLICES = 8, 4


def clot(number: int, n: int) -> np.ndarray:
    """A patient's mask of a slice; none on the uppermost."""
    mask_YX = np.zeros((SIDE, SIDE), np.uint8)
    if n < SLICES:
        mask_YX[20 : 24 + n, 18 : 22 + number % 3] = 1
    return mask_YX


def edit(folder: Path, change: Callable[[Dataset], object], of: slice = slice(None), where: str = "dicom") -> None:
    """Change files of some patients (or masks)."""
    roots = sorted((folder / where).iterdir())[of]
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                ds = pydicom.dcmread(path)
                change(ds)
                ds.save_as(path)


def put(**values: object) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return change


def images(of: slice = slice(None), **values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, put(**values), of)


def each(keyword: str, value: Callable[[Dataset], object], of: slice = slice(None)) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda ds: setattr(ds, keyword, value(ds)), of)


def table(change: Callable[[list[dict[str, str]]], object]) -> Callable[[Path], None]:
    """Change the label table as rows."""

    def apply(folder: Path) -> None:
        rows = list(csv.DictReader(io.StringIO((folder / "labels.csv").read_text())))
        found = change(rows)
        rows = found if isinstance(found, list) else rows
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        (folder / "labels.csv").write_text(text.getvalue())

    return apply


def words(change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    """Change the label table as text."""

    def apply(folder: Path) -> None:
        content = change((folder / "labels.csv").read_text())
        (folder / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def column(name: str, change: Callable[[str], str], every: int = 1) -> Callable[[Path], None]:
    return table(
        lambda rows: [r.update({name: change(r[name])}) for n, r in enumerate(rows) if n % every == 0] and None
    )


def data(**keys: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = yaml.safe_load((folder / "site.yaml").read_text())
        content["data"] |= keys
        content["data"] = {k: v for k, v in content["data"].items() if v is not None}
        (folder / "site.yaml").write_text(yaml.safe_dump(content))

    return apply


def both(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: [step(folder) for step in steps] and None


def masks_gone(keep: int) -> Callable[[Path], None]:
    return lambda folder: [p.unlink() for p in sorted((folder / "masks").iterdir())[keep:]] and None


def counted(first: int) -> Callable[[Path], None]:
    """Labels by slice number in place of image."""

    def change(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [
            {
                "series_uid": r["series_uid"],
                "slice_index": str(int(r["sop_uid"].rpartition(".")[2]) - 1 + first),
                "hypodensity": r["hypodensity"],
            }
            for r in rows
        ]

    return table(change)


def compress(syntax: str, of: slice = slice(None)) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for root in sorted((folder / "dicom").iterdir())[of]:
            for path in root.iterdir():
                ds = pydicom.dcmread(path)
                options = {"j2k_cr": [8]} if syntax == JPEG2000 else {"jls_error": 3}
                ds.compress(syntax, generate_instance_uid=False, **options)
                ds.save_as(path)

    return apply


def niftis(folder: Path, values: Callable[[np.ndarray], np.ndarray] = lambda v: v, shift: float = 0.0) -> None:
    """The masks as NIfTI, named after their series."""
    shutil.rmtree(folder / "masks")
    (folder / "masks").mkdir()
    for number in range(1, PATIENTS + 1):
        volume = np.stack([clot(number, n) for n in range(1, SLICES + 1)]).transpose(2, 1, 0)
        affine = np.diag([-4.0, -4.0, 5.0, 1.0])
        affine[:3, 3] = shift, shift, 5.0
        image = nibabel.Nifti1Image(values(volume), affine)
        nibabel.save(image, folder / "masks" / f"1.2.826.1.{number}.nii.gz")


def pngs(folder: Path, names: Callable[[int, int], str], side: int = SIDE, mode: str = "L", value: int = 1) -> None:
    """The masks as PNG."""
    shutil.rmtree(folder / "masks")
    (folder / "masks").mkdir()
    for number in range(1, PATIENTS + 1):
        for n in range(1, SLICES + 1):
            picture = Image.fromarray(clot(number, n) * np.uint8(value)).resize((side, side), Image.Resampling.NEAREST)
            picture.convert(mode).save(folder / "masks" / f"{names(number, n)}.png")


def uid_png(number: int, n: int) -> str:
    return f"1.2.826.1.{number}.{n}"


def replace_images(make: Callable[[Path], object], of: slice = slice(None)) -> Callable[[Path], None]:
    """Something else in place of every file of some patients."""

    def apply(folder: Path) -> None:
        for root in sorted((folder / "dicom").iterdir())[of]:
            for path in root.iterdir():
                path.unlink()
                make(path)

    return apply


def empty(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    (folder / name).mkdir()


def second_copy(folder: Path, **values: object) -> None:
    """The first four patients exported again, under other names and UIDs."""
    for root in sorted((folder / "dicom").iterdir())[:4]:
        shutil.copytree(root, folder / "dicom" / f"again-{root.name}")

    def change(ds: Dataset) -> None:
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(ds, keyword, f"{getattr(ds, keyword)}.7")
        ds.PatientID = f"{ds.PatientID}-b"

    edit(folder, change, slice(0, 4))


def larger(ds: Dataset) -> None:
    """A trunk: tissue up to the field's edge, and lungs."""
    ds.PixelSpacing, ds.BodyPartExamined = [4.99, 4.99], "CHEST"
    rows, columns = np.mgrid[:SIDE, :SIDE] - 23.5
    trunk = np.hypot(rows, columns) < 27
    lungs = np.hypot(rows, np.abs(columns) - 10) < 7
    ds.PixelData = np.where(trunk & ~lungs, 40, -950).astype(np.int16).tobytes()


def hu(ds: Dataset) -> np.ndarray:
    return np.frombuffer(ds.PixelData, np.int16)
