"""NIfTI and PNG label maps to hematoma masks.

A NIfTI must have the series' own grid: its affine says where each voxel lies, and a voxel must lie on a pixel. A mask of
another grid is refused, never stretched. Stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.dicom.faults import DicomError
from client.dicom.headers import CtSlice
from client.dicom.series import CtSeries
from client.masks.drawn import EMPTY_LAYER, NOWHERE, Drawn, OtherSegment, choose_segments

SHEAR_MM = 0.5  # slices that are shifted against each other by more are no straight grid
VOXEL_TOLERANCE = 0.1  # of a voxel, between a voxel's centre and its pixel's, at every corner of the picture
_TO_PATIENT = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI counts x to the right and y to the front
_AS_SEG = "save the mask as DICOM SEG (3D Slicer, dcmqi), which names its images"
# What 3D Slicer and dcmqi write of a straightened volume is straightened too.
_AS_SLICES = "save it slice by slice as SOPInstanceUID.png, or as DICOM SEG with highdicom or OHIF, which keep each slice's place"
_WHITE = 255  # what pictures have where a label map has 1

Grid = tuple[float, ...]  # shape (3), and the affine's first three rows (12) in the patient's axes
Layer = tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]


def nifti_grid(path: Path) -> Grid:
    """Shape (3) and the affine's first three rows (12) in the patient's axes, from the header alone.

    Raises:
      DicomError: no NIfTI, not three-dimensional, an affine that is none, or two that contradict each other.
    """
    try:
        image = _load(path)
        shape, affine = image.shape, _TO_PATIENT @ np.asarray(image.affine, dtype=float)
    except Exception as error:  # nibabel and gzip raise many types
        raise DicomError("cannot be read as NIfTI: cut, damaged or of another format; save the mask again") from error
    if len(shape) < 3 or shape[3:] != (1,) * (len(shape) - 3):
        raise DicomError(f"NIfTI of shape {shape}, expected three dimensions; save the mask alone, as one label map")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
        raise DicomError(f"NIfTI whose affine is not invertible, expected one that places voxels in mm; {_AS_SEG}")
    _check_affines(image, shape)
    return (*map(float, shape[:3]), *map(float, affine[:3].ravel()))


def _load(path: Path) -> nibabel.spatialimages.SpatialImage:
    """A NIfTI; nibabel knows .nii.gz and .NII.GZ, and not .Nii.gz."""
    if path.name.endswith((".nii", ".nii.gz", ".NII", ".NII.GZ", ".NII.gz")):
        return nibabel.load(path)
    data = path.read_bytes()
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)


def _check_affines(image: nibabel.spatialimages.SpatialImage, shape: tuple[int, ...]) -> None:
    """Refuse a file whose qform and sform place a voxel in two places: readers differ in which they believe."""
    header = image.header
    if not hasattr(header, "get_qform"):
        return
    (qform, has_q), (sform, has_s) = header.get_qform(coded=True), header.get_sform(coded=True)
    if not has_q and not has_s:
        raise DicomError(f"NIfTI with neither qform nor sform: where its voxels lie is not known; {_AS_SEG}")
    if not (has_q and has_s):
        return
    corners = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    apart = np.linalg.solve(sform[:3, :3], ((qform - sform) @ corners.T)[:3])
    if np.abs(apart).max() > VOXEL_TOLERANCE:
        raise DicomError(
            f"NIfTI whose qform and sform contradict each other by {np.abs(apart).max():.1f} voxels: programs differ in which they "
            f"believe; set both alike in the program that wrote it, or {_AS_SEG}"
        )


def fits(grid: Grid, series: CtSeries) -> bool:
    """Whether every slice of a series is a layer of a NIfTI's grid, and every layer a slice."""
    if grid[:3].count(len(series.slices)) == 0:
        return False
    return all(_layer(grid, image) is not None for image in series.slices)


def _layer(grid: Grid, image: CtSlice) -> Layer | None:
    """Locate an image's pixels in a volume: first voxel, (axis, step) along a row's pixels, (axis, step) down a column.

    None if the pixels are not voxels of the volume, or not a whole layer of it.
    """
    shape, affine = np.array(grid[:3]), np.vstack([np.array(grid[3:]).reshape(3, 4), [0, 0, 0, 1]])
    inverse = np.linalg.inv(affine)
    first = (inverse @ [*image.position_mm, 1])[:3]
    right = inverse[:3, :3] @ (np.array(image.row_direction) * image.spacing_mm[1])
    down = inverse[:3, :3] @ (np.array(image.column_direction) * image.spacing_mm[0])
    axes = [int(np.argmax(np.abs(right))), int(np.argmax(np.abs(down)))]
    steps = [int(np.sign(right[axes[0]])), int(np.sign(down[axes[1]]))]
    start = np.rint(first).astype(int)
    last_row, last_column = image.shape[0] - 1, image.shape[1] - 1
    if axes[0] == axes[1] or (shape[axes[0]], shape[axes[1]]) != (image.shape[1], image.shape[0]):
        return None
    for row, column in ((0, 0), (0, last_column), (last_row, 0), (last_row, last_column)):
        voxel, expected = first + column * right + row * down, start.copy()
        expected[axes[0]] += steps[0] * column
        expected[axes[1]] += steps[1] * row
        if np.abs(voxel - expected).max() > VOXEL_TOLERANCE or (expected < 0).any() or (expected >= shape).any():
            return None
    return tuple(start.tolist()), (axes[0], steps[0]), (axes[1], steps[1])


def misfit(grid: Grid, series: Sequence[CtSeries]) -> str:
    """Return why a NIfTI fits none of the series, or several, and what to do."""
    fitting = sum(fits(grid, one) for one in series)
    found = f"its grid is that of {fitting} series, expected 1"
    if fitting:
        return f"{found}; name it SeriesInstanceUID.nii.gz"
    layers = [one for one in series if len(one.slices) in grid[:3]]
    if any(one.sheared_mm > SHEAR_MM for one in layers):
        return f"{found}: slices of a tilted gantry are no straight grid, and programs that write NIfTI straighten them; {_AS_SLICES}"
    if any("uneven" in one.flags for one in layers):
        return f"{found}: the distances of the slices are uneven, and a NIfTI's are even; {_AS_SLICES}"
    return (
        f"{found}: {'x'.join(f'{n:.0f}' for n in grid[:3])} voxels; draw it on the series in data.images, or {_AS_SEG}"
    )


def read_nifti(path: Path, series: CtSeries, segments: Sequence[str | int]) -> Drawn:
    """Masks of a series' images; see client/masks/match.py read_masks."""
    grid = nifti_grid(path)
    layers = {image: _layer(grid, image) for image in series.slices}
    off = sum(layer is None for layer in layers.values())
    if off:
        raise DicomError(
            f"{off} of {len(layers)} slices are no layer of the NIfTI's grid; expected the series' own grid: {_AS_SEG}"
        )
    volume = np.asanyarray(_load(path).dataobj).reshape([int(n) for n in grid[:3]])
    chosen, name = _chosen(volume, segments)
    masks, used = {}, set()
    for image, (start, (right_axis, right_step), (down_axis, down_step)) in layers.items():
        depth_axis = 3 - right_axis - down_axis
        used.add(start[depth_axis])
        layer = np.take(chosen, start[depth_axis], axis=depth_axis)
        layer_YX = layer.T if right_axis < down_axis else layer
        masks[image.image] = np.ascontiguousarray(layer_YX[::down_step, ::right_step])
    depth = volume.shape[depth_axis]
    drawn = np.nonzero(chosen.any(axis=tuple({0, 1, 2} - {depth_axis})))[0]
    outside = len(set(drawn.tolist()) - used)
    if len(used) < len(layers):
        raise DicomError(f"{len(layers)} slices on {len(used)} layers of the NIfTI; expected one each: {_AS_SEG}")
    left = {NOWHERE: outside, EMPTY_LAYER: depth - len(used) - outside}
    return Drawn({name: masks}, frozenset(masks), depth, dict.fromkeys(masks, 1), left)


def read_png(path: Path, name: str, series: CtSeries, segments: Sequence[str | int]) -> Drawn:
    """The mask of one image; see client/masks/match.py read_masks."""
    image = next((s for s in series.slices if s.frames == 1 and name in (s.instance, *s.copies)), None)
    if image is None:
        raise DicomError("a PNG for a multi-frame image, expected one image per file; export the mask as SEG or NIfTI")
    try:
        with Image.open(path) as picture:
            size, bands, mode = picture.size, picture.getbands(), picture.mode
            pixels_YX = np.asarray(picture)
    except Exception as error:  # Pillow raises many types
        raise DicomError("cannot be read as PNG: cut or damaged; save the mask again") from error
    if size != image.shape[::-1]:
        raise DicomError(f"mask is {size[::-1]} pixels, its image {image.shape}; expected the same: save it unscaled")
    if len(bands) != 1:
        raise DicomError(f"a PNG of mode {mode}, expected one channel with a number per pixel; save it in grey")
    chosen, segment = _chosen(pixels_YX.astype(np.int64), segments)
    return Drawn({segment: {image.image: chosen}}, frozenset([image.image]), 1, {image.image: 1}, {})


def _chosen(values: NDArray, segments: Sequence[str | int]) -> tuple[NDArray[np.uint8], str]:
    """1 where a label map has a number that is the hematoma, and these numbers' name.

    The numbers are those of data.segment, else the only one there is.
    """
    present = np.unique(values)
    if not np.isfinite(present).all() or (present != np.rint(present)).any():
        raise DicomError("a label map with numbers that are not whole, expected 0 and the number of each segment")
    numbers = [int(s) for s in segments if str(s).strip().isdecimal()]
    found = {int(value): () for value in present if value}
    if found and not numbers:
        try:
            numbers = choose_segments(found, ())
        except DicomError as error:
            raise DicomError(
                f"a label map with the numbers {', '.join(map(str, list(found)[:8]))} and no names: which is the hematoma? name "
                f"its number in site.yaml, as data.segment: {next(iter(found))}"
            ) from error
    if list(found) == [_WHITE] and _WHITE not in numbers:
        raise OtherSegment(
            f"a black and white mask (0 and {_WHITE}), and data.segment names {numbers}; add {_WHITE} to data.segment"
        )
    return np.isin(values, numbers).astype(np.uint8), " ".join(map(str, sorted(numbers)))
