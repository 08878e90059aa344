"""Refuse files labelled CT that are no axial CT image in HU, and damaged or contradictory files that would give wrong values.

In: the elements of one file. Out: nothing, or a DicomError with the value found and what was expected. Stays in the hospital.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import get_decoder
from pydicom.uid import HTJ2K, JPEG2000, UID, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless

from client.dicom.elements import DicomFile, integer, text, texts, word
from client.dicom.faults import DicomError, Kind

SIDES_PX = (16, 2048)  # rows and columns of a CT image; larger ones are not made by any scanner
AXIAL_COSINE = 0.7  # a slice's normal within about 45 degrees of z: tilted gantries pass, sagittal views do not

# Syntaxes that always lose information, and those that may; the latter pass where the file says that it did not.
_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)
_PERHAPS_LOSSY = (JPEG2000, HTJ2K)
# Words in ImageType of what is computed from CT images and is no CT image (PS3.3 C.8.2.1.1.1, C.8.15.2.1.3).
_MAPS = re.compile(
    r"PERFUSION|VOLUME_?RENDER|SURFACE|PROJECTION|SCREEN(?!ING)|IODINE|EFF_ATOMIC|ELECTRON|MONO_?E|SUBTRACT|CURVED|MAX_IP|MIN_IP|"
    r"(?<![A-Z])(CBF|CBV|MTT|TTP|TMAX|DRAIN|FLOW|MIP|MINIP|VRT|SSD|VNC|FUSION)(?![A-Z])"
)
_PIXEL_DATA = {"little": b"\xe0\x7f\x10\x00", "big": b"\x7f\xe0\x00\x10"}
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")  # PS3.5 7.1.2
_UNDEFINED = 0xFFFFFFFF


def check_kind(ds: pydicom.Dataset) -> None:
    """Refuse what is filed as CT and is no axial CT image in HU."""
    if text(ds, "Modality") != "CT":
        raise DicomError(f"Modality {word(text(ds, 'Modality'))}, expected CT", Kind.NO_HEAD_CT)
    check_image_type(texts(ds, "ImageType"))
    if text(ds, "BurnedInAnnotation").upper() == "YES":
        raise DicomError(
            "BurnedInAnnotation YES: text is drawn into the picture, expected an untouched image", Kind.NO_HEAD_CT
        )
    if (integer(ds, "SamplesPerPixel") or 0) != 1:
        raise DicomError(
            f"SamplesPerPixel {integer(ds, 'SamplesPerPixel')}, expected 1: a colour picture is not CT", Kind.NO_HEAD_CT
        )
    if not text(ds, "PhotometricInterpretation").startswith("MONOCHROME"):
        raise DicomError(
            f"PhotometricInterpretation {word(text(ds, 'PhotometricInterpretation'))}, expected MONOCHROME2",
            Kind.NO_HEAD_CT,
        )


def check_image_type(values: tuple[str, ...]) -> None:
    """Refuse localizers, computed maps and screenshots (PS3.3 C.8.2.1.1.1)."""
    kinds = [value.upper() for value in values]
    if "LOCALIZER" in kinds:
        raise DicomError("a localizer, expected an axial image", Kind.NO_HEAD_CT)
    computed = next((value for value in kinds[2:] if _MAPS.search(value)), None)
    if computed:
        raise DicomError(
            f"ImageType {word(computed)}: a computed map or a screenshot, expected an axial image in HU",
            Kind.NO_HEAD_CT,
        )


def check_syntax(ds: pydicom.Dataset, accept_lossy: bool) -> bool:
    """Whether the image is lossy; refuse what cannot be decoded or contradicts the file."""
    syntax = UID(str(ds.file_meta.get("TransferSyntaxUID", "")))
    if not syntax.is_transfer_syntax:
        raise DicomError("without a known TransferSyntaxUID; expected in the file's meta group (PS3.10 7.1)")
    implicit, little = ds.original_encoding
    if (implicit, little) != (syntax.is_implicit_VR, syntax.is_little_endian):
        raise DicomError(f"the header names {syntax.name}, its elements are written otherwise; export the file again")
    declared = text(ds, "LossyImageCompression")
    lossy = declared == "01" or syntax in _LOSSY or (syntax in _PERHAPS_LOSSY and declared != "00")
    if lossy and not accept_lossy:
        raise DicomError(
            f"lossy compression ({syntax.name}), expected a lossless export: it changes HU; "
            "data.accept_lossy: true in site.yaml takes it and marks its slices"
        )
    try:
        decodable = get_decoder(syntax).is_available
    except NotImplementedError:
        decodable = False
    if not decodable:
        raise DicomError(f"no decoder for {syntax.name}; export as Explicit VR Little Endian or a lossless syntax")
    return lossy


def storage(ds: pydicom.Dataset, frames: int) -> dict[str, object]:
    """Check how pixels are stored (PS3.5 8.1.1, PS3.3 C.8.2.1)."""
    rows, columns = integer(ds, "Rows") or 0, integer(ds, "Columns") or 0
    if not (SIDES_PX[0] <= rows <= SIDES_PX[1] and SIDES_PX[0] <= columns <= SIDES_PX[1]):
        raise DicomError(f"{rows} x {columns} pixels, expected {SIDES_PX[0]} to {SIDES_PX[1]} rows and columns")
    allocated, stored, high = (integer(ds, name) or 0 for name in ("BitsAllocated", "BitsStored", "HighBit"))
    signed = integer(ds, "PixelRepresentation")
    if allocated != 16 or not 9 <= stored <= 16 or high != stored - 1 or signed not in (0, 1):
        raise DicomError(
            f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high}, PixelRepresentation {signed}; expected 16, "
            "9 to 16, BitsStored - 1, and 0 or 1: other pictures hold no HU"
        )
    padding = integer(ds, "PixelPaddingValue", bool(signed))
    limit = integer(ds, "PixelPaddingRangeLimit", bool(signed))
    ends = sorted(value for value in (padding, padding if limit is None else limit) if value is not None)
    return {
        "shape": (rows, columns),
        "frames": frames,
        "bits_allocated": allocated,
        "bits_stored": stored,
        "signed": bool(signed),
        "padding": (ends[0], ends[-1]) if padding is not None else None,
    }


def check_pixels(file: DicomFile, path: Path, stored: Mapping[str, Any]) -> None:
    """Whether Pixel Data follows the header, and is as long as the header says; a deflated file is looked at when read."""
    if file.pixel_offset < 0:
        return
    syntax = file.ds.file_meta.TransferSyntaxUID
    order, head = "little" if syntax.is_little_endian else "big", file.pixel_head
    if head[:4] != _PIXEL_DATA[order]:
        raise DicomError("no Pixel Data after the header: cut, or damaged; export the file again")
    start = 8 if syntax.is_implicit_VR else 12
    length = int.from_bytes(head[start - 4 : start], order)
    if syntax.is_encapsulated != (length == 0xFFFFFFFF):
        raise DicomError(f"the header names {syntax.name}, Pixel Data is written otherwise; export the file again")
    if syntax.is_encapsulated:
        return
    side, expected = 2 * min(stored["shape"]), stored_bytes(stored)
    if not 0 <= length - expected < side:
        raise DicomError(
            f"Pixel Data of {length} bytes, expected {expected} for {stored['frames']} x {stored['shape']} pixels; export the file again"
        )
    end = file.pixel_offset + start + length
    if end > file.size:
        raise DicomError(
            f"cut: {file.size - file.pixel_offset - start} bytes of pixels, expected {expected}; export the file again"
        )
    if end < file.size:
        with open(path, "rb") as stream:
            stream.seek(end)
            check_tail(stream.read(), syntax.is_implicit_VR, order)


def stored_bytes(stored: Mapping[str, Any]) -> int:
    """Check the length of uncompressed pixels; a few more bytes are padding, a row or column more is another picture (PS3.5 8.1.1)."""
    return stored["shape"][0] * stored["shape"][1] * stored["frames"] * stored["bits_allocated"] // 8


def check_tail(tail: bytes, implicit: bool, order: str) -> None:
    """Whether elements, or NULs up to the end of a block, follow Pixel Data, as they may; anything else is damage.

    Private elements, signatures and padding have higher tags (PS3.3 A.1, PS3.10 7.2).
    """
    short, long = ("<H", "<I") if order == "little" else (">H", ">I")
    place, last = 0, (0x7FE0, 0x0010)
    while tail[place:].strip(b"\0"):
        head = tail[place : place + 12].ljust(12, b"\0")
        tag = struct.unpack_from(short, head)[0], struct.unpack_from(short, head, 2)[0]
        if implicit or head[4:6] in _LONG:
            length, start = struct.unpack_from(long, head, 4 if implicit else 8)[0], 8 if implicit else 12
        else:
            length, start = struct.unpack_from(short, head, 6)[0], 8
        if length == _UNDEFINED:
            mark = struct.pack(f"{short}{short[1]}", 0xFFFE, 0xE0DD) + bytes(4)
            found = tail.find(mark, place + start)
            length = found + len(mark) - place - start if found >= 0 else len(tail)
        known = implicit or (head[4:6].isalpha() and head[4:6].isupper())
        if tag <= last or not known or place + start + length > len(tail):
            raise DicomError("bytes after Pixel Data that are no element: the file was damaged; export it again")
        place, last = place + start + length, tag


def check_plane(row: tuple[float, ...], column: tuple[float, ...], normal: tuple[float, ...]) -> None:
    """Refuse directions that are no right angle, and planes that are not axial (PS3.3 C.7.6.2.1.1)."""
    lengths = [math.hypot(*row), math.hypot(*column), math.hypot(*normal)]
    if not all(0.98 < value < 1.02 for value in lengths):
        raise DicomError("ImageOrientationPatient is malformed, expected two unit vectors at a right angle")
    if abs(normal[2]) < AXIAL_COSINE:
        raise DicomError(
            f"normal {np.round(normal, 2).tolist()}, expected an axial slice (near [0, 0, 1])", Kind.NO_HEAD_CT
        )
