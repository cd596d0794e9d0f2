"""The batch on a real SLURM: Debian's slurm-wlm with munge, started here on loopback, one job per
encoder and stage.
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from dejavu_utils import store

needs_slurm = pytest.mark.skipif(
    not shutil.which("sbatch") or not shutil.which("munged"),
    reason="no sbatch or munged: Debian and Ubuntu have them in `apt install slurm-wlm munge`",
)
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=teaching Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture
def slurm(tmp_path_factory):
    """Start munged, slurmctld and slurmd of this user's own, and return (environment, folder); stop
    them afterwards.
    """
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    config, memory = (
        folder / "slurm.conf",
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10 >> 20,
    )
    config.write_text(
        CONFIG.format(
            host=host,
            user=getpass.getuser(),
            folder=folder,
            ports=_free_ports(2),
            cores=store.cores(),
            memory=memory,
        )
    )
    srun = (
        folder / "srun"
    )  # Snakemake's plugin drops SLURM_CONF inside a job: a cluster has its file in /etc/slurm
    srun.write_text(f'#!/bin/sh\nSLURM_CONF="{config}" exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    environment = os.environ | {
        "SLURM_CONF": str(config),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    munge = [
        "munged",
        "-F",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    ]
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", host]):
            out = (folder / f"{command[0]}.out").open("wb")
            daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(2)
        _wait_for_the_node(environment, folder)
        yield environment, folder
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _wait_for_the_node(environment, folder):
    for _ in range(60):
        said = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
        )
        if said.stdout.strip() == "idle":
            return
        time.sleep(1)
    logs = "\n".join(
        f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in folder.glob("*.out")
    )
    pytest.fail(f"the node did not come up: {said.stdout} {said.stderr}\n{logs}")


def test_what_a_cluster_would_run_is_known_without_one(tmp_path):
    """Snakemake knows no number of cores there."""
    environment = {"DEJAVU_RUNS": str(tmp_path / "runs"), "PROFILE": "smoke", "DRY": "1"}
    environment |= {"EXECUTOR": "slurm", "P": 'criteria=["vicreg"] rhos=[0.2] epochs=[0,1]'}
    command = [sys.executable, store.PACKAGE.parent / "notebooks" / "figures.py"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "4 encoders to train" in done.stdout and "07_other_measures" in done.stdout


@needs_slurm
@pytest.mark.slow
def test_one_job_per_encoder_and_the_notebooks_after_them(slurm, tmp_path):
    environment, folder = slurm
    root, runs = store.PACKAGE.parent, tmp_path / "runs"
    done = subprocess.run(
        [
            "make",
            "figures",
            "PROFILE=smoke",
            "EXECUTOR=slurm",
            'P=criteria=["vicreg"] rhos=[0.2] epochs=[0,1]',
            "EXECUTOR_FLAGS=--slurm-status-command squeue --slurm-no-account --default-resources "
            "slurm_partition=teaching "
            "mem_mb=4000 runtime=30 --slurm-init-seconds-before-status-checks 5 "
            "--slurm-keep-successful-logs",
        ],
        cwd=root,
        env=environment | {"DEJAVU_RUNS": str(runs)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    encoders = [path for path in (runs / "smoke" / "encoders").iterdir() if path.is_dir()]
    accepted = (folder / "slurmctld.log").read_text().count("_slurm_rpc_submit_batch_job")
    notebooks = {path.stem for path in (runs / "smoke" / "notebooks").glob("*.ipynb")}
    assert notebooks == {path.stem for path in (root / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    jobs = list((runs / "smoke" / "keys" / "jobs").glob("*.done"))
    assert (
        len(jobs) == len([path for path in encoders if not path.name.startswith("finetuned")]) >= 4
    )
    assert accepted == len(jobs) + len(notebooks)
