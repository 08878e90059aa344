"""What is in deploy/ holds before the tools that would run it; each tool is shown to refuse a broken copy too."""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import helm_python
import kubernetes_validate
import pytest
import yaml

from client.boundary.code import code_hash
from server.centre.config import Centre
from server.centre.status import write_unit
from shared.host.systemd import unit_text

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "hemafed"
PROGRAMS = Path(sys.executable).parent
CENTRE = {"centre": {"host": "fed.example.org"}}
HOSPITAL = {
    "centre": {"enabled": False},
    "hospital": {
        "enabled": True,
        "site": {"persistentVolumeClaim": {"claimName": "site"}},
        "data": {"hostPath": {"path": "/srv/data", "type": "Directory"}},
    },
}


def call(program: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PROGRAMS / program, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=DEPLOY
    )


def instructions(target: str) -> list[tuple[str, str]]:
    """Instruction and arguments of one target of the Dockerfile, without comments, lines joined."""
    text = "\n".join(line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    stages = re.split(r"^FROM ", text.replace("\\\n", " "), flags=re.M)[1:]
    named = {stage.split("\n")[0].split(" AS ")[1]: stage.split("\n")[1:] for stage in stages}
    return [tuple(line.split(" ", 1)) for line in named[target] if line]


def of(target: str, name: str) -> str:
    """Arguments of a target's only instruction of that name."""
    (found,) = [arguments for instruction, arguments in instructions(target) if instruction == name]
    return found


def context(root: Path) -> list[Path]:
    """Files below root that Docker would see, by .dockerignore: the last pattern that fits a file or its folder decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    found = []
    for folder, names, files in os.walk(root):
        here = Path(folder).relative_to(root)
        names[:] = [name for name in names if _kept(here / name, patterns)]
        found += [here / name for name in files if _kept(here / name, patterns)]
    return sorted(found)


def _kept(path: Path, patterns: list[str]) -> bool:
    folders = ["/".join(path.parts[:end]) for end in range(1, len(path.parts) + 1)]
    kept = True
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        forms = (wanted, wanted.removeprefix("**/"))  # **/ stands for no folder too
        if any(fnmatch.fnmatchcase(folder, form) for folder in folders for form in forms):
            kept = pattern.startswith("!")
    return kept


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What `COPY . .` brings into an image."""
    for path in context(ROOT):
        (tmp_path / "image" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / "image" / path)
    return tmp_path / "image"


def test_the_dockerfile_passes_its_linter(tmp_path: Path) -> None:
    done = call("hadolint", DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text((DEPLOY / "Dockerfile").read_text().replace("WORKDIR /opt/hemafed\n", "WORKDIR opt/hemafed\n"))
    assert "DL3000" in call("hadolint", broken).stdout


@pytest.mark.parametrize(("target", "program"), [("centre", "hemafed-server"), ("hospital", "hemafed-client")])
def test_an_image_runs_its_side_and_not_as_root(target: str, program: str) -> None:
    assert of(target, "USER") == "10001:10001"
    assert json.loads(of(target, "ENTRYPOINT")) == ["tini", "--", program]


def test_an_image_holds_the_program_and_nothing_that_is_a_hospitals_or_a_centres(tmp_path: Path) -> None:
    wanted = (
        "client/app.py",
        "simulations/importers/rsna.py",
        "shared/config.py",
        "server/centre/daemon.py",
        "simulations/cli.py",
    )
    wanted += ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
    unwanted = (
        ".venv/bin/python",
        ".git/config",
        "hospitals/a/state/key",
        "runs/a/config.toml",
        "centre/keys/authority.key",
    )
    unwanted += ("site.yaml", "a.key", "deploy/site/site.yaml", "deploy/.env", "tests/conftest.py")
    unwanted += ("client/__pycache__/app.cpython-311.pyc", "simulations/results/gap/a.0.json")
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert context(tmp_path) == sorted(map(Path, wanted))


def test_the_run_that_an_image_brings_has_the_code_that_an_image_runs(image: Path, tmp_path: Path) -> None:
    # As the centre's `flwr run` does in the image, and as a hospital's image compares.
    built = subprocess.run(
        [PROGRAMS / "flwr", "build", "--app", image], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    (bundle,) = tmp_path.glob("*.fab")
    zipfile.ZipFile(bundle).extractall(tmp_path / "bundle")
    assert code_hash(tmp_path / "bundle") == code_hash(image), built.stdout
    with open(image / "client" / "policy.py", "a") as file:
        file.write("# another version\n")
    assert code_hash(tmp_path / "bundle") != code_hash(image)


def test_what_the_dockerfile_copies_is_there(image: Path) -> None:
    copied = [
        arguments.split() for target in ("wanted", "app") for name, arguments in instructions(target) if name == "COPY"
    ]
    sources = [source for words in copied for source in words[:-1] if not source.startswith(("/", "--"))]
    assert {"pyproject.toml", "constraints.txt", "."} <= set(sources)
    assert [source for source in sources if not (image / source).exists()] == []


def test_the_health_check_knows_whether_the_port_is_open(tmp_path: Path) -> None:
    command = json.loads(of("centre", "HEALTHCHECK").split(" CMD ")[1])
    assert command[:2] == ["python", "-c"]
    assert "/var/lib/hemafed/centre.toml" in command[2]
    code = command[2].replace("/var/lib/hemafed/centre.toml", str(tmp_path / "centre.toml"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "centre.toml").write_text(f"port = {server.getsockname()[1]}\n")
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_takes_its_files(files: list[str]) -> None:
    done = call("docker-compose", *[part for file in files for part in ("-f", file)], "config", "-q")
    assert done.returncode == 0, done.stderr


def test_compose_refuses_a_misspelt_key(tmp_path: Path) -> None:
    broken = tmp_path / "compose.yaml"
    broken.write_text((DEPLOY / "compose.yaml").read_text().replace("restart:", "restrat:"))
    done = call("docker-compose", "-f", broken, "config", "-q")
    assert done.returncode != 0
    assert "restrat" in done.stderr


def composed() -> dict[str, dict]:
    """The services as Docker Compose reads them."""
    return yaml.safe_load(call("docker-compose", "-f", "compose.yaml", "config").stdout)["services"]


def test_compose_has_a_centre_two_hospitals_and_one_open_port() -> None:
    services = composed()
    assert set(services) == {"centre", "hospital-a", "hospital-b"}
    ports = {name: [(p["target"], p["published"]) for p in one.get("ports", [])] for name, one in services.items()}
    assert ports == {"centre": [(Centre.port, str(Centre.port))], "hospital-a": [], "hospital-b": []}
    assert services["centre"]["sysctls"] == {"net.ipv4.ip_unprivileged_port_start": str(Centre.port)}
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert service["read_only"]
        assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & service.keys()
    for name in ("hospital-a", "hospital-b"):
        data = next(v for v in services[name]["volumes"] if v["target"] == "/data")
        assert data["read_only"], "nothing writes to the hospital's data"
    assert not set(services["hospital-a"]["networks"]) & set(services["hospital-b"]["networks"])


def test_compose_and_chart_mount_what_the_images_write() -> None:
    services = composed()
    for name, target in (("centre", "centre"), ("hospital-a", "hospital"), ("hospital-b", "hospital")):
        assert of(target, "VOLUME") in [volume["target"] for volume in services[name]["volumes"]]
        assert services[name]["build"]["target"] == target
    for values, target in ((CENTRE, "centre"), (HOSPITAL, "hospital")):
        pod = workload(rendered(values))["spec"]["template"]["spec"]
        assert of(target, "VOLUME") in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        user = pod["securityContext"]
        assert f"{user['runAsUser']}:{user['runAsGroup']}" == of(target, "USER")


def rendered(values: dict) -> list[dict]:
    """Every manifest of the chart, by Helm's own engine."""
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="fed", namespace="hemafed")
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def workload(manifests: list[dict]) -> dict:
    """The chart's only StatefulSet."""
    (found,) = [one for one in manifests if one["kind"] == "StatefulSet"]
    return found


@pytest.mark.parametrize("values", [CENTRE, HOSPITAL], ids=["centre", "hospital"])
def test_the_chart_renders_to_what_kubernetes_takes(values: dict) -> None:
    findings = helm_python.lint(str(CHART), values, strict=True)
    assert [m for m in findings["messages"] if m["severity"] > 1] == []
    manifests = rendered(values)
    assert sorted(one["kind"] for one in manifests) == ["NetworkPolicy", "Service", "StatefulSet"]
    for one in manifests:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    one = workload(manifests)
    one["spec"]["replica"] = one["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_the_chart_is_linted_by_helm(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "hemafed")
    (tmp_path / "hemafed" / "Chart.yaml").write_text("apiVersion: v2\nname: hemafed\n")
    findings = helm_python.lint(str(tmp_path / "hemafed"), CENTRE, strict=True)
    assert [m for m in findings["messages"] if m["severity"] > 1]


def test_the_chart_opens_one_port() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["centre"]
    assert (values["port"], values["loopbackPort"]) == (Centre.port, Centre.loopback_port)
    assert of("centre", "EXPOSE") == str(Centre.port)
    for port in (Centre.port, 30443):
        manifests = rendered({"centre": {"host": "fed.example.org", "port": port}})
        (service,) = [one for one in manifests if one["kind"] == "Service"]
        assert [(p["port"], p["targetPort"]) for p in service["spec"]["ports"]] == [(port, "hospitals")]
        pod = workload(manifests)["spec"]["template"]["spec"]
        assert pod["containers"][0]["ports"] == [{"name": "hospitals", "containerPort": port, "protocol": "TCP"}]
        assert pod["initContainers"][0]["args"][1:] == ["/var/lib/hemafed", "fed.example.org", str(port), "8443"]
        needed = [{"name": "net.ipv4.ip_unprivileged_port_start", "value": str(port)}] if port < 1024 else None
        assert pod["securityContext"].get("sysctls") == needed
    policies = [one["spec"] for one in (*rendered(CENTRE), *rendered(HOSPITAL)) if one["kind"] == "NetworkPolicy"]
    assert [("egress" in one, "ingress" in one) for one in policies] == [(False, True), (True, False)]
    assert [one["policyTypes"] for one in policies] == [["Ingress", "Egress"]] * 2
    assert {p["port"] for rule in policies[1]["egress"] for p in rule["ports"]} == {Centre.port, 53}


@pytest.mark.parametrize("values", [CENTRE, HOSPITAL], ids=["centre", "hospital"])
def test_the_chart_gives_no_right_that_is_not_needed(values: dict) -> None:
    found = workload(rendered(values))
    pod = found["spec"]["template"]["spec"]
    assert found["spec"]["replicas"] == 1
    assert pod["automountServiceAccountToken"] is False
    # Kubernetes' default makes every file of a volume readable to the group at each start, the private keys too, and the
    # client refuses such a key.
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    for container in pod["containers"] + pod.get("initContainers", []):
        confined = pod["securityContext"] | container["securityContext"]
        assert confined["runAsNonRoot"]
        assert confined["readOnlyRootFilesystem"]
        assert confined["capabilities"] == {"drop": ["ALL"]}
        assert confined["allowPrivilegeEscalation"] is False
        assert confined["seccompProfile"] == {"type": "RuntimeDefault"}
    assert [
        m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/data" and not m.get("readOnly")
    ] == []


REFUSED = {
    "no host": {},
    "port is a text": {"centre": {"host": "a", "port": "many"}},
    "unknown key": CENTRE | {"hospitals": {}},
    "unknown key of the centre": {"centre": {"host": "a", "replicas": 2}},
    "unknown key of a hospital": HOSPITAL | {"hospital": HOSPITAL["hospital"] | {"replicas": 2}},
    "both ports are one": {"centre": {"host": "a", "port": 8443}},
    "another node port": {"centre": {"host": "a", "service": {"type": "NodePort", "nodePort": 30443}}},
    "a hospital without folder": HOSPITAL | {"hospital": HOSPITAL["hospital"] | {"site": {}}},
    "a hospital without data": HOSPITAL | {"hospital": HOSPITAL["hospital"] | {"data": {}}},
}


@pytest.mark.parametrize("values", REFUSED.values(), ids=REFUSED)
def test_the_chart_refuses_values_that_cannot_be(values: dict) -> None:
    with pytest.raises(helm_python.HelmError):
        rendered(values)


def test_a_hospitals_pod_waits_until_it_is_told_to_take_part() -> None:
    pod = workload(rendered(HOSPITAL))["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["tini", "--", "sleep", "infinity"]
    values = HOSPITAL | {"hospital": HOSPITAL["hospital"] | {"prepare": False}}
    container = workload(rendered(values))["spec"]["template"]["spec"]["containers"][0]
    assert "command" not in container
    assert container["args"] == json.loads(of("hospital", "CMD"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("unit", sorted(path.name for path in (DEPLOY / "systemd").glob("*.service")))
def test_systemd_takes_the_units(unit: str, tmp_path: Path) -> None:
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (DEPLOY / "systemd" / unit).read_text(), flags=re.M)

    def verdict(content: str) -> str:
        (tmp_path / unit).write_text(content)
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert unit not in verdict(text)
    assert "Restrat" in verdict(text.replace("Restart=", "Restrat="))


def settings(text: str) -> dict[tuple[str, str], str]:
    """Section and key -> value of a unit."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read_string(text)
    return {(section, key): parser[section][key] for section in parser.sections() for key in parser[section]}


def test_the_units_are_as_strict_as_those_that_the_programs_write(tmp_path: Path) -> None:
    folder = Path("/var/lib/hemafed/centre")
    written = write_unit(Centre(tmp_path, "fed.example.org")).read_text().replace(str(tmp_path), str(folder))
    centre = settings((DEPLOY / "systemd" / "hemafed-centre.service").read_text())
    hospital = settings((DEPLOY / "systemd" / "hemafed-hospital.service").read_text())
    join = ["hemafed-client", "join", "/var/lib/hemafed/site/site.yaml"]
    for ours, theirs in (
        (centre, settings(written)),
        (hospital, settings(unit_text("", join, user="hemafed", stop_s=60))),
    ):
        start = ("Service", "ExecStart")
        assert ours.pop(start).split()[1:] == shlex.split(theirs.pop(start))[1:]
        assert (ours["Service", "ProtectSystem"], theirs.pop(("Service", "ProtectSystem"))) == ("strict", "full")
        theirs.pop(("Unit", "Description"))
        assert {key: ours.get(key) for key in theirs} == theirs
        assert ours["Service", "User"] == "hemafed"
    assert centre["Service", "CapabilityBoundingSet"] == centre["Service", "AmbientCapabilities"]
    assert hospital["Service", "CapabilityBoundingSet"] == ""
