from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from server.centre.authority import Pair, issue_server, issue_signer, make_authority, read_certificate
from shared.wire.instructions import AHEAD_S, LONGEST_S, InstructionError, RepeatedError, Signer, open_instruction

SITE, CONFIG = "hospital-01", "c" * 64


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("authority")
    pair = Pair(folder / "authority.key", folder / "authority.crt")
    make_authority(pair, "test")
    return pair


@pytest.fixture(scope="module")
def trusted(authority: Pair) -> x509.Certificate:
    return read_certificate(authority.certificate)


def pair_beside(authority: Pair, name: str) -> Pair:
    return Pair(authority.key.with_name(f"{name}.key"), authority.key.with_name(f"{name}.crt"))


@pytest.fixture(scope="module")
def signer(authority: Pair) -> Signer:
    pair = pair_beside(authority, "instructions")
    issue_signer(authority, pair, "test")
    return Signer(*pair.load())


def instruction(run_id: int = 17, kind: str = "train", value: float = 1.0) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1
    content = RecordDict(
        {
            "arrays": ArrayRecord({"a": Array(np.full(3, value, np.float32))}),
            "config": ConfigRecord({"server-round": 1}),
        }
    )
    return Message(content, dst_node_id=5, message_type=kind)


def new(nonce: str, until: float) -> bool:
    return True


def opened(message: Message, trusted: x509.Certificate, site: str = SITE, now: float | None = None) -> Message:
    found, config = open_instruction(message, trusted, site, new, now)
    assert config == CONFIG
    return found


def test_what_the_centre_signed_is_opened_without_its_signature(signer: Signer, trusted: x509.Certificate) -> None:
    message = instruction()
    before = message.content.object_id
    signer.sign(message, SITE, CONFIG)
    assert message.content.keys() == {"arrays", "config", "signature"}
    assert opened(message, trusted).content.object_id == before


def test_an_empty_instruction_is_signed_too(signer: Signer, trusted: x509.Certificate) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 17, 1
    message = Message(RecordDict(), dst_node_id=5, message_type="query.hello")
    signer.sign(message, SITE, CONFIG)
    assert dict(opened(message, trusted).content) == {}


def set_metadata(message: Message, **values: object) -> None:
    message.metadata.__dict__.update({f"_{key}": value for key, value in values.items()})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.content.update({"config": ConfigRecord({"server-round": 2})}),
        lambda m: m.content.update({"more": MetricRecord({"a": 1})}),
        lambda m: m.content.pop("config"),
        lambda m: m.content.update({"other": m.content.pop("config")}),
        lambda m: m.content["arrays"].update({"a": Array(np.full(3, 2.0, np.float32))}),
        lambda m: m.content["signature"].update({"issued": time.time() - 1}),
        lambda m: m.content["signature"].update({"nonce": "0" * 32}),
        lambda m: m.content["signature"].update({"config": "0" * 64}),
        lambda m: m.content["signature"].update({"signature": m.content["signature"]["signature"][:-1] + b"\0"}),
        lambda m: set_metadata(m, run_id=18),
        lambda m: set_metadata(m, message_type="evaluate"),
    ],
)
def test_whatever_is_altered_the_instruction_is_refused(
    signer: Signer, trusted: x509.Certificate, change: object
) -> None:
    message = instruction()
    signer.sign(message, SITE, CONFIG)
    change(message)
    with pytest.raises(InstructionError, match="altered, or is for another site or run"):
        opened(message, trusted)


def test_an_instruction_for_one_site_is_none_for_another(signer: Signer, trusted: x509.Certificate) -> None:
    message = instruction()
    signer.sign(message, SITE, CONFIG)
    with pytest.raises(InstructionError, match="another site"):
        opened(message, trusted, site="hospital-02")


def test_an_instruction_that_nobody_signed_is_refused(trusted: x509.Certificate) -> None:
    with pytest.raises(InstructionError, match="without a signature"):
        opened(instruction(), trusted)


def test_only_a_key_that_the_authority_issued_for_instructions_signs(
    authority: Pair, trusted: x509.Certificate, tmp_path: Path
) -> None:
    server = pair_beside(authority, "server")
    issue_server(authority, server, ["localhost"])
    stranger = Pair(tmp_path / "authority.key", tmp_path / "authority.crt")
    make_authority(stranger, "test")
    strangers = pair_beside(stranger, "instructions")
    issue_signer(stranger, strangers, "test")
    expired = pair_beside(authority, "expired")
    issue_signer(authority, expired, "test", days=-1)
    for pair, told in (
        (server, "not for instructions"),
        (strangers, "did not issue"),
        (authority, "did not issue|not for instructions"),
        (expired, "has expired"),
    ):
        message = instruction()
        Signer(*pair.load()).sign(message, SITE, CONFIG)
        with pytest.raises(InstructionError, match=told):
            opened(message, trusted)


def test_an_instruction_counts_for_some_hours(signer: Signer, trusted: x509.Certificate) -> None:
    for offset, good in ((0.0, True), (LONGEST_S - 60, True), (LONGEST_S + 60, False), (-AHEAD_S - 60, False)):
        message = instruction()
        signer.sign(message, SITE, CONFIG)
        if good:
            opened(message, trusted, now=time.time() + offset)
        else:
            with pytest.raises(InstructionError, match="an instruction of"):
                opened(message, trusted, now=time.time() + offset)


def test_an_instruction_is_answered_once(signer: Signer, trusted: x509.Certificate) -> None:
    known: dict[str, float] = {}

    def first_time(nonce: str, until: float) -> bool:
        return known.setdefault(nonce, until) == until and len(known) == 1

    message = instruction()
    signer.sign(message, SITE, CONFIG)
    record = message.content["signature"]
    open_instruction(message, trusted, SITE, first_time)
    assert list(known.values()) == [record["issued"] + LONGEST_S]
    message.content["signature"] = record
    with pytest.raises(RepeatedError):
        open_instruction(message, trusted, SITE, lambda nonce, until: nonce not in known)


def test_a_refused_instruction_is_not_remembered(signer: Signer, trusted: x509.Certificate) -> None:
    """Else whoever alters a copy could make the hospital refuse the true one."""
    message = instruction()
    signer.sign(message, "hospital-02", CONFIG)
    with pytest.raises(InstructionError, match="another site"):
        open_instruction(message, trusted, SITE, lambda nonce, until: pytest.fail("remembered"))


VALUES = st.one_of(st.binary(max_size=40), st.text(max_size=40), st.integers(0, 9), st.floats(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(values=st.dictionaries(st.sampled_from(["signature", "certificate", "issued", "nonce", "config", "x"]), VALUES))
def test_whatever_stands_in_the_signature_it_is_refused_in_words(values: dict, trusted: x509.Certificate) -> None:
    message = instruction()
    message.content["signature"] = ConfigRecord(values)
    with pytest.raises(InstructionError):
        opened(message, trusted)


def test_certificates_say_what_they_are_for(signer: Signer) -> None:
    usage = signer.certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [use._name for use in usage] == ["codeSigning"]
    assert signer.certificate.not_valid_after_utc > datetime.now(UTC)
