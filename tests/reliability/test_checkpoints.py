"""Checkpoints that are damaged, hostile or odd end in an encoder or in one StoreError.

Each case is a format, a mutation and a seed; a failure prints all three, and
`judge(make(format, mutation, seed, folder))` repeats it.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import signal
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dejavu_utils import limited, store
from dejavu_utils.models import checkpoint_files, external, own_format
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.recipe import Recipe

_found = importlib.util.spec_from_file_location(
    "checkpoint_mutations", Path(__file__).with_name("checkpoint_mutations.py")
)
mutations = importlib.util.module_from_spec(_found)
_found.loader.exec_module(mutations)

SMALL = "timm:vit_tiny_patch16_224:img_size=32,depth=1,embed_dim=12,num_heads=2"
GIB = 2**30
FIRST = 1000 * (1 + int(os.environ.get("DEJAVU_SEED", "0")))  # of the many mutants
ANY = ("bits", "edges", "truncated", "inserted", "swapped", "numbers", "contents")
CASES = [
    (form, mutation)
    for form, more in {
        "zip": ("pickles", "directories"),
        "legacy": ("pickles",),
        "module": ("pickles", "directories"),
        "safetensors": ("headers",),
        "own": ("headers", "sidecars"),
    }.items()
    for mutation in (*ANY, *more)
    if (form, mutation) != ("module", "contents")
]


class Trap:
    """Unpickled as code, this would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def network():
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def state():
    """Return the weights of a small ViT and of an MLP on it, as training code saves them."""
    head = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    parts = {"backbone": network(), "projector": head}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def own(path):
    recipe = Recipe(encoder="small4", projector="16-8", size=32)
    encoder = Encoder(recipe.encoder, recipe.projector, recipe.size)
    encoder.add_classifier(3)
    own_format.save(path, encoder, recipe)
    return encoder.state_dict()


def tensors_only(content):
    """Return what safetensors can hold of a state dict."""
    kinds = (torch.float32, torch.float16, torch.int64, torch.int8, torch.float8_e4m3fn)
    return {
        str(name).encode(errors="replace").decode(): tensor.clone().contiguous()
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor) and tensor.dtype in kinds
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.nbytes < 1e6
    }


def write(form, path, content, rng):
    """Write the weights `content` in a format, beside what training code saves with them."""
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(71), "step": {0: {"n": 1}}}
    if rng.random() < 0.1:
        beside["run"] = Trap(path.parent / "trap")
    if form == "zip":
        torch.save({"model": content, **beside}, path)
    elif form == "legacy":
        torch.save({"model": content, **beside}, path, _use_new_zipfile_serialization=False)
    elif form == "module":
        torch.save({"net": network(), **beside}, path)
    else:
        save_file(tensors_only(content) or {"none": torch.zeros(1)}, path)


def make(form, mutation, seed, folder):
    """Return (spec, file) of a checkpoint that one mutation changed."""
    rng = random.Random(f"{form} {mutation} {seed}")
    path = folder / ("file.safetensors" if form in ("safetensors", "own") else "file.pt")
    store.sidecar(path).unlink(missing_ok=True)

    content = own(path) if form == "own" else state()
    changed = mutations.contents(content, rng) if mutation == "contents" else content
    if form != "own" or mutation == "contents":
        write(form, path, changed, rng)
    if mutation not in ("contents", "sidecars"):
        path.write_bytes(getattr(mutations, mutation)(path.read_bytes(), rng))
    if form != "own":
        return SMALL, path

    # what damages a file by accident fails its checksum; here somebody made a new one
    side = store.sidecar(path)
    entry = json.loads(side.read_text())
    entry["sha256"] = store.digest(path)
    side.write_text(json.dumps(mutations.sidecars(entry, rng) if mutation == "sidecars" else entry))
    return str(path), None


def judge(spec, file):
    """Return "read", or "refused", or in other words what is wrong with how a file was refused."""
    started = time.monotonic()
    before = os.times()
    try:
        external.encoder(spec, file and str(file))
        verdict = "read"
    except store.StoreError as error:
        text = str(error)
        named = str(file or spec) in text
        short = len(text) < 2000 and "\n" not in text
        ours = "fault of ours" in text
        verdict = "refused" if named and short and not ours else f"says {text!r}"
    except BaseException as error:
        verdict = f"raises {type(error).__name__}: {str(error)[:200]}"
    waited = time.monotonic() - started
    spent = sum(os.times()[:4]) - sum(before[:4])
    if min(spent, waited) > 20 or waited > 300:  # other programs may use the processor
        return f"took {waited:.0f} s, {spent:.0f} s of them of the processor, and {verdict}"
    return verdict


def peak(who):
    return resource.getrusage(who).ru_maxrss * 1024 / GIB


def check(form, mutation, seeds, folder):
    """Judge mutants and return {verdict: number}; fail with the seeds of those gone wrong."""
    before = peak(resource.RUSAGE_SELF)
    counts, wrong = {"read": 0, "refused": 0}, {}
    for seed in seeds:
        verdict = judge(*make(form, mutation, seed, folder))
        if verdict in counts:
            counts[verdict] += 1
        else:
            wrong[f"{form} {mutation} {seed}"] = verdict

    assert not wrong, json.dumps(wrong, indent=1)
    assert not (folder / "trap").exists(), "code of a file was run"
    # files are small, so a child may take one GiB more than what it was forked with
    assert peak(resource.RUSAGE_SELF) < before + 1
    assert peak(resource.RUSAGE_CHILDREN) < peak(resource.RUSAGE_SELF) + 1
    return counts


# -- mutants --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "module", "safetensors", "own"])
def test_what_was_not_mutated_is_read(form, tmp_path):
    """Else all mutants could be refused for another reason."""
    path = tmp_path / ("own.safetensors" if form in ("safetensors", "own") else "file.pt")
    if form == "own":
        own(path)
        assert judge(str(path), None) == "read"
    else:
        write(form, path, state(), random.Random(0))
        assert judge(SMALL, path) == "read"


@pytest.mark.parametrize(("form", "mutation"), CASES)
def test_a_few_mutants(form, mutation, tmp_path):
    check(form, mutation, range(4), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "mutation"), CASES)
def test_many_mutants(form, mutation, tmp_path):
    counts = check(form, mutation, range(FIRST, FIRST + 65), tmp_path)
    print(f"\n{form} {mutation}: {counts}")


# -- one by one -----------------------------------------------------------------------------------

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")


def refusal(content, path, limit_gib=8.0, form="zip"):
    """Return the error for a state dict, with the small network's weights for what it lacks."""
    write(form, path, state() | content, random.Random(0))
    with pytest.raises(store.StoreError) as error:
        external.encoder(SMALL, str(path), limit_gib=limit_gib)
    assert str(path) in str(error.value)
    return str(error.value)


@on_linux
def test_a_pickle_of_43_bytes_takes_no_more_than_the_budget(tmp_path):
    path = tmp_path / "bomb.pt"
    size = (300 * GIB).to_bytes(8, "little")
    path.write_bytes(
        b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\n\x8a\x08" + size + b"\x85Rs."
    )
    with pytest.raises(store.StoreError, match="more memory than its budget of 1 GiB"):
        checkpoint_files.read(path)


def test_a_file_larger_than_the_budget_is_not_opened(tmp_path):
    words = refusal({}, tmp_path / "file.pt", limit_gib=1e-5)
    assert "more memory than its budget" in words and "pass a larger limit_gib" in words


def test_a_zip_has_one_directory(tmp_path):
    """Python reads the record before the locator, torch the one that the locator points to."""
    path = tmp_path / "file.pt"
    torch.save(state(), path)
    data = path.read_bytes()
    record, locator, end = data[-98:-42], data[-42:-22], data[-22:]
    assert record.startswith(b"PK\x06\x06") and locator.startswith(b"PK\x06\x07")
    (start,) = struct.unpack("<48xQ", record)

    # the same directory 56 bytes later, and a second record in the gap
    record = record[:48] + struct.pack("<Q", start + 56)
    locator = locator[:8] + struct.pack("<Q", start) + locator[16:]
    end = end[:16] + struct.pack("<I", start + 56) + end[20:]
    path.write_bytes(data[:start] + record + data[start:-98] + record + locator + end)
    with pytest.raises(store.StoreError, match="expected one zip directory at its end"):
        checkpoint_files.read(path)


def test_a_head_of_no_width_is_no_head(tmp_path):
    """Its next layer could say that it has a billion rows, without a byte in the file."""
    head = {"projector.0.weight": torch.zeros(0, 12), "projector.0.bias": torch.zeros(0)}
    head |= {"projector.1.weight": torch.zeros(10**9, 0), "projector.1.bias": torch.zeros(1)}
    backbone = {name: t for name, t in state().items() if name.startswith("backbone")}
    torch.save(backbone | head, tmp_path / "file.pt")
    found = external.encoder(SMALL, str(tmp_path / "file.pt"))
    assert "projector: none" in found.notes


@pytest.mark.parametrize("form", ["zip", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn])
def test_weights_are_floating_point_numbers(tmp_path, dtype, form):
    path = tmp_path / "file.safetensors"
    bias = torch.zeros(12).to(dtype)
    words = refusal({"backbone.norm.bias": bias}, path, form=form)
    assert f"norm.bias of the network is {dtype}: expected float16" in words


def test_a_layer_of_the_head_without_its_bias(tmp_path):
    content = {"projector.1.running_var": torch.zeros(0), "projector.3.strange": torch.zeros(4)}
    words = refusal(content, tmp_path / "file.pt")
    assert "projector.1: running_var has shape (0,), expected (8,)" in words


@pytest.mark.parametrize("name", ["²", "projector.²", "٣.weight", "a\nb", "", "\ud800"])
def test_any_name_of_a_tensor_that_is_not_used(tmp_path, name):
    path = tmp_path / "file.pt"
    torch.save({"model": state(), name: torch.zeros(2, 2)}, path)
    assert judge(SMALL, path) == "read"


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_tensors_keep_the_order_of_the_file(tmp_path, form):
    """Of two copies of a network the first is read."""
    content = {name: torch.zeros(1) for name in ("b.10", "b.9", "a", "z")}
    write(form, tmp_path / "file.pt", content, random.Random(0))
    assert list(checkpoint_files.read(tmp_path / "file.pt")) == [f"model.{n}" for n in content]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_named(tmp_path):
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    said = refusal({"rows": nested}, tmp_path / "x.pt")
    assert "model.rows is a nested tensor" in said


@pytest.mark.parametrize(
    ("content", "text"), [(b"", "is empty"), (b"<!DOCTYPE html>", "is no checkpoint")]
)
def test_what_is_no_checkpoint(tmp_path, content, text):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(store.StoreError, match=text):
        external.encoder(SMALL, str(tmp_path / "x.pt"))


def test_a_tensor_alone_has_no_name(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    with pytest.raises(store.StoreError, match="it begins with a tensor without a name"):
        external.encoder(SMALL, str(tmp_path / "x.pt"))


@on_linux
def test_a_file_whose_name_is_no_text(tmp_path):
    """Bytes of another system's encoding: torch cannot open it, and may not be to blame for it."""
    path = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.pt")
    torch.save(state(), tmp_path / "x.pt")
    os.rename(tmp_path / "x.pt", path)
    with pytest.raises(store.StoreError, match=r"caf\\xe9.pt: the name is no UTF-8. Rename it."):
        external.encoder(SMALL, path)


def test_an_error_that_holds_a_name_is_one_short_line(tmp_path):
    """A library quotes the name of a tensor whose place is wrong, however long it is."""
    path = tmp_path / "file.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
    header = json.dumps({"a\n" * 5000: entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    assert judge(SMALL, path) == "refused"


def test_names_and_numbers_of_tensors_are_bounded(tmp_path):
    words = refusal({"a." * 600: torch.zeros(1)}, tmp_path / "file.pt")
    assert "has 1206 characters: expected at most 1000" in words


def seal(path, entry):
    """Write a sidecar as somebody would who may write there, its digest of itself included."""
    fields = {name: value for name, value in entry.items() if name != "self"}
    text = json.dumps(fields, indent=1, ensure_ascii=False)
    fields["self"] = hashlib.sha256(text.encode()).hexdigest()
    store.sidecar(path).write_text(json.dumps(fields, indent=1, ensure_ascii=False))
    store.verify(path)


@pytest.mark.parametrize("name", ["encoder", "projector", "size"])
def test_a_sidecar_without_a_field(tmp_path, name):
    path = tmp_path / "own.safetensors"
    own(path)
    entry = json.loads(store.sidecar(path).read_text())
    del entry["parameters"][name]
    seal(path, entry)
    with pytest.raises(store.StoreError, match=f"own.safetensors.json says {name}=None.*expected"):
        external.encoder(str(path))


def test_a_sidecar_that_names_a_network_of_any_size(tmp_path):
    path = tmp_path / "own.safetensors"
    own(path)
    entry = json.loads(store.sidecar(path).read_text())
    entry["parameters"]["projector"] = "1000000-1000000"
    seal(path, entry)
    assert judge(str(path), None) == "refused"
    assert peak(resource.RUSAGE_CHILDREN) < peak(resource.RUSAGE_SELF) + 1


def test_a_pattern_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="reading.unused='.' is no regular expression.*expected"):
        external.encoder(SMALL, None, unused="(")


@on_linux
def test_what_ends_the_child_is_one_error(tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(b"x")
    with pytest.raises(store.StoreError, match=r"file.pt could not be read: .* ended with -9"):
        limited.run(lambda: os.kill(os.getpid(), signal.SIGKILL), path, 8)
    with pytest.raises(store.StoreError, match=r"by a fault of ours \(KeyError: 'x'\)"):
        limited.run(lambda: {}["x"], path, 8)
    with pytest.raises(store.StoreError, match="more memory than its budget"):
        limited.run(lambda: torch.empty(2 * GIB), path, 8)
    assert limited.run(lambda: path.write_text("done"), path, 8) == 4
    assert path.read_text() == "done"


@on_linux
def test_two_threads_may_read_at_a_time(tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(b"x")
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda i: limited.run(lambda: i, path, 8), range(6)))
    assert answers == list(range(6))


@on_linux
@pytest.mark.slow
def test_a_file_cannot_take_for_ever(tmp_path):
    def forever():
        while True:
            pass

    path = tmp_path / "file.pt"
    path.write_bytes(b"x")
    started = time.monotonic()
    with pytest.raises(store.StoreError, match="more than 10 s of processor time"):
        limited.run(forever, path, 8)
    assert time.monotonic() - started < 60  # of a busy machine
