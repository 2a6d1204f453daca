"""Every command that the docs and messages show exists, with its options, and has those that it needs."""

import re
import shlex

import pytest
import typer

from lungddpm.cli import app

PASSED_ON = "run"
"""Its arguments are Snakemake's."""


def commands_in_page(text):
    """Commands of a page, without `lungddpm`: lines of its blocks, and inline code."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    block = [line.strip() for line in lines if line.startswith("    ")]
    prose = " ".join(line for line in lines if not line.startswith("    "))
    found = [
        re.fullmatch(r"(?:[\w./]+/)?lungddpm ([a-z-]+(?: .*)?|<.*)", each)
        for each in block + re.findall(r"`([^`]+)`", prose)
    ]
    # Without a comment, and without the shell's next command.
    return [re.split(r"(?:^|\s)#|[|;&>]", each[1])[0].strip() for each in found if each]


def commands_in_code(text):
    """Commands that messages quote: 'lungddpm verify --repair'."""
    return re.findall(r"'lungddpm ([a-z][^'\n]*)'", text)


def problem_with(shown):
    """What the command line has against a command; nothing, if it takes it."""
    words = [word for word in shlex.split(shown) if word not in {"…", "..."}]
    command, context = typer.main.get_command(app), None
    # Typer brings its own click.
    while hasattr(command, "get_command"):
        context = command.context_class(command, parent=context)
        if not words or words[0].startswith(("-", "<")):
            return None
        if (found := command.get_command(context, words[0])) is None:
            return f"no command {words[0]}"
        command, words = found, words[1:]
    # Without options it is named, not called.
    if command.name == PASSED_ON or not words or "--help" in words:
        return None
    try:
        given, *_ = command.make_parser(command.context_class(command, parent=context)).parse_args(words)
    except Exception as error:
        return str(error)
    missing = [each.opts[0] for each in command.params if each.required and each.name not in given]
    return f"without {', '.join(missing)}" if missing else None


def problems(files, commands_in):
    shown = [(path, command) for path in files for command in commands_in(path.read_text(encoding="utf-8"))]
    found = {f"{path.name}: lungddpm {command}": problem_with(command) for path, command in shown}
    return len(shown), {command: problem for command, problem in found.items() if problem}


def test_the_docs_show_commands_that_work(repository):
    pages = [repository / "README.md", repository / "CONTRIBUTING.md", *(repository / "docs").rglob("*.md")]
    number, found = problems(pages, commands_in_page)
    assert number > 80
    assert found == {}


def test_messages_show_commands_that_work(repository):
    number, found = problems((repository / "lungddpm").rglob("*.py"), commands_in_code)
    assert number > 15
    assert found == {}


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("synthesize --weights model.safetensors", "without --generator"),
        ("segment plam --arm-folder x", "no command plam"),
        ("plan --nodes 3", "No such option: --nodes"),
        ("verify --repair", None),
    ],
)
def test_what_does_not_work_is_found(command, problem):
    assert (problem_with(command) or "").startswith(problem or "")
    assert bool(problem_with(command)) == bool(problem)
