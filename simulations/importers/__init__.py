"""Public head CT data sets -> hospital folders that `hemafed-client ingest` reads.

In: a set's folder as its publisher lays it out. Out: one folder per hospital with site.yaml, labels.csv and
import.json; pixels stay where they are, are hard-linked, or are converted from NIfTI to DICOM. No set tells whether a
hematoma holds a hypodensity, so that column is blank, which means unknown; the sets' other labels are in further
columns.

Nothing is downloaded, and nothing leaves the machine. The sets have terms of their own; site.yaml names them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simulations.importers.bhsd import import_bhsd
from simulations.importers.cq500 import import_cq500
from simulations.importers.hospital import SourceError
from simulations.importers.physionet_ich import import_physionet_ich
from simulations.importers.rsna import import_rsna

__all__ = ["IMPORTERS", "Importer", "SourceError"]

# (source, target, progress(done, total)) -> the site.yaml files that were written
Importer = Callable[[Path, Path, Callable[[int, int], None]], list[Path]]

IMPORTERS: dict[str, Importer] = {
    "rsna": import_rsna,
    "cq500": import_cq500,
    "physionet-ich": import_physionet_ich,
    "bhsd": import_bhsd,
}
