"""Files of the centre: replaced in one step, and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.host.files import bound_log, replace_text


def test_a_text_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for text in ("one", "two"):
        replace_text(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_log_is_put_aside_and_its_writer_begins_anew(tmp_path: Path) -> None:
    path, older = tmp_path / "access.log", tmp_path / "access.log.1"
    with open(path, "a") as writer:
        for line in ("first\n", "second\n", "third\n"):
            writer.write(line)
            writer.flush()
            bound_log(path, largest=8)
        assert (older.read_text(), path.read_text()) == ("first\nsecond\n", "third\n")
        writer.write("a line that is long\n")
        writer.flush()
        bound_log(path, largest=8)
    assert (older.read_text(), path.read_text()) == ("third\na line that is long\n", "")


def test_a_log_stays_whole_where_it_cannot_be_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text("lines")
    (tmp_path / "access.log.1").mkdir()
    with pytest.raises(OSError, match=r"access\.log\.1"):
        bound_log(path, largest=0)
    assert path.read_text() == "lines"
