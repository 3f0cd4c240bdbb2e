"""The options on the pages of docs/commands/ are those of --help; run as a script, this file rewrites them."""

import re
from pathlib import Path

import click
import pytest
import typer

from moqa.cli.main import application

PAGES = Path(__file__).parents[1] / "docs" / "commands"
ROOT = typer.main.get_command(application())
COMMANDS = dict(ROOT.commands)
# pages of groups have the options of their commands, one after the other
GROUPS = {"mixture": ("build",), "federated": ("run",), "vla": ("profile", "plan", "quantize", "rollout")}
TABLE = re.compile(r"\| option \| meaning \| default \|\n(?:\|.*\n)+")


def tables(name: str) -> list[str]:
    """The options of a command, or of each command of a group."""
    if name not in GROUPS:
        return [options(name, COMMANDS[name])]
    return [options(name, COMMANDS[name].commands[one]) for one in GROUPS[name]]


def options(name: str, command: click.Command) -> str:
    """A command's options as a table, from what --help prints about each."""
    # fills in what comes from the library
    command.get_help(click.Context(command, parent=click.Context(ROOT.commands[name], parent=click.Context(ROOT))))
    lines = ["| option | meaning | default |", "|---|---|---|"]
    for param in command.params:
        if param.param_type_name == "option":
            text, default = re.fullmatch(r"(.*?) ?(?:\[default: ([^\]]*)\])?", param.help).groups()
            if default is None:
                plain = "" if param.default is None or param.default is False else param.default
                default = "required" if param.required else plain
            if param.secondary_opts:
                default = param.opts[0]
            typed = " / ".join(filter(None, [", ".join(param.opts), *param.secondary_opts]))
            lines.append(f"| `{' '.join(filter(None, [typed, param.metavar]))}` | {text} | {default} |")
    return "\n".join(lines) + "\n"


def with_options() -> list[str]:
    return sorted(name for name in COMMANDS if len(tables(name)[0].splitlines()) > 2)


@pytest.mark.parametrize("name", with_options())
def test_the_page_has_the_options_of_the_help(name):
    assert TABLE.findall((PAGES / f"{name}.md").read_text()) == tables(name)


def test_the_table_says_what_users_can_type():
    (text,) = tables("quantize")
    assert "| `--proof / --no-proof` | compare with baselines on held-out text | --proof |" in text
    assert "| `--seed` | seed of samples, labels, self-written text and random plans | 0 |" in text
    assert "| `--out, -o OUT` | checkpoint folder to make | required |" in text
    assert "| `--max-memory SIZE` | memory the process may take, e.g. 4GiB | free memory |" in text


if __name__ == "__main__":
    for command in with_options():
        page = PAGES / f"{command}.md"
        of_page = iter(tables(command))
        page.write_text(TABLE.sub(lambda _, found=of_page: next(found), page.read_text()))
