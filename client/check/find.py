"""Look up the file, series, study or patient behind a code of a report; for those who may open the folder, on screen only.

Reports name files, series, studies and patients by keyed hashes. A user with the folder and the key gets the path or
the patient's identifier back; nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from client.check.check import pseudonyms_of
from client.dicom.elements import identifier, read_dicom
from client.dicom.faults import DicomError
from client.dicom.pseudonyms import Pseudonyms
from client.ingest.scan import FoundFile, walk
from shared.site import Site

_TAGS = {"series": "SeriesInstanceUID", "study": "StudyInstanceUID", "patient": "PatientID", "image": "SOPInstanceUID"}


def find(site: Site, codes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what codes mean.

    Args:
      site: whose report they are from.
      codes: the 16 digits of a file, series, study, patient or image, or their first 8 or more.
    Yields:
      Code, and what it is: identifiers and paths, not for any file or log.
    """
    pseudonyms, _ = pseudonyms_of(site)
    files = walk(site, pseudonyms)
    open_codes = {code.partition(".")[0].strip(",") for code in codes}
    for f in files:
        for code in _meant(f.code, open_codes):
            open_codes.discard(code)
            yield code, str(f.path)
    if open_codes:
        yield from _find_in_headers(files, pseudonyms, open_codes)


def _find_in_headers(
    files: Sequence[FoundFile], pseudonyms: Pseudonyms, open_codes: set[str]
) -> Iterator[tuple[str, str]]:
    """Look up codes in the files' headers until every code is found."""
    for f in files:
        if f.refused or not open_codes:
            continue
        try:
            ds = read_dicom(f.path).ds
            values = {kind: identifier(ds, tag) for kind, tag in _TAGS.items()}
        except DicomError:
            continue
        except Exception:
            continue
        for kind, value in values.items():
            name = pseudonyms.of(kind, value)
            for code in _meant(name, open_codes):
                open_codes.discard(code)
                where = "" if kind == "patient" else f", PatientID {values['patient']}"
                yield code, f"{kind} {value}{where}, first in {f.path}"


def _meant(name: str, codes: set[str]) -> list[str]:
    """The codes that mean a keyed hash."""
    return [code for code in sorted(codes) if len(code) >= 8 and name.startswith(code)]
