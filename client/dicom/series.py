"""CT images to series: ordered, checked, and one series per study chosen.

In: image headers in any order. Out: series whose slices belong together, ordered along their normal, and what was left
out with the reason. File names, InstanceNumber and BodyPartExamined decide nothing. Stays in the hospital.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from client.dicom.faults import Fault, Kind
from client.dicom.headers import CtSlice, normal_of

SAME_PLACE_MM = 0.01  # two slices nearer than this are at one position
UNEVEN = 1.5  # a gap this many times the median is a missing slice or a change of spacing
DIRECTION_TOLERANCE = 0.001  # of a cosine, .06 degree: writers round directions differently from slice to slice
SPACING_TOLERANCE = 0.001  # mm; half a pixel over a picture of 512
TILT_DEGREE = 1.0  # between the tilt that the orientation shows and the tag
USUAL_THICKNESS_MM = 5.0  # non-contrast head CT is read at 5 mm (PHANTOM: 2.5 to 10)

# Reconstruction kernels by their makers' names. Siemens: a letter, and a number that grows with sharpness (H31s, J40s,
# Hr38f); Canon FC20 to 29 and 60 to 69 brain, FC30 to 39, 50 to 59 and 80 to 89 bone and lung; GE and Philips by word.
_SOFT_WORDS = {"SOFT", "STANDARD", "STND", "DETAIL", "BRAIN", "SMOOTH", "UA", "UB", "UC", "A", "B"}
_SHARP_WORDS = {"BONE", "BONEPLUS", "BONE PLUS", "EDGE", "LUNG", "ULTRA", "SHARP", "D", "E", "L", "YC", "YD", "YE"}
_CANON = re.compile(r"FC(\d)\d")
_SIEMENS = re.compile(r"[A-Z]{1,2}[a-z]?(\d{2})[a-z]*")


@dataclass(frozen=True)
class CtSeries:
    """Slices of one series, ordered along the normal from the feet up.

    Attributes:
      name: keyed hash of the series.
      slices: at least one, of one patient, orientation and pixel grid.
      flags: what is unusual and does not spoil the series: "uneven", "tilt-differs", "sharp-kernel", "derived",
        "contrast", "lossy", "space-per-slice".
    """

    name: str
    slices: tuple[CtSlice, ...]
    flags: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> float:
        """Median distance of neighbouring slices along the normal; 0 for a single slice."""
        heights = [s.height_mm for s in self.slices]
        return float(np.median(np.diff(heights))) if len(heights) > 1 else 0.0

    @property
    def sheared_mm(self) -> float:
        """Return the in-plane shift from the first slice to the last: a gantry's tilt."""
        first, last = self.slices[0], self.slices[-1]
        way = np.subtract(last.position_mm, first.position_mm)
        return max(abs(float(way @ np.array(first.row_direction))), abs(float(way @ np.array(first.column_direction))))

    @property
    def tilt_degree(self) -> float:
        """Angle between the slices' normal and the patient's axis, from the orientation."""
        normal = normal_of(self.slices[0].row_direction, self.slices[0].column_direction)
        return math.degrees(math.acos(min(1.0, abs(normal[2]) / math.hypot(*normal))))


def build_series(images: Iterable[CtSlice]) -> tuple[list[CtSeries], list[CtSeries], list[Fault]]:
    """Series of images, in order of their name.

    Args:
      images: of any number of series, each image once.
    Returns:
      Series; those that do not hold together, as they are, to be looked at and not to be used; and why: slices unlike the
      rest of their series, and whole series.
    """
    by_series: dict[str, list[CtSlice]] = defaultdict(list)
    for image in images:
        by_series[image.series].append(image)
    built, refused, faults = [], [], []
    for name, members in sorted(by_series.items()):
        series, found = _build_one(name, members)
        built += [series] if series else []
        refused += [] if series else [CtSeries(name, tuple(sorted(members, key=lambda s: (s.height_mm, s.image))))]
        faults += found
    return built, refused, faults


def _build_one(name: str, members: list[CtSlice]) -> tuple[CtSeries | None, list[Fault]]:
    """One series, or why it cannot be used."""
    what = f"series {name}"
    if len({(s.patient, s.study) for s in members}) > 1:
        reason = "its images name several patients or studies, expected one; export it again, or have its anonymiser keep one"
        return None, [Fault(what, reason)]
    members, shared_space = _with_one_space(members)
    groups = _alike(members)
    kinds = Counter(groups)
    usual, count = kinds.most_common(1)[0]
    examples = {group: _signature(s) for group, s in zip(reversed(groups), reversed(members), strict=True)}
    if 2 * count <= len(members) and len(kinds) > 1:
        reason = (
            f"its {len(members)} images differ in {_differing(*examples.values())}; expected one kind; split the series"
        )
        return None, [Fault(what, reason)]
    faults = [
        Fault(
            f"file {s.file}",
            f"differs from the {count} other images of its series in {_differing(examples[group], examples[usual])}",
            Kind.OUTLIER,
        )
        for s, group in zip(members, groups, strict=True)
        if group != usual
    ]
    row, column = examples[usual][-1][:3], examples[usual][-1][3:]
    alike = [
        replace(s, row_direction=row, column_direction=column)  # one for all, or a height would depend on rounding
        for s, group in zip(members, groups, strict=True)
        if group == usual
    ]
    slices = tuple(sorted(alike, key=lambda s: (s.height_mm, s.image)))
    double = sum(gap < SAME_PLACE_MM for gap in np.diff([s.height_mm for s in slices]))
    if double:
        reason = (
            f"{double} of {len(slices)} slices at the position of another and not equal to it, expected one each; export one series "
            "each"
        )
        if double == len(slices) - 1:
            reason = f"all {len(slices)} slices have one position, so ImagePositionPatient was overwritten; export the original geometry"
        return None, [*faults, Fault(what, reason)]
    series = CtSeries(name, slices)
    flags = _flags(series) if shared_space else ("space-per-slice", *_flags(series))
    return replace(series, flags=flags), faults


def _with_one_space(members: list[CtSlice]) -> tuple[list[CtSlice], bool]:
    """The images of a series, and whether they share frames of reference.

    Some anonymisers give every slice a FrameOfReferenceUID of its own; positions stay what they were, and a frame of
    reference that nothing shares says nothing.
    """
    spaces = {s.space for s in members}
    if len(members) < 3 or len(spaces) < len(members):
        return members, True
    return [replace(s, space="") for s in members], False


_SHARED = ("pixel grid", "kernel", "frame of reference", "compression", "pixel spacing", "orientation")
_EXACT = 4  # so many of these must be equal; the others are numbers that writers round from slice to slice
_TOLERANCES = (SPACING_TOLERANCE, DIRECTION_TOLERANCE)


def _signature(s: CtSlice) -> tuple:
    """Return the values that all images of a series share, in the order of _SHARED.

    How pixels are stored and rescaled is not among them: HU are right all the same, or client/ingest/read_series.py finds that not.
    """
    return s.shape, s.kernel, s.space, s.lossy, s.spacing_mm, (*s.row_direction, *s.column_direction)


def _alike(members: list[CtSlice]) -> list[int]:
    """Per image, which group of alike images it belongs to; the commonest signature is looked at first."""
    counts = Counter(_signature(s) for s in members)
    leaders: list[tuple] = []
    group_of: dict[tuple, int] = {}
    for signature, _ in counts.most_common():
        near = (n for n, leader in enumerate(leaders) if not _differing(signature, leader))
        group_of[signature] = next(near, len(leaders))
        if group_of[signature] == len(leaders):
            leaders.append(signature)
    return [group_of[_signature(s)] for s in members]


def _differing(*signatures: tuple) -> str:
    """In what signatures differ by more than rounding, in words; "" if in nothing."""
    found = []
    for place, name in enumerate(_SHARED):
        values = [signature[place] for signature in signatures]
        if place < _EXACT:
            differ = len(set(values)) > 1
        else:
            differ = np.ptp(np.array(values), axis=0).max() > _TOLERANCES[place - _EXACT]
        found += [name] if differ else []
    return " and ".join(found)


def _flags(series: CtSeries) -> tuple[str, ...]:
    """Return notes on a series for the report."""
    first = series.slices[0]
    gaps = np.diff([s.height_mm for s in series.slices])
    flags = {
        "uneven": len(gaps) > 1 and gaps.max() > UNEVEN * np.median(gaps),
        "tilt-differs": abs(abs(first.tilt_degree) - series.tilt_degree) > TILT_DEGREE,
        "sharp-kernel": sharpness(first) == "sharp",
        "derived": first.derived,
        "contrast": first.contrast,
        "lossy": first.lossy,
    }
    return tuple(name for name, holds in flags.items() if holds)


def sharpness(image: CtSlice) -> str:
    """Whether an image's kernel is "soft" (brain), "sharp" (bone, lung) or "unknown"."""
    kernel = image.kernel.strip()
    canon, siemens = _CANON.fullmatch(kernel.upper()), _SIEMENS.match(kernel)
    if image.bone or kernel.upper() in _SHARP_WORDS:
        return "sharp"
    if kernel.upper() in _SOFT_WORDS:
        return "soft"
    if canon:
        return {"2": "soft", "6": "soft", "3": "sharp", "5": "sharp", "8": "sharp"}.get(canon[1], "unknown")
    if siemens:
        return "soft" if int(siemens[1]) < 50 else "sharp"
    return "unknown"


@dataclass(frozen=True)
class Choice:
    """Choice of one series of a study.

    Attributes:
      study: keyed hash.
      taken: names of the series, one unless several are labelled or have a mask.
      reason: why.
    """

    study: str
    taken: tuple[str, ...]
    reason: str


def choose(
    series: Iterable[CtSeries], annotated: Mapping[str, str]
) -> tuple[list[CtSeries], list[Choice], list[Fault]]:
    """One series per study: the axial original one with a brain kernel.

    Annotated series come first, and all of them; then no contrast agent, an original image, a
    soft kernel, a distance of slices near 5 mm, more slices. Ties are broken by name.

    Args:
      series: all of them.
      annotated: series name -> "labels", "masks" or both, for those that a label or mask refers to.
    Returns:
      The series taken in order of name, one choice per study, and a fault for each series that was not taken.
    """
    studies: dict[str, list[CtSeries]] = defaultdict(list)
    for one in series:
        studies[one.slices[0].study].append(one)
    taken, choices, faults = [], [], []
    for study, members in sorted(studies.items()):
        ranked = sorted(members, key=_rank)
        chosen = [s for s in ranked if s.name in annotated] or ranked[:1]
        reason = f"has {annotated[chosen[0].name]}" if chosen[0].name in annotated else ""
        reason = reason or ("the only one" if len(members) == 1 else f"best of {len(members)}: {describe(chosen[0])}")
        names = {s.name for s in chosen}
        choices.append(Choice(study, tuple(sorted(names)), reason))
        taken += chosen
        for other in ranked:
            if other.name not in names:
                faults.append(
                    Fault(
                        f"series {other.name}", f"not chosen: {_drawback(other, chosen[0], annotated)}", Kind.NOT_CHOSEN
                    )
                )
    return sorted(taken, key=lambda s: s.name), choices, faults


def describe(series: CtSeries) -> str:
    """A series in a few words."""
    first = series.slices[0]
    return (
        f"{'derived' if first.derived else 'original'}, kernel {first.kernel} ({sharpness(first)}), "
        f"{len(series.slices)} slices every {series.spacing_mm:.1f} mm{', contrast' if first.contrast else ''}"
    )


_CRITERIA = (
    "a contrast agent",
    "a derived image",
    "a sharp kernel",
    "a distance of slices further from 5 mm",
    "fewer slices",
)


def _rank(series: CtSeries) -> tuple:
    """Order of preference within a study, in the order of _CRITERIA; the smallest is taken."""
    first = series.slices[0]
    kernel = {"soft": 0, "unknown": 1, "sharp": 2}[sharpness(first)]
    distance = abs(series.spacing_mm - USUAL_THICKNESS_MM)
    return (first.contrast, first.derived, kernel, round(distance, 1), -len(series.slices), series.name)


def _drawback(other: CtSeries, chosen: CtSeries, annotated: Mapping[str, str]) -> str:
    """Return why a series was not chosen."""
    if chosen.name in annotated:
        return "labels and masks refer to another series of its study"
    worse = next((c for c, a, b in zip(_CRITERIA, _rank(other), _rank(chosen), strict=False) if a > b), "the same kind")
    return f"{worse}; the study's {describe(chosen)} was taken"
