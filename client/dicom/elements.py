"""DICOM elements: files opened with care, values as plain text and numbers.

pydicom decodes an element when it is asked for; for some 30 elements of each of 100,000 files its conversions cost more
than the rest of an ingest, so plain ASCII and 16-bit values are taken from the raw elements here. Everything stays in
the hospital.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import gdcm
import pydicom
from pydicom import charset, config
from pydicom.dataelem import RawDataElement
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, UID_dictionary

from client.dicom.faults import DicomError

MOST_INFLATED_BYTES = 1 << 29  # a deflated file is inflated in memory


@dataclass(frozen=True)
class DicomFile:
    """The elements of a file before its pixels.

    Attributes:
      ds: elements, not yet decoded.
      pixel_offset: where Pixel Data begins, -1 in a deflated file.
      pixel_head: the first bytes of Pixel Data, at most 12.
      size: of the file, in bytes.
    """

    ds: pydicom.Dataset
    pixel_offset: int
    pixel_head: bytes
    size: int


def read_dicom(path: Path) -> DicomFile:
    """A file's elements before its pixels.

    Raises:
      DicomError: not DICOM, unreadable, damaged, or inflating to more than MOST_INFLATED_BYTES.
    """
    try:
        with open(path, "rb") as file:
            deflated = DeflatedExplicitVRLittleEndian.encode() in file.read(1024)
            if deflated:
                inflate(file)
            file.seek(0)
            ds = pydicom.dcmread(file, stop_before_pixels=True)
            offset = -1 if deflated else file.tell()
            return DicomFile(ds, offset, b"" if deflated else file.read(12), file.seek(0, 2))
    except DicomError:
        raise
    except InvalidDicomError as error:
        raise DicomError("not a DICOM file (no 'DICM' prefix); if it should be one, export it again") from error
    except OSError as error:
        raise DicomError(f"cannot be opened ({error.strerror or type(error).__name__})") from error
    except Exception as error:  # zlib.error, struct.error, EOFError and others, by where it is damaged
        raise DicomError("damaged: its elements do not follow DICOM's encoding; export the file again") from error


def inflate(file: BinaryIO) -> bytes:
    """A deflated file's dataset (PS3.5 A.5), inflated piece by piece, before pydicom inflates it at once.

    Raises:
      DicomError: more than MOST_INFLATED_BYTES, or the stream does not end where the file does.
    """
    file.seek(140)
    length = int.from_bytes(file.read(4), "little")  # of the meta group, after its first element (PS3.10 7.1)
    file.seek(144 + length)
    stream, piece, data = zlib.decompressobj(-zlib.MAX_WBITS), file.read(), bytearray()
    while piece and not stream.eof:
        data += stream.decompress(piece, 1 << 24)
        piece = stream.unconsumed_tail
        if len(data) > MOST_INFLATED_BYTES:
            raise DicomError(f"inflates to more than {MOST_INFLATED_BYTES >> 20} MiB; expected one image")
    if not stream.eof or stream.unused_data.strip(b"\0"):
        raise DicomError("the deflated part does not end where the file ends: cut or damaged; export the file again")
    return bytes(data)


def class_name(uid: str) -> str:
    """The name of a SOP class; a private one's UID is not shown."""
    return UID_dictionary[uid][0] if uid in UID_dictionary else "an unknown SOP class" if uid else "no SOP class"


def word(value: str) -> str:
    """A coded value for a message; what is not short and coded may be anything, and is not shown."""
    return value if re.fullmatch(r"[A-Za-z0-9_ /.:+-]{1,24}", value) else "(not shown)" if value else "(empty)"


@lru_cache
def _tag(keyword: str) -> BaseTag:
    """The tag of a keyword."""
    return Tag(keyword)


def _element(ds: pydicom.Dataset, keyword: str) -> pydicom.DataElement | RawDataElement | None:
    """An element as it was read, not decoded; None if absent."""
    try:
        return ds.get_item(_tag(keyword))
    except KeyError:
        return None


def texts(ds: pydicom.Dataset, keyword: str) -> tuple[str, ...]:
    """An element's values as text, padding off; () if absent. Plain ASCII avoids pydicom's costly conversions."""
    element = _element(ds, keyword)
    if element is None or element.value is None:
        return ()
    if isinstance(element, RawDataElement) and isinstance(element.value, bytes) and element.value.isascii():
        return _split(element.value)
    value = ds[keyword].value
    values = value if isinstance(value, list | MultiValue) else [value]
    return tuple(str(v).strip() for v in values if v is not None)


@lru_cache(4096)
def _split(value: bytes) -> tuple[str, ...]:
    """Values of a raw text element."""
    return tuple(part.strip(" \0") for part in value.decode("ascii").split("\\")) if value else ()


def text(ds: pydicom.Dataset, keyword: str) -> str:
    """An element's first value as text, "" if absent."""
    return next(iter(texts(ds, keyword)), "")


def identifier(ds: pydicom.Dataset, keyword: str) -> str:
    """An element of one value that tells things apart, whole, "" if absent.

    It is not split at backslashes: these are half of a character in ISO 2022, GB 18030 and Shift JIS, and two patients must
    not become one because their names share a byte. Text that cannot be decoded is kept as its bytes.
    """
    element = _element(ds, keyword)
    if element is None or element.value is None:
        return ""
    if not isinstance(element, RawDataElement):
        return str(element.value).strip()
    value = element.value.strip(b" \0")
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii")
    try:
        declared = ds.get("SpecificCharacterSet") or "ISO_IR 6"
        decoded = charset.decode_bytes(value, charset.convert_encodings(declared), set())
    except (LookupError, ValueError):
        return value.hex()
    return value.hex() if "\ufffd" in decoded else decoded.strip()


def numbers(ds: pydicom.Dataset, keyword: str, count: int) -> tuple[float, ...]:
    """A decimal element as exactly `count` finite numbers."""
    try:
        values = tuple(float(value) for value in texts(ds, keyword))
    except ValueError:
        values = ()
    if len(values) != count or not all(map(math.isfinite, values)):
        raise DicomError(
            f"{keyword} is missing or malformed, expected {count} number{'s' if count > 1 else ''}: export the original images again"
        )
    return values


def optional_number(ds: pydicom.Dataset, keyword: str) -> float:
    """One number, 0 if absent or empty."""
    return numbers(ds, keyword, 1)[0] if text(ds, keyword) else 0.0


def integer(ds: pydicom.Dataset, keyword: str, signed: bool = False) -> int | None:
    """A 16-bit element (US or SS), None if absent."""
    element = _element(ds, keyword)
    if element is None or element.value in (None, b""):
        return None
    if isinstance(element, RawDataElement):
        order = "little" if element.is_little_endian else "big"
        if len(element.value) != 2:
            raise DicomError(f"{keyword} has {len(element.value)} bytes, expected 2")
        return int.from_bytes(element.value, order, signed=signed)
    return int(element.value)


def silence_readers() -> None:
    """Keep pydicom and GDCM from writing to the log: their warnings quote values, and values may name a patient."""
    config.settings.reading_validation_mode = config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom|highdicom|nibabel")
    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()
    gdcm.Trace.DebugOff()
