"""Starts trainings: jobs side by side in processes of their own, one job over several devices,
other engines.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dejavu_utils import store
from dejavu_utils.models import engines
from dejavu_utils.models.jobs import Job, load_job, read_log

PARENT = "DEJAVU_PARENT"  # the process that a worker is to end with


def fit(job: Job) -> None:
    """Train one job to its end, with the engine and the number of processes that its recipe names;
    one at a time.
    """
    with store.lock(Path(job.folder) / "training"):
        if job.done():
            return
        if job.recipe.engine == "own" and job.recipe.processes * job.recipe.nodes > 1:
            _run_torchrun(job)
        else:
            engines.load(job.recipe.engine).fit(job)


def torchrun(job: Job, entry: Path) -> list[str]:
    """Return the command that trains one job over its recipe's processes, on its nodes (in a SLURM
    allocation).
    """
    recipe = job.recipe
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(recipe.processes),
    ]
    if recipe.nodes == 1:
        command += ["--standalone"]
    else:  # the first node of the allocation is where they meet
        head = os.environ.get("SLURMD_NODENAME") or os.environ.get("HOSTNAME", "localhost")
        command = [
            "srun",
            "--nodes",
            str(recipe.nodes),
            "--ntasks-per-node",
            "1",
            *command,
            "--nnodes",
            str(recipe.nodes),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{head}:29500",
            "--rdzv-id",
            os.environ.get("SLURM_JOB_ID", "dejavu"),
        ]
    return [*command, "-m", "dejavu_utils.models.train", str(entry)]


def _run_torchrun(job: Job) -> None:
    entry, log = Path(job.folder) / "run.json", Path(job.folder) / "torchrun.log"
    with store.atomic(entry) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(job)))
    with log.open("wb") as output:
        code = subprocess.run(
            torchrun(job, entry),
            stdout=output,
            stderr=output,
            cwd=store.PACKAGE.parent,
            env=os.environ | _threads(job),
        ).returncode
    if code:
        lines = log.read_text(errors="replace").splitlines()
        said = [line for line in lines if "Error: " in line][
            :3
        ]  # torchrun's own summary, at the end, does not say why
        raise RuntimeError(
            f"training over {job.recipe.processes} processes failed, see {log}:\n"
            + "\n".join(said or lines[-15:])
        )


def _threads(job: Job) -> dict[str, str]:
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.recipe.threads))


def fit_all(
    jobs: list[Job],
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Train all jobs, `workers` at a time, each worker a process of its own; those that are done
    cost nothing.

    `workers` defaults to the cores divided by a job's threads; on GPUs to one. `progress(done,
    total, text)` is called about once a second, in epochs of all jobs. RuntimeError carries the
    last lines of a worker that failed; the others' work is kept.
    """
    todo = [job for job in jobs if not job.done()]
    if not todo:
        return
    recipe = todo[0].recipe
    whole = not todo[0].device.startswith("cpu") or recipe.processes > 1 or recipe.engine == "vissl"
    workers = workers or (1 if whole else max(1, store.cores() // recipe.threads))
    if workers == 1 or len(todo) == 1:
        for job in todo:
            if progress:
                progress(*_state(jobs))
            fit(job)
        return
    shares = [todo[i::workers] for i in range(min(workers, len(todo)))]
    running = [_worker(share) for share in shares]
    try:
        while True:
            time.sleep(0.5)
            codes = [process.poll() for process in running]
            if progress:
                progress(*_state(jobs))
            if failed := [share for share, code in zip(shares, codes, strict=True) if code]:
                lines = _log(failed[0]).read_text(errors="replace").strip().splitlines()
                raise RuntimeError("training failed: " + "\n".join(lines[-5:]))
            if None not in codes:
                return
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _state(jobs: list[Job]) -> tuple[int, int, str]:
    """Return the epochs that are done, those that there are, and the losses of running jobs."""
    done = total = 0
    losses = []
    for job in jobs:
        total += max(job.epochs)
        log = read_log(Path(job.folder) / "log.jsonl")
        if job.done():
            done += max(job.epochs)
        elif log:
            done += log[-1]["epoch"]
            losses.append(f"{log[-1]['loss']:.2f}")
    return done, total, " ".join(["loss", *losses]) if losses else ""


def _log(share: list[Job]) -> Path:
    return Path(share[0].folder) / "worker.log"


def _worker(share: list[Job]) -> subprocess.Popen:
    """Start a process that trains these jobs, one after the other; what it says goes to their
    `_log`.
    """
    _log(share).parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "dejavu_utils.models.launch"],
        stdin=subprocess.PIPE,
        stderr=_log(share).open("wb"),
        cwd=store.PACKAGE.parent,
        env=os.environ | _threads(share[0]) | {PARENT: str(os.getpid())},
    )
    process.stdin.write(json.dumps([dataclasses.asdict(job) for job in share]).encode())
    process.stdin.close()
    return process


def here(job: Job) -> Job:
    """Return the job with its device "auto" replaced by what this machine has: CUDA, else the
    CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return dataclasses.replace(job, device=device) if job.device == "auto" else job


if __name__ == "__main__":
    if PARENT in os.environ:
        store.end_with_parent(int(os.environ.pop(PARENT)))
    for each in json.load(sys.stdin):
        fit(here(load_job(each)))
