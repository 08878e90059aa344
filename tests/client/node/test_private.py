"""What the user who answers can have root do by way of the folder with the node's key: nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.node.answering import StoppedError, answering_user
from client.node.connection import Order
from client.node.daemon import Daemon
from client.node.enrol import read_authority, read_known_centre
from client.node.private import answering_owner, keep_from_others
from shared.site import read_site
from shared.wire.enrolment import EnrolError
from tests.client.node.test_daemon import unanswered
from tests.support.centres import enrol, make_centre

ANSWERS, THIRD = 65534, 1
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def site_yaml(tmp_path: Path) -> Path:
    """Of another user than root, with all that is beside it, as after that user's `init`."""
    file = enrol(make_centre(tmp_path / "centre"), tmp_path / "hospital", "hospital-01")
    for path in (file.parent, *file.parent.rglob("*")):
        os.chown(path, ANSWERS, ANSWERS)
    return file


@pytest.fixture
def folder(site_yaml: Path) -> Path:
    return read_known_centre(read_site(site_yaml)).folder


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "of root"
    path.write_text("ROOT ONLY")
    path.chmod(0o600)
    yield path
    assert path.read_text() == "ROOT ONLY"
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o600)


class Asked:
    """In place of the process that answers: keeps the task."""

    def ask(self, task: object, wanted: object) -> list[bytes]:
        self.place = json.loads(task.place)
        raise StoppedError

    def close(self) -> None:
        """As the process's."""


class Line:
    node_id = 5


def ask(daemon: Daemon) -> str:
    """The authority that a message's task brings to the process that answers."""
    daemon._answering = asked = Asked()
    daemon._answer(Line, Order(unanswered(), 17, b"", b"", b"", []))
    return asked.place["authority"]


def test_a_folder_that_is_exchanged_while_the_daemon_runs_changes_nothing(
    site_yaml: Path, folder: Path, secret: Path
) -> None:
    authority = read_authority(read_known_centre(read_site(site_yaml)))
    daemon = Daemon(read_site(site_yaml), site_yaml, print)
    folder.rename(folder.with_name("kept"))
    folder.mkdir()
    for name in ("authority.crt", "node.key", "unanswered", "lock", "centre.json"):
        (folder / name).symlink_to(secret)
    assert ask(daemon) == authority
    daemon._remember(unanswered())
    assert (folder.with_name("kept") / "unanswered").is_file()
    daemon.stop()
    daemon.run()


def test_only_the_certificate_of_the_authority_goes_to_who_answers(site_yaml: Path, folder: Path) -> None:
    path = folder / "authority.crt"
    path.write_text("more text\n" + path.read_text() + "and more\n")
    authority = ask(Daemon(read_site(site_yaml), site_yaml, print))
    assert "more" not in authority
    assert authority.count("BEGIN") == 1
    path.write_text("ROOT ONLY")
    with pytest.raises(EnrolError, match="no certificate") as caught:
        Daemon(read_site(site_yaml), site_yaml, print)
    assert "ROOT" not in str(caught.value)


def test_a_link_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    (victim / "f").touch()
    os.chown(victim / "f", THIRD, THIRD)
    shutil.rmtree(folder)
    folder.symlink_to(victim)
    with pytest.raises(EnrolError, match="no folder, or a link"):
        keep_from_others(folder, ANSWERS)
    assert (victim.stat().st_mode & 0o777, (victim / "f").stat().st_uid) == (0o755, THIRD)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_a_link_in_the_folder_is_refused(folder: Path, secret: Path, link: Callable) -> None:
    (folder / "node.key").unlink()
    link(folder / "node.key", secret)
    with pytest.raises(EnrolError, match=r"node\.key is a link or no plain file"):
        keep_from_others(folder, ANSWERS)


def test_a_folder_or_file_of_a_third_user_is_refused(folder: Path) -> None:
    os.chown(folder / "node.crt", THIRD, THIRD)
    with pytest.raises(EnrolError, match=r"node\.crt belongs to .*, expected root or"):
        keep_from_others(folder, ANSWERS)
    os.chown(folder, THIRD, THIRD)
    with pytest.raises(EnrolError, match=r"centre belongs to .*, expected root or"):
        keep_from_others(folder, ANSWERS)


def test_the_folder_is_taken_again_at_the_next_start(folder: Path) -> None:
    for _ in range(2):
        held = keep_from_others(folder, ANSWERS)
        assert (held / "node.key").read_bytes() == (folder / "node.key").read_bytes()
        assert {path.stat().st_uid for path in (folder, *folder.iterdir())} == {0}
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_site_file_of_root_in_a_folder_of_another_makes_nobody_root(site_yaml: Path, tmp_path: Path) -> None:
    """Its owner answers; whoever owns the folder could put a link to a file of root's there."""
    daemon = Daemon(read_site(site_yaml), site_yaml, print)
    theirs = {"user": ANSWERS, "group": ANSWERS, "extra_groups": []}
    assert daemon._answering._user == theirs
    (tmp_path / "roots.yaml").write_text(site_yaml.read_text())
    site_yaml.unlink()
    site_yaml.symlink_to(tmp_path / "roots.yaml")
    assert daemon._answering._user == theirs
    site_yaml.unlink()
    site_yaml.touch()
    with pytest.raises(EnrolError, match="belongs to root, and its folder to"):
        answering_user(site_yaml)
    os.chown(site_yaml.parent, 0, 0)
    assert answering_owner(site_yaml) == (0, 0)
