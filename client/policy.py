"""The hospital's own rule on what may leave, enforced on the outgoing message.

This is the last thing that touches a reply before Flower sends it: whatever the code before it did, a tensor of a
group that site.yaml does not release, or a number that stands for too few patients, does not pass. No server,
run config or message can change the policy; it is read from the hospital's own file.
"""

from __future__ import annotations

from flwr.app import RecordDict

from shared.site import Site
from shared.wire import group

# Records of a reply. Tensors are under UPDATE; everything else that depends on patients is counted as metrics.
UPDATE, TALLY, METRICS, FACTS = "update", "tally", "metrics", "facts"
PATIENTS = "patients"  # key in METRICS: how many patients the reply's numbers stand for


class PolicyError(PermissionError):
    """The server asked for something that the hospital does not release; the text may reach the server."""


def metrics_refusal(site: Site, patients: int) -> str:
    """Why numbers over `patients` patients may not leave; empty if they may."""
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
    unknown = content.keys() - {UPDATE, TALLY, METRICS, FACTS}
    if unknown:
        raise PolicyError(f"site {site.name!r} sends no record {sorted(unknown)}; expected update, tally, metrics or facts")
    for name in content.get(UPDATE, {}):
        if group(name) not in site.policy.release:
            raise PolicyError(
                f"site {site.name!r} does not release tensor group {group(name)!r}: its policy.release is "
                f"{list(site.policy.release)}; use federation.share = 'encoder', or ask the site to change its site.yaml"
            )
    if TALLY in content or METRICS in content:
        refusal = metrics_refusal(site, int(content.get(METRICS, {}).get(PATIENTS, 0)))
        if refusal:
            raise PolicyError(f"site {site.name!r} does not release these numbers: {refusal}")
    return content
