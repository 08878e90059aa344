"""Speed of reading a hospital's export, against the limit: a bare pydicom loop over the same files.

    python -m simulations.benchmarks.ingest [PATIENTS] [FILES]

writes PATIENTS series of 30 slices of 512 x 512 in three transfer syntaxes, and times, in turn and several times over, a
loop that decodes every file and keeps nothing (`dcmread(path).pixel_array`), and an ingest, which reads headers, chooses
series, decodes, checks, resamples and writes the cache; each in one and in two processes. Then it ingests FILES small
images and times the second, unchanged ingest. Prints one table.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import yaml
from pydicom.uid import JPEGLosslessSV1

from client.dicom.elements import silence_readers
from client.ingest.ingest import ingest
from shared.site import Site, read_site
from simulations.phantom.dicom_export import ct_image
from simulations.phantom.hospitals import HOSPITALS
from simulations.phantom.patient import sample_case
from simulations.phantom.render import render_slice

SLICES = 30
REPEATS = 3
SYNTAXES = {"uncompressed": "explicit", "JPEG 2000": "jpeg2000", "JPEG Lossless": "explicit"}


def write_series(folder: Path, name: str, patients: int) -> Site:
    """A hospital of equal heads: one is rendered and written under many identifiers."""
    hospital = replace(HOSPITALS[0], slices=SLICES, transfer_syntax=SYNTAXES[name])
    rng = np.random.default_rng(0)
    patient = sample_case(rng, hospital.cohort).patient
    heights = [6.0 + 4 * (index - SLICES / 2) for index in range(SLICES)]
    rendered = [render_slice(patient, hospital.scanner, z_mm, rng) for z_mm in heights]
    first = [ct_image(hospital, 0, 0, index, heights[index], rendered[index]) for index in range(SLICES)]
    for number in range(patients):
        place = folder / "dicom" / f"{number:04d}"
        place.mkdir(parents=True)
        for index, ds in enumerate(first):
            ds.PatientID, ds.StudyInstanceUID = f"patient-{number}", f"2.25.{number + 1}1"
            ds.SeriesInstanceUID, ds.SOPInstanceUID = f"2.25.{number + 1}2", f"2.25.{number + 1}3{index:03d}"
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.save_as(place / f"IM{index:03d}", enforce_file_format=True)
            if name == "JPEG Lossless":
                compress_lossless(place / f"IM{index:03d}")
    return write_site(folder)


def compress_lossless(path: Path) -> None:
    """Rewrite a file in JPEG Lossless, Process 14 (1.2.840.10008.1.2.4.70), with GDCM."""
    reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(path))
    reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.Write()
    if pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID != JPEGLosslessSV1:
        raise RuntimeError("GDCM did not compress the file")


def write_site(folder: Path) -> Site:
    """A site.yaml for a folder with DICOM."""
    content = {"site": "benchmark", "data": {"images": "dicom/"}, "role": "held-out"}
    (folder / "site.yaml").write_text(yaml.safe_dump(content))
    return read_site(folder / "site.yaml")


def decode(paths: list[Path]) -> None:
    """The limit: every file decoded, nothing kept."""
    for path in paths:
        pydicom.dcmread(path).pixel_array  # noqa: B018


def time_loop(paths: list[Path], workers: int) -> float:
    """Seconds of the bare loop, in this process or shared out to several."""
    start = time.perf_counter()
    if workers == 1:
        decode(paths)
    else:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(decode, [paths[i::workers] for i in range(workers)]))
    return time.perf_counter() - start


def time_ingest(site: Site, workers: int) -> float:
    """Seconds of a first ingest."""
    shutil.rmtree(site.cache, ignore_errors=True)
    start = time.perf_counter()
    ingest(site, workers)
    return time.perf_counter() - start


def time_unchanged(folder: Path, files: int) -> tuple[float, float]:
    """Seconds of a second ingest of small images that have not changed: the function, and the command as a whole."""
    hospital = replace(HOSPITALS[0], slices=SLICES)
    rng = np.random.default_rng(0)
    rendered = render_slice(sample_case(rng, hospital.cohort).patient, hospital.scanner, 6.0, rng)
    small = replace(rendered, hu_YX=rendered.hu_YX[::8, ::8], hematoma_YX=rendered.hematoma_YX[::8, ::8])
    ds = ct_image(hospital, 0, 0, 0, 0.0, small)
    for number in range(files):
        series, index = divmod(number, 100)
        place = folder / "dicom" / f"{series:04d}"
        place.mkdir(parents=True, exist_ok=True)
        ds.PatientID, ds.StudyInstanceUID = f"patient-{series}", f"2.25.{series + 1}1"
        ds.SeriesInstanceUID, ds.SOPInstanceUID = f"2.25.{series + 1}2", f"2.25.{series + 1}3{index:03d}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], 5 * index]
        ds.save_as(place / f"IM{index:03d}", enforce_file_format=True)
    site = write_site(folder)
    first = ingest(site)
    start = time.perf_counter()
    second = ingest(site)
    function = time.perf_counter() - start
    if first.slices != files or not second.unchanged:
        raise RuntimeError(f"{first.slices} of {files} images were taken, unchanged {second.unchanged}")
    start = time.perf_counter()
    command = [Path(sys.executable).with_name("hemafed-client"), "ingest", folder / "site.yaml"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return function, time.perf_counter() - start


def main(patients: int = 20, files: int = 10_000) -> None:
    """Write, time and print."""
    silence_readers()
    with tempfile.TemporaryDirectory() as place:
        print("| | bare loop, 1 process | ingest, 1 worker | ratio | bare loop, 2 | ingest, 2 | ratio |")
        print("|---|---|---|---|---|---|---|")
        for name in SYNTAXES:
            site = write_series(Path(place) / name.replace(" ", "-"), name, patients)
            paths = sorted(site.images.rglob("IM*"))
            speeds = {}
            times: dict[tuple[str, int], list[float]] = {}
            for _ in range(REPEATS):
                for workers in (1, 2):
                    times.setdefault(("loop", workers), []).append(time_loop(paths, workers))
                    times.setdefault(("ingest", workers), []).append(time_ingest(site, workers))
            speeds = {key: len(paths) / statistics.median(values) for key, values in times.items()}
            cells = []
            for workers in (1, 2):
                loop, own = speeds["loop", workers], speeds["ingest", workers]
                cells += [f"{loop:.0f}/s", f"{own:.0f}/s", f"{own / loop:.2f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            shutil.rmtree(site.images.parent)
        function, command = time_unchanged(Path(place) / "unchanged", files)
        print(f"\nUnchanged ingest of {files} files: {function:.2f} s, as a command {command:.2f} s")


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:]))
