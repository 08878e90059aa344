"""JPEG Lossless and JPEG-LS through imagecodecs (libjpeg-turbo, CharLS), as a plugin of pydicom's decoders.

JPEG Lossless is the common compression of head CT, and GDCM, pydicom's only free decoder of it, takes five times as long.
pydicom's plugin interface is used: the module needs `is_available`, `DECODER_DEPENDENCIES` and a decoding function. A
stream that these libraries refuse is refused; a more lenient decoder is not asked.
"""

from __future__ import annotations

import imagecodecs
import numpy as np
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import UID, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless

from client.dicom.jpeg import lenient_scan

PLUGIN = "imagecodecs"
_DECODE = {
    JPEGLossless: imagecodecs.jpeg_decode,
    JPEGLosslessSV1: imagecodecs.jpeg_decode,
    JPEGLSLossless: imagecodecs.jpegls_decode,
}
DECODER_DEPENDENCIES = dict.fromkeys(_DECODE, ("imagecodecs",))


def is_available(uid: str) -> bool:
    """Whether this plugin decodes a transfer syntax."""
    return uid in _DECODE


def decode_frame(stream: bytes, runner: DecodeRunner) -> bytes:
    """One frame's pixels as pydicom expects them: little endian, in the header's number of bytes."""
    decode = _DECODE[runner.transfer_syntax]
    pixels_YX = decode(lenient_scan(stream) if decode is imagecodecs.jpeg_decode else stream)
    runner.set_option("bits_allocated", 8 * pixels_YX.dtype.itemsize)
    return np.ascontiguousarray(pixels_YX).astype(pixels_YX.dtype.newbyteorder("<"), copy=False).tobytes()


def plugin_for(syntax: UID) -> str:
    """The plugin to decode a syntax with; "" for pydicom's own choice."""
    if syntax not in _DECODE:
        return ""
    decoder = get_decoder(syntax)
    if PLUGIN not in decoder.available_plugins:
        decoder.add_plugin(PLUGIN, (__name__, "decode_frame"))
    return PLUGIN
