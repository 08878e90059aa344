"""Headers of JPEG, JPEG-LS and JPEG 2000 streams, checked before a decoder relies on them.

A stream can be cut, claim a size that fills the memory, or be lossy under a lossless transfer syntax: decoders take all of
these without a word. Stays in the hospital.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from client.dicom.faults import DicomError

_J2K_START = b"\xff\x4f\xff\x51"  # SOC and SIZ (ITU-T T.800 Annex A)
_END = b"\xff\xd9"  # of a JPEG, JPEG-LS and JPEG 2000 stream alike
_SOF_LOSSLESS, _SOF_LS = 0xC3, 0xF7  # lossless Huffman (ITU-T T.81 table B.1), JPEG-LS (ITU-T T.87 C.1.1)
_SOS, _COD, _COC, _SOT = 0xDA, 0x52, 0x53, 0x90
_NO_SOF = (0xC4, 0xC8, 0xCC)  # tables among the markers C0 to CF
_STANDALONE = (0xD8, 0x01, *range(0xD0, 0xD8))
_LOSSY = "though its transfer syntax is lossless and the header does not say so; export the series again without loss"


def check_stream(stream: bytes, shape: tuple[int, int], lossy: bool) -> None:
    """Whether a stream is whole, of the size that the header says, and lossless unless declared otherwise.

    Args:
      stream: one frame.
      shape: rows and columns that the header says.
      lossy: the header declares the image as lossy, and the hospital takes it.
    Raises:
      DicomError: it is not.
    """
    start = stream[:256].find(_J2K_START)  # a JP2 file's boxes may come first
    found, loss = _jpeg_2000(stream[start:]) if start >= 0 else _jpeg(stream)
    if loss and not lossy:
        raise DicomError(f"{loss}: lossy, {_LOSSY}")
    if found != shape:
        raise DicomError(f"compressed picture of {found} pixels, the header says {shape}; damaged: export it again")
    if _END not in stream[-16:]:
        raise DicomError("compressed picture without its end: cut; export it again")


def _segments(stream: bytes, place: int) -> Iterator[tuple[int, bytes, int]]:
    """Marker, content and place of every marker segment until one that is none."""
    while place + 4 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xFF:  # fill bytes (T.81 B.1.1.2)
            place += 1
            continue
        if marker in _STANDALONE:
            place += 2
            continue
        length = struct.unpack_from(">H", stream, place + 2)[0]
        yield marker, stream[place + 4 : place + 2 + length], place
        place += 2 + length


def _jpeg(stream: bytes) -> tuple[tuple[int, int] | None, str]:
    """Rows and columns of a JPEG or JPEG-LS stream, None without a frame header; and how it is lossy, "" if it is not."""
    shape, kind = None, 0
    for marker, content, _ in _segments(stream, 0):
        if marker == _SOF_LS or (0xC0 <= marker <= 0xCF and marker not in _NO_SOF):
            if len(content) < 5:
                return None, ""
            kind, shape = marker, struct.unpack_from(">2H", content, 1)
            if kind not in (_SOF_LS, _SOF_LOSSLESS):
                return shape, f"JPEG stream with the cosine transform (SOF{kind - 0xC0})"
        if marker == _SOS:
            tail = content[-3:]  # JPEG: Ss, Se, Ah and Al; JPEG-LS: NEAR, ILV, Al
            if len(tail) < 3:
                return None, ""
            if kind == _SOF_LS and tail[0]:
                return shape, f"JPEG-LS stream with NEAR {tail[0]}"
            if tail[2] & 0x0F:
                return shape, f"JPEG stream with a point transform of {tail[2] & 0x0F} bits"
            return shape, ""
    return shape, ""


def _jpeg_2000(stream: bytes) -> tuple[tuple[int, int] | None, str]:
    """Rows and columns of a JPEG 2000 or HTJ2K stream, and how it is lossy.

    Looks at the main header; a tile with a transform of its own is looked at in the first tile's header.
    """
    if len(stream) < 24:
        return None, ""
    width, height, left, top = struct.unpack_from(">4I", stream, 8)
    for marker, content, _ in _segments(stream, 2):
        # Transform: last of SGcod and SPcod's first five bytes (Table A.15, A.20); COC names its component first.
        place = {_COD: 9, _COC: 6}.get(marker)
        if place is not None and len(content) > place and content[place] == 0:
            return (height - top, width - left), "JPEG 2000 stream with the irreversible transform"
        if marker == _SOT:
            continue
        if marker == 0x93:  # SOD: data follow
            break
    return (height - top, width - left), ""


def lenient_scan(stream: bytes) -> bytes:
    """A JPEG Lossless stream with Se and Ah of its scans set to 0.

    They have no meaning in a lossless scan and must be 0 (T.81 B.2.3), but some encoders write 63; libjpeg-turbo then refuses
    the stream, GDCM ignores them.
    """
    marks = {marker: (place, len(content)) for marker, content, place in _segments(stream, 0) if marker == _SOS}
    if not marks or not any(marker == _SOF_LOSSLESS for marker, _, _ in _segments(stream, 0)):
        return stream
    place, length = marks[_SOS]
    end = place + 4 + length  # Ss, Se, Ah and Al end the segment
    changed = bytearray(stream)
    changed[end - 2], changed[end - 1] = 0, changed[end - 1] & 0x0F
    return bytes(changed)
