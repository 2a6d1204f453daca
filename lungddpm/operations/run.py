"""`lungddpm run`: Snakemake behind our own lock, so that the same command always continues.

After a kill -9 Snakemake leaves its own lock and refuses to start. Here, the process that holds `results/.lock` is the
run; a Snakemake lock without such a process is stale and is cleared (see docs/explanation/interruption.md), unless a
Snakemake that was started by hand works in the folder. What runs no job, such as a dry run, takes and clears no lock.
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
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import chain
from pathlib import Path

import psutil

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

_SHOWS = [
    "dryrun", "report", "lint", "summary", "detailed_summary", "list_rules", "list_target_rules", "list_changes",
    "list_input_changes", "list_params_changes", "list_untracked", "list_conda_envs", "dag", "rulegraph", "filegraph",
]  # fmt: skip
"""With these options, Snakemake runs no job."""

_MANY_CORES = 1000
"""More than a job has threads."""
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
    if os.environ.get("NO_COLOR"):
        arguments = [*arguments, "--nocolor"]
    if not _option(arguments, "--snakefile", "-s") and not any(map(Path.exists, SNAKEFILES)):
        arguments = _with_shipped_workflow(arguments, directory)
    options = _options_of_snakemake(arguments)
    if options is None:
        return subprocess.run(_snakemake([*arguments, *targets]), check=False).returncode
    arguments = [*arguments, *_cores(options)]
    _check_names(directory)
    _check_configs(arguments, directory)
    shows = any(getattr(options, name, None) for name in _SHOWS) and not options.report_after_run
    work = _show if shows else _work
    code, messages = work(arguments, targets, directory)
    for message in messages:
        LOG.error("error: %s", message)
    return 2 if messages else code


def _cores(options: argparse.Namespace) -> list[str]:
    """The option for the number of cores, where neither the user nor a profile gives one."""
    if options.cores is None and options.executor not in (None, "local"):
        # They would limit the threads of a cluster's jobs; without them, a dry run shows one thread for each.
        return ["--cores", str(_MANY_CORES)] if options.dryrun else []
    return ["--cores", "all"] if options.cores is options.jobs is None else []


def _options_of_snakemake(arguments: Sequence[str]) -> argparse.Namespace | None:
    """What Snakemake takes the arguments for, those of its profiles included; None if it ends with a message: its
    help, its version, or what is wrong with them."""
    try:
        from snakemake.cli import parse_args
    except ImportError:
        raise _no_snakemake() from None
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            return parse_args(list(arguments))[1]
        except (Exception, SystemExit):  # Snakemake will show it
            return None


def _show(arguments: Sequence[str], targets: Sequence[str], directory: Path) -> tuple[int, list[str]]:
    """Exit code and errors of a Snakemake that makes no output: it does not need the lock, nor touch another's."""
    with tempfile.TemporaryDirectory(dir=_temporary_folder(directory)) as folder, _errors(Path(folder)) as errors:
        command = _snakemake([*arguments, *_forced(directory), *targets])
        code = subprocess.run(command, env=_environment(errors, directory), check=False).returncode
        return code, _messages(errors)


def _work(arguments: Sequence[str], targets: Sequence[str], directory: Path) -> tuple[int, list[str]]:
    """Exit code of a run, and errors of its stages; it holds the lock of the results folder."""
    results = directory / "results"
    _temporary_folder(directory)
    with _lock(results) as lock:
        _check_space(results)
        _date_no_later_than_now(results)
        # Below the run's folder: of those of this machine, jobs on a cluster's nodes see no other.
        with _errors(results) as errors:
            environment = _environment(errors, directory)
            # Snakemake inherits the lock's descriptor: if we are killed, it still counts as the run. Its jobs do not
            # inherit it, so an orphaned job cannot block the next run.
            if _is_locked(directory):
                _check_alone(directory)
                LOG.info("Clearing the lock of an interrupted run.")
                subprocess.run(_snakemake([*arguments, "--unlock", "--quiet"]), env=environment, check=False)
            command = _snakemake([*arguments, "--rerun-incomplete", *_forced(directory), *targets])
            return _supervise(command, environment, lock), _messages(errors)


def _forced(directory: Path) -> list[str]:
    """The option that has damaged files made again, where there are any."""
    damaged = [f"results/{name}" for name in outputs_to_make_again(directory / "results")]
    return ["--forcerun", *damaged] if damaged else []


@contextmanager
def _errors(folder: Path) -> Iterator[Path]:
    """An empty file for the errors of stages; see `ERRORS_VARIABLE`."""
    path = folder.resolve() / ".errors"
    path.write_text("", encoding="utf-8")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _messages(errors: Path) -> list[str]:
    """The errors, each once."""
    return list(dict.fromkeys(errors.read_text(encoding="utf-8").splitlines()))


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
        raise _no_snakemake()
    return [program, *arguments]


def _no_snakemake() -> UserError:
    return UserError("snakemake", "is not installed with this Python", "Run 'make demo', or pip install it.")


def _environment(errors: Path, directory: Path) -> dict[str, str]:
    # Jobs call `lungddpm` by name: this environment's own comes first, activated or not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    caches = _caches_in(directory / ".snakemake" / "cache") if not _can_keep_caches() else {}
    # On a cluster, jobs are `python -m snakemake`, which would import from the working folder first.
    return {**os.environ, "PATH": path, "PYTHONSAFEPATH": "1", ERRORS_VARIABLE: str(errors), **caches}


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


def _is_locked(directory: Path) -> bool:
    """Whether a Snakemake has locked the folder, which may have been killed since."""
    locks = directory / ".snakemake" / "locks"
    return locks.is_dir() and any(locks.iterdir())


def _check_alone(directory: Path) -> None:
    """Refuse to work beside a Snakemake that was started without `lungddpm run`."""
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or []
        is_snakemake = "snakemake" in {Path(word).name for word in words[:3]}
        # Jobs of a cluster are Snakemakes with a mode; those that outlive their run hold no lock.
        if is_snakemake and "--mode" not in words and process.info["cwd"] == str(directory.resolve()):
            raise OutputError(
                directory, f"Snakemake is working in this folder (process {process.pid})", "Wait for it, or end it."
            )


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
