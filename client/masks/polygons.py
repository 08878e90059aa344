"""Closed polygons of one image to the pixels that they enclose.

A pixel is inside when its centre is, or when the polygon runs through its centre: rt-utils and others trace masks through the
centres of their outermost pixels, and a mask without these is a pixel too small all around. A polygon within another is a
hole, and one within the hole an island; polygons that cross are united. Stays in the hospital.

Shape suffixes: P point, Y row, X column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray
from scipy.spatial import cKDTree

ON_EDGE_PX = 0.02  # from a centre to the polygon; coordinates are written with two decimals of a mm or more
SAME_POINT_PX = 0.05  # between the corners of one polygon sent twice

Points = NDArray[np.float64]  # (P, 2): row and column in pixels, 0 at the first pixel's centre


def fill(polygons: Sequence[Points], shape: tuple[int, int], exclusive: bool = False) -> NDArray[np.uint8]:
    """Pixels that some polygons enclose together.

    Args:
      polygons: at least one point each.
      shape: rows and columns of the image.
      exclusive: pixels in an odd number of polygons (CLOSEDPLANAR_XOR, PS3.3 C.8.8.6.3) in place of holes by nesting.
    Returns:
      uint8 (Y, X) of 0 and 1.
    """
    once: list[Points] = []
    for points in polygons:
        if not any(_same(points, other) for other in once):  # sent twice: no writer means that they cancel
            once.append(points)
    mask_YX = np.zeros(shape, np.uint8)
    for points in sorted(once, key=_area, reverse=True):
        inside_YX, edge_YX = _inside(points, shape), _edge(points, shape)
        if exclusive:
            mask_YX ^= inside_YX | edge_YX
        elif sum(_within(points, other) for other in once if other is not points) % 2:
            mask_YX &= ~(inside_YX & ~edge_YX) & 1
        else:
            mask_YX |= inside_YX | edge_YX
    return mask_YX


def encloses_nothing(points: Points, shape: tuple[int, int]) -> bool:
    """Whether a polygon holds no pixel's centre: it is finer than the pixels."""
    return not (_inside(points, shape).any() or _edge(points, shape).any())


def opposed(polygons: Sequence[Points]) -> bool:
    """Whether two of some polygons are the same in opposite directions.

    A small ring, traced through its pixels' centres, is such a pair, and so is a contour that was sent twice and reversed.
    """
    return any(
        _turn(one) * _turn(other) < 0 and _same(one, other)
        for number, one in enumerate(polygons)
        for other in polygons[:number]
    )


def _turn(points: Points) -> int:
    """The direction that a polygon runs in, 1 or -1; 0 without an area."""
    rows, columns = points.T
    doubled = float(np.dot(rows, np.roll(columns, 1)) - np.dot(columns, np.roll(rows, 1)))
    return int(np.sign(doubled)) if abs(doubled) > 1 else 0


def _same(one: Points, other: Points) -> bool:
    """Whether two polygons have the same corners, in whatever order and direction, repeated or not."""
    return all(cKDTree(a).query(b)[0].max() < SAME_POINT_PX for a, b in ((one, other), (other, one))) and np.isclose(
        _area(one), _area(other), rtol=0.01, atol=0.1
    )


def _area(points: Points) -> float:
    """Area in pixels (the shoelace formula)."""
    rows, columns = points.T
    return abs(float(np.dot(rows, np.roll(columns, 1)) - np.dot(columns, np.roll(rows, 1)))) / 2


def _within(inner: Points, outer: Points) -> bool:
    """Whether a polygon lies in another, larger one; touching from inside is within."""
    if _area(inner) >= _area(outer):
        return False
    return bool((_contains(outer, inner) | _distance_below(inner, outer, ON_EDGE_PX)).all())


def _contains(polygon: Points, points: Points) -> NDArray[np.bool_]:
    """Return which points are inside a polygon."""
    return Polygon(np.vstack([polygon, polygon[:1]]), closed=False).contains_points(points)


def _distance_below(points: Points, polygon: Points, limit: float) -> NDArray[np.bool_]:
    """Return which points are nearer to a polygon's edges than a limit."""
    near = np.zeros(len(points), bool)
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        along = end - start
        share = np.clip((points - start) @ along / max(float(along @ along), 1e-12), 0, 1)
        near |= np.hypot(*(points - start - share[:, None] * along).T) < limit
    return near


def _inside(points: Points, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels whose centres are inside; a centre on the edge may be or not."""
    mask_YX = np.zeros(shape, np.uint8)
    top, left = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
    bottom, right = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 1, shape)
    if len(points) < 3 or top >= bottom or left >= right:
        return mask_YX
    box = np.mgrid[top:bottom, left:right].reshape(2, -1).T
    mask_YX[top:bottom, left:right] = _contains(points, box).reshape(bottom - top, right - left)
    return mask_YX


def _edge(points: Points, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels whose centres the edges run through: one candidate for each row or column that an edge crosses."""
    mask_YX = np.zeros(shape, np.uint8)
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        steep = abs(end[0] - start[0]) >= abs(end[1] - start[1])
        main, other = (0, 1) if steep else (1, 0)
        low, high = sorted((start[main], end[main]))
        at = np.arange(np.ceil(low - ON_EDGE_PX), np.floor(high + ON_EDGE_PX) + 1)
        length = end[main] - start[main]
        share = np.clip((at - start[main]) / length, 0, 1) if length else np.zeros(len(at))
        across = start[other] + share * (end[other] - start[other])
        centre = np.rint(across)
        on = np.abs(across - centre) < ON_EDGE_PX
        rows, columns = (at, centre) if steep else (centre, at)
        fits = on & (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
        mask_YX[rows[fits].astype(int), columns[fits].astype(int)] = 1
    return mask_YX
