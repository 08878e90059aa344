"""The hospital's daemon: checks that all is ready, then stays connected to the centre and answers what it asks.

One connection goes out, to the centre's one port; nothing listens. This process holds the node's private key and carries
bytes (client/node/connection.py); another, without the key, reads and answers them (client/node/program.py). When the connection breaks, the
centre starts again or the answering process dies, the daemon goes on by itself and says what happened.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flwr.proto.message_pb2 import Message as MessageProto
from google.protobuf.message import DecodeError

from client.boundary.audit import printable
from client.boundary.code import CodeError
from client.node.answering import AnswerError, Answering, StoppedError, watcher
from client.node.calls import CentreFaultError, ConnectionLostError, NodeError, RunOverError
from client.node.connection import Connection, Order, check_metadata, error_frames, message_text
from client.node.enrol import Centre, read_authority, read_known_centre
from client.node.private import answering_owner, keep_from_others
from client.node.task import Task, make_place
from shared.host.processes import HeldError, end_owned, hold
from shared.host.rights import user_name
from shared.host.systemd import unit_text
from shared.site import Site
from shared.wire.enrolment import EnrolError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 30.0  # a node that was killed is refused for up to a minute
BUSY_POLL_S, IDLE_POLL_S = 0.25, 3.0  # between two questions for a message, while a run goes on and otherwise
LONGEST_LINE = 1000  # characters of a line of the log
BUSY_S = 60.0  # after a message, the next is soon

# Of root's rights only: to become the owner of site.yaml, to read what is the owner's, to end what it started.
_HARDENING = """\
CapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_CHOWN CAP_FOWNER CAP_DAC_OVERRIDE CAP_KILL CAP_SYS_PTRACE
ProtectKernelModules=true
ProtectKernelTunables=true
ProtectControlGroups=true
RestrictSUIDSGID=true
"""


class Daemon:
    """Keeps one hospital connected until it is stopped."""

    def __init__(self, site: Site, site_yaml: Path, say: Callable[[str], None]):
        self._site, self._site_yaml = site, site_yaml.resolve()
        self._say = lambda line: say(printable(line[:LONGEST_LINE]))  # errors hold words of whatever answered
        self._mark = site.state / "centre"  # of the processes that this daemon starts
        self._answering = Answering(self._mark, self._site_yaml, self._say)
        self._centre = _private_centre(site, self._site_yaml)
        self._authority = read_authority(self._centre)
        self._stopping = threading.Event()
        self._unanswered = self._centre.folder / "unanswered"

    def stop(self, *_: object) -> None:
        """End the connection and the daemon; a signal handler too."""
        self._stopping.set()

    def run(self) -> None:
        """Take part until `stop`.

        Raises:
          EnrolError: another daemon of this site runs.
        """
        try:
            with hold(self._centre.folder / "lock"):
                end_owned(self._mark)  # what a daemon that was killed left running
                try:
                    self._take_part()
                finally:
                    self._answering.close()
        except HeldError as error:
            raise EnrolError(
                f"site {self._site.name!r} takes part already, from another process on this machine; a site is joined once: "
                "end the other, or look whether its service runs (systemctl status)"
            ) from error
        self._say("stopped")

    def _take_part(self) -> None:
        """Connect, again whenever the connection has ended."""
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            connected, reason = False, "the centre has forgotten this node"
            try:
                self._answering.warm_up()
                with Connection(self._centre, self._remember) as connection:
                    connected = True
                    self._say(f"connected to {self._centre.address} as node {connection.node_id}")
                    self._answer_messages(connection)
            except (NodeError, AnswerError, CodeError) as error:
                reason = str(error)
            except EnrolError:  # of our own key and certificates: another attempt finds the same
                raise
            except Exception as error:  # a fault of ours or a full disk must not end a hospital's part in every run
                reason = f"{type(error).__name__}: {error}"
            if self._stopping.is_set():
                break
            pause_s = FIRST_PAUSE_S if connected else min(2 * pause_s, LONGEST_PAUSE_S)
            self._say(f"not connected: {reason}; again in {pause_s:.0f} s")
            self._stopping.wait(pause_s)

    def _answer_messages(self, connection: Connection) -> None:
        """Ask for messages and answer them, one at a time, until `stop` or the centre forgets this node."""
        last = -BUSY_S
        while not connection.forgotten:
            self._give_up_unanswered(connection)
            busy = time.monotonic() - last < BUSY_S
            if self._stopping.wait(BUSY_POLL_S if busy else IDLE_POLL_S):
                return
            try:
                order = connection.pull()
                if order is not None:
                    self._answer(connection, order)
                    last = time.monotonic()
            except RunOverError as error:
                self._unanswered.unlink(missing_ok=True)
                self._say(f"a message of a run that has ended: {error}")
            except ConnectionLostError as error:
                self._say(f"{error}; asking again")  # the node's number holds as long as its heartbeats are taken

    def _answer(self, connection: Connection, order: Order) -> None:
        """Answer one message and send the reply."""
        self._say(f"received {message_text(order.message)}")
        place = make_place(self._site_yaml, connection.node_id, self._authority)
        task = Task(place, order.run, order.bundle, order.tree, tuple(order.objects))
        wanted = watcher(self._stopping.is_set, lambda: connection.is_running(order.run_id))
        try:
            frames = self._answering.ask(task, wanted)
        except StoppedError:  # the run ended, or this daemon does, and says so when it is back
            self._say("its answer is not wanted any more")
            return
        except AnswerError as error:
            self._say(str(error))
            frames = error_frames(order.message, connection.node_id)
        self._say(f"sending the reply to {message_text(order.message)}")
        self._push(connection, order.run_id, frames)
        self._unanswered.unlink(missing_ok=True)
        self._say(f"answered {message_text(order.message)}")

    def _push(self, connection: Connection, run_id: int, frames: list[bytes]) -> None:
        """Send a reply, again while the network is down: hours of training may be in it."""
        while True:
            try:
                return connection.push(run_id, frames)
            except ConnectionLostError as error:
                self._say(f"{error}; sending again")
                if connection.forgotten or self._stopping.wait(IDLE_POLL_S):
                    raise

    def _remember(self, message: MessageProto) -> None:
        """Note a message that the centre waits for, without its content."""
        self._unanswered.write_bytes(message.SerializeToString())

    def _give_up_unanswered(self, connection: Connection) -> None:
        """Tell the centre that a message gets no answer, whose process or line ended; it would wait until its deadline."""
        if not self._unanswered.is_file():
            return
        try:
            message = MessageProto.FromString(self._unanswered.read_bytes())
            check_metadata(message, connection.node_id)
        except (DecodeError, CentreFaultError):
            self._unanswered.unlink(missing_ok=True)
            return
        try:
            if message.metadata.dst_node_id == connection.node_id:  # else it is of a SuperLink that is gone
                connection.push(message.metadata.run_id, error_frames(message, connection.node_id))
                self._say(f"gave up {message_text(message)}, which was not answered")
        except ConnectionLostError as error:
            self._say(f"{error}; asking again")
            return
        except RunOverError as error:
            self._say(f"a message that was not answered is not waited for: {error}")
        self._unanswered.unlink(missing_ok=True)


def _private_centre(site: Site, site_yaml: Path) -> Centre:
    """Return what is known of the centre; as root, from a folder that the answering process cannot replace."""
    centre = read_known_centre(site)
    if os.geteuid() != 0:
        return centre
    return read_known_centre(site, keep_from_others(centre.folder, answering_owner(site_yaml)[0]))


def site_unit(site_yaml: Path, user: bool) -> str:
    """A systemd unit for the daemon.

    As a system service, root holds the connection with the node's key and answers are computed as the owner of site.yaml.
    """
    owner = user_name(site_yaml.stat().st_uid)
    return unit_text(
        f"hemafed: {site_yaml.parent.name} takes part in federated training",
        ["hemafed-client", "join", str(site_yaml)],
        user="",
        stop_s=60,
        target="default.target" if user else "multi-user.target",
        extra="UMask=0077\n"
        + ("" if user else f"# Messages are answered as {owner}, the owner of site.yaml.\n{_HARDENING}"),
    )


def install_unit(site: Site, site_yaml: Path) -> tuple[Path, list[str]]:
    """Write a systemd unit, of the system for root and of the user otherwise; its path and the commands that start it."""
    user = os.geteuid() != 0
    folder = Path.home() / ".config" / "systemd" / "user" if user else Path("/etc/systemd/system")
    path = folder / f"hemafed-{site.name}.service"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(site_unit(site_yaml.resolve(), user))
    who = "systemctl --user" if user else "systemctl"
    commands = [f"{who} daemon-reload", f"{who} enable --now {path.name}"]
    return path, commands + (["loginctl enable-linger  # so that it runs while nobody is logged in"] if user else [])


def join(site: Site, site_yaml: Path, say: Callable[[str], None]) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C."""
    daemon = Daemon(site, site_yaml, say)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, daemon.stop)
    daemon.run()
