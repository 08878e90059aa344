"""The frames of a DICOM segmentation, decoded one by one as numbers.

pydicom and highdicom decode what they know; what would decode to something else without an error is refused by name. Stays in
the hospital. Shape suffixes: N frame, Y row, X column.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pydicom
from highdicom.frame import decode_frame
from numpy.typing import NDArray
from pydicom.encaps import generate_frames
from pydicom.uid import (
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from client.dicom.faults import DicomError
from client.dicom.jpeg import check_stream
from client.dicom.refusals import SIDES_PX

DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"  # Deflated Image Frame Compression (PS3.5 A.4.13), unknown to pydicom 3.0
_STREAMS = (JPEG2000Lossless, JPEGLSLossless, JPEGLossless, JPEGLosslessSV1, HTJ2KLossless, HTJ2KLosslessRPCL)
_AGAIN = "export the mask again as Explicit VR Little Endian"
MOST_PIXELS = 1 << 30  # of all frames of a file

Frame = NDArray[np.unsignedinteger]


def frames_of(seg: pydicom.Dataset, count: int) -> Callable[[int], Frame]:
    """Return a reader of a segmentation's frames.

    Args:
      seg: read whole.
      count: frames that its functional groups describe.
    Returns:
      Number of a frame from 0 -> its stored values, unsigned integers (Y, X).
    Raises:
      DicomError: an encoding that is not read, or pixels that are not those of `count` frames.
    """
    shape, bits = (int(seg.get("Rows") or 0), int(seg.get("Columns") or 0)), int(seg.get("BitsAllocated") or 0)
    if int(seg.get("NumberOfFrames") or 0) != count:
        raise DicomError(f"NumberOfFrames {seg.get('NumberOfFrames')}, but {count} frames are described; {_AGAIN}")
    if not all(1 <= side <= SIDES_PX[1] for side in shape) or count * shape[0] * shape[1] > MOST_PIXELS:
        raise DicomError(f"{count} frames of {shape} pixels, expected up to {SIDES_PX[1]} rows and columns; {_AGAIN}")
    if bits not in (1, 8, 16) or int(seg.get("SamplesPerPixel") or 1) != 1 or int(seg.get("PixelRepresentation") or 0):
        raise DicomError(
            f"BitsAllocated {bits}, or colours or signed values; expected 1, 8 or 16 bits unsigned; {_AGAIN}"
        )
    syntax = UID(str(seg.file_meta.TransferSyntaxUID))
    if "PixelData" not in seg:
        raise DicomError(f"without Pixel Data; expected {count} frames; {_AGAIN}")
    if syntax == DEFLATED_FRAMES:
        return _deflated(seg, count, shape, bits)
    if not syntax.is_transfer_syntax or not syntax.is_little_endian:
        raise DicomError(f"segments in {syntax.name}, which is not read for masks; {_AGAIN}")
    if not syntax.is_encapsulated:
        return _native(seg.PixelData, count, shape, bits)
    if syntax not in (*_STREAMS, RLELossless) or (syntax == RLELossless and bits == 1):
        kind = "single bits" if bits == 1 else "lossy or unknown"
        raise DicomError(f"segments in {syntax.name} ({kind}), which is not read; {_AGAIN}")
    return _encapsulated(seg, count, shape, bits, syntax)


def _native(data: bytes, count: int, shape: tuple[int, int], bits: int) -> Callable[[int], Frame]:
    """Frames without compression; single bits follow each other without a gap between frames (PS3.5 8.1.1)."""
    pixels = shape[0] * shape[1]
    expected = -(-count * pixels * bits // 8)
    excess = len(data) - expected
    if not 0 <= excess < max(2, pixels * bits // 8):
        raise DicomError(
            f"Pixel Data of {len(data)} bytes, expected {expected} for {count} frames; cut or damaged: {_AGAIN}"
        )

    def frame(number: int) -> Frame:
        if bits > 1:
            kind = np.dtype(np.uint8 if bits == 8 else "<u2")
            return np.frombuffer(data, kind, pixels, number * pixels * kind.itemsize).reshape(shape)
        first = number * pixels
        part = np.frombuffer(data, np.uint8, -(-(first + pixels) // 8) - first // 8, first // 8)
        return np.unpackbits(part, bitorder="little")[first % 8 : first % 8 + pixels].reshape(shape)

    return frame


def _parts(seg: pydicom.Dataset, count: int) -> list[bytes]:
    """The compressed frames."""
    offsets = None
    if "ExtendedOffsetTable" in seg:
        offsets = (seg.ExtendedOffsetTable, seg.ExtendedOffsetTableLengths)
    try:
        parts = list(generate_frames(seg.PixelData, number_of_frames=count, extended_offsets=offsets))
    except Exception as error:  # pydicom raises many types for a damaged sequence of fragments
        raise DicomError(f"compressed frames are cut or damaged, expected {count}; {_AGAIN}") from error
    if len(parts) != count:
        raise DicomError(f"{len(parts)} compressed frames, expected {count}; {_AGAIN}")
    return parts


def _deflated(seg: pydicom.Dataset, count: int, shape: tuple[int, int], bits: int) -> Callable[[int], Frame]:
    """Frames that are deflated one by one (RFC 1951)."""
    parts, size = _parts(seg, count), -(-shape[0] * shape[1] * bits // 8)

    def frame(number: int) -> Frame:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(parts[number], size + 2)
        except zlib.error as error:
            raise DicomError(f"frame {number + 1} is deflated and damaged; {_AGAIN}") from error
        if not inflate.eof or len(data) - size not in (0, 1):
            raise DicomError(f"frame {number + 1} inflates to {len(data)} bytes, expected {size}; {_AGAIN}")
        return _native(data, 1, shape, bits)(0)

    return frame


def _encapsulated(
    seg: pydicom.Dataset, count: int, shape: tuple[int, int], bits: int, syntax: UID
) -> Callable[[int], Frame]:
    """Frames in a compression that pydicom decodes."""
    parts = _parts(seg, count)

    def frame(number: int) -> Frame:
        if syntax != RLELossless:
            check_stream(parts[number].rstrip(b"\0"), shape, lossy=False)
        try:
            return decode_frame(
                parts[number], syntax, *shape, 1, bits, int(seg.get("BitsStored") or bits), "MONOCHROME2", 0
            ).reshape(shape)
        except Exception as error:  # decoders raise types of their own
            raise DicomError(
                f"frame {number + 1} in {syntax.name} cannot be decoded: damaged, or not read; {_AGAIN}"
            ) from error

    return frame
