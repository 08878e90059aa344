from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from client.training.round import build_learner, training_inputs
from client.training.round import train_round as train_locally
from server.federation.robust import LONGEST, longest_update
from server.federation.roster import QuorumError, RunContext, wait_for_quorum
from server.federation.strategy import repeat_round, run_round
from server.storage.checkpoint import Moments
from shared.config import parse_config
from shared.model.scoring import build_model
from shared.refusals import TEXTS, Refusal
from shared.wire.records import to_arrays, to_record
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.loopback import Change, LoopbackGrid
from tests.support.rounds import NAMES, beginning, first_round, update_of


def spoil(node: int, what) -> Change:
    """Replace the training reply of one node."""

    def change(asked: Message, reply: Message) -> Message | None:
        if asked.metadata.message_type == "train" and asked.metadata.dst_node_id == node:
            return what(reply)
        return reply

    return change


def with_tensor(name: str, make) -> Change:
    """Node 2's update with one tensor changed."""

    def what(reply: Message) -> Message:
        tensors = update_of(reply)
        chosen = next(n for n in tensors if n.endswith(name))
        reply.content["update"] = to_record(tensors | {chosen: make(tensors[chosen])})
        return reply

    return spoil(2, what)


def with_group(make) -> Change:
    """Node 2's update with all of its encoder's values changed."""

    def what(reply: Message) -> Message:
        reply.content["update"]["encoder"] = Array(make(reply.content["update"]["encoder"].numpy()))
        return reply

    return spoil(2, what)


def test_one_hospital_federated_is_the_same_training_without_flower(two: SmallHospitals) -> None:
    flat = small_config(federation__quorum=1)
    config = parse_config(flat)
    _, _, _, result = first_round(two, ["hospital-01"], flat)

    learner = build_learner(config, torch.device("cpu"))
    inputs = training_inputs(two.cache("hospital-01"), config, "hospital-01")
    train_locally(learner, inputs, config, site="hospital-01", round_number=1)
    expected = to_arrays(learner.model.state_dict(), ("encoder",))
    assert result.arrays.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(result.arrays[name], value, err_msg=name)


def test_two_identical_hospitals_are_one(two: SmallHospitals, tmp_path) -> None:
    flat = small_config(federation__quorum=1)
    _, _, _, alone = first_round(two, ["hospital-01"], flat)
    # A twin with the same slices, told apart by its name alone; the name seeds the order of slices, so it is given the
    # same training by sending the same update twice.
    twin = {}

    def same_update(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train":
            if asked.metadata.dst_node_id == 1:
                twin["update"] = reply.content["update"]
            else:
                reply.content["update"] = twin["update"]
        return reply

    shutil.rmtree(two.site("hospital-01").state / "runs")
    _, _, _, both = first_round(two, NAMES, flat, change=same_update)
    for name, value in alone.arrays.items():
        np.testing.assert_array_equal(both.arrays[name], value, err_msg=name)


def test_the_sum_does_not_depend_on_the_order_of_arrival(two: SmallHospitals) -> None:
    flat = small_config()
    results = []
    for late in ({1: 5}, {2: 5}, {}):
        for name in NAMES:
            shutil.rmtree(two.site(name).state / "runs", ignore_errors=True)
        results.append(first_round(two, NAMES, flat, late=late)[3])
    for name, value in results[0].arrays.items():
        for other in results[1:]:
            assert value.tobytes() == other.arrays[name].tobytes(), name


def kept(sent: dict[int, dict[str, np.ndarray]]) -> Change:
    """Keep what each node sends in a round, float64."""

    def keep(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train":
            sent[asked.metadata.dst_node_id] = {n: v.astype(np.float64) for n, v in update_of(reply).items()}
        return reply

    return keep


def test_a_weight_that_a_hospital_asks_for_changes_nothing(two: SmallHospitals) -> None:
    """Before: 1e6 in its answer to 'hello' made its encoder the global one."""
    sent: dict = {}

    def greedy(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "query.hello" and asked.metadata.dst_node_id == 2:
            reply.content["facts"]["weight"] = 1e6
        return kept(sent)(asked, reply)

    _, members, _, result = first_round(two, NAMES, small_config(), change=greedy)
    assert [member.weight for member in members] == [1.0, 1.0]
    for name, value in result.arrays.items():
        np.testing.assert_array_equal(value, ((sent[1][name] + sent[2][name]) / 2).astype(np.float32))


def test_by_patients_a_hospital_counts_three_times_the_median_at_most(two: SmallHospitals) -> None:
    sent: dict = {}

    def boasting(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "query.hello":
            patients = 10_000_000 if asked.metadata.dst_node_id == 2 else 10
            reply.content["metrics"] = MetricRecord({"patients": patients, "slices": 3 * patients})
        return kept(sent)(asked, reply)

    flat = small_config(federation__weights="patients")
    _, members, _, result = first_round(two, NAMES, flat, change=boasting)
    weights = {member.node_id: member.weight for member in members}
    assert weights == {1: 1 / 3, 2: pytest.approx(2.0, rel=1e-3)}
    for name, value in result.arrays.items():
        mean = sum(weights[n] * sent[n][name] for n in (1, 2)) / sum(weights.values())
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-8)


BAD_UPDATES = {
    "not finite": with_tensor("patch_embed.proj.weight", lambda v: v * np.float32("nan")),
    "infinite": with_tensor("patch_embed.proj.bias", lambda v: v + np.float32("inf")),
    "enormous": with_tensor("patch_embed.proj.bias", lambda v: v + np.float32(3e38)),
    "another shape": with_tensor("patch_embed.proj.bias", lambda v: v[:1]),
    "another dtype": with_group(lambda v: v.astype(np.float64)),
    "a group too few": spoil(2, lambda r: (r.content["update"].clear(), r)[1]),
    "a group too many": spoil(2, lambda r: (r.content["update"].update({"cls": Array(np.zeros(1, np.float32))}), r)[1]),
    "no update": spoil(2, lambda r: (r.content.pop("update"), r)[1]),
    "another name": spoil(2, lambda r: (r.content.__setitem__("facts", ConfigRecord({"site": "hospital-07"})), r)[1]),
    "losses over no slice": spoil(2, lambda r: (r.content["metrics"].__setitem__("slices", 5e-324), r)[1]),
    "a number of no kind": spoil(2, lambda r: (r.content["metrics"].__setitem__("secret", 1.0), r)[1]),
    "more patients than it has": spoil(2, lambda r: (r.content["metrics"].__setitem__("patients", 11), r)[1]),
    "a count of half a slice": spoil(2, lambda r: (r.content["metrics"].__setitem__("slices", 20.5), r)[1]),
    "a long error": spoil(2, lambda r: Message(Error(1002, "\x1b[2Jx\n" * 100_000), reply_to=r)),
    "an error": spoil(2, lambda r: Message(Error(1002, "OSError while answering 'train'"), reply_to=r)),
    "no reply": spoil(2, lambda r: None),
}


@pytest.mark.parametrize("fault", BAD_UPDATES)
def test_a_bad_reply_is_refused_by_name_and_the_round_goes_on(two: SmallHospitals, fault: str) -> None:
    flat = small_config(federation__quorum=1, federation__round_deadline_s=3.0)
    good = {}

    def change(asked: Message, reply: Message) -> Message | None:
        changed = BAD_UPDATES[fault](asked, reply)
        if asked.metadata.message_type == "train" and asked.metadata.dst_node_id == 1:
            good.update(update_of(reply))
        return changed

    _, _, _, result = first_round(two, NAMES, flat, change=change)
    assert list(result.refused) == ["hospital-02"]
    assert 0 < len(result.refused["hospital-02"]) < 1000
    assert result.refused["hospital-02"].isprintable()
    assert list(result.sites) == ["hospital-01"]
    for name, value in good.items():
        np.testing.assert_array_equal(result.arrays[name], value)


def test_a_round_below_quorum_stops_the_run(two: SmallHospitals) -> None:
    with pytest.raises(QuorumError, match=r"1 good updates, federation.quorum is 2[\s\S]*'hospital-02'.*not finite"):
        first_round(two, NAMES, small_config(), change=BAD_UPDATES["not finite"])


def test_a_round_below_quorum_is_asked_for_again_and_none_of_it_is_used(
    two: SmallHospitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.federation.strategy.FIRST_PAUSE_S", 0.1)
    faults = [BAD_UPDATES["not finite"], BAD_UPDATES["an error"]]

    def change(asked: Message, reply: Message) -> Message | None:
        train_of_2 = asked.metadata.message_type == "train" and asked.metadata.dst_node_id == 2
        return faults.pop()(asked, reply) if train_of_2 and faults else reply

    flat = small_config()
    undisturbed = first_round(two, NAMES, flat)[3]
    grid = LoopbackGrid([two.files[name] for name in NAMES], flat, change=change)
    session, moments, arrays = beginning(grid, flat, two)
    result = repeat_round(replace(session, settings=replace(session.settings, wait_s=30.0)), moments, arrays, 1)
    assert len([m for m in grid.asked if m.metadata.message_type == "train"]) == 6
    for name, value in undisturbed.arrays.items():
        np.testing.assert_array_equal(result.arrays[name], value, err_msg=name)


def test_fedadam_moves_towards_the_mean_in_float32(two: SmallHospitals) -> None:
    flat = small_config(federation__strategy="fedadam", federation__server_learning_rate=0.01)
    sent = {}

    def keep(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train":
            sent[asked.metadata.dst_node_id] = update_of(reply)
        return reply

    _, _, before, result = first_round(two, NAMES, flat, change=keep)
    name = "encoder.layers.0.blocks.0.mlp.fc1.weight"
    wanted = (sent[1][name] + sent[2][name]) / 2 - before[name]
    moved = result.arrays[name] - before[name]
    assert result.arrays[name].dtype == np.float32
    assert (np.sign(moved) == np.sign(wanted))[np.abs(wanted) > 1e-6].all()


def test_fedprox_tells_the_hospitals_its_mu(two: SmallHospitals) -> None:
    flat = small_config(federation__strategy="fedprox", federation__proximal_mu=0.5)
    grid, _, _, _ = first_round(two, NAMES, flat)
    trained = [m for m in grid.asked if m.metadata.message_type == "train"]
    assert {m.content["config"]["proximal-mu"] for m in trained} == {0.5}


def test_only_encoder_tensors_are_sent(two: SmallHospitals) -> None:
    seen: list[str] = []

    def keep(asked: Message, reply: Message) -> Message:
        seen.extend(asked.content.array_records.get("arrays", ()))
        seen.extend(reply.content.array_records.get("update", ()))
        return reply

    first_round(two, NAMES, small_config(), change=keep)
    assert seen == ["encoder"] * 4


def test_sharing_all_is_refused_by_a_hospital_that_releases_the_encoder_only(two: SmallHospitals) -> None:
    edit_site(two.files["hospital-02"], policy={"release": ["encoder"], "min_patients": 1})
    flat = small_config(federation__share="all", federation__quorum=1)
    config = parse_config(flat)
    grid = LoopbackGrid([two.files[n] for n in NAMES], flat)
    arrays = to_arrays(build_model(config.model, 0).state_dict(), ("encoder", "cls", "seg", "rec"))
    session = RunContext(grid, config.federation, two.root, longest_update(arrays))
    result = run_round(session, Moments(), wait_for_quorum(session), arrays, 1)
    assert result.refused["hospital-02"] == TEXTS[Refusal.GROUP]
    assert "policy.release" in result.refused["hospital-02"]
    assert torch.is_tensor(torch.from_numpy(result.arrays["cls.weight"]))


SIZE = 576_878  # values of the demo encoder


@pytest.mark.parametrize(
    ("strategy", "share"),
    [("fedavg", None), ("fedprox", None), ("fedavgm", None), ("fedadam", None), ("fedavgm", 0.9)],
)
def test_one_hospital_of_three_does_not_end_a_run(two: SmallHospitals, strategy: str, share: float | None) -> None:
    """Before: with momentum the global tensors were beyond 1e8 in the third round, and the run ended for all."""
    edit_site(two.files["hospital-05"], role="train")
    flat = small_config(
        federation__strategy=strategy,
        federation__server_learning_rate=0.1 if strategy == "fedadam" else 2.0,
        federation__rounds=4,
    )
    longest = []

    def pull(asked: Message, reply: Message) -> Message:
        """Values at the limit, or a step of almost the longest length, in the same direction each round."""
        if asked.metadata.message_type == "train" and asked.metadata.dst_node_id == 3:
            received = asked.content["arrays"]["encoder"].numpy()
            sent = received + np.float32(share * longest[0] / SIZE**0.5) if share else np.full(SIZE, 9.9e7, np.float32)
            update = ArrayRecord({"encoder": Array(sent)})
            content = RecordDict({"update": update, "facts": ConfigRecord({"site": "hospital-05"})})
            return Message(content, reply_to=asked)
        return reply

    grid = LoopbackGrid([two.files[n] for n in (*NAMES, "hospital-05")], flat, change=pull)
    session, moments, arrays = beginning(grid, flat, two)
    longest.append(session.longest)
    for number in range(1, 5):
        result = run_round(session, moments, wait_for_quorum(session), arrays, number)
        arrays, moments = result.arrays, result.moments
        assert result.sites.keys() >= set(NAMES)
        assert list(result.refused) == ([] if share else ["hospital-05"])
        assert share or "an update of length" in result.refused["hospital-05"]


def test_the_longest_update_is_of_the_runs_beginning() -> None:
    start = {"encoder.x": np.array([3, 4], np.float32), "cls.norm.running_var": np.array([1e6], np.float32)}
    assert longest_update(start) == 5 * LONGEST


def test_who_was_turned_away_at_hello_stands_among_the_refused(two: SmallHospitals) -> None:
    """Before: in the log of the run alone, and `status` did not show it."""

    def change(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "query.hello" and asked.metadata.dst_node_id == 3:
            reply.content["facts"]["protocol"] = 99
        return reply

    _, _, _, result = first_round(two, [*NAMES, "hospital-05"], small_config(), change=change)
    assert list(result.sites) == NAMES
    assert "protocol 99, expected" in result.refused["node 3"]


def test_a_tally_of_who_withheld_its_counts_is_not_used(two: SmallHospitals) -> None:
    def change(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "query.hello" and asked.metadata.dst_node_id == 2:
            del reply.content["metrics"]
        return reply

    result = first_round(two, NAMES, small_config(), change=change)[3]
    assert result.sites["hospital-01"].tally is not None
    assert result.sites["hospital-02"].tally is None
