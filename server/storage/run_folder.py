"""A run's folder: what it holds, and the only place that reads and writes it.

runs/<run>/ has config.toml (resolved), status.json (how it stands), rounds.jsonl (one line per round), checkpoint/,
evaluation/ (counts per site), summary.json and report.html. `latest` beside it points at the newest.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
import tomllib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from server.storage.lines import RoundLine, RunStatus, Summary
from shared.config import PLACES, ConfigError, RunConfig, parse_config
from shared.errors import HemafedError
from shared.host.files import replace_text
from shared.metrics import Tally
from shared.wire.records import UNREADABLE, tally_from_arrays, tally_to_arrays

log = logging.getLogger("hemafed.server")

DISK_PAUSE_S = 15.0
LARGEST_TALLY = 64_000_000  # bytes of a file of counts, unpacked
STAGES = ("initial", "final")
EXAMPLES = "examples.png"  # in evaluation/: slices of held-out hospitals
_UNREADABLE = (*UNREADABLE, KeyError, IndexError, zipfile.BadZipFile, zlib.error)  # of a file of several arrays
# Keys that may change when a run is resumed: how long hospitals are waited for, and what is done after the last round.
_FREE = (*PLACES, "federation.wait_s", "federation.round_deadline_s", "federation.heads", "federation.development_site")


class RunError(HemafedError, ValueError):
    """A run's folder cannot be used; names it and the next step."""


def open_run(config: RunConfig) -> Path:
    """Make a new run's folder, or open the one to resume; `latest` points at it from then on.

    Raises:
      RunError: the folder exists and the run is not to be resumed, or the other way round, or with another config.
    """
    root = Path(config.run.folder).absolute()
    name = config.run.id or new_run_name(config)
    check_run(root, name, config)
    run = root / name
    (run / "checkpoint").mkdir(parents=True, exist_ok=True)
    if not config.run.resume:
        record_config(run, config)
    link = root / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, root / "latest")
    return run


def record_config(run: Path, config: RunConfig) -> None:
    """Write config.toml: what the run's results are of."""
    replace_text(run / "config.toml", tomli_w.dumps(asdict(config)))


def check_run(root: Path, name: str, config: RunConfig) -> None:
    """That a new run's folder is free, or the one to resume is there and was made with the same config.

    Raises:
      RunError: it is not so.
    """
    run = root / name
    if not config.run.resume:
        if run.exists():
            raise RunError(
                f"run {name!r} exists in {root}; choose another run.id, or continue it with run.resume = true"
            )
        return
    if not (run / "config.toml").is_file():
        there = ", ".join(
            sorted(path.parent.name for path in root.glob("[!.]*/config.toml") if not path.parent.is_symlink())
        )
        raise RunError(
            f"no run {config.run.id!r} in {root} to resume; run.id must be one of: {there or 'there is none'}"
        )
    if changed := changed_keys(read_config(run), config):
        raise RunError(
            f"run {name!r} was made with another config: {', '.join(changed)}; resume it with its own: --preset "
            f"{run / 'config.toml'} --set run.resume=true"
        )


def changed_keys(made: RunConfig, given: RunConfig) -> list[str]:
    """Return which keys differ, and how, ignoring keys that cannot affect a finished round."""
    before, now = made.flat(), given.flat()
    return [
        f"{key} was {before[key]!r}, is {now[key]!r}" for key in before if before[key] != now[key] and key not in _FREE
    ]


def read_keys(preset: Path | None, keys: list[str]) -> dict[str, dict]:
    """A run config's sections, of a TOML file and of single keys, which count more.

    Args:
      preset: the file; None is the defaults.
      keys: such as "train.batch=8".
    Raises:
      ConfigError: something is no TOML or no section of keys; keys and values are not checked here.
    """
    try:
        config = {} if preset is None else tomllib.loads(preset.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"preset {preset} cannot be read ({error}); give a TOML file such as simulations/demo.toml"
        ) from error
    _check_sections(config, f"preset {preset}")
    for key in keys:
        try:
            part = tomllib.loads(key)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                f"--set {key!r} is not TOML ({error}); expected one key such as --set train.batch=8, a text in quotes of its own that the "
                "shell leaves alone: --set run.id=\"'pilot'\""
            ) from error
        _check_sections(part, f"--set {key!r}")
        for section, values in part.items():
            config[section] = config.get(section, {}) | values
    return config


def _check_sections(config: dict, source: str) -> None:
    """Every top-level value must be a section of keys."""
    for section, values in config.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {section} is {values!r}; expected section.key=value, such as train.batch=8")


def flatten(sections: dict[str, dict]) -> dict:
    """Sections of keys as dotted keys."""
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def write_status(run: Path, state: str, **facts: Any) -> None:
    """Write a run's status to status.json: "running", "waiting", "finished", "failed" or "crashed", and the reason.

    It is informative only; a full disk does not stop a run here.
    """
    try:
        replace_text(
            run / "status.json",
            json.dumps(RunStatus(state, time.time(), **facts).to_json(), indent=2, allow_nan=False) + "\n",
        )
    except OSError as error:
        log.warning(f"status.json cannot be written ({error.strerror}): {state} {facts}")


def write_patiently(run: Path, write: Callable[[], None]) -> None:
    """Write to a run's folder, waiting for room where the disk is full: what hospitals trained is not lost.

    Args:
      run: the run's folder.
      write: tried until it succeeds.
    Raises:
      OSError: it fails for another reason.
    """
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            what = f"room on the disk of {run}: {error.strerror}"
            log.info(f"waiting for {what}")
            write_status(run, "waiting", what=what)
            time.sleep(DISK_PAUSE_S)


def read_status(run: Path) -> RunStatus:
    """Read what write_status wrote last; empty before that."""
    path = run / "status.json"
    return RunStatus.from_json(json.loads(path.read_text())) if path.is_file() else RunStatus()


def new_run_name(config: RunConfig) -> str:
    """A name for a run that was given none: the time and the config."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{config.hash()}"


def read_config(run: Path) -> RunConfig:
    """The config that a run was made with.

    Raises:
      RunError: the folder is no run.
    """
    path = run / "config.toml"
    if not path.is_file():
        raise RunError(f"{run} is not a run: it has no config.toml; give a folder such as runs/latest")
    return parse_config(flatten(tomllib.loads(path.read_text())))


def append_round(run: Path, line: RoundLine) -> None:
    """Add a round to rounds.jsonl, on a line of its own whatever a crash left there."""
    path = run / "rounds.jsonl"
    before = path.read_bytes() if path.is_file() else b""
    with open(path, "a") as file:
        file.write(
            ("\n" if before and not before.endswith(b"\n") else "") + json.dumps(line.to_json(), allow_nan=False) + "\n"
        )


def read_rounds(run: Path) -> list[RoundLine]:
    """All rounds, in order; of a round that was done again after a crash, the last."""
    path = run / "rounds.jsonl"
    lines = [_line(text) for text in path.read_text().splitlines()] if path.is_file() else []
    lines = [line for line in lines if line is not None]
    return [line for _, line in sorted({line.round: line for line in lines}.items())]


def _line(text: str) -> RoundLine | None:
    """A line of rounds.jsonl; None for one that a crash cut off, whose round is done again."""
    try:
        return RoundLine.from_json(json.loads(text))
    except (ValueError, AttributeError):
        return None


def forget_test(run: Path, stage: str) -> None:
    """Remove heads and counts of a test of the "initial" or the "final" model, for what comes may be of other heads.

    And all of held-out hospitals, which are tested with both models.
    """
    for path in (run / "checkpoint").glob(f"heads-{stage}-*.safetensors"):
        path.unlink()
    for folder in (stage, *(f"{one}/unseen" for one in STAGES)):
        shutil.rmtree(run / "evaluation" / folder, ignore_errors=True)
    (run / "evaluation" / EXAMPLES).unlink(missing_ok=True)


def save_tally(run: Path, stage: str, part: str, site: str, tally: Tally, model: str = "") -> None:
    """Keep a site's counts: evaluation/<stage>/<part>/<site>.npz.

    Args:
      run, stage, part: see load_tallies.
      site: whose.
      tally: the counts.
      model: hash of what was tested, for counts that are sent from one machine to another.
    """
    path = run / "evaluation" / stage / part / f"{site}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **tally_to_arrays(tally), site=site, model=model)


def load_tallies(run: Path, stage: str, part: str, model: str = "") -> dict[str, Tally]:
    """Site -> counts.

    Args:
      run: the run's folder.
      stage: "initial" or "final".
      part: "val", "seen" or "unseen".
      model: hash of the model that they must be of; "" takes any.
    Raises:
      RunError: a file holds no counts of that site and model; a held-out hospital may have sent it.
    """
    replicates = 0 if part == "val" else read_config(run).evaluation.replicates
    tallies = {}
    for path in sorted((run / "evaluation" / stage / part).glob("*.npz")):
        try:
            _check_size(path)
            with np.load(path) as file:
                values = {name: file[name] for name in file.files}
            site, tested = (str(values.pop(name)) for name in ("site", "model"))
            tallies[path.stem] = tally_from_arrays(values, replicates)
        except _UNREADABLE as error:
            raise RunError(
                f"{path} holds no counts of a test ({type(error).__name__}: {error}); get it again from who wrote it, or remove it"
            ) from error
        if site != path.stem:
            raise RunError(f"{path} holds counts of site {site!r}; a file has its site's name, and each site one file")
        if model and tested != model:
            raise RunError(
                f"{path} is a test of another model ({tested}) than this run's {stage} one ({model}); let {site} test this run again, or "
                "remove it"
            )
    return tallies


def _check_size(path: Path) -> None:
    """Refuse a file that unpacks to more than counts can take: 2000 bootstrap samples over 1000 cells have 32 MB.

    Raises:
      ValueError: it does, by its own list of parts; zipfile reads no part beyond that size.
    """
    with zipfile.ZipFile(path) as file:
        size = sum(part.file_size for part in file.infolist())
    if size > LARGEST_TALLY:
        raise ValueError(f"it unpacks to {size / 1e6:.0f} MB, expected at most {LARGEST_TALLY / 1e6:.0f}")


def read_summary(run: Path) -> Summary:
    """Read the run's summary.json.

    Raises:
      RunError: there is none yet, or it is damaged.
    """
    path = run / "summary.json"
    try:
        return Summary.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); name the folder of a run that has begun") from error


def write_summary(run: Path, summary: Summary) -> None:
    """Replace summary.json in one step."""
    replace_text(run / "summary.json", json.dumps(summary.to_json(), indent=2, allow_nan=False) + "\n")
