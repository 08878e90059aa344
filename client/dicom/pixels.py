"""The pixels of one CT image, in Hounsfield units.

In: a CtSlice, which says where they lie and how they are stored. Out: float32 HU. What a damaged or contradictory file
would turn into a wrong value is refused before it is decoded. Stays in the hospital.

Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import UID, RLELossless
from scipy import ndimage

from client.dicom.decoders import plugin_for
from client.dicom.elements import inflate
from client.dicom.faults import DicomError
from client.dicom.headers import CtSlice
from client.dicom.jpeg import check_stream
from client.dicom.refusals import check_tail

AIR_HU = -1024  # what padding outside the reconstructed circle is clamped to
PADDING_HU = -32768  # declared padding until then: no measurement, and not to be counted as one
MAX_HU = 3071  # the top of a 12-bit CT scale; metal beyond it carries no information
# A padding value above the first is a tissue's value too, and counts only where it touches the border; one between the two is
# air's own.
PADDING_BELOW_HU, LOWEST_AIR_HU = -900.0, -1100.0

_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def read_hu(image: CtSlice) -> NDArray[np.float32]:
    """Pixels of one CT image after rescale.

    Args:
      image: in any transfer syntax that pydicom's decoders know.
    Returns:
      float32 (Y, X), Hounsfield units; declared padding is PADDING_HU, undeclared keeps its value until clamp_hu.
    Raises:
      DicomError: the pixels cannot be decoded, are cut, or are not those that the header describes.
    Source: DICOM PS3.3 C.11.1 (output = slope * stored + intercept), C.7.5.1.1.2 (padding).
    """
    syntax = UID(image.syntax)
    try:
        raw, compressed = _read_frame(image, syntax)
        options = {
            "rows": image.shape[0],
            "columns": image.shape[1],
            "samples_per_pixel": 1,
            "photometric_interpretation": "MONOCHROME2",
            "number_of_frames": 1,
            "bits_allocated": image.bits_allocated,
            "bits_stored": image.bits_stored,
            "pixel_representation": int(image.signed),
            "pixel_keyword": "PixelData",
            "pixel_vr": "OW",
            # Padding may stand in bits beyond those stored, as -2000 does in 12-bit data: they are cut after it is found.
            "correct_unused_bits": compressed,
        }
        stored_YX = get_decoder(syntax).as_array(raw, index=0, raw=True, decoding_plugin=plugin_for(syntax), **options)[
            0
        ]
    except DicomError:
        raise
    except OSError as error:
        raise DicomError(f"cannot be opened ({error.strerror or type(error).__name__})") from error
    except Exception as error:  # decoders raise types of their own
        raise DicomError(f"pixels in {syntax.name} cannot be decoded: damaged; export the file again") from error
    if stored_YX.shape != image.shape:
        raise DicomError(f"decodes to {stored_YX.shape} pixels, the header says {image.shape}")
    return rescale(stored_YX, image)


def rescale(stored_YX: NDArray[np.integer], image: CtSlice) -> NDArray[np.float32]:
    """Stored values to HU: unused bits off, rescale, declared padding to PADDING_HU."""
    padded_YX = None
    if image.padding is not None and not _is_air(image):
        low, high = image.padding
        padded_YX = (stored_YX >= low) & (stored_YX <= high)
    unused = 16 - image.bits_stored
    if unused and stored_YX.dtype.itemsize == 2:
        stored_YX = np.right_shift(np.left_shift(stored_YX, unused), unused)  # arithmetic where signed
        if padded_YX is not None:
            padded_YX |= (stored_YX >= low) & (stored_YX <= high)
    hu_YX = stored_YX.astype(np.float32)
    hu_YX *= np.float32(image.slope)
    hu_YX += np.float32(image.intercept)
    if padded_YX is not None and padded_YX.any():
        if image.slope * high + image.intercept > PADDING_BELOW_HU:
            padded_YX = _touching_border(padded_YX)
        hu_YX[padded_YX] = PADDING_HU
    return hu_YX


def _is_air(image: CtSlice) -> bool:
    """Whether the padding value is air's: then it is no mark, and air within the head's picture has it too."""
    ends = [image.slope * value + image.intercept for value in image.padding or ()]
    return all(LOWEST_AIR_HU <= end <= PADDING_BELOW_HU for end in ends)


def clamp_hu(hu_YX: NDArray[np.float32]) -> NDArray[np.float32]:
    """Padding (often -2000, -2048 or -3024) to air's -1024, metal to 3071 HU."""
    return np.clip(hu_YX, AIR_HU, MAX_HU)


def _touching_border(region_YX: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected parts of a region that reach the picture's border: padding lies outside the reconstructed circle."""
    parts_YX, _ = ndimage.label(region_YX)
    outer = np.unique(np.concatenate([parts_YX[0], parts_YX[-1], parts_YX[:, 0], parts_YX[:, -1]]))
    return np.isin(parts_YX, outer[outer > 0])


def _read_frame(image: CtSlice, syntax: UID) -> tuple[bytes, bool]:
    """The frame's bytes as a decoder takes them, and whether they are compressed."""
    size = image.shape[0] * image.shape[1] * image.bits_allocated // 8
    if image.pixel_offset < 0:  # a deflated file has no offsets
        element = pydicom.dcmread(image.path).get_item("PixelData")
        pixels = element.value
        with open(image.path, "rb") as file:
            check_tail(inflate(file)[element.value_tell + len(pixels) :], False, "little")
        if not 0 <= len(pixels) - size * image.frames < 2 * min(image.shape):
            raise DicomError(
                f"Pixel Data of {len(pixels)} bytes, expected {size * image.frames}; export the file again"
            )
        return pixels[size * image.frame : size * (image.frame + 1)], False
    with open(image.path, "rb") as file:
        start = image.pixel_offset + (8 if syntax.is_implicit_VR else 12)
        if not syntax.is_encapsulated:
            file.seek(start + size * image.frame)
            pixels = file.read(size)
            if len(pixels) != size:
                raise DicomError(f"cut: {len(pixels)} bytes of pixels, expected {size}")
            return pixels, False
        frame = _encapsulated_frame(file, start, image)
    if syntax != RLELossless:
        check_stream(frame, image.shape, image.lossy)
    return encapsulate([frame]), True


def _encapsulated_frame(file: BinaryIO, start: int, image: CtSlice) -> bytes:
    """One frame of encapsulated pixels (PS3.5 A.4): all fragments of a single one, or one fragment each."""
    end = file.seek(0, 2)
    items, place = [], start
    while True:
        file.seek(place)
        head = file.read(8)
        if head == _DELIMITER + bytes(4):
            break
        length = struct.unpack("<I", head[4:])[0] if len(head) == 8 else end
        if head[:4] != _ITEM or place + 8 + length > end:
            raise DicomError("compressed pixels are cut or damaged: no end of their sequence")
        items.append((place + 8, length))
        place += 8 + length
    items = items[1:]  # the first is the offset table
    if image.frames > 1 and len(items) != image.frames:
        raise DicomError(f"{len(items)} fragments for {image.frames} frames, expected one each; export uncompressed")
    parts = []
    for place, length in items if image.frames == 1 else [items[image.frame]]:
        file.seek(place)
        parts.append(file.read(length))
    return b"".join(parts)
