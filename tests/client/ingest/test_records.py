from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from client.dicom.pseudonyms import Pseudonyms
from client.ingest import records
from client.ingest.records import append_records, read_records, write_records
from client.ingest.scan import FileRecord, FoundFile, scan, walk
from client.ingest.workers import WorkerPool
from shared.site import Site, read_site
from tests.support.small_sites import SERIES, make_site, three, write_multi_frame

Pairs = list[tuple[FoundFile, FileRecord]]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Three images, one of them lossy, a multi-frame image, a mask and two files that are left out."""
    images = three()
    images["7"] |= {"LossyImageCompression": "01", "PixelPaddingValue": -2000}
    file = make_site(tmp_path, images, data={"masks": "masks", "accept_lossy": True})
    write_multi_frame(tmp_path / "dicom" / "frames", 2, "1.2.826.5")
    (tmp_path / "dicom" / "letter").write_text("Dear")
    (tmp_path / "dicom" / ".hidden").touch()
    (tmp_path / "masks" / f"{SERIES}.1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return read_site(file)


def pairs_of(site: Site) -> Pairs:
    with WorkerPool(1) as crew:
        return scan(site, Pseudonyms(site.key()), walk(site, Pseudonyms(site.key())), {}, crew).files


def known(pairs: Pairs) -> dict[str, tuple[str, FileRecord]]:
    """As read_records gives it: what was not opened is not there, and paths are not."""
    return {
        f.code: (
            f.stamp,
            FileRecord(
                tuple(replace(image, path=Path()) for image in record.images),
                replace(record.mask, path=Path()) if record.mask else None,
                record.fault,
            ),
        )
        for f, record in pairs
        if not f.refused
    }


def test_records_come_back_as_they_were(site: Site, tmp_path: Path) -> None:
    pairs = pairs_of(site)
    assert sorted(len(record.images) for _, record in pairs) == [0, 0, 0, 1, 1, 1, 2]
    write_records(tmp_path / "kept", site, Pseudonyms(site.key()), pairs)
    assert read_records(tmp_path / "kept", site, Pseudonyms(site.key())) == known(pairs)
    assert len(known(pairs)) == 6


def test_no_record_is_no_fault(site: Site, tmp_path: Path) -> None:
    assert read_records(tmp_path / "nothing", site, Pseudonyms(site.key())) == {}
    (tmp_path / "empty").touch()
    assert read_records(tmp_path / "empty", site, Pseudonyms(site.key())) == {}


@pytest.mark.parametrize("keep", [write_records, append_records])
def test_every_cut_gives_whole_records_only(site: Site, tmp_path: Path, keep: object) -> None:
    pairs = pairs_of(site)
    keep(tmp_path / "kept", site, Pseudonyms(site.key()), pairs)
    whole, expected = (tmp_path / "kept").read_bytes(), known(pairs)
    counts = set()
    for end in range(0, len(whole), 7):
        (tmp_path / "cut").write_bytes(whole[:end])
        found = read_records(tmp_path / "cut", site, Pseudonyms(site.key()))
        assert found.items() <= expected.items()
        counts.add(len(found))
    assert counts == set(range(len(expected)))


def test_what_follows_a_cut_line_is_whole(site: Site, tmp_path: Path) -> None:
    pairs = pairs_of(site)
    append_records(tmp_path / "kept", site, Pseudonyms(site.key()), pairs[:3])
    whole = (tmp_path / "kept").read_bytes()
    (tmp_path / "kept").write_bytes(whole[:-40])
    append_records(tmp_path / "kept", site, Pseudonyms(site.key()), pairs[3:])
    found = read_records(tmp_path / "kept", site, Pseudonyms(site.key()))
    lost = [f.code for f, _ in pairs[:3] if not f.refused][-1]
    assert found == {code: value for code, value in known(pairs).items() if code != lost}


def test_of_two_records_of_one_file_the_later_counts(site: Site, tmp_path: Path) -> None:
    pairs = pairs_of(site)
    append_records(
        tmp_path / "kept", site, Pseudonyms(site.key()), [(replace(f, stamp="older"), record) for f, record in pairs]
    )
    append_records(tmp_path / "kept", site, Pseudonyms(site.key()), pairs)
    assert read_records(tmp_path / "kept", site, Pseudonyms(site.key())) == known(pairs)


def test_records_of_another_key_or_reader_are_not_taken(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path / "kept", site, Pseudonyms(site.key()), pairs_of(site))
    assert read_records(tmp_path / "kept", site, Pseudonyms(b"k" * 32)) == {}
    monkeypatch.setattr(records, "READER_VERSION", 1000)
    assert read_records(tmp_path / "kept", site, Pseudonyms(site.key())) == {}


def test_another_answer_to_lossy_images_drops_what_it_decides(site: Site, tmp_path: Path) -> None:
    pairs = pairs_of(site)
    write_records(tmp_path / "kept", site, Pseudonyms(site.key()), pairs)
    strict = read_records(tmp_path / "kept", replace(site, accept_lossy=False), Pseudonyms(site.key()))
    lossy = {f.code for f, record in pairs if any(image.lossy for image in record.images)}
    left_out = {f.code for f, record in pairs if record.fault}
    assert (len(lossy), len(left_out)) == (1, 2)
    assert strict.keys() == known(pairs).keys() - lossy - left_out


def test_neither_path_nor_identifier_is_kept(site: Site, tmp_path: Path) -> None:
    write_records(tmp_path / "kept", site, Pseudonyms(site.key()), pairs_of(site))
    text = (tmp_path / "kept").read_text()
    for planted in ("letter", "frames", "Doe", "4711", SERIES, "dicom"):
        assert planted not in text
