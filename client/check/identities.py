"""Find patients that cannot be told apart, or are told apart wrongly, after an anonymiser changed identifiers.

In: what a check has read. Out: problems in words. Stays in the hospital.
"""

from __future__ import annotations

from collections import defaultdict

from client.check.found import WHO, Found

SINGLE_SLICES = 3  # series of one slice in one patient
FEW_PATIENTS = 5  # from here on it is worth asking why most have one slice
# What anonymisers and people write where an identifier was.
PLACEHOLDERS = (
    *(
        "ANON",
        "ANONYM",
        "ANONYMOUS",
        "ANONYMIZED",
        "ANONYMISED",
        "ANONYME",
        "ANONIMO",
        "PATIENT",
        "UNKNOWN",
        "UNBEKANNT",
        "NONE",
    ),
    *(
        "NA",
        "N/A",
        "TEST",
        "REMOVED",
        "DEIDENTIFIED",
        "DE-IDENTIFIED",
        "X",
        "XX",
        "XXX",
        "XXXX",
        "0",
        "00",
        "000",
        "0000",
        "1",
        "NULL",
        "DUMMY",
    ),
)


def identities(found: Found) -> list[str]:
    """Identifiers that an anonymiser made equal, or gave to every slice."""
    if not found.used:
        return []
    problems, pseudonyms = [], found.pseudonyms
    slices = [found.series[part.series].slices[0] for part in found.used]
    studies: dict[str, set[str]] = defaultdict(set)
    for one in slices:
        studies[one.patient].add(one.study)
    words = {
        pseudonyms.of("patient", word): word for base in PLACEHOLDERS for word in {base, base.lower(), base.title()}
    }
    for patient in sorted(studies.keys() & words.keys()):
        if len(studies[patient]) > 1:
            problems.append(
                f"PatientID is {words[patient]!r} in {len(studies[patient])} studies: patients who share it cannot be told apart, and "
                "one could be trained and tested on; have the anonymiser give each patient an ID of its own"
            )
    if len(studies) == 1 and not problems:
        (count,) = map(len, studies.values())
        what = f"all {count} studies have one PatientID" if count > 1 else "there is one patient in all"
        problems.append(
            f"{what}: nobody is left to test on, and no number may leave; if there are more patients, have the anonymiser give each "
            "an ID of its own"
        )
    persons: dict[str, set[str]] = defaultdict(set)
    for image in found.survey.scan.images:
        persons[image.patient].add(image.person)
    mixed = sorted(patient for patient, who in persons.items() if len(who - {""}) > 1)
    if mixed:
        problems.append(
            f"{len(mixed)} PatientIDs have several birth dates or sexes (such as patient {mixed[0]}; {WHO}): several patients "
            "under one ID; give each an ID of its own"
        )
    return _one_slice_each(found) + problems


def _one_slice_each(found: Found) -> list[str]:
    """SeriesInstanceUID, StudyInstanceUID or PatientID of its own on every slice."""
    singles: dict[str, set[float]] = defaultdict(set)
    for one in found.survey.series_found:
        if len(one.slices) == 1:
            singles[one.slices[0].patient].add(one.slices[0].height_mm)
    torn = {patient: len(heights) for patient, heights in singles.items() if len(heights) >= SINGLE_SLICES}
    if torn:
        return [
            (
                f"{sum(torn.values())} series of one slice each in {len(torn)} patients (such as patient {min(torn)}; {WHO}): "
                "SeriesInstanceUID is another on every slice, as some anonymisers do, and of each study one slice is taken; anonymise "
                "again so that the slices of a series keep one UID"
            )
        ]
    patients = {part.patient for part in found.used}
    lonely = {part.patient for part in found.used if len(part.rows) == 1} & singles.keys()
    if len(patients) >= FEW_PATIENTS and 2 * len(lonely) > len(patients):
        return [
            (
                f"{len(lonely)} of {len(patients)} patients have one slice each: is PatientID another on every slice? export whole series, "
                "and have the anonymiser give a patient's images one ID"
            )
        ]
    return []


def leaks(found: Found) -> list[str]:
    """One patient in two splits: equal pictures, or one study, under two identifiers.

    Without splits, as before the first ingest, which makes the key that they follow, any two identifiers may come apart.
    """
    problems, splits = [], found.splits
    pictures: dict[str, set[str]] = defaultdict(set)  # by content; slices of air alone say nothing and have none
    studies: dict[str, set[str]] = defaultdict(set)
    for part in found.used:
        studies[found.series[part.series].slices[0].study].add(part.patient)
        for row in part.rows:
            if row.content:
                pictures[row.content].add(part.patient)
    for kind, groups in (("pictures", pictures), ("studies", studies)):
        shared = [patients for patients in groups.values() if len(patients) > 1]
        apart = [patients for patients in shared if not splits or len({splits[p] for p in patients}) > 1]
        if apart:
            where = "are in different splits" if splits else "may come into different splits"
            problems.append(
                f"{len(apart)} {kind} belong to several patients that {where} (such as {' and '.join(sorted(apart[0])[:2])}; {WHO}): "
                "one patient with two identifiers, half trained on and half tested on: give them one PatientID; or two patients whose "
                "images were mixed: export them apart"
            )
    return problems
