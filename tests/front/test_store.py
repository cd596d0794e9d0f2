"""store: atomic writes, verified reads, keys, code versions, locks."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from dejavu_utils import store

matplotlib.use("agg")
import matplotlib.pyplot as plt

FRAME = pd.DataFrame(
    {
        "id": ["01", "NA", "null"],
        "value": [0.1, np.nan, 1 / 3],
        "hit": [True, False, True],
        "k": [1, 2, 3],
        "single": np.float32([0.1, 0.3, 7]),
    }
)


def test_import_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; t = time.process_time(); import dejavu_utils as dv; first = "
        "time.process_time() - t\n"
        "dv.store; dv.notebook; assert not {'torch', 'numpy', 'pandas', 'papermill'} & "
        "set(sys.modules)\n"
        "print(first)"
    )
    quickest = min(
        float(
            subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                cwd=store.PACKAGE.parent,
            ).stdout
        )
        for _ in range(2)
    )
    assert quickest < 0.1


def test_public_names_are_lazy_and_an_unknown_one_is_an_attribute_error():
    import dejavu_utils as dv

    assert dv.store is store
    assert callable(dv.start)
    assert {"start", "store", "notebook"} <= set(dir(dv))
    with pytest.raises(AttributeError, match="has no attribute 'strat'"):
        dv.strat  # noqa: B018


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_comes_back_exactly(tmp_path, suffix):
    store.write_table(tmp_path / f"t{suffix}", FRAME, {"seed": 4})
    pd.testing.assert_frame_equal(store.read_table(tmp_path / f"t{suffix}"), FRAME)
    meta = store.verify(tmp_path / f"t{suffix}")
    assert meta["seed"] == 4
    assert meta["rows"] == 3
    assert {"sha256", "bytes", "parameters", "versions", "device", "code", "created"} <= meta.keys()


def test_table_of_another_format_is_refused(tmp_path):
    with pytest.raises(store.StoreError, match=r"\.parquet or \.csv"):
        store.write_table(tmp_path / "t.pkl", FRAME)


def test_tensors_come_back_exactly_also_transposed_and_shared(tmp_path):
    w = torch.randn(3, 4)
    tensors = {
        "w": w,
        "t": w.T,
        "row": w[1],
        "same": w,
        "empty": torch.zeros(0, 2),
        "half": w.bfloat16(),
    }
    store.write_tensors(tmp_path / "w.safetensors", tensors, {"epoch": 2})
    found, meta = store.read_tensors(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert meta["epoch"] == 2


def test_json_makes_numpy_plain_and_nan_null(tmp_path):
    content = {
        "a": np.float32(1.5),
        "b": np.arange(3),
        "c": float("nan"),
        "d": [True, None, 1e-12],
        "e": float("inf"),
    }
    store.write_json(tmp_path / "m.json", content)
    assert store.read_json(tmp_path / "m.json") == {
        "a": 1.5,
        "b": [0, 1, 2],
        "c": None,
        "d": [True, None, 1e-12],
        "e": None,
    }


def test_figures_have_the_same_bytes_at_another_time(tmp_path):
    def draw(name):
        figure, axis = plt.subplots()
        axis.plot(FRAME["k"])
        store.write_figure(tmp_path / name / "score.rho0.5", figure, FRAME, {"seed": 1})
        plt.close(figure)
        return [
            (tmp_path / name / f"score.rho0.5{suffix}").read_bytes()
            for suffix in (".png", ".pdf", ".csv")
        ]

    first = draw("one")
    time.sleep(1.1)  # a date in the file would have a resolution of seconds
    assert draw("two") == first
    assert len(list((tmp_path / "one").glob("*.json"))) == 3


def _write(path):
    if path.suffix == ".safetensors":
        store.write_tensors(path, {"w": torch.ones(64)})
    elif path.suffix == ".json":
        store.write_json(path, {"score": 0.25})
    else:
        store.write_table(path, FRAME)


READ = {
    ".csv": store.read_table,
    ".parquet": store.read_table,
    ".json": store.read_json,
    ".safetensors": store.read_tensors,
}


@pytest.mark.parametrize("suffix", READ)
@pytest.mark.parametrize(
    "damage", ["flip", "cut", "empty", "no sidecar", "bad sidecar", "list sidecar", "missing"]
)
def test_damage_is_one_clear_error(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    _write(path)
    READ[suffix](path)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-3])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no sidecar":
        store.sidecar(path).unlink()
    elif damage == "bad sidecar":
        store.sidecar(path).write_text('{"sha')
    elif damage == "list sidecar":
        store.sidecar(path).write_text("[]")
    else:
        path.unlink()
        with pytest.raises(FileNotFoundError, match="make figures"):
            READ[suffix](path)
        return
    with pytest.raises(store.StoreError, match=rf"a\{suffix}.*again"):
        READ[suffix](path)


def test_every_single_flipped_bit_is_found(tmp_path):
    path = tmp_path / "m.json"
    store.write_json(path, {"score": 0.25})
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(store.StoreError):
            store.verify(path)


def test_an_exception_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.json"
    store.write_json(path, 1)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="stop"), store.artifact(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent  # os.replace is atomic on one file system only
        raise RuntimeError("stop")
    assert store.read_json(path) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_at_fsync_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    store.write_json(path, {"n": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*a\.json.*No space left.*unchanged.*Free some space"
    ):
        store.write_json(path, {"n": 2})
    monkeypatch.undo()
    assert store.read_json(path) == {"n": 1}
    assert not list(tmp_path.glob(".a*"))


def test_a_file_size_limit_keeps_the_old_files(tmp_path):
    code = f"""
import resource, torch, numpy as np, pandas as pd
from pathlib import Path
from dejavu_utils import store
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise, folder = np.random.default_rng(0).random(100_000), Path({str(tmp_path)!r})
for write, name, value in [(store.write_tensors, "a.safetensors", {{"w": torch.from_numpy(noise)}}),
                           (store.write_json, "a.json", noise),
                           (store.write_table, "a.csv", pd.DataFrame({{"x": noise}})),
                           (store.write_table, "a.parquet", pd.DataFrame({{"x": noise}}))]:
    try:
        write(folder / name, value)
    except OSError as error:
        print(error)
"""
    for suffix in READ:
        _write(tmp_path / f"a{suffix}")
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=store.PACKAGE.parent
    )
    for suffix in READ:
        assert (
            f"cannot write {tmp_path}/a{suffix}: File too large. What was there before is unchanged"
            in done.stdout
        )
        READ[suffix](tmp_path / f"a{suffix}")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("step", range(1, 4))
def test_killed_between_any_two_renames_something_valid_is_left(tmp_path, step):
    path = tmp_path / "a.json"
    store.write_json(path, {"n": 1}, {"epoch": 1})
    code = f"""
import os, signal
from dejavu_utils import store
rename, seen = os.replace, []
def replace(*names):
    seen.append(names)
    if len(seen) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)
os.replace = replace
store.write_json({str(path)!r}, {{"n": 2}}, {{"epoch": 2}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=store.PACKAGE.parent)
    assert done.returncode == -9
    n = store.read_json(path)["n"]
    assert n == (1 if step < 3 else 2)
    assert store.verify(path)["epoch"] == n
    store.write_json(path, {"n": 3}, {"epoch": 3})
    assert "previous" not in store.verify(path)


@dataclass
class Settings:
    width: int = 8
    rates: tuple = (0.1, 0.2)


def test_key_depends_on_values_only():
    assert store.key(a=1, b=[2.0, "x"]) == store.key(b=(2, "x"), a=1.0)
    assert store.key(x=np.float64(0.1), y=np.int64(3)) == store.key(x=0.1, y=3)
    assert store.key(s=Settings()) == store.key(s={"width": 8, "rates": [0.1, 0.2]})
    assert store.key(f=Path("a/b")) == store.key(f="a/b")
    assert len({store.key(a=v) for v in (1, True, "1", None, [1], 1.5, {"1": 1}, -1)}) == 8
    assert store.key(a=0.1 + 0.2) != store.key(a=0.3)
    assert (
        store.key(a=1, b=[2.0, "ä"])
        == hashlib.sha256(b'{"a":1,"b":[2,"\\u00e4"]}').hexdigest()[:16]
    )


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), len])
def test_key_refuses_what_has_no_stable_text(value):
    with pytest.raises(store.StoreError):
        store.key(a=value)


def test_code_version_of_a_module_is_that_of_all_it_imports(tmp_path, monkeypatch):
    def version(*modules, **sources):
        package = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "dejavu_utils"
        (package / "room").mkdir(parents=True)
        for name, source in sources.items():
            (package / "room" / f"{name}.py").write_text(source)
        monkeypatch.setattr(store, "PACKAGE", package)
        store.code_version.cache_clear()
        return store.code_version(*modules)

    one, two = "dejavu_utils.room.one", "dejavu_utils.room.two"
    lazy = "def f():\n    from dejavu_utils.room import two\n    return two.x"
    plain = version(one, one=lazy, two="x = 1", three="x = 1")
    assert version(one, one=lazy, two="x = 1  # one", three="x = 2") == plain
    assert version(one, one=lazy, two="x = 2", three="x = 1") != plain
    assert version(two, one=lazy, two="x = 1") != plain
    assert version(one, two, one=lazy, two="x = 1") == plain == version(one=lazy, two="x = 1")
    assert version(one=lazy, two="x = 1", three="x = 1") != plain
    with pytest.raises(store.StoreError, match="no module __main__ in"):
        store.code_version("__main__")
    store.code_version.cache_clear()


def test_lock_makes_two_processes_take_turns(tmp_path):
    code = f"""
import time
from pathlib import Path
from dejavu_utils import store
for _ in range(10):
    with store.lock({str(tmp_path / "k")!r}):
        n = int(Path({str(tmp_path / "n")!r}).read_text())
        time.sleep(0.005)
        Path({str(tmp_path / "n")!r}).write_text(str(n + 1))
"""
    (tmp_path / "n").write_text("0")
    jobs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=store.PACKAGE.parent) for _ in range(2)
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    assert (tmp_path / "n").read_text() == "20"


def test_lock_says_whom_it_waits_for_and_is_freed_by_death(tmp_path):
    code = (
        "import sys, time\nfrom dejavu_utils import store\n"
        f"with store.lock({str(tmp_path / 'k')!r}):\n    print('held', flush=True)\n"
        "    time.sleep(float(sys.argv[1]))"
    )

    def hold(seconds):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=store.PACKAGE.parent,
        )

    first = hold(60)
    assert first.stdout.readline() == "held\n"
    second = hold(0)
    assert (
        second.stdout.readline()
        == f"waiting for k: process {first.pid} on {os.uname().nodename} is working on it\n"
    )
    first.kill()
    assert second.wait(10) == 0
    first.wait()
    first.stdout.close()
    second.stdout.close()


def test_root_and_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_ROOT", str(tmp_path))
    with pytest.raises(store.StoreError, match="has no notebooks/ folder"):
        store.root()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.delenv("DEJAVU_RUNS", raising=False)
    assert store.runs("smoke") == tmp_path / "runs" / "smoke"
    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path / "elsewhere"))
    assert store.runs("smoke") == tmp_path / "elsewhere" / "smoke"
