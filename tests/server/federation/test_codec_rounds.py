"""Rounds whose tensors travel as coded differences: real server code, real client code, on a loopback grid."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message

from server.storage.checkpoint import load_checkpoint, read_tensors
from server.storage.run_folder import read_rounds
from shared.config import parse_config
from shared.refusals import TEXTS, Refusal
from shared.site import read_site
from shared.wire.codecs import BITS
from tests.conftest import SmallHospitals, small_config
from tests.support.loopback import LoopbackGrid, run_server
from tests.support.rounds import NAMES, run, stopped_in_round

VALUES = 576_878  # of the demo encoder


def orders(grid: LoopbackGrid, node: int) -> list[ConfigRecord]:
    trained = [m for m in grid.asked if m.metadata.message_type == "train" and m.metadata.dst_node_id == node]
    return [m.content.config_records["config"] for m in trained]


def encoders(folder: Path) -> dict[str, np.ndarray]:
    return load_checkpoint(folder / "checkpoint").arrays


@pytest.mark.parametrize(("codec", "most"), [("int2", 0.0645), ("int4", 0.1271), ("fp16", 0.501)])
def test_a_round_sends_a_share_of_the_bytes_and_ends_near_the_uncoded_one(
    copied_hospitals: SmallHospitals, tmp_path: Path, codec: str, most: float
) -> None:
    coded, grid = run(copied_hospitals, tmp_path, run__id="coded", federation__codec=codec)
    sent = [m.content["arrays"] for m in grid.asked if m.metadata.message_type == "train"]
    assert len(sent) == 4
    assert all(len(record["encoder"].data) <= most * 4 * VALUES for record in sent)
    lines = read_rounds(coded)
    assert all(line.bytes_up <= 2 * (most * 4 * VALUES + 20_000) for line in lines), "with tallies"
    assert all(line.bytes_down <= 2 * most * 4 * VALUES for line in lines)

    plain, _ = run(copied_hospitals, tmp_path, run__id="plain")
    assert load_checkpoint(plain / "checkpoint").held == {}, "without a codec nothing is kept beside the tensors"
    near = {"fp16": 0.01, "int4": 0.3, "int2": 0.6}[codec]
    one, other = encoders(tmp_path / "coded"), encoders(tmp_path / "plain")
    start, _ = read_tensors(plain / "checkpoint" / "initial.safetensors")
    moved = np.sqrt(sum(np.square(other[name] - start[name]).sum() for name in other))
    apart = np.sqrt(sum(np.square(other[name] - one[name]).sum() for name in other))
    assert apart < near * moved


def test_a_stopped_run_resumed_is_the_undisturbed_run(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    keys = {"federation__codec": "int2", "federation__rounds": 3}
    whole, _ = run(copied_hospitals, tmp_path / "a", run__id="whole", **keys)
    flat = small_config(run__folder=str(tmp_path / "b"), run__id="stopped", **keys)

    stopped_in_round(copied_hospitals, flat, 3)
    resumed, grid = run(copied_hospitals, tmp_path / "b", run__id="stopped", run__resume=True, **keys)
    assert all("held-round" in order for node in (1, 2) for order in orders(grid, node)), (
        "who holds it gets a difference"
    )
    expected, found = encoders(whole), encoders(resumed)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_who_missed_a_round_or_lost_its_state_gets_whole_tensors_and_goes_on(
    copied_hospitals: SmallHospitals, tmp_path: Path
) -> None:
    flat = small_config(
        run__folder=str(tmp_path), run__id="lost", federation__codec="int4", federation__rounds=5, federation__quorum=1
    )

    def lose(asked: Message, reply: Message) -> Message:
        """Node 2's answer to round 1 is lost, and after round 3 its disk is empty."""
        if asked.metadata.message_type != "train" or asked.metadata.dst_node_id != 2:
            return reply
        number = asked.content["config"]["server-round"]
        if number == 3:
            shutil.rmtree(read_site(copied_hospitals.files[NAMES[1]]).state / "runs")
        return Message(Error(1, "lost"), reply_to=asked) if number == 1 else reply

    grid = LoopbackGrid([copied_hospitals.files[n] for n in NAMES], flat, change=lose)
    run_server(grid, flat)
    assert ["held-round" in order for order in orders(grid, 1)] == [True] * 5
    assert ["held-round" in order for order in orders(grid, 2)] == [True, False, True, True, False]
    lines = {line.round: line for line in read_rounds(tmp_path / "lost")}
    assert [number for number, line in lines.items() if NAMES[1] in line.sites] == [2, 3, 5]
    assert lines[4].refused[NAMES[1]] == TEXTS[Refusal.NOT_HELD]


@pytest.mark.parametrize(
    "keys",
    [
        {"federation__norm_bound": 1.0},
        {"federation__strategy": "fedavgm"},
        {"federation__share": "all"},
    ],
)
def test_rules_strategies_and_shared_heads_go_with_a_codec(
    copied_hospitals: SmallHospitals, tmp_path: Path, keys: dict[str, str]
) -> None:
    folder, _ = run(copied_hospitals, tmp_path, run__id="coded", federation__codec="int2", **keys)
    lines = read_rounds(folder)
    assert [sorted(line.sites) for line in lines] == [NAMES, NAMES]
    assert not any(line.refused for line in lines)


@pytest.mark.parametrize("codec", BITS)
def test_every_codec_is_a_choice_of_the_run_config(codec: str) -> None:
    assert parse_config({"federation.codec": codec}).federation.codec == codec
