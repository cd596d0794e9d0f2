"""How cost grows: training with the number of pictures, the attack with public and attacked images.

Not a test: speed depends on what else runs. Each row is measured in a process of its own, so that
its memory is its own; GiB is the largest size of that process, the data included. Training should
cost the same for each picture whatever the set; the attack should grow in proportion, and its
memory with the embeddings alone: distances are looked at in tiles.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import bench_common

CLASSES = 100


def training(images: int, recipe: dict, device: str, sizes: dict) -> float:
    """Return images/s of an epoch of VICReg on so many random pictures held as uint8."""
    import torch

    from dejavu_utils.models import pairs, train

    chosen = pairs.recipe("vicreg", recipe)
    torch.set_num_threads(chosen.threads)
    side = sizes["side"]
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
    labels = torch.arange(images) % CLASSES
    run = train.Training(pixels, chosen, 1000, "bench", device, labels, CLASSES)
    took = bench_common.best(run.run_epoch, device, 1)
    return (images // chosen.batch) * chosen.batch / took


def attack(attacked: int, public: int, width: int, device: str, sizes: dict) -> float:
    """Return seconds of the attack on random embeddings: neighbours, votes, confidence."""
    import torch

    from dejavu_utils.attack import inference

    torch.set_num_threads(sizes["threads"])
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(attacked, width, generator=generator).to(device)
    bank = torch.randn(public, width, generator=generator).to(device)
    labels = torch.arange(public) % CLASSES

    began = time.perf_counter()
    inference.infer(queries, bank, labels.numpy(), sizes["k"], CLASSES)
    return time.perf_counter() - began


def alone(call: str, device: str, sizes: dict) -> dict:
    """Return value and GiB of a call of this module in a process of its own."""
    code = (
        "import json, resource, sys; sys.path[:0] = ['.', 'tests/bench']; import bench_scale as b\n"
        "device, sizes = sys.argv[1], json.loads(sys.argv[2])\n"
        f"print(b.{call}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    command = [sys.executable, "-c", code, device, json.dumps(sizes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed: too little memory"])[-1])
    value, gib = map(float, done.stdout.split())
    return {"value": value, "gib": gib}


def rows(device: str, sizes: dict) -> list[dict]:
    """Return a row for each number of `sizes["scale"]`: pictures, and attacked x public images."""
    scale = sizes["scale"]
    found = []
    for images in scale["images"]:
        call = f"training({images}, {scale['recipe']}, device, sizes)"
        how = ("images/s", device, "auto")
        found.append(
            bench_common.row("scale", f"train on {images:,}", *how, alone, call, device, sizes)
        )
    for attacked, public in scale["attacks"]:
        call = f"attack({attacked}, {public}, {scale['width']}, device, sizes)"
        what = f"attack {attacked:,} with {public:,}"
        found.append(
            bench_common.row("scale", what, "s", device, "float32", alone, call, device, sizes)
        )
    return found
