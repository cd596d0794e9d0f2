"""Signals: whatever ends `make figures` ends all that it has started, and says how to go on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from dejavu_utils import store
from dejavu_utils.models import jobs, train
from dejavu_utils.models.jobs import read_log

SECONDS = 10.0  # that all children may take to end


def _family(process):
    me = psutil.Process(process.pid)
    return [me, *me.children(recursive=True)]


def _runs(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _alive(processes):
    return [one for one in processes if _runs(one)]


def _gone(processes, seconds):
    """Return the commands of the processes that are still there after so many seconds, and kill
    them.
    """
    until = time.monotonic() + seconds
    while _alive(processes) and time.monotonic() < until:
        time.sleep(0.1)
    left = _alive(processes)
    names = [one.cmdline() for one in left]
    for one in left:
        one.kill()
    return names


def _until(condition, process, seconds=300):
    """Wait for a condition; of a process for which it never comes true, leave nothing behind."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            for one in _family(process):
                one.kill()
            pytest.fail("it never came to that")
        time.sleep(0.1)


@pytest.mark.parametrize(
    "name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow), "SIGKILL"]
)
def test_a_signal_to_make_ends_everything(clone, name):
    """To make alone, as `kill` does it, but Ctrl-C to its group, as a terminal does.

    A make that was killed cannot say anything.
    """
    there = clone.root / "there"
    sleeps = f"import pathlib, time; pathlib.Path({str(there)!r}).touch(); time.sleep(120)"
    clone.add("01_training", sleeps)
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    process = subprocess.Popen(
        ["make", "figures", "PROFILE=tiny"],
        cwd=clone.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _until(there.exists, process)
    family = _family(process)
    assert any("ipykernel" in " ".join(one.cmdline()) for one in family)

    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, name))
    left = _gone(family, SECONDS)
    _, said = process.communicate(timeout=30)
    assert not left
    if name != "SIGKILL":
        assert "go on with `make figures PROFILE=tiny`" in said
        assert process.returncode != 0


@pytest.mark.parametrize("delay", [0.3, 8.0])  # while the worker imports torch; while it trains
def test_a_worker_ends_with_the_process_that_started_it(tmp_path, delay):
    source = tmp_path / "pixels.safetensors"
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    store.write_tensors(source, {"pixels": pixels, "labels": torch.arange(64) % 4})
    small = train.Recipe(encoder="small4", projector="16-16-8", batch=16, constants={})
    todo = []
    for i in range(2):
        folder = str(tmp_path / f"job{i}")
        todo.append(jobs.Job(str(source), folder, small, [0, 100_000], "0/A", "cpu", 4))

    text = json.dumps([dataclasses.asdict(job) for job in todo])
    code = (
        "import json, sys; from dejavu_utils.models import jobs, launch; "
        "launch.fit_all([jobs.load_job(each) for each in json.load(sys.stdin)], workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, cwd=store.PACKAGE.parent
    )
    process.stdin.write(text)
    process.stdin.close()
    _until(lambda: len(_family(process)) == 3, process)
    if delay > 1:
        _until(lambda: read_log(f"{todo[0].folder}/log.jsonl"), process)
    else:
        time.sleep(delay)

    workers = _family(process)[1:]
    process.kill()
    process.wait()
    assert not _gone(workers, 60)  # importing torch takes its time on a busy machine
    if delay < 1:
        assert not any(read_log(f"{job.folder}/log.jsonl") for job in todo)
