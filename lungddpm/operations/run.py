"""`lungddpm run`: Snakemake behind our own lock, so that the same command always continues.

After a kill -9 Snakemake leaves its own lock and refuses to start. Here, the process that holds `results/.lock` is the
run; a Snakemake lock without such a process is stale and is cleared (see docs/explanation/interruption.md).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from lungddpm import __version__
from lungddpm.config.loading import parse_yaml, read_values
from lungddpm.core.errors import ConfigError, OutputError, UserError, from_os_error
from lungddpm.core.locks import PATIENCE_SECONDS, FileLock
from lungddpm.core.progress import LOG
from lungddpm.core.shipped import default_config, shipped_folder
from lungddpm.operations.verify import outputs_to_make_again

ERRORS_VARIABLE = "LUNGDDPM_ERRORS"
"""Names a file to which stages append user errors, so that `run` can repeat them at the end, where they are seen."""

SNAKEFILES = [Path("Snakefile"), Path("snakefile"), Path("workflow/Snakefile"), Path("workflow/snakefile")]
"""Where Snakemake looks for the workflow."""

CONFIG_OPTION = "--configfile"

_LEAST_FREE_BYTES = 100 * 2**20
"""With less, Snakemake itself could not keep its records."""


def run_snakemake(arguments: Sequence[str]) -> int:
    """Run snakemake with these arguments while holding the lock of the results folder.

    Returns:
        Snakemake's exit code; 2 if a stage rejected the user's input.

    Raises:
        OutputError: another run holds the folder, or the folder cannot be written.
        UserError: a folder name that Snakemake cannot handle, or a config file that would run code.
    """
    directory = _option(arguments, "--directory", "-d") or Path(".")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, targets = _with_config_options_once(arguments[:end]), arguments[end:]
    if not {"--cores", "-c", "--jobs", "-j", "--help", "-h", "--version", "-v"} & {a.split("=")[0] for a in arguments}:
        arguments = [*arguments, "--cores", "all"]
    if os.environ.get("NO_COLOR"):
        arguments = [*arguments, "--nocolor"]
    if not _option(arguments, "--snakefile", "-s") and not any(map(Path.exists, SNAKEFILES)):
        arguments = _with_shipped_workflow(arguments, directory)
    _check_names(directory)
    _check_configs(arguments, directory)
    with (
        _lock(directory / "results") as lock,
        tempfile.NamedTemporaryFile("r", encoding="utf-8", dir=_temporary_folder(directory)) as problems,
    ):
        environment = _environment(problems.name, directory)
        _check_space(directory / "results")
        _date_no_later_than_now(directory / "results")
        # Snakemake inherits the lock's descriptor: if we are killed, it still counts as the run. Its jobs do not
        # inherit it, so an orphaned job cannot block the next run.
        if _has_stale_lock(directory):
            LOG.info("Clearing the lock of an interrupted run.")
            subprocess.run(_snakemake([*arguments, "--unlock", "--quiet"]), env=environment, check=False)
        damaged = [f"results/{name}" for name in outputs_to_make_again(directory / "results")]
        forced = ["--forcerun", *damaged] if damaged else []
        code = _supervise(_snakemake([*arguments, "--rerun-incomplete", *forced, *targets]), environment, lock)
        messages = list(dict.fromkeys(problems.read().splitlines()))
    for message in messages:
        LOG.error("error: %s", message)
    return 2 if messages else code


def _with_shipped_workflow(arguments: Sequence[str], directory: Path) -> list[str]:
    """The arguments, with the workflow and default profile of the package, and this folder's config."""
    shipped, own = shipped_folder(), Path("config.yaml")
    LOG.info("No Snakefile in this folder: running the workflow of lungddpm %s", __version__)
    added = ["--snakefile", str(shipped / "workflow" / "Snakefile")]
    if _option(arguments, "--workflow-profile") is None and not Path("profiles/default").exists():
        added += ["--workflow-profile", str(shipped / "profiles" / "default")]
    arguments = [*added, *arguments]
    if not own.exists():
        LOG.info("Config: %s; 'lungddpm init' copies it for editing", default_config(directory))
    elif directory.resolve() != Path.cwd():
        # Snakemake only looks for it in its working folder.
        return _with_config_first(own, arguments)
    return arguments


def _with_config_first(path: Path, arguments: list[str]) -> list[str]:
    """The arguments, the first of which is an option, with a config file before those that are given."""
    if CONFIG_OPTION in arguments:
        place = arguments.index(CONFIG_OPTION) + 1
        return [*arguments[:place], str(path), *arguments[place:]]
    return [CONFIG_OPTION, str(path), *arguments]


def _with_config_options_once(arguments: Sequence[str]) -> list[str]:
    """The arguments with all config files after one option, and all values of the config after another.

    Of a repeated option, Snakemake uses only the last.
    """
    given, others = _config_options(arguments)
    files = [CONFIG_OPTION, *chain(*given.configfile)] if given.configfile else []
    values = ["--config", *chain(*given.config)] if given.config else []
    return [*others, *files, *values]


def _config_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`configfile` and `config`, a list per occurrence of the option; and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(CONFIG_OPTION, "--configfiles", nargs="+", action="append", default=[])
    parser.add_argument("--config", "-C", nargs="*", action="append", default=[])
    return parser.parse_known_args(list(arguments))


def report_error(error: UserError) -> None:
    """Leave a message for `run_snakemake`, if it is listening."""
    if path := os.environ.get(ERRORS_VARIABLE):
        with suppress(OSError), Path(path).open("a", encoding="utf-8") as file:
            file.write(" ".join(str(error).split()) + "\n")


def offer_own_programs() -> None:
    """Let jobs find `lungddpm` beside this Python where no environment is activated; an activated one comes first."""
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    # See `_environment`.
    os.environ["PYTHONSAFEPATH"] = "1"


def _snakemake(arguments: Sequence[str]) -> list[str]:
    beside_python = Path(sys.executable).with_name("snakemake")
    program = str(beside_python) if beside_python.exists() else shutil.which("snakemake")
    if program is None:
        raise UserError("snakemake", "is not installed with this Python", "Run 'make demo', or pip install it.")
    return [program, *arguments]


def _environment(problems: str, directory: Path) -> dict[str, str]:
    # Jobs call `lungddpm` by name: this environment's own comes first, activated or not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    caches = _caches_in(directory / ".snakemake" / "cache") if not _can_keep_caches() else {}
    # On a cluster, jobs are `python -m snakemake`, which would import from the working folder first.
    return {**os.environ, "PATH": path, "PYTHONSAFEPATH": "1", ERRORS_VARIABLE: problems, **caches}


def _can_keep_caches() -> bool:
    """Whether the cache folder that Snakemake requires, and other libraries use, is writable."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "snakemake")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        LOG.warning("%s is not writable (%s): using .snakemake/cache of the run", folder.parent, error.strerror)
        return False


def _caches_in(folder: Path) -> dict[str, str]:
    """Environment variables that move the caches of libraries into a folder; existing ones are kept."""
    folder = folder.resolve()
    own = {"MPLCONFIGDIR": "matplotlib", "NUMBA_CACHE_DIR": "numba", "TRITON_CACHE_DIR": "triton"}
    for name in own.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    unset = {variable: str(folder / name) for variable, name in own.items() if variable not in os.environ}
    return {"XDG_CACHE_HOME": str(folder), **unset}


def _temporary_folder(directory: Path) -> str:
    """The folder for temporary files, here and in processes that this one starts; the run's own if there is none."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        folder = (directory / ".snakemake" / "tmp").resolve()
        LOG.warning("No temporary folder is writable: using .snakemake/tmp of the run")
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        return tempfile.tempdir


@contextmanager
def _lock(results: Path) -> Iterator[FileLock]:
    try:
        lock = FileLock(results / ".lock")
    except OSError as error:
        raise from_os_error(error) or error from error
    try:
        if not lock.take(PATIENCE_SECONDS):
            raise OutputError(
                results, "another run is working in this folder", "Wait for it, or use another --directory."
            )
        yield lock
    finally:
        lock.release()


def _check_names(directory: Path) -> None:
    for folder in (Path.cwd(), directory.resolve()):
        if braces := {"{", "}"} & set(str(folder)):
            raise UserError(
                folder, f"has '{min(braces)}' in its path, which Snakemake treats as a wildcard", "Use another folder."
            )


def _check_configs(arguments: Sequence[str], directory: Path) -> None:
    """Reject values that Snakemake would drop without a word, and config files that it would execute.

    A config file from somebody else must not run code.
    """
    given, _ = _config_options(arguments)
    for path in [Path("config.yaml"), directory / "config.yaml", *map(Path, chain(*given.configfile))]:
        if path.is_file() and "__use_yte__" in read_values(path):
            raise ConfigError(
                path, "has the key __use_yte__, with which Snakemake runs code in the file", "Write plain values."
            )
    for entry in chain(*given.config):
        key, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError("--config", f"{entry} is not KEY=VALUE", "Pass files with --configfile.")
        if value.lstrip().startswith("{"):
            parse_yaml(value, f"--config {key}")


def _check_space(results: Path) -> None:
    if (free := shutil.disk_usage(results).free) < _LEAST_FREE_BYTES:
        raise OutputError(
            results,
            f"only {free / 2**20:.0f} MiB are free, but a run needs {_LEAST_FREE_BYTES / 2**20:.0f} MiB to start",
            "Free some space, or use another --directory.",
        )


def _date_no_later_than_now(results: Path) -> None:
    """Set time stamps in the future (after the clock was set back) to the present; their order is kept.

    Snakemake fails, and deletes its output, if an output is older than its input.
    """
    (results / ".lock").touch()
    now = (results / ".lock").stat().st_mtime_ns  # the disk's clock, which may be another machine's
    ahead = {}
    for path in results.rglob("*"):
        with suppress(FileNotFoundError):  # a job that outlived its Snakemake may still be running
            if (date := path.lstat().st_mtime_ns) > now:
                ahead[path] = date
    if not ahead:
        return
    LOG.warning("%d files had future time stamps, such as %s: they were set to now.", len(ahead), next(iter(ahead)))
    microseconds_ago = {date: place for place, date in enumerate(sorted(set(ahead.values()), reverse=True))}
    for path, date in ahead.items():
        with suppress(FileNotFoundError):
            os.utime(path, ns=(now - 1000 * microseconds_ago[date],) * 2, follow_symlinks=False)


def _has_stale_lock(directory: Path) -> bool:
    locks = directory / ".snakemake" / "locks"
    return locks.is_dir() and any(locks.iterdir())


def _supervise(command: Sequence[str], environment: dict[str, str], lock: FileLock) -> int:
    """Run the command in its own process group; forward signals; leave no orphans if it is killed."""
    process = subprocess.Popen(command, env=environment, process_group=0, pass_fds=(lock.descriptor,))
    lock.share_with(process.pid)

    def forward(number: int, _frame: object) -> None:
        # To the whole group, like a terminal on Ctrl-C: Snakemake alone would wait hours for a training job.
        os.killpg(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    code = process.wait()
    if code < 0:
        LOG.error("snakemake was killed by signal %d; ending its jobs. The same command continues.", -code)
    # Its jobs if it was killed; otherwise remains of a killed job, such as nnU-Net's loaders, which would wait forever.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return 128 - code if code < 0 else code


def _option(arguments: Sequence[str], *names: str) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest="value", type=Path)
    return parser.parse_known_args(list(arguments))[0].value
