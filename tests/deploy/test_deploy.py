"""What is in deploy/ holds before the tools that would run it; each tool is shown to refuse a broken copy too."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import helm_python
import kubernetes_validate
import pytest
import typer
import yaml

from client.cli import app as client_app
from server.centre import Centre
from server.cli import app as server_app

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
COMMANDS = {"hemafed-server": typer.main.get_command(server_app), "hemafed-client": typer.main.get_command(client_app)}


def call(program: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PROGRAMS / program, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=DEPLOY
    )


def test_the_dockerfile_passes_its_linter(tmp_path: Path) -> None:
    done = call("hadolint", DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text((DEPLOY / "Dockerfile").read_text().replace("WORKDIR /opt/hemafed\n", "WORKDIR opt/hemafed\n"))
    assert "DL3000" in call("hadolint", broken).stdout


def test_the_dockerfile_has_a_target_for_each_side_and_no_image_runs_as_root() -> None:
    stages = re.split(r"^FROM ", (DEPLOY / "Dockerfile").read_text(), flags=re.M)[1:]
    named = {stage.split("\n")[0].split(" AS ")[1]: stage for stage in stages}
    for target, program in (("centre", "hemafed-server"), ("hospital", "hemafed-client")):
        assert "\nUSER 10001:10001\n" in named[target]
        assert program in named[target]


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


def test_compose_has_a_centre_two_hospitals_and_one_open_port() -> None:
    services = yaml.safe_load(call("docker-compose", "-f", "compose.yaml", "config").stdout)["services"]
    assert set(services) == {"centre", "hospital-a", "hospital-b"}
    ports = {name: [port["target"] for port in service.get("ports", [])] for name, service in services.items()}
    assert ports == {"centre": [Centre.port], "hospital-a": [], "hospital-b": []}
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]
        assert not service.get("privileged")
    for name in ("hospital-a", "hospital-b"):
        data = next(v for v in services[name]["volumes"] if v["target"] == "/data")
        assert data["read_only"], "nothing writes to the hospital's data"


def rendered(values: dict) -> list[dict]:
    """Every manifest of the chart, by Helm's own engine."""
    files = helm_python.Chart.load(str(CHART)).render(values, name="fed", namespace="hemafed")
    return [
        manifest
        for path, text in files.items()
        if path.endswith(".yaml")
        for manifest in yaml.safe_load_all(text)
        if manifest
    ]


@pytest.mark.parametrize("values", [CENTRE, HOSPITAL], ids=["centre", "hospital"])
def test_the_chart_renders_to_what_kubernetes_takes(values: dict) -> None:
    findings = helm_python.lint(str(CHART), values, strict=True)
    assert [m for m in findings["messages"] if m["severity"] > 1] == []
    manifests = rendered(values)
    assert {"StatefulSet"} <= {one["kind"] for one in manifests}
    for one in manifests:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    one = next(one for one in manifests if one["kind"] == "StatefulSet")
    one["spec"]["replica"] = one["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_the_chart_opens_one_port_and_gives_no_right_that_is_not_needed() -> None:
    manifests = rendered(CENTRE)
    (service,) = [one for one in manifests if one["kind"] == "Service"]
    assert [port["port"] for port in service["spec"]["ports"]] == [Centre.port]
    for rendering in (manifests, rendered(HOSPITAL)):
        (workload,) = [one for one in rendering if one["kind"] == "StatefulSet"]
        pod = workload["spec"]["template"]["spec"]
        assert workload["spec"]["replicas"] == 1
        for container in pod["containers"] + pod.get("initContainers", []):
            context = pod.get("securityContext", {}) | container["securityContext"]
            assert context["runAsNonRoot"]
            assert context["capabilities"]["drop"] == ["ALL"]
            assert context["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize(
    "values", [{}, CENTRE | {"centre": {"host": "a", "port": "many"}}, HOSPITAL | {"hospitals": {}}]
)
def test_the_chart_refuses_values_that_cannot_be(values: dict) -> None:
    with pytest.raises(helm_python.HelmError):
        rendered(values)


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


def lines_of_commands(page: Path) -> list[str]:
    """Lines of code blocks that call one of the programs."""
    text = page.read_text()
    blocks = re.findall(r"^```.*?\n(.*?)^```|((?:^    [^\n]*\n)+)", text, flags=re.M | re.S)
    lines = [line.strip() for block in blocks for line in "".join(block).splitlines()]
    return [line for line in lines if re.match(r"(sudo .*|runuser .*)?[\w./-]*hemafed-(server|client) ", line)]


def fault_of(line: str) -> str:
    """What is wrong with a command line; empty if the program has the command with these options."""
    words = shlex.split(re.sub(r"\s#.*", "", line))
    at = next(number for number, word in enumerate(words) if re.search(r"hemafed-(server|client)$", word))
    program = COMMANDS[words[at].split("/")[-1]]
    name, given = words[at + 1], words[at + 2 :]
    command = program.commands.get(name)
    if command is None:
        return f"{line}: no command {name}"
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    wrong = [word for word in given if word.startswith("--") and word.split("=")[0] not in known | {"--help"}]
    least = sum(isinstance(p, click.Argument) and p.required for p in command.params)
    if not wrong and len([w for w in given if not w.startswith("--")]) < least and "--help" not in given:
        return f"{line}: {least} arguments are needed"
    return f"{line}: no option {wrong[0]}" if wrong else ""


@pytest.mark.parametrize("page", ["README.md", "deploy/RUNBOOK.md"])
def test_every_command_of_the_pages_is_one(page: str) -> None:
    lines = lines_of_commands(ROOT / page)
    assert len(lines) > 10
    assert [fault for line in lines if (fault := fault_of(line))] == []
    assert fault_of("hemafed-server invent centre/")
    assert fault_of("hemafed-client join site.yaml --chekc")
    assert fault_of("hemafed-client join")
