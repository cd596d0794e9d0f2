"""`make figures`: runs the notebooks that are out of date, in order, by Snakemake.

It reads PROFILE, P, DRY, EXECUTOR, EXECUTOR_FLAGS and CORES from the environment, as `make` passes
them on. Nothing here imports torch: an unchanged batch ends in seconds.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import batch

from dejavu_utils import store
from dejavu_utils.parameters import ParameterError

HERE = Path(__file__).resolve().parent
PATIENCE = 5.0  # seconds that children have to end before they are killed


def side_by_side() -> int:
    """Return how many notebooks run at once unless CORES says it: each has one thread of its own,
    so two where there are two cores; one where they would share a GPU.
    """
    return 1 if shutil.which("nvidia-smi") else min(2, store.cores())


class Stopped(Exception):
    """SIGTERM, SIGHUP or Ctrl-C has come."""


def command(stale: list[str], profile: str, environment: dict[str, str]) -> list[str]:
    """Return the Snakemake command that runs the notebooks `stale`.

    They are forced: the store's keys have decided, by content, and dates of files have no say.
    """
    words = [sys.executable, "-m", "snakemake", "--snakefile", str(HERE / "Snakefile")]
    words += ["--rerun-triggers", "mtime", "--rerun-incomplete", "--nolock", "--drop-metadata"]
    words += ["--forcerun", *stale]

    executor = environment.get("EXECUTOR", "")
    if executor:
        words += ["--executor", executor, "--jobs", "32", "--latency-wait", "60"]
        words += shlex.split(environment.get("EXECUTOR_FLAGS", ""))
    else:
        words += ["--cores", environment.get("CORES") or str(side_by_side())]

    if environment.get("DRY"):
        words += ["--dry-run", "--quiet", "host", "progress", "rules", "reason"]
    elif executor:
        words += ["--quiet", "host", "progress"]  # what a cluster refuses, nobody else says
    else:
        words += ["--quiet", "all"]
    settings = [f"profile={profile}", f"fan={executor}", f"stale={' '.join(stale)}"]
    return [*words, "--config", *settings]


def end(process: psutil.Process) -> None:
    """End a process and all that it has started, within some seconds."""
    everyone = [process, *process.children(recursive=True)]
    for one in everyone:
        try:
            one.terminate()
        except psutil.NoSuchProcess:
            pass

    _, alive = psutil.wait_procs(everyone, PATIENCE)
    for one in alive:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass


def supervised(words: list[str]) -> int:
    """Return the exit status of a command; Stopped, after all its children have ended, if a signal
    comes.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)

    # A session of its own: Ctrl-C in a terminal reaches this process alone, which ends the others.
    process = psutil.Popen(words, start_new_session=True)
    try:
        return process.wait()
    except Stopped:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        end(process)
        raise


def figures(environment: dict[str, str]) -> int:
    """Return the exit status of `make figures`: 0 if everything that was announced has run."""
    profile = environment.get("PROFILE") or "laptop"
    typed = environment.get("P", "")
    dry = bool(environment.get("DRY"))
    overrides = batch.parse_overrides([], typed)

    if dry:
        print(batch.plan(profile, overrides))
    if environment.get("EXECUTOR"):
        cluster = [sys.executable, str(HERE / "cluster.py")]
        status = subprocess.run([*cluster, f"--profile={profile}", f"--set={typed}"]).returncode
        if status:
            return status

    stale = batch.write_keys(profile, overrides)
    if os.environ.get("VERIFY") == "full":
        del os.environ["VERIFY"]  # once is enough
    print(f"to run: {', '.join(stale)}" if stale else "up to date", flush=True)
    if stale:
        status = supervised(command(stale, profile, environment))
        if status:
            return status
    if dry:
        return 0

    left = batch.write_keys(profile, overrides) if stale else []
    if left:
        raise ParameterError(
            f"{', '.join(left)} should have run and is not up to date: was a notebook, a table or "
            "the code changed meanwhile? Run `make figures` again."
        )

    _repair_pages(profile)
    found = batch.numbers(profile)
    if found:
        print(found)
    folder = os.path.relpath(store.runs(profile), store.root())
    print(f"the figures are in {folder}/figures/; `make report PROFILE={profile}` writes pages")
    return 0


def _repair_pages(profile: str) -> None:
    """Make the pages of `make report` again if one of them is damaged."""
    pages = sorted((store.runs(profile) / "report").glob("*.html"))
    whole = [store.intact(page) for page in pages]
    if not all(whole) and os.environ.get("VERIFY") != "0":
        subprocess.run([sys.executable, str(HERE / "site" / "pages.py"), profile], check=False)


def main() -> int:
    """Return the exit status, after saying in one line what went wrong."""
    store.end_with_parent(os.getppid())
    began = time.monotonic()
    try:
        return figures(dict(os.environ))
    except Stopped as signal_name:
        again = " ".join(["make figures", *(shlex.quote(word) for word in _given())])
        print(
            f"\nstopped by {signal_name} after {time.monotonic() - began:.0f} s. Every finished "
            f"notebook and encoder is kept, and a training up to its last saved state: go on with "
            f"`{again}`.",
            file=sys.stderr,
        )
        return 130
    except (ParameterError, store.StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _given() -> list[str]:
    names = ("PROFILE", "P", "EXECUTOR")
    return [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]


if __name__ == "__main__":
    sys.exit(main())
