from __future__ import annotations

import re
from contextlib import suppress
from datetime import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shared.rules import ACCEPT, Bound, Policy
from shared.site import SiteError, read_site


def content(**changes: object) -> dict[str, object]:
    return {"site": "hospital-03", "data": {"images": "dicom/", "masks": "masks", "labels": "labels.csv"}} | changes


def write_site(folder: Path, text: object = None) -> Path:
    """A hospital's folder with empty data folders; text is a mapping or raw YAML."""
    for name in ("dicom", "masks"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "labels.csv").write_text("series_uid,hypodensity\n")
    path = folder / "site.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(content() if text is None else text))
    return path


def test_the_designs_example(tmp_path: Path) -> None:
    site = read_site(
        write_site(
            tmp_path,
            """
            site: hospital-03
            data:
              images: dicom/
              masks: masks/
              labels: labels.csv
            cache: cache/
            role: held-out
            policy:
              release: [encoder, cls]
              metrics: false
              min_patients: 5
            """,
        )
    )
    assert (site.name, site.role) == ("hospital-03", "held-out")
    assert site.images == (tmp_path / "dicom").resolve()
    assert site.masks == (tmp_path / "masks").resolve()
    assert site.labels == (tmp_path / "labels.csv").resolve()
    assert site.policy == Policy(("encoder", "cls"), metrics=False, min_patients=5)


def test_what_need_not_be_said(tmp_path: Path) -> None:
    site = read_site(write_site(tmp_path, content(data={"images": "dicom"})))
    assert (site.role, site.masks, site.labels) == ("train", None, None)
    assert site.cache == (tmp_path / "cache").resolve()
    assert site.state == (tmp_path / "state").resolve()
    # The careful choice is the one that nobody made: encoder only, ten patients.
    assert site.policy == Policy(("encoder",), metrics=True, min_patients=10)


def test_what_a_hospital_lets_run(tmp_path: Path) -> None:
    accept = {
        "train.epochs": {"min": 1, "max": 3},
        "train.learning_rate": {"max": 0.01},
        "model.variant": ["default", "tiny"],
    }
    rules = {"accept": accept, "hours": "19:00-06:30"}
    policy = read_site(write_site(tmp_path, content(policy=rules))).policy
    assert policy.hours == (time(19), time(6, 30))
    assert dict(policy.accept) == dict(ACCEPT) | {
        "train.epochs": Bound(1, 3),
        "train.learning_rate": Bound(high=0.01),
        "model.variant": Bound(choices=("default", "tiny")),
    }
    assert Bound(1, 3).text() == "at least 1 and at most 3"


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hospital"
    folder.mkdir()
    path = write_site(folder, content(cache="../fast/cache", state=str(tmp_path / "state")))
    monkeypatch.chdir(folder.parent)
    site = read_site(Path("hospital") / path.name)
    assert site.images == (folder / "dicom").resolve()
    assert site.cache == (tmp_path / "fast" / "cache").resolve()
    assert site.state == (tmp_path / "state").resolve()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"no site file .*nowhere\.yaml.*client/README\.md"):
        read_site(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("site: [unclosed", "is not YAML"),
        ("just a sentence", "the file is a str, expected a mapping"),
        ("", "the file is a NoneType, expected a mapping"),
        (content(sites=3), "unknown key 'sites'; did you mean 'site'"),
        (content(polcy={}), "unknown key 'polcy'; did you mean 'policy'"),
        (
            content(data={"images": "dicom", "label": "labels.csv"}),
            "unknown key 'data.label'; did you mean 'data.labels'",
        ),
        (content(policy={"min_patient": 3}), "unknown key 'policy.min_patient'; did you mean 'policy.min_patients'"),
        ({"data": {"images": "dicom"}}, "'site' is missing; expected keys: cache, data, policy"),
        ({"site": "a"}, "'data' is missing"),
        (
            content(data={"masks": "masks"}),
            "'data.images' is missing; expected keys: accept_lossy, images, labels, masks, segment",
        ),
        (content(data="dicom"), "data is a str, expected a mapping"),
        (content(role="test"), "role is 'test', expected one of train, held-out, development"),
        (content(role=1), r"'role' is 1 \(int\), expected str"),
        (
            content(data={"images": "dcm"}),
            "data.images is .*dcm, and there is no such folder; correct the path or mount",
        ),
        (content(data={"images": "labels.csv"}), "data.images is .*labels.csv, and there is no such folder"),
        (content(data={"images": "dicom", "masks": "seg"}), "data.masks is .*seg, and there is no such folder"),
        (content(data={"images": "dicom", "labels": "l.csv"}), "data.labels is .*l.csv, and there is no such file"),
        (content(data={"images": "dicom", "labels": "masks"}), "data.labels is .*masks, and there is no such file"),
        (content(data={"images": 7}), r"'data.images' is 7 \(int\), expected str"),
        (content(cache=3), r"'cache' is 3 \(int\), expected str"),
        (content(weight=1.0), "'weight' is no key any more; remove its line: the centre gives the weights"),
        (content(policy={"round_counts_per_month": -1}), "policy.round_counts_per_month is -1, expected 0 to 10000"),
        (content(policy={"round_counts_per_month": "x"}), "'policy.round_counts_per_month' is 'x'"),
        (
            content(policy={"release": ["encoder", "head"]}),
            r"policy.release names \['head'\], expected some of encoder, cls",
        ),
        (content(policy={"release": "encoder"}), r"'policy.release' is 'encoder' \(str\), expected list"),
        (content(policy={"release": None}), "'policy.release' is None"),
        (content(policy={"metrics": 1}), r"'policy.metrics' is 1 \(int\), expected bool"),
        (content(policy={"metrics": "false"}), r"'policy.metrics' is 'false' \(str\), expected bool"),
        (content(policy={"min_patients": 0}), "policy.min_patients is 0, expected at least 1"),
        (content(policy={"min_patients": True}), r"'policy.min_patients' is True \(bool\), expected int"),
        (content(policy={"min_patients": 2.5}), r"'policy.min_patients' is 2.5 \(float\), expected int"),
        (content(policy={"accept": {"train.epoch": {"max": 1}}}), "did you mean 'policy.accept.train.epochs'"),
        (content(policy={"accept": {"train.epochs": {"maximum": 1}}}), "did you mean 'policy.accept.train.epochs.max'"),
        (
            content(policy={"accept": {"train.epochs": {"max": "5"}}}),
            r"'policy.accept.train.epochs.max' is '5' \(str\)",
        ),
        (content(policy={"accept": {"train.epochs": {}}}), r"policy.accept.train.epochs is \{\}, expected values"),
        (content(policy={"accept": {"train.epochs": []}}), r"policy.accept.train.epochs is \[\], expected values"),
        (
            content(policy={"accept": {"model.variant": {"max": 1}}}),
            r"'policy.accept.model.variant' is .*expected list",
        ),
        (
            content(policy={"accept": {"model.variant": [1]}}),
            r"'policy.accept.model.variant' is 1 \(int\), expected str",
        ),
        (content(policy={"hours": "night"}), "policy.hours is 'night', expected such as '19:00-06:30'"),
        (content(policy={"hours": "19:00-25:00"}), "policy.hours is '19:00-25:00'"),
        (content(policy="strict"), "policy is a str, expected a mapping"),
        (content(policy=[]), "policy is a list, expected a mapping"),
        (content(policy=False), "policy is a bool, expected a mapping"),
        (content(site=3), r"'site' is 3 \(int\), expected str"),
        (content(site="../escape"), "site is '../escape', expected up to 64 letters"),
        (content(site="two words"), "site is 'two words'"),
        (content(site=""), "site is ''"),
        (content(site="a" * 65), "site is 'a{65}'"),
        (content(site="-dash"), "site is '-dash'"),
    ],
)
def test_a_wrong_site_file_says_what_and_where(tmp_path: Path, text: object, message: str) -> None:
    path = write_site(tmp_path, text)
    with pytest.raises(SiteError, match=message) as caught:
        read_site(path)
    assert str(path.resolve()) in str(caught.value)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = write_site(tmp_path)
    path.write_bytes("# Universitätsklinikum\n".encode("latin-1") + path.read_bytes())
    with pytest.raises(SiteError, match=re.escape(str(path.resolve()))):
        read_site(path)


@pytest.mark.parametrize("cache", ["", ".", "..", "dicom", "dicom/..", "masks", "labels.csv", "state"])
def test_a_cache_that_would_delete_something_else_is_refused(tmp_path: Path, cache: str) -> None:
    """Ingest removes the old cache folder whole, so it may hold nothing but the cache."""
    path = write_site(tmp_path, content(cache=cache))
    with pytest.raises(SiteError, match="cache"):
        read_site(path)


def test_names_that_may_be_used(tmp_path: Path) -> None:
    assert read_site(write_site(tmp_path, content(site="Klinik-1.a_b"))).name == "Klinik-1.a_b"
    assert len(read_site(write_site(tmp_path, content(site="a" * 64))).name) == 64


def test_the_key_is_made_once_and_for_the_owner_only(tmp_path: Path) -> None:
    path = write_site(tmp_path)
    site = read_site(path)
    assert not site.state.exists()
    key = site.key()
    assert len(key) == 32
    assert (site.state / "key").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in site.state.iterdir()] == ["key"]
    assert site.key() == read_site(path).key() == key == (site.state / "key").read_bytes()


def test_two_hospitals_have_two_keys(tmp_path: Path) -> None:
    keys = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        keys.add(read_site(write_site(tmp_path / name)).key())
    assert len(keys) == 2


@pytest.mark.parametrize("length", [0, 16, 33])
def test_a_damaged_key_is_refused_and_kept(tmp_path: Path, length: int) -> None:
    site = read_site(write_site(tmp_path))
    site.state.mkdir()
    (site.state / "key").write_bytes(bytes(length))
    with pytest.raises(SiteError, match=f"'hospital-03'.*{length} bytes, expected 32; restore it from a backup"):
        site.key()
    assert (site.state / "key").read_bytes() == bytes(length)


KEYS = st.sampled_from(
    ["site", "data", "policy", "cache", "state", "role", "images", "release", "accept", "hours", "1"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
CONTENT = st.recursive(LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=4))


@given(content=CONTENT, cut=st.integers(0, 30), noise=st.binary(max_size=12))
def test_whatever_stands_in_a_site_file_it_is_read_or_refused(
    content: object, cut: int, noise: bytes, tmp_path: Path
) -> None:
    good = {"site": "a", "data": {"images": "."}, "policy": {}}
    whole = good | content if isinstance(content, dict) else content
    for text in (yaml.safe_dump(whole).encode(), yaml.safe_dump(whole).encode()[:-cut] + noise):
        (tmp_path / "site.yaml").write_bytes(text)
        with suppress(SiteError):
            read_site(tmp_path / "site.yaml")
