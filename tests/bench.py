"""How fast this machine trains, embeds and searches, each next to what limits it: `make bench` prints tables.

Not a test: speed depends on what else runs. Every figure is the best of several runs after a warm-up.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    import resource

    import bench_knn
    import bench_training

    bench_training.table()
    bench_knn.table()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
