"""The data that a check has read, in which problems are looked for. Stays in the hospital. Shape suffix: N slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.dicom.faults import Fault
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import CtSeries
from client.ingest.read_series import CachedSeries
from client.ingest.survey import Survey
from client.masks.drawn import Tally
from shared.site import Site

WHO = "'hemafed-client find SITE_YAML CODE' tells who that is"


@dataclass(frozen=True)
class Found:
    """The data that a check has read.

    Attributes:
      site: whose.
      pseudonyms: the hospital's, or temporary ones.
      survey: headers and decisions.
      used: parts with slices; masks are int64 (N,), pixels of hematoma.
      heads: series name -> int64 (N,), pixels of head.
      edges: series name -> share of the field's edge that is tissue.
      series: name -> series, of those taken.
      faults: everything that was left out.
      tallies: accounts of the mask files that were read.
      splits: patient -> split; {} before the first ingest of a training hospital, which decides it.
      labelled: scanner -> labelled slices, positives.
    """

    site: Site
    pseudonyms: Pseudonyms
    survey: Survey
    used: Sequence[CachedSeries]
    heads: Mapping[str, NDArray[np.int64]]
    edges: Mapping[str, float]
    series: Mapping[str, CtSeries]
    faults: Sequence[Fault]
    tallies: Sequence[Tally]
    splits: Mapping[str, str]
    labelled: Mapping[str, tuple[int, int]]
