"""The runbook says what the programs do: its commands are theirs with their options, and its errors are in their words."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import click
import flwr
import pytest
import typer
import yaml

from client.cli import app as client_app
from server.centre.authority import SERVER_DAYS
from server.centre.config import Centre
from server.centre.registry import INVITATION_DAYS
from server.cli import app as server_app

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
COMMANDS = {"hemafed-server": typer.main.get_command(server_app), "hemafed-client": typer.main.get_command(client_app)}
PAGES = {
    "client/README.md": 9,
    "server/README.md": 7,
    "simulations/README.md": 1,
    "deploy/RUNBOOK.md": 50,
    "deploy/helm/hemafed/templates/NOTES.txt": 5,
}
PAGES |= {"deploy/systemd/hemafed-centre.service": 1}
FLOWERS = ("Node Unavailable", "ClientApp stopped responding")  # errors that the run's log shows as Flower words them
SERVICES = {"centre": "hemafed-server", "hospital-a": "hemafed-client", "hospital-b": "hemafed-client"}


def command_lines(text: str) -> list[str]:
    """Calls of the programs in code: in blocks, in `code`, and in comments of units; with arguments to the line's end."""
    blocks = re.findall(r"^```.*?\n(.*?)^```|((?:^[ #]   +[^\n]*\n)+)", text, flags=re.M | re.S)
    lines = "".join("".join(block) for block in blocks).replace("\\\n", " ").splitlines()
    for service, program in SERVICES.items():  # the program is the image's entry point
        lines = [re.sub(rf"docker compose run --rm {service} ", f"{program} ", line) for line in lines]
    lines += re.findall(r"`([^`\n]*)`", text)
    lines = [line for line in lines if "next: " not in line]  # a sentence that `init` prints
    call = re.compile(r"(?:^|[\s/])(hemafed-(?:server|client) [a-z].*?)(?:\s[|<>#]|\s&&|$)")
    return [found.group(1).strip() for line in lines if (found := call.search(line))]


def fault_of(line: str) -> str:
    """What the program itself says of a command line; empty if it takes it. Nothing is carried out."""
    words = shlex.split(line)
    command = COMMANDS[words[0]].commands.get(words[1])
    if command is None:
        return f"{line}: no command {words[1]}"
    try:
        command.make_context(words[1], words[2:])
    except click.ClickException as error:
        return f"{line}: {error.format_message()}"
    except click.exceptions.Exit:  # --help
        return ""
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_pages_is_one(page: str) -> None:
    text = (ROOT / page).read_text()
    lines = [line for line in command_lines(text) if len(line.split()) > 2 or line.split()[1] == "app"]
    assert len(lines) >= PAGES[page]
    assert [fault for line in lines if (fault := fault_of(line))] == []
    unknown = [line for line in command_lines(text) if line.split()[1] not in COMMANDS[line.split()[0]].commands]
    assert unknown == []


@pytest.mark.parametrize(
    "line",
    [
        "hemafed-server invent centre/",
        "hemafed-server invite centre/",
        "hemafed-server init centre/",
        "hemafed-server run centre/ --sett a=1",
        "hemafed-client join site.yaml --chekc",
        "hemafed-client join",
        "hemafed-client ingest site.yaml other.yaml",
    ],
)
def test_a_command_that_is_none_is_seen(line: str) -> None:
    assert command_lines(f"text\n\n    {line}  # a comment\n") == [line]
    assert fault_of(line)


def test_every_service_and_file_that_docker_is_given_is_there() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    assert services.keys() == SERVICES.keys()
    text = RUNBOOK.read_text()
    calls = re.findall(
        r"docker compose(?: -f \S+)* (?:run --rm|exec(?: -T)?|up -d|build|logs --follow) (\S+?)[`\s]", text
    )
    assert len(calls) > 15
    assert set(calls) <= services.keys()
    files = re.findall(r"(?:-f |hemafed/deploy/|deploy/)([\w./-]+\.(?:yaml|service))", text)
    assert len(files) >= 4
    assert [file for file in files if not (ROOT / "deploy" / file).is_file()] == []


def test_numbers_of_the_runbook_are_the_programs() -> None:
    text = RUNBOOK.read_text()
    for fact in (
        f"| centre | {Centre.port}, or `--port` of `init` |",
        f"| centre | {Centre.loopback_port}, or `--loopback-port` |",
        f"port {Centre.port}. Nothing else",
        f"good for {INVITATION_DAYS} days",
        f"**Server certificates** end after {SERVER_DAYS} days",
    ):
        assert fact in text


def error_words(text: str) -> list[str]:
    """The first cells of the tables of errors, each `text` by itself."""
    section = text.split("## What to do at each error")[1]
    cells = re.findall(r"^\| (`.*?`) \|", section, flags=re.M)
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


@cache
def spoken(root: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Every text in the code, with … for what it is filled with."""
    texts = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if id(node) in silent:
                continue
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


def is_spoken(words: str) -> bool:
    """Whether a program of ours says these words, or Flower's those of its words that ours hand on."""
    if words in FLOWERS:
        texts = spoken(Path(flwr.__file__).parent, (".",))
    else:
        texts = spoken(ROOT, ("client", "server", "shared"))
    return any(map(re.compile(".*?".join(map(re.escape, words.split("…"))), flags=re.S).search, texts))


def test_every_error_is_in_the_programs_words() -> None:
    words = error_words(RUNBOOK.read_text())
    assert len(words) > 70
    assert [word for word in words if not is_spoken(word)] == []
    assert len(words) == len(set(words))
    assert not is_spoken("the centre is on holiday")
    assert not is_spoken("refuses … holidays")


def test_every_test_that_the_table_of_faults_names_is_there() -> None:
    named = set(
        re.findall(
            r"\b(?:federation|server|client|shared)(?:/\w+)*/test_\w+\.py", (ROOT / "deploy/README.md").read_text()
        )
    )
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()] == []
