"""Starting trainings: one job over two processes, the command for a cluster, what a plan says."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from dejavu_utils import store
from dejavu_utils.models import launch, pairs, train
from dejavu_utils.models.jobs import read_log

TINY = train.Recipe(
    encoder="small4",
    projector="16-16-16",
    batch=8,
    precision="fp32",
    constants={},
    sync_bn=True,
    views={"scale_min": 0.04, "strength": 0.4, "blur": 0.0},
)


def _job(tmp_path, name, recipe):
    source = tmp_path / "pixels.safetensors"
    if not source.exists():
        pixels = torch.randint(
            0, 256, (16, 3, 48, 48), dtype=torch.uint8, generator=train.stream(0, "pixels")
        )
        store.write_tensors(source, {"pixels": pixels, "labels": torch.arange(16) % 4})
    return train.Job(str(source), str(tmp_path / name), recipe, [0, 2], "0/A", classes=4)


def test_two_processes_train_what_one_does(tmp_path):
    one = _job(tmp_path, "one", TINY)
    two = _job(tmp_path, "two", dataclasses.replace(TINY, processes=2))
    launch.fit_all([one, two], workers=1)
    losses = [[line["loss"] for line in read_log(f"{job.folder}/log.jsonl")] for job in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    weights = [store.read_tensors(job.checkpoint(2))[0] for job in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0.02, atol=2e-3, msg=name)


def test_a_job_that_another_process_trains_is_waited_for_and_not_trained_again(tmp_path):
    job = _job(tmp_path, "same", TINY)
    with store.lock(tmp_path / "same" / "training"):  # this process is the other one
        worker = subprocess.Popen(
            [sys.executable, "-u", "-m", "dejavu_utils.models.launch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=store.PACKAGE.parent,
            text=True,
        )
        worker.stdin.write(json.dumps([dataclasses.asdict(job)]))
        worker.stdin.close()
        assert f"process {os.getpid()}" in worker.stdout.readline()
        assert not job.checkpoint(0).exists()
        train.fit(job)
    written = [job.checkpoint(epoch).stat().st_mtime_ns for epoch in (0, 2)]
    assert worker.wait() == 0
    assert [job.checkpoint(epoch).stat().st_mtime_ns for epoch in (0, 2)] == written


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_reported(tmp_path):
    job = _job(tmp_path, "bad", dataclasses.replace(TINY, processes=2, batch=7))
    with pytest.raises(
        RuntimeError, match=r"(?s)over 2 processes failed.*torchrun.log.*cannot be shared by 2"
    ):
        launch.fit(job)


def test_a_failure_in_torchrun_is_reported(tmp_path, monkeypatch):
    """Its own summary, at the end, does not say why."""
    says = "echo first; echo ValueError: what a process said >&2; echo '== summary =='; exit 1"
    monkeypatch.setattr(launch, "torchrun", lambda job, entry: ["sh", "-c", says])
    job = _job(tmp_path, "bad", dataclasses.replace(TINY, processes=2))
    with pytest.raises(
        RuntimeError,
        match=r"over 2 processes failed, see .*torchrun.log:\nValueError: what a.*said$",
    ):
        launch.fit(job)


def test_command_on_several_nodes(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = _job(tmp_path, "many", dataclasses.replace(TINY, processes=8, nodes=4))
    command = launch.torchrun(job, tmp_path / "run.json")
    assert command[:5] == ["srun", "--nodes", "4", "--ntasks-per-node", "1"]
    text = " ".join(command)
    for part in (
        "--nproc-per-node 8",
        "--nnodes 4",
        "--rdzv-endpoint node1:29500",
        "--rdzv-id 7",
        "-m dejavu_utils.models.train",
    ):
        assert part in text


def test_plan_counts_encoders_steps_and_arithmetic():
    params = {
        "dataset": "scenes",
        "seeds": [0, 1],
        "rhos": [0.2, 0.0],
        "criteria": ["vicreg", "supervised"],
        "sizes": {"classes": 10, "attacked": 30, "shared": 2},
        "epochs": [0, 5, 10],
        "recipe": {"batch": 50},
    }
    table = pairs.plan(params).set_index("criterion")
    assert table["encoders"].to_dict() == {
        "vicreg": 8,
        "supervised": 4,
    }  # each seed: two rhos, one rho; A and B
    assert table["steps"].to_dict() == {"vicreg": 60, "supervised": 60}
    per_encoder = table["exaflop"] / table["encoders"]
    assert per_encoder["vicreg"] == pytest.approx(
        2 * per_encoder["supervised"]
    )  # two views against one
    by_hand = 2 * 3 * 32 * 9 * 16 * 16  # the first convolution alone, two operations a weight
    assert per_encoder["supervised"] * 1e18 / (60 * 50 * 3) > by_hand
