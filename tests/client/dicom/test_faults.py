from __future__ import annotations

from client.dicom.faults import Fault, by_reason, commonest


def test_one_reason_is_one_group_whatever_numbers_stand_in_it() -> None:
    faults = [
        Fault("file a", "a contour lies 1.2 mm from file 0123456789abcdef, expected 0"),
        Fault("file b", "a contour lies 13 mm from file fedcba9876543210, expected 0"),
        Fault("file c", "a localizer"),
        Fault("file d", "a localizer"),
        Fault("file e", "a localizer"),
    ]
    first, second = by_reason(faults)
    assert first == ("a localizer", ["file c", "file d", "file e"])
    assert second == (
        "a contour lies 1.2 mm from file 0123456789abcdef, expected 0 (numbers of the first, file a)",
        ["file a", "file b"],
    )
    assert commonest(faults) == "a localizer, 3 times"
    assert commonest(faults[:1]) == faults[0].reason
    assert commonest([]) == ""
