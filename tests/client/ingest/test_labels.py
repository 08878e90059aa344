from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from client.dicom.pseudonyms import Pseudonyms
from client.ingest.ingest import IngestError, ingest
from client.ingest.label_table import LabelError, read_labels
from client.ingest.labels import SPLIT_SHARES, annotated_series, assign_splits, splits_of
from shared.site import SiteError, read_site
from tests.support.small_sites import (
    SERIES,
    index,
    ingested,
    make_site,
    patients,
    series_name,
    three,
    write_multi_frame,
)

HEADER = "series_uid,sop_uid,hypodensity\n"
COUNTED = "series_uid,slice_index,hypodensity\n"
NAN = np.nan


def faults(file: Path) -> dict[str, str]:
    return {fault.what: fault.reason for fault in ingested(file)[1].faults}


def refusal(file: Path) -> str:
    with pytest.raises(IngestError) as caught:
        ingest(read_site(file), workers=1)
    return str(caught.value)


# By image


def test_labels_by_image(tmp_path: Path) -> None:
    cache, report = ingested(make_site(tmp_path, labels=HEADER + f"{SERIES},{SERIES}.3,1\n{SERIES},{SERIES}.1,0\n"))
    np.testing.assert_array_equal(cache.label, [0, NAN, 1])
    assert (report.positives, report.unlabelled, report.faults) == (1, 1, ())


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_label_is_unknown(tmp_path: Path, blank: str) -> None:
    cache, report = ingested(make_site(tmp_path, labels=HEADER + f"{SERIES},{SERIES}.1,{blank}\n"))
    assert np.isnan(cache.label).all()
    assert report.unlabelled == 3


def test_a_hospital_without_a_table(tmp_path: Path) -> None:
    cache, report = ingested(make_site(tmp_path))
    assert np.isnan(cache.label).all()
    assert (report.slices, report.unlabelled, report.masked) == (3, 3, 0)


def test_the_same_label_twice_is_no_fault(tmp_path: Path) -> None:
    cache, report = ingested(make_site(tmp_path, labels=HEADER + f"{SERIES},{SERIES}.1,1\n" * 2))
    assert cache.label[0] == 1
    assert report.faults == ()


def test_contradictions_are_refused_with_both_lines(tmp_path: Path) -> None:
    lines = [f"{SERIES},{SERIES}.2,1", f"{SERIES},{SERIES}.1,1", f"{SERIES},{SERIES}.1,0", f"{SERIES},{SERIES}.2,"]
    text = refusal(make_site(tmp_path, labels=HEADER + "\n".join(lines)))
    assert "lines 3 and 4: different labels for one slice" in text
    assert "lines 2 and 5: different labels for one slice" in text
    assert SERIES not in text
    assert not (tmp_path / "cache").exists()


def test_lines_that_match_nothing_are_told_and_the_others_used(tmp_path: Path) -> None:
    lines = ["9.9,1.2.1,1", f"{SERIES},1.2.77,0", f"{SERIES},{SERIES}.2,1"]
    file = make_site(tmp_path, labels=HEADER + "\n".join(lines))
    cache, report = ingested(file)
    np.testing.assert_array_equal(cache.label, [NAN, 1, NAN])
    assert [(f.what, f.reason) for f in report.faults] == [
        ("labels.csv line 2", "its series is not in data.images, or its files were left out"),
        ("labels.csv line 3", "its sop_uid is no image of its series, or was left out"),
    ]


def test_a_table_of_which_nothing_matches_is_refused(tmp_path: Path) -> None:
    text = refusal(make_site(tmp_path, labels=HEADER + "9.9,1.2.1,1\n9.9,1.2.2,1\n"))
    assert "none of 2 lines belongs to an image in data.images (its series is not in data.images" in text


def test_a_hospital_without_images_hears_of_the_images_not_of_the_labels(tmp_path: Path) -> None:
    file = make_site(tmp_path, {"a": {"Modality": "MR"}}, labels=HEADER + f"{SERIES},{SERIES}.1,1\n")
    assert "no usable CT series" in refusal(file)


# By place


@pytest.mark.parametrize("column", [(0.0, 1.0, 0.0), (0.0, -1.0, 0.0)], ids=["supine", "rows-flipped"])
def test_slice_index_counts_from_the_feet_up(tmp_path: Path, column: tuple) -> None:
    lines = [f"{SERIES},0,1\n", f"{SERIES},2,0\n", f"{SERIES},1,\n"]
    cache, report = ingested(make_site(tmp_path, three(column=column), labels=COUNTED + "".join(lines)))
    assert [float(row["z_mm"]) for row in index(read_site(tmp_path / "site.yaml"))] == [5, 10, 15]
    np.testing.assert_array_equal(cache.label, [1, NAN, 0])
    assert report.faults == ()


@pytest.mark.parametrize("indexes", [(0, 2), (0, 1, 2, 3), (1, 3), (0, 0, 1)])
def test_an_incomplete_count_labels_nothing_of_its_series(tmp_path: Path, indexes: tuple) -> None:
    """With one image missing, every later count would mean its neighbour."""
    lines = [f"{SERIES},{n},1\n" for n in indexes] + ["1.2.826.1.7,0,1\n", "1.2.826.1.7,1,0\n"]
    cache, report = ingested(make_site(tmp_path, three() | patients(7), labels=COUNTED + "".join(lines)))
    assert sorted(np.nan_to_num(cache.label, nan=9)) == [0, 1, 9, 9, 9]
    assert [f.what for f in report.faults] == [f"labels.csv line {n + 2}" for n in range(len(indexes))]
    assert (
        f"slice_index counts {len(set(indexes))} slices up to {max(indexes)}, its series has 3"
        in report.faults[0].reason
    )


def test_a_count_that_begins_with_one_is_called_so(tmp_path: Path) -> None:
    lines = [f"{SERIES},{n},1\n" for n in (1, 2, 3)] + ["1.2.826.1.7,0,1\n", "1.2.826.1.7,1,0\n"]
    _, report = ingested(make_site(tmp_path, three() | patients(7), labels=COUNTED + "".join(lines)))
    expected = "slice_index counts from 1 to 3, expected 0 to 2 from the feet up; subtract 1 on every line"
    assert [f.reason for f in report.faults] == [expected] * 3


def test_an_image_that_is_left_out_makes_the_count_unsafe(tmp_path: Path) -> None:
    lines = "".join(f"{SERIES},{n},1\n" for n in range(3)) + "1.2.826.1.7,0,1\n1.2.826.1.7,1,0\n"
    file = make_site(tmp_path, three() | patients(7), labels=COUNTED + lines)
    path = tmp_path / "dicom" / "8"  # the lowest
    path.write_bytes(path.read_bytes()[:-100])
    cache, report = ingested(file)
    assert sorted(np.nan_to_num(cache.label, nan=9)) == [0, 1, 9, 9]
    assert (
        sum("slice_index counts 3 slices up to 2, its series has 2 usable ones" in f.reason for f in report.faults) == 3
    )


# The table itself


def test_a_table_from_a_spreadsheet(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, spaces, another order of columns, more of them, and empty lines at the end."""
    table = (
        "\ufeffnote,hypodensity,series_uid,sop_uid\r\nMüller, 1 ," + f" {SERIES} , {SERIES}.2 \r\n,,,\r\n , ,,\r\n\r\n"
    )
    cache, report = ingested(make_site(tmp_path, labels=table))
    np.testing.assert_array_equal(cache.label, [NAN, 1, NAN])
    assert report.faults == ()


def test_all_wrong_values_in_one_error_by_the_files_own_line_numbers(tmp_path: Path) -> None:
    lines = [f"{SERIES},{SERIES}.1,yes", "", f"{SERIES},{SERIES}.2,1", f"{SERIES},{SERIES}.3,2"]
    text = refusal(make_site(tmp_path, labels=HEADER + "\n".join(lines)))
    assert "line 2: hypodensity is neither 1, 0 nor blank" in text
    assert "line 5: hypodensity" in text
    assert "line 4" not in text
    assert "yes" not in text
    assert SERIES not in text


@pytest.mark.parametrize("line", [f"{SERIES}", f"{SERIES},{SERIES}.1", "", "x", f"{SERIES},{SERIES}.1,,more,and more"])
def test_a_short_or_long_line_is_a_fault_or_blank_never_a_crash(tmp_path: Path, line: str) -> None:
    cache, _ = ingested(make_site(tmp_path, labels=HEADER + f"{SERIES},{SERIES}.3,1\n{line}\n"))
    np.testing.assert_array_equal(cache.label, [NAN, NAN, 1])


@pytest.mark.parametrize("place", ["-1", "1.0", "²", "", "first", "9" * 5000])
def test_a_slice_index_that_is_none_is_refused(tmp_path: Path, place: str) -> None:
    text = refusal(make_site(tmp_path, labels=COUNTED + f"{SERIES},{place},1\n"))
    assert "line 2: slice_index is no number from 0 on" in text


@pytest.mark.parametrize("header", ["sop_uid,hypodensity", "series_uid,hypodensity", "series_uid,sop_uid", "a;b", ""])
def test_a_missing_column_is_refused(tmp_path: Path, header: str) -> None:
    text = refusal(make_site(tmp_path, labels=header + "\n"))
    assert "expected series_uid, sop_uid or slice_index, and hypodensity" in text


@pytest.mark.parametrize("content", [HEADER.encode("utf-16"), "note\nMüller\n".encode("latin-1")])
def test_a_table_in_another_encoding_is_refused(tmp_path: Path, content: bytes) -> None:
    file = make_site(tmp_path, labels="")
    (tmp_path / "labels.csv").write_bytes(content)
    assert "is not a CSV table in UTF-8" in refusal(file)


def test_a_table_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path, labels=HEADER))
    site.labels.unlink()
    with pytest.raises(IngestError, match=r"labels.csv cannot be opened \(No such file or directory\)"):
        ingest(site, workers=1)
    with pytest.raises(LabelError, match="cannot be opened"):
        read_labels(site, Pseudonyms(site.key()))


def test_many_faults_are_counted(tmp_path: Path) -> None:
    assert "and 15 more" in refusal(make_site(tmp_path, labels=HEADER + f"{SERIES},{SERIES}.1,x\n" * 25))


def test_rows_hold_hashes_only(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path, labels=HEADER + f"{SERIES},{SERIES}.1,1\n"))
    (row,) = read_labels(site, Pseudonyms(site.key()))
    assert (row.line, row.value, row.index) == (2, "1", -1)
    assert row.series == Pseudonyms(site.key()).of("series", SERIES)
    assert row.instance == Pseudonyms(site.key()).of("image", f"{SERIES}.1")


def test_empty_lines_of_a_counted_table_are_passed_over(tmp_path: Path) -> None:
    lines = [f"{SERIES},{n},1\n" for n in range(3)]
    cache, report = ingested(make_site(tmp_path, labels=COUNTED + "".join(lines) + ",,\n , ,\n"))
    assert cache.label.tolist() == [1, 1, 1]
    assert report.faults == ()


# Which series of a study


def two_kernels() -> dict[str, dict]:
    """One study in a brain kernel, three slices, and in a bone kernel, three slices."""
    bone = three("1.2.826.2", ConvolutionKernel="BONE")
    return three(ConvolutionKernel="STANDARD") | {f"bone-{name}": settings for name, settings in bone.items()}


def test_without_labels_the_brain_kernel_is_taken(tmp_path: Path) -> None:
    file = make_site(tmp_path, two_kernels())
    assert faults(file) == {
        series_name(read_site(file), "1.2.826.2"): "not chosen: a sharp kernel; the study's original, kernel STANDARD "
        "(soft), 3 slices every 5.0 mm was taken"
    }


def test_a_labelled_series_is_taken_before_a_better_one(tmp_path: Path) -> None:
    file = make_site(tmp_path, two_kernels(), labels=HEADER + "1.2.826.2,1.2.826.2.1,1\n")
    cache, report = ingested(file)
    np.testing.assert_array_equal(cache.label, [1, NAN, NAN])
    (fault,) = report.faults
    assert fault.what == series_name(read_site(file), SERIES)
    assert fault.reason == "not chosen: labels and masks refer to another series of its study"


def test_a_blank_label_chooses_no_series(tmp_path: Path) -> None:
    file = make_site(tmp_path, two_kernels(), labels=HEADER + f"{SERIES},{SERIES}.1,\n1.2.826.2,1.2.826.2.1,\n")
    cache, _ = ingested(file)
    assert len(cache.label) == 3
    assert series_name(read_site(file), "1.2.826.2") in faults(file)


def test_every_labelled_series_of_a_study_is_taken(tmp_path: Path) -> None:
    lines = [f"{SERIES},{SERIES}.1,0\n", "1.2.826.2,1.2.826.2.1,1\n"]
    _, report = ingested(make_site(tmp_path, two_kernels(), labels=HEADER + "".join(lines)))
    assert (report.series, report.slices, report.positives, report.faults) == (2, 6, 1, ())


def test_annotated_series_say_what_they_have() -> None:
    assert annotated_series([], {"a": object()}) == {"a": "masks"}


# Multi-frame


def test_a_multi_frame_file_is_labelled_by_place_not_by_uid(tmp_path: Path) -> None:
    file = make_site(tmp_path, {}, labels=COUNTED + "".join(f"{SERIES},{n},{n % 2}\n" for n in range(3)))
    write_multi_frame(tmp_path / "dicom" / "a", 3)
    cache, report = ingested(file)
    np.testing.assert_array_equal(cache.label, [0, 1, 0])
    assert report.faults == ()
    (tmp_path / "labels.csv").write_text(HEADER + f"{SERIES},{SERIES}.1,1\n")
    assert "its sop_uid is a multi-frame file; give slice_index instead" in refusal(file)


# Splits


def test_the_splits_shares_are_kept() -> None:
    names = [Pseudonyms(b"k" * 32).of("patient", str(n)) for n in range(100)]
    for count in (1, 2, 10, 47, 100):
        splits = list(assign_splits(names[:count], {}).values())
        for split, share in SPLIT_SHARES.items():
            assert abs(splits.count(split) - share * count) <= 1


def test_nobody_moves_when_patients_are_added() -> None:
    names = [Pseudonyms(b"k" * 32).of("patient", str(n)) for n in range(60)]
    first = assign_splits(names[:40], {})
    later = assign_splits(names, first)
    assert {name: later[name] for name in first} == first
    assert assign_splits(reversed(names), first) == later, "the order of files decides nothing"


def test_splits_are_kept_where_no_cache_is_deleted(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path))
    site.key()  # makes the state folder
    first = splits_of(site, [f"{n:016x}" for n in range(5)])
    assert json.loads((site.state / "splits.json").read_text()) == first
    more = splits_of(site, [f"{n:016x}" for n in range(9)], keep=False)
    assert {name: more[name] for name in first} == first
    assert json.loads((site.state / "splits.json").read_text()) == first


@pytest.mark.parametrize("role", ["held-out", "development"])
def test_a_hospital_that_does_not_train_is_all_test(tmp_path: Path, role: str) -> None:
    site = read_site(make_site(tmp_path, role=role))
    assert set(splits_of(site, map(str, range(12))).values()) == {"test"}
    assert not (site.state / "splits.json").exists()


@pytest.mark.parametrize("content", ['{"ab": "tra', '["ab"]', '{"ab": "training"}', '{"ab": {}}', "\0"])
def test_damaged_splits_are_never_made_anew(tmp_path: Path, content: str) -> None:
    """Made again, whoever was trained on could be tested on."""
    file = make_site(tmp_path)
    site = read_site(file)
    ingest(site, workers=1)
    (site.state / "splits.json").write_text(content)
    (tmp_path / "dicom" / "8").unlink()
    for act in (lambda: splits_of(site, ["0" * 16]), lambda: ingest(site, workers=1)):
        with pytest.raises(SiteError, match=r"splits.json is damaged.*restore it from a backup"):
            act()
    assert (site.state / "splits.json").read_text() == content
