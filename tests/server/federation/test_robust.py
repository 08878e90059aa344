from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum
from flwr.supercore.task_identity import TaskIdentity

from server.federation.aggregate import WeightedSum, fold, mean
from server.federation.robust import combine, is_plain, update_norm
from shared.config import FederationSettings
from shared.wire.records import Tensors

RULES = ["mean", "median", "trimmed-mean", "krum"]
PLAIN = FederationSettings(quorum=5)


def settings(rule: str = "mean", **changes: object) -> FederationSettings:
    return replace(PLAIN, rule=rule, **changes)


def one(*values: float) -> Tensors:
    """A model of one tensor."""
    return {"encoder.a": np.array(values, np.float32)}


def sites(*updates: Tensors) -> dict[str, Tensors]:
    """a, b, c, ... -> update."""
    return {chr(ord("a") + number): update for number, update in enumerate(updates)}


def result(updates: dict[str, Tensors], start: Tensors, by: FederationSettings, **weights: float) -> np.ndarray:
    """What becomes of a model of one tensor; weights are 1 where nothing is said."""
    combined = combine(updates, dict.fromkeys(updates, 1.0) | weights, start, by)
    return combined.arrays["encoder.a"]


def random_round(count: int, seed: int = 0) -> tuple[Tensors, dict[str, Tensors], dict[str, float]]:
    """Where a round began, its updates and their weights: near to each other, as of one round."""
    rng = np.random.default_rng(seed)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("encoder.a", (3, 4)), ("cls.b", 5))}
    updates = {
        f"hospital-{number}": {
            name: value + rng.normal(0, 0.01, value.shape).astype(np.float32) for name, value in start.items()
        }
        for number in range(count)
    }
    return start, updates, {site: float(rng.uniform(0.5, 3)) for site in updates}


@pytest.mark.parametrize(
    ("by", "plain"),
    [
        (settings("mean"), True),
        (settings("mean", norm_bound=1.5), False),
        (settings("median"), False),
        (settings("krum", norm_bound=1.5), False),
    ],
)
def test_only_a_mean_without_a_bound_needs_one_update_at_a_time(by: FederationSettings, plain: bool) -> None:
    assert is_plain(by) == plain


def test_hand_computed_median_of_an_odd_and_an_even_number() -> None:
    start, three = one(1, 1), sites(one(2, 1), one(4, -1), one(9, 3))
    np.testing.assert_array_equal(result(three, start, settings("median")), [4, 1])
    four = sites(*three.values(), one(3, 100))  # 2 3 4 9 and -1 1 3 100
    np.testing.assert_array_equal(result(four, start, settings("median")), [3.5, 2])


def test_hand_computed_trimmed_mean() -> None:
    start, five = one(1), sites(one(9), one(2), one(3), one(8), one(4))
    assert result(five, start, settings("trimmed-mean", faulty=0)) == pytest.approx(26 / 5)
    assert result(five, start, settings("trimmed-mean", faulty=1)) == pytest.approx((3 + 4 + 8) / 3)
    assert result(five, start, settings("trimmed-mean", faulty=2)) == pytest.approx(4)


# 1 / 49 * 49 is less than 1 in floating point.
ENOUGH = [(n, f) for n in range(3, 13) for f in range(1, 6) if 2 * f + 1 <= n] + [(47, 6), (49, 1)]


@pytest.mark.parametrize(("count", "faulty"), ENOUGH)
def test_as_many_are_trimmed_as_may_be_faulty(count: int, faulty: int) -> None:
    values = [float(number**2) for number in range(count)]
    found = result(sites(*map(one, values)), one(0), settings("trimmed-mean", faulty=faulty))
    assert found == pytest.approx(np.mean(values[faulty:-faulty]), rel=1e-6)


def test_krum_picks_the_update_that_has_the_nearest_others() -> None:
    # Squares of distances to the 5 - 1 - 2 = 2 nearest: 0 has 1 + 1.21, 1 has 0.01 + 1, 1.1 has 0.01 + 1.21, 3 has
    # 3.61 + 4. Of 3 nearest it would be 1.1: 4.83, and 1 has 5.01; 100 would be a mean's.
    five = sites(one(0), one(1), one(1.1), one(3), one(100))
    assert result(five, one(0), settings("krum", faulty=1)) == pytest.approx(1)
    # Of 5 - 0 - 2 = 3 nearest it is 1.1.
    assert result(five, one(0), settings("krum", faulty=0)) == pytest.approx(1.1)


@pytest.mark.parametrize("rule", RULES)
def test_small_steps_of_a_large_model_are_not_rounding(rule: str) -> None:
    """At 1000, float32 has steps of 0.00006, and the square of a distance of 0.001 is nothing beside that of 1000."""
    near = [one(1000, 0), one(1000.001, 0), one(1000.0011, 0), one(1000.003, 0), one(1000.1, 0)]
    steps = [float(update["encoder.a"][0]) - 1000 for update in near]
    expected = {"mean": np.mean(steps), "median": steps[2], "trimmed-mean": np.mean(steps[1:4]), "krum": steps[1]}
    found = result(sites(*near), one(1000, 0), settings(rule)) - 1000
    assert found[0] == pytest.approx(expected[rule], abs=4e-5)


def test_weights_count_in_the_mean_alone() -> None:
    three = sites(one(2), one(4), one(9))
    assert result(three, one(1), settings("mean", norm_bound=1e9), c=2.0) == pytest.approx((2 + 4 + 18) / 4)
    assert result(three, one(1), settings("median"), c=1000.0) == 4
    assert result(three, one(1), settings("trimmed-mean"), c=1000.0) == 4
    five = sites(one(0), one(1), one(1.1), one(3), one(100))
    assert result(five, one(0), settings("krum"), e=1000.0) == pytest.approx(1)


def test_an_update_longer_than_the_bound_is_shortened_to_it() -> None:
    # Lengths 5, 5 and 500, their median 5: twice that is 10, which is 0.02 of 500.
    three = sites(one(4, 5), one(1, 6), one(1, 501))
    combined = combine(three, {"a": 1.0, "b": 1.0, "c": 2.0}, one(1, 1), settings("mean", norm_bound=2.0))
    assert combined.shrunk == pytest.approx({"c": 0.02})
    # (3 + 0 + 2 * 0) / 4 and (4 + 5 + 2 * 10) / 4, from 1.
    np.testing.assert_allclose(combined.arrays["encoder.a"], [1.75, 8.25], rtol=1e-6)


def test_the_bound_of_an_even_number_is_that_of_the_two_in_the_middle() -> None:
    # Lengths 5, 5, 15 and 500: 1.5 times their median of 10 is 15, which the third just reaches.
    four = sites(one(5), one(-5), one(15), one(500))
    combined = combine(four, dict.fromkeys(four, 1.0), one(0), settings("mean", norm_bound=1.5))
    assert combined.shrunk == pytest.approx({"d": 0.03})
    assert combined.arrays["encoder.a"] == pytest.approx((5 - 5 + 15 + 15) / 4)


def test_a_bound_and_a_rule_work_together() -> None:
    # Bound at 1.05 as 0.9 and 1 and 1.1 and 100 have it; the median is then of 0.9, 1, 1.05 and 1.05.
    four = sites(one(0.9), one(1), one(1.1), one(100))
    combined = combine(four, dict.fromkeys(four, 1.0), one(0), settings("median", norm_bound=1.0))
    assert set(combined.shrunk) == {"c", "d"}
    assert combined.arrays["encoder.a"] == pytest.approx((1 + 1.05) / 2)


def test_an_update_has_the_length_of_what_it_changes_without_running_statistics() -> None:
    start = {
        "encoder.a": np.array([[1.0, 2.0]], np.float32),
        "cls.norm.weight": np.array([1.0], np.float32),
        "cls.norm.running_mean": np.array([0.0], np.float32),
        "cls.norm.running_var": np.array([1.0], np.float32),
    }
    update = {
        "encoder.a": np.array([[3.0, 5.0]], np.float32),  # 2 and 3
        "cls.norm.weight": np.array([7.0], np.float32),  # 6
        "cls.norm.running_mean": np.array([1e6], np.float32),
        "cls.norm.running_var": np.array([1e9], np.float32),
    }
    assert update_norm(update, start) == 7.0  # 4 + 9 + 36 = 49
    assert update_norm(start, start) == 0.0


def test_running_statistics_shorten_no_update() -> None:
    start = {"cls.norm.weight": np.zeros(1, np.float32), "cls.norm.running_var": np.ones(1, np.float32)}
    updates = {
        site: {"cls.norm.weight": np.ones(1, np.float32), "cls.norm.running_var": np.array([variance], np.float32)}
        for site, variance in (("a", 1.0), ("b", 2.0), ("c", 900.0))
    }
    combined = combine(updates, dict.fromkeys(updates, 1.0), start, settings("mean", norm_bound=1.5))
    assert combined.shrunk == {}
    assert combined.arrays["cls.norm.running_var"] == pytest.approx(301)


def test_a_bound_that_no_update_reaches_is_the_plain_mean() -> None:
    start, updates, weights = random_round(6)
    total = WeightedSum({})
    for site in sorted(updates):
        total = fold(total, updates[site], weights[site])
    combined = combine(updates, weights, start, settings("mean", norm_bound=1e6))
    assert combined.shrunk == {}
    for name, value in mean(total).items():
        np.testing.assert_allclose(combined.arrays[name], value, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm_bound", [0.0, 1.0])
def test_the_result_does_not_depend_on_who_answered_first(rule: str, norm_bound: float) -> None:
    start, updates, weights = random_round(6)
    forth = combine(updates, weights, start, settings(rule, norm_bound=norm_bound))
    back = combine(dict(reversed(updates.items())), weights, start, settings(rule, norm_bound=norm_bound))
    assert forth.shrunk == back.shrunk
    for name in start:
        np.testing.assert_array_equal(forth.arrays[name], back.arrays[name])


@pytest.mark.parametrize(("rule", "expected"), [("mean", 0.0), ("krum", 1.0)])
def test_sites_are_taken_in_order_of_their_names_where_order_counts(rule: str, expected: float) -> None:
    """In sums of float64 (1 is nothing beside 1e20), and where two updates are each other's nearest."""
    values = {"mean": (1e20, 1, -1e20, 0), "krum": (1, 2, 50, 100)}[rule]
    forth = sites(*map(one, values))
    by = settings(rule, norm_bound=1e30)
    for updates in (forth, dict(reversed(forth.items())), {site: forth[site] for site in "acbd"}):
        assert result(updates, one(0), by) == expected


@pytest.mark.parametrize("rule", RULES)
def test_the_updates_and_where_the_round_began_stay_as_they_are(rule: str) -> None:
    start, updates, weights = random_round(5)
    before = {name: value.copy() for name, value in start.items()}
    copies = {site: {name: value.copy() for name, value in update.items()} for site, update in updates.items()}
    combined = combine(updates, weights, start, settings(rule, norm_bound=1.0))
    for name, value in combined.arrays.items():
        assert (value.dtype, value.shape) == (np.float32, start[name].shape)
        np.testing.assert_array_equal(start[name], before[name])
        for site, copy in copies.items():
            np.testing.assert_array_equal(updates[site][name], copy[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm_bound", [0.0, 1.5])
def test_hospitals_that_agree_are_taken_at_their_word(rule: str, norm_bound: float) -> None:
    start, updates, _ = random_round(1)
    same = sites(*[next(iter(updates.values()))] * 5)
    combined = combine(same, dict.fromkeys(same, 2.0), start, settings(rule, norm_bound=norm_bound))
    assert combined.shrunk == {}
    for name, value in same["a"].items():
        np.testing.assert_allclose(combined.arrays[name], value, rtol=2e-7, atol=2e-7)


def test_where_nobody_moved_nothing_moves() -> None:
    start, _, _ = random_round(0)
    same = sites(*[start] * 5)
    for rule in RULES:
        combined = combine(same, dict.fromkeys(same, 1.0), start, settings(rule, norm_bound=1.5))
        assert combined.shrunk == {}
        for name, value in start.items():
            np.testing.assert_array_equal(combined.arrays[name], value)


LONGEST = 3e38  # nearly as far as float32 goes


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("attack", [-1.0, 100.0, -100.0, LONGEST, -LONGEST])
@pytest.mark.parametrize(
    "by",
    [settings("median"), settings("trimmed-mean"), settings("krum"), settings("mean", norm_bound=1.5)],
    ids=lambda by: by.rule,
)
def test_one_hospital_of_four_does_not_move_the_result_far(by: FederationSettings, attack: float) -> None:
    """Three that step by 0.9, 1 and 1.1; with the fourth among them they would step by 1."""
    found = result(sites(one(10.9), one(11), one(11.1), one(10 + attack)), one(10), by)
    assert np.isfinite(found).all()
    # A bound shortens a step and does not turn it round: (3 - 1.5 * 1.05) / 4 at worst.
    least = 0.35 if by.rule == "mean" else 0.8999
    assert least <= float(found[0]) - 10 <= 1.15


@pytest.mark.parametrize(("attack", "step"), [(-1.0, 0.5), (100.0, 25.75)])
def test_the_plain_mean_is_moved_by_one_hospital_of_four(attack: float, step: float) -> None:
    """Else the test above says nothing."""
    four = sites(one(0.9), one(1), one(1.1), one(attack))
    assert result(four, one(0), settings("mean")) == pytest.approx(step)


@pytest.mark.parametrize(
    ("attack", "rule", "step"),
    [
        (-1.0, "median", (0.9 + 1) / 2),
        (100.0, "median", (1 + 1.1) / 2),
        (-1.0, "trimmed-mean", (0.9 + 1) / 2),
        (100.0, "trimmed-mean", (1 + 1.1) / 2),
    ],
)
def test_hand_computed_step_beside_a_flipped_or_hundredfold_update(attack: float, rule: str, step: float) -> None:
    four = sites(one(0.9), one(1), one(1.1), one(attack))
    assert result(four, one(0), settings(rule)) == pytest.approx(step)


FLOWERS = {
    "median": lambda sites: FedMedian(weighted_by_key="weight"),
    "trimmed-mean": lambda sites: FedTrimmedAvg(weighted_by_key="weight", beta=1 / sites + 1e-9),
    "krum": lambda sites: Krum(weighted_by_key="weight", num_malicious_nodes=1),
}


@pytest.mark.parametrize("count", [5, 6, 9])
@pytest.mark.parametrize("rule", FLOWERS)
def test_every_rule_is_flowers(rule: str, count: int) -> None:
    """Flower's strategies are given the differences, as records."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # a message cannot be made without
    for seed in range(5):
        start, updates, weights = random_round(count, seed)
        replies = []
        for site in sorted(updates):
            record = ArrayRecord({name: Array(updates[site][name] - start[name]) for name in sorted(start)})
            content = RecordDict({"arrays": record, "metrics": MetricRecord({"weight": 1.0})})
            replies.append(Message(content, dst_node_id=0, message_type="train"))
        theirs, _ = FLOWERS[rule](count).aggregate_train(1, replies)
        ours = combine(updates, weights, start, settings(rule)).arrays
        for name, array in theirs.items():
            np.testing.assert_allclose(ours[name], start[name] + array.numpy(), rtol=1e-6, atol=1e-9)
