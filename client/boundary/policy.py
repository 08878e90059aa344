"""The hospital's own rule on what may run in it and what may leave, enforced on messages in both directions.

`admit` is asked before anything is computed: a run config outside of what site.yaml accepts, or work outside of its hours,
is refused. `enforce` is the last thing that touches a reply before Flower sends it: whatever the code before it
did, a tensor of a group that site.yaml does not release, or a number over too few patients, does not pass. No
server, run config or message can change the policy; it is read from the hospital's own file.
"""

from __future__ import annotations

from datetime import datetime, time

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from shared.config import RunConfig
from shared.groups import group
from shared.refusals import Refusal, Refused, code_of_key
from shared.rules import INSTALLED, unsound_key
from shared.site import Site

# Records of a reply. Tensors are under UPDATE; everything else that depends on patients is counted as metrics.
UPDATE, METRICS, FACTS = "update", "metrics", "facts"
TALLY, TALLY_VAL, TALLY_TEST = TALLIES = ("tally", "tally-val", "tally-test")  # of a round; of a test's two splits
PATIENTS = "patients"  # key in METRICS and in a tally: how many patients the reply's numbers stand for
RECORDS = {UPDATE: ArrayRecord, METRICS: MetricRecord, FACTS: ConfigRecord} | dict.fromkeys(TALLIES, ArrayRecord)
PUBLIC_FACTS = {"site", "role", "release", "protocol", "withheld", "model", "audit"}


class PolicyError(Refused):
    """The centre asked for something that the hospital does not release."""

    code = Refusal.POLICY


def admit_code(site: Site, own: str, bundle: str) -> None:
    """Check the code that is to run in the hospital.

    Args:
      site: whose policy.
      own: hash of the code that the hospital installed, which is what runs (client/node/program.py).
      bundle: hash of the client code in the run's bundle.
    Raises:
      PolicyError: the two differ, or policy.app names another.
    """
    if site.policy.app not in (INSTALLED, own):
        raise PolicyError(
            f"site {site.name!r} reviewed the code {site.policy.app[:12]}… (policy.app) and has {own[:12]}… installed; the site must "
            "install what it reviewed, or review what it installed",
            Refusal.CODE_MISMATCH,
        )
    if bundle != own:
        raise PolicyError(
            f"site {site.name!r} runs only the code that it installed, {own[:12]}… (policy.app), and the run brings {bundle[:12]}…; "
            "start the run from the version that the site has, or ask the site to review and install the new one",
            Refusal.CODE_MISMATCH,
        )


def admit(site: Site, config: RunConfig, now: datetime) -> None:
    """Check what the hospital is asked to do, before it is done.

    Args:
      site: whose policy.
      config: of the run.
      now: the hospital's local time.
    Raises:
      PolicyError: a key of the run config has a value that policy.accept or a default bound excludes, or the hospital does
        not work for runs at this hour.
    """
    flat, policy = config.flat(), site.policy
    for key, bound in policy.accept:
        if not bound.admits(flat[key]):
            raise PolicyError(
                f"site {site.name!r} refuses runs with {key} = {flat[key]!r}: its policy.accept takes {bound.text()}",
                code_of_key(key),
            )
    if key := unsound_key(config, policy.named):
        raise PolicyError(
            f"site {site.name!r} refuses runs with {key} = {flat[key]!r} (shared/rules.py); name the key in policy.accept to take it",
            code_of_key(key),
        )
    hours = policy.hours
    if hours is not None and not within_hours(hours, now):
        raise PolicyError(
            f"site {site.name!r} works between {hours[0]:%H:%M} and {hours[1]:%H:%M} of its own time only (policy.hours), and it "
            f"is {now:%H:%M}",
            Refusal.HOURS,
        )


def within_hours(hours: tuple[time, time], now: datetime) -> bool:
    """Whether a moment lies from the first hour to before the second; they may span midnight."""
    start, end = hours
    moment = now.time()
    return start <= moment < end if start <= end else moment >= start or moment < end


def metrics_refusal(site: Site, patients: int) -> str:
    """Return why numbers over `patients` patients may not leave; empty if they may."""
    if not site.policy.metrics:
        return "policy.metrics is false"
    if patients < site.policy.min_patients:
        return f"they stand for fewer patients than policy.min_patients ({site.policy.min_patients})"
    return ""


def enforce(site: Site, content: RecordDict) -> RecordDict:
    """Check a reply's content; the only way out of the hospital.

    Args:
      site: whose policy.
      content: what is about to leave.
    Returns:
      The same content.
    Raises:
      PolicyError: it holds tensors that are not released, numbers that may not leave, or an unknown record.
    """
    for name, record in content.items():
        if type(record) is not RECORDS.get(name):
            raise PolicyError(
                f"site {site.name!r} sends no {type(record).__name__} {name!r}; expected "
                + ", ".join(f"{kind.__name__} {known!r}" for known, kind in RECORDS.items())
            )
    unknown = content.get(FACTS, {}).keys() - PUBLIC_FACTS
    if unknown:
        raise PolicyError(
            f"site {site.name!r} sends no facts {sorted(unknown)}; expected some of {sorted(PUBLIC_FACTS)}"
        )
    for name in content.get(UPDATE, {}):
        if group(name) not in site.policy.release:
            raise PolicyError(
                f"site {site.name!r} does not release tensor group {group(name)!r}: its policy.release is "
                f"{list(site.policy.release)}; use federation.share = 'encoder', or ask the site to change its site.yaml",
                Refusal.GROUP,
            )
    tallies = [content.array_records[name] for name in TALLIES if name in content]
    if tallies or METRICS in content:
        patients = content.metric_records[METRICS].get(PATIENTS, 0) if METRICS in content else 0
        counts = [patients if isinstance(patients, int | float) else 0]
        for tally in tallies:
            counts += tally[PATIENTS].numpy().tolist() if PATIENTS in tally else [0]
        refusal = metrics_refusal(site, int(min(counts)))
        if refusal:
            raise PolicyError(f"site {site.name!r} does not release these numbers: {refusal}", Refusal.METRICS)
    return content
