"""How fast this machine trains, embeds, searches and samples, each next to what limits it: `make
bench` prints a table.

    .venv/bin/python tests/bench/bench.py [knn …] [--set '{"turns": 3}']

measures some parts, with other sizes, as JSON.

Not a test: speed depends on what else runs. `make reference PIECES=bench` keeps the same table in
an archive. `share` is the speed as a share of the limit's; in the k-NN rows a value is seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import bench_common  # noqa: E402  the paths come first
import bench_forward  # noqa: E402
import bench_knn  # noqa: E402
import bench_scale  # noqa: E402
import bench_training  # noqa: E402

PARTS = {
    "training": bench_training.rows,
    "embedding": bench_forward.embedding,
    "knn": bench_knn.rows,
    "sampling": bench_forward.sampling,
    "scale": bench_scale.rows,
}


def sizes(device: str) -> dict:
    """Return what is measured on a device: on a CPU what the notebooks do, on a GPU something
    larger.
    """
    from dejavu_utils import store
    from dejavu_utils.models import methods

    cores = store.cores()
    common = {
        "steps": 6,
        "repeats": 3,
        "criteria": list(methods.METHODS),
        "turns": 5,
        "k": 20,
        "threads": cores,
        "scale": {
            "recipe": {},
            "images": [600, 6_000, 60_000],
            "attacks": [
                [1_000, 10_000],
                [1_000, 100_000],
                [1_000, 1_000_000],
                [10_000, 10_000],
                [100_000, 10_000],
            ],
            "width": 512,
        },
    }
    if device == "cuda":
        return common | {
            "recipe": {
                "encoder": "resnet18-s",
                "size": 64,
                "batch": 512,
                "projector": "2048-2048-2048",
            },
            "side": 64,
            "grid": [
                {"precision": p, "compile": c} for p in ("fp32", "bf16") for c in (False, True)
            ],
            "beside": False,
            "encoders": [
                ["resnet18-s", "2048-2048-2048", 64, 20000],
                ["resnet101", "8192-8192-8192", 224, 2000],
            ],
            "shapes": [[2000, 20000, 512], [20000, 100000, 2048], [100000, 500000, 8192]],
            "turns": 3,
            "memory": False,
            "decoder": {
                "size": 64,
                "channels": [128, 256, 256],
                "blocks": [2, 2, 2],
                "attention": [16],
                "steps": 8,
                "guidance": 3.0,
                "pictures": 1024,
                "batch": 128,
            },
        }
    grid = [
        {"threads": t, "precision": p} for t in dict.fromkeys((1, cores)) for p in ("fp32", "bf16")
    ]
    return common | {
        "recipe": {},
        "side": 48,
        "beside": True,
        "grid": [
            *grid,
            {"encoder": "small8", "projector": "32-32-32", "threads": cores},
            {"compile": True},
        ],
        "encoders": [["patch64", "512-512-512", 32, 2000]],
        "memory": True,
        "shapes": [[600, 2000, 512], [2000, 20000, 512], [500, 5000, 2048], [5000, 50000, 256]],
        "decoder": {
            "size": 32,
            "steps": 10,
            "guidance": 2.0,
            "pictures": 64,
            "batch": 64,
            "channels": [64, 192],
            "blocks": [1, 2],
        },
    }


def rows(given: dict | None = None, parts=tuple(PARTS)):
    """Return the table of all `parts`; `given` replaces some of `sizes`. Each row is printed when
    it is measured.
    """
    import pandas as pd
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    known, before = sizes(device), torch.get_num_threads()
    if unknown := set(given or {}) - set(known):
        raise SystemExit(
            f"error: bench has no size {', '.join(sorted(unknown))}; there are: {', '.join(known)}"
        )
    print(
        f"{bench_common.where(device)}, torch {torch.__version__}\n{bench_common.HEADER}",
        flush=True,
    )
    try:
        found = [row for part in parts for row in PARTS[part](device, known | (given or {}))]
    finally:
        torch.set_num_threads(before)
    return pd.DataFrame(found, columns=bench_common.COLUMNS)


def main() -> None:
    """Print the table, and how much memory this process took."""
    import resource

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar=" ".join(PARTS))
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        sys.exit(f"error: no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    rows(options.set, options.parts or tuple(PARTS))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
