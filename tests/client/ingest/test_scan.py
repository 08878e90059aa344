from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from PIL import Image

from client.dicom.pseudonyms import Pseudonyms
from client.ingest import scan as scan_module
from client.ingest.ingest import ingest
from client.ingest.scan import FileRecord, FoundFile, Scan, manifest_of, scan, walk
from client.ingest.workers import WorkerPool
from shared.site import Site, read_site
from tests.support.small_sites import SERIES, file_code, ingested, make_site, tiny_head, write_images


def scanned(site: Site, known: dict[str, tuple[str, FileRecord]] | None = None) -> Scan:
    with WorkerPool(1) as crew:
        return scan(site, Pseudonyms(site.key()), walk(site, Pseudonyms(site.key())), known or {}, crew)


def refused(site: Site) -> dict[str, str]:
    """What a walk does not open: path below the hospital's folder -> reason."""
    return {
        str(f.path.relative_to(site.images.parent)): f.refused for f in walk(site, Pseudonyms(site.key())) if f.refused
    }


def names(files: list[FoundFile], site: Site) -> list[str]:
    return [str(f.path.relative_to(site.images.parent)) for f in files]


# The walk


def test_a_walk_finds_every_file_once_in_order(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path, {name: {} for name in ("b/2", "b/1", "a/c/3", "a/9", "z")}))
    files = walk(site, Pseudonyms(site.key()))
    assert names(files, site) == ["dicom/z", "dicom/a/9", "dicom/a/c/3", "dicom/b/1", "dicom/b/2"]
    assert {f.place for f in files} == {"images"}
    assert [f.code for f in files] == [Pseudonyms(site.key()).of("file", f"images/{n[6:]}") for n in names(files, site)]
    assert len({f.code for f in files}) == 5
    assert all(len(f.code) == 16 for f in files), "a hospital has 100,000 files: 8 digits would collide"


@pytest.mark.parametrize("target", ["file", "folder", "file outside", "folder outside", "nothing", "itself"])
def test_symbolic_links_are_not_followed(tmp_path: Path, target: str) -> None:
    site = read_site(make_site(tmp_path / "hospital"))
    write_images(tmp_path / "elsewhere", {"image": {"sop": "1.2.3", "series": "1.2.4"}})
    places = {
        "file": site.images / "9",
        "folder": site.images,
        "file outside": tmp_path / "elsewhere" / "image",
        "folder outside": tmp_path / "elsewhere",
        "nothing": tmp_path / "nowhere",
        "itself": site.images / "link",
    }
    (site.images / "link").symlink_to(places[target])
    assert refused(site) == {"dicom/link": "a symbolic link, expected a file; it may lead out of the folder"}
    assert len(walk(site, Pseudonyms(site.key()))) == 4


def test_hidden_files_and_folders_are_told_and_not_opened(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path))
    write_images(site.images, {".hidden": {}, ".folder/image": {}})
    assert refused(site) == dict.fromkeys(["dicom/.folder", "dicom/.hidden"], "a hidden file or folder")
    assert len(walk(site, Pseudonyms(site.key()))) == 5


def test_special_files_are_told_and_block_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_site(tmp_path)
    site = read_site(file)
    os.mkfifo(site.images / "fifo")  # opening it would wait for a writer, for ever
    monkeypatch.chdir(site.images)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    assert refused(site) == dict.fromkeys(["dicom/fifo", "dicom/socket"], "neither a file nor a folder")
    assert ingested(file)[1].slices == 3


def test_names_in_any_encoding(tmp_path: Path) -> None:
    """Latin-1 umlauts are no UTF-8; exports of Windows machines have them."""
    file = make_site(tmp_path, {})
    site = read_site(file)
    write_images(tmp_path / "made", {str(n): {"position": (0, 0, 5 * n), "sop": f"1.2.{n}"} for n in (1, 2)})
    os.rename(os.fsencode(tmp_path / "made" / "1"), os.fsencode(site.images) + b"/M\xfcller")
    os.rename(os.fsencode(tmp_path / "made" / "2"), os.fsencode(site.images) + b"/M\xf6ller")
    (site.images / "Größe").write_text("a letter")
    assert len({f.code for f in walk(site, Pseudonyms(site.key()))}) == 3
    _, report = ingested(file)
    assert report.slices == 2
    assert [f.what for f in report.faults] == [file_code(site, "images/Größe")]


def test_a_site_is_walked_once_wherever_its_masks_are(tmp_path: Path) -> None:
    for number, (images, masks) in enumerate([("all", "all"), ("all", "all/masks"), ("all/dicom", "all")]):
        root = tmp_path / str(number)
        write_images(root / "all" / "dicom", {"1": {}})
        (root / "all" / "masks").mkdir()
        mask = Image.fromarray((tiny_head() > 0).astype("uint8"))
        mask.save(root / "all" / "masks" / "1.2.826.1.1.png")
        site = read_site(make_site(root, {}, data={"images": images, "masks": masks}))
        assert sorted(f.path.name for f in walk(site, Pseudonyms(site.key()))) == ["1", "1.2.826.1.1.png"]
        found = scanned(site)
        assert (len(found.images), len(found.masks), found.faults) == (1, 1, [])


def test_what_ingest_wrote_and_the_label_table_are_no_images(tmp_path: Path) -> None:
    """A hospital may keep everything in one folder."""
    write_images(tmp_path, {"IM1": {}, "sub/IM2": {"sop": "1.2.2", "position": (0, 0, 5)}})
    table = f"series_uid,sop_uid,hypodensity\n{SERIES},1.2.2,1\n"
    file = make_site(tmp_path, {}, labels=table, data={"images": "."})
    for _ in range(2):
        site = read_site(file)
        report = ingest(site, workers=1)
        assert [f.what for f in report.faults] == [file_code(site, "images/site.yaml")]
        assert report.slices == 2
    assert report.unchanged
    for leftover in ("cache.partial", "cache.old"):
        shutil.copytree(site.cache, tmp_path / leftover)
    assert ingest(site, workers=1).unchanged


def test_codes_do_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path / "one", {"a/1": {}, "2": {"sop": "1.2.2"}}))
    before = [f.code for f in walk(site, Pseudonyms(site.key()))]
    manifest = manifest_of(walk(site, Pseudonyms(site.key())))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = walk(other := read_site(tmp_path / "two" / "site.yaml"), Pseudonyms(other.key()))
    assert [f.code for f in moved] == before
    assert manifest_of(moved) == manifest


def test_a_manifest_depends_on_every_name_size_and_time(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path, {"1": {}, "2": {"sop": "1.2.2"}}))
    path = site.images / "1"
    seen = {manifest_of(walk(site, Pseudonyms(site.key())))}
    os.utime(path, ns=(1, 1))
    seen.add(manifest_of(walk(site, Pseudonyms(site.key()))))
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(1, 1))
    seen.add(manifest_of(walk(site, Pseudonyms(site.key()))))
    path.rename(site.images / "3")
    seen.add(manifest_of(walk(site, Pseudonyms(site.key()))))
    (site.images / "3").unlink()
    seen.add(manifest_of(walk(site, Pseudonyms(site.key()))))
    (site.images / "link").symlink_to("2")
    seen.add(manifest_of(walk(site, Pseudonyms(site.key()))))
    assert len(seen) == 6


# What files are


def test_files_that_vanish_after_the_walk_are_told(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path, {"a": {}, "folder/b": {"sop": "1.2.2"}, "folder/c": {"sop": "1.2.3"}}))
    files = walk(site, Pseudonyms(site.key()))
    shutil.rmtree(site.images / "folder")
    with WorkerPool(1) as crew:
        found = scan(site, Pseudonyms(site.key()), files, {}, crew)
    assert len(found.images) == 1
    assert [(f.what, f.reason) for f in found.faults] == [
        (file_code(site, f"images/folder/{name}"), "cannot be opened (No such file or directory)") for name in "bc"
    ]


def test_one_file_twice_counts_once(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path))
    for name in ("again", "folder/once more"):
        (site.images / name).parent.mkdir(exist_ok=True)
        shutil.copy(site.images / "8", site.images / name)
    found = scanned(site)
    assert len(found.images) == 3
    first = file_code(site, "images/8")
    assert {(f.what, f.reason) for f in found.faults} == {
        (file_code(site, f"images/{name}"), f"the same image as {first}, byte for byte; counted once")
        for name in ("again", "folder/once more")
    }


def test_one_uid_on_different_images_leaves_out_all_of_them(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path))
    shutil.copy(site.images / "8", site.images / "again")
    write_images(site.images, {"other": {"hu_YX": tiny_head(60), "sop": f"{SERIES}.1"}})
    found = scanned(site)
    assert [image.position_mm[2] for image in found.images] == [15, 10]
    assert {f.what for f in found.faults} == {file_code(site, f"images/{name}") for name in ("8", "again", "other")}
    assert all("one SOPInstanceUID on 3 files that differ" in f.reason for f in found.faults)


def test_a_mask_among_the_images_says_what_to_set(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path))
    Image.fromarray((tiny_head() > 0).astype("uint8")).save(site.images / f"{SERIES}.1.png")
    found = scanned(site)
    assert (len(found.images), found.masks) == (3, [])
    (fault,) = found.faults
    assert fault.reason.startswith(
        "a PNG or NIfTI among the images: of a mask, name the folder as data.masks in site.yaml"
    )


def test_an_image_among_the_masks_is_told(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path, data={"masks": "masks"}))
    write_images(site.masks, {"image": {"sop": "1.2.9"}})
    found = scanned(site)
    assert len(found.images) == 3
    (fault,) = found.faults
    assert fault.what == file_code(site, "masks/image")
    assert "CT Image Storage, expected Segmentation or RT Structure Set Storage, NIfTI or PNG" in fault.reason


def test_known_records_are_not_read_again(tmp_path: Path) -> None:
    site = read_site(make_site(tmp_path))
    first = scanned(site)
    known = {f.code: (f.stamp, record) for f, record in first.files}
    for path in site.images.iterdir():  # same size and time, other content: only a reader would notice
        stat = path.stat()
        path.write_bytes(b"\0" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert scanned(site, known) == first
    os.utime(site.images / "8")
    assert len(scanned(site, known).images) == 2


def test_records_are_handed_over_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_CHUNK", 2)
    site = read_site(make_site(tmp_path, {str(n): {"sop": f"1.2.{n}", "position": (0, 0, n)} for n in range(5)}))
    kept: list[list[str]] = []
    counted: list[tuple[int, int]] = []
    with WorkerPool(1) as crew:
        scan(
            site,
            Pseudonyms(site.key()),
            walk(site, Pseudonyms(site.key())),
            {},
            crew,
            lambda done, total: counted.append((done, total)),
            lambda pairs: kept.append([f.path.name for f, _ in pairs]),
        )
    assert kept == [["0", "1"], ["2", "3"], ["4"]]
    assert counted == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("mischief", ["dies", "spins", "raises"])
def test_a_header_that_ends_its_reader_is_the_only_one_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mischief: str
) -> None:
    def spoiled(path: Path) -> object:
        if path.name == "7":
            if mischief == "raises":
                raise RecursionError
            if mischief == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                pass
        return read_dicom(path)

    read_dicom = scan_module.read_dicom
    monkeypatch.setattr(scan_module, "read_dicom", spoiled)
    monkeypatch.setattr("client.ingest.workers.PATIENCE_S", 0.1)
    images = {str(n): {"sop": f"1.2.{n}", "position": (0, 0, n)} for n in range(9)}
    site = read_site(make_site(tmp_path, images))
    found = scanned(site)
    assert len(found.images) == 8
    (fault,) = found.faults
    assert fault.what == file_code(site, "images/7")
    expected = (
        "damaged: its content cannot be read; export the file again"
        if mischief == "raises"
        else "ended its reader: damaged; export it again"
    )
    assert fault.reason == expected
