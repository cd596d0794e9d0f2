"""Reading any encoder on disk, ours and other people's: recognises the layout, loads it strictly,
and says what it had to assume.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dejavu_utils import store
from dejavu_utils.models import foreign, rebuild
from dejavu_utils.models.encoders import Encoder, width_of
from dejavu_utils.models.own_format import fill, load

if TYPE_CHECKING:
    pass

ACTIVATIONS = tuple(rebuild.ACTIVATIONS.values())


class Foreign(Encoder):
    """An encoder that was read from somebody's file: what `Encoder` can, and where it comes from.

    `layout` and `which` ("student" or "teacher") name what was read, `notes` what was assumed and
    what is not in the file, `ignored` every name in the file that is no part of it, `sha256` the
    file.
    """

    def __init__(
        self,
        trunk: nn.Module,
        blocks: nn.ModuleList,
        layout: str,
        which: str,
        notes: list[str],
        ignored: list[str],
        sha256: str,
    ) -> None:
        nn.Module.__init__(self)  # the parts are there already: nothing is built from specs
        self.trunk, self.projector, self.classifier = trunk, blocks, None
        self.layout, self.which, self.sha256 = layout, which, sha256
        self.notes, self.ignored = tuple(notes), tuple(ignored)


def read(
    path: str | Path,
    layout: str = "auto",
    which: str | None = None,
    encoder: str | None = None,
    activation: str | None = None,
    blocks: int | None = None,
) -> Foreign:
    """Return the encoder in `path`, in evaluation mode on the CPU, float32: `models.embed` takes it
    as any other.

    `layout` is "auto", "own" or a name in foreign.LAYOUTS. `which` is "student" or "teacher" in
    files that hold both; `encoder` names the trunk where the shapes cannot tell it (see
    models.trunk); `activation` ("relu", "gelu") is that between the head's layers, where it is not
    the layout's usual one; `blocks` is how many blocks of the head are read (0: the trunk only).
    The file is safetensors, or torch's with weights only. StoreError says what is wrong with it: a
    damaged or compressed file, one that would have to be unpickled, an unknown layout, or the names
    and shapes that do not fit; FileNotFoundError that there is none.
    """
    path = Path(path)
    known = store.sidecar(path).is_file()
    if layout == "own" or layout == "auto" and known and path.suffix == ".safetensors":
        if (which, encoder, activation, blocks) != (None, None, None, None):
            raise store.StoreError(
                f"{path} is in our own format, whose sidecar says all that there is to say: leave "
                "out which, encoder, activation and blocks."
            )
        own = load(path)
        found = Foreign(own.trunk, own.projector, "own", "student", [], [], store.digest(path))
        found.classifier = own.classifier
        return found.eval()
    if known:  # an artifact of this package in VISSL's layout (vissl_engine)
        store.verify(path)
    tree = contents(path)
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # building a network draws numbers, which reading a file must not
            return _rebuilt(tree, path, layout, which, encoder, activation, blocks).eval()
    except store.StoreError as error:
        raise (
            error if str(error).startswith(str(path)) else store.StoreError(f"{path}: {error}.")
        ) from None


def _rebuilt(
    tree: dict,
    path: Path,
    layout: str,
    which: str | None,
    encoder: str | None,
    activation: str | None,
    blocks: int | None,
) -> Foreign:
    parts = foreign.recognise(tree, layout, which, encoder)
    own = {f"head {name}": value for name, value in parts.head.items()}
    own |= {f"classifier {name}": value for name, value in parts.scores.items()}
    _check(parts.trunk | own, path.stat().st_size)
    advice = (
        "Nothing was loaded: is the file whole, and the layout right? encoder=… names another trunk"
    )
    trunk, notes, size = rebuild.trunk(parts.trunk, parts.padding, encoder)
    fill(
        trunk,
        _floats(parts.trunk, trunk),
        path,
        f"its trunk, read as {parts.layout}",
        advice,
        assign=True,
    )
    parts.activation = activation or parts.activation
    head, named, left = rebuild.head(
        parts.head, width_of(trunk, size), parts.activation, parts.ends_active, blocks
    )
    fill(head, _floats(named, head), path, f"its head, read as {parts.layout}", advice, assign=True)
    parts.ignored += [f"head {name}" for name in left]
    notes = _notes(parts, notes, head)
    found = Foreign(
        trunk, head, parts.layout, parts.which, notes, parts.ignored, store.digest(path)
    )
    if parts.scores and blocks is None:
        found.add_classifier(len(parts.scores["2.weight"]))
        fill(
            found.classifier,
            _floats(parts.scores, found.classifier),
            path,
            "its classifier",
            advice,
        )
    return found


def _floats(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in float32, with the counters of batch normalisation, which old files
    lack, as zeros.
    """
    counters = {name for name in module.state_dict() if name.endswith("num_batches_tracked")}
    added = (
        {}
        if counters & tensors.keys()
        else {name: torch.zeros((), dtype=torch.long) for name in counters}
    )
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()} | added


def _check(tensors: dict[str, Tensor], size: int) -> None:
    """Raise StoreError unless the tensors are plain, finite, and no larger than the file of `size`
    bytes.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise store.StoreError(
                f"{name} is {tensor.layout}, {tensor.dtype}; expected a plain real tensor"
            )
    if (total := sum(tensor.nbytes for tensor in tensors.values())) > size:
        raise store.StoreError(
            f"its tensors would take {total} bytes, more than the {size} of the file: it was made "
            "to fill the memory, and nothing was loaded"
        )
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise store.StoreError(
            f"{broken[0]} holds NaN or infinity, and so do {len(broken) - 1} other tensors: the "
            "training diverged; take an earlier checkpoint"
        )


def _notes(parts: foreign.Parts, trunk: list[str], head: nn.ModuleList) -> list[str]:
    """Return what a reader of the results must know: what was read, what was assumed, what was left
    out.
    """
    others = [who for who in parts.there if who != parts.which]
    whose = f": the {parts.which}" if len(parts.there) > 1 or parts.which == "teacher" else ""
    other = f', which="{others[0]}" reads the other' if others else ""
    notes = [f"read as {parts.layout}{whose}{other}", *trunk]
    if len(head) == 0:
        notes.append("projector: none")
    else:
        widths = "-".join(str(block[0].out_features) for block in head)
        between = [
            type(layer).__name__ for block in head for layer in block if type(layer) in ACTIVATIONS
        ]
        bare = [str(i) for i, block in enumerate(head, 1) if block[0].bias is None]
        unbiased = f", no bias in layer {', '.join(bare)}" if bare else ""
        notes.append(
            f"projector: {widths}{unbiased}, from the shapes; "
            f"{between[0] if between else 'no activation'} between the layers and "
            f"{between[-1] if parts.ends_active else 'nothing'} after the last (assumed: they "
            "have no names)"
        )
    if any(re.search(r"last_layer\.|prototypes", name) for name in parts.ignored):
        notes.append(
            "after the projector come an L2 normalisation and prototypes in the original: not "
            "applied here"
        )
    notes.append(
        "input normalisation: not in the file; models.embed uses ImageNet's mean and deviation"
    )
    groups = list(
        dict.fromkeys(name.split(".")[0] if " " not in name else name for name in parts.ignored)
    )
    return notes + [f"ignored: {', '.join(groups)}"] if groups else notes


def contents(path: Path) -> dict:
    """Return what a file holds, as dicts of tensors and plain values, without running anything that
    is in it.

    Which kind it is, its first bytes say. StoreError if it is damaged, compressed (its size would
    say nothing about what it expands to), or would have to be unpickled.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file: expected a checkpoint (.safetensors, .pt, .pth, .ckpt)."
        )
    with path.open("rb") as file:
        first = file.read(9)
    if first[:4] == b"PK\x03\x04":
        _check_zip(path)
    elif first[8:9] == b"{":
        with _whole(path, SafetensorError):
            return load_file(path)
    elif first[:1] != b"\x80":
        raise store.StoreError(
            f"{path} begins with {first[:4]!r}, which is no checkpoint that this can read: "
            "expected "
            "safetensors or a torch file. A compressed one must be unpacked first."
        )
    return _torch(path)


@contextlib.contextmanager
def _whole(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Turn the exceptions that a damaged file raises into a StoreError that says so."""
    try:
        yield
    except store.StoreError:
        raise
    except damage as error:
        raise store.StoreError(
            f"{path} is truncated or damaged: {error}. Fetch it again."
        ) from error


def _check_zip(path: Path) -> None:
    """Raise StoreError unless the zip is stored plainly, as torch writes it, and its entries are
    what they seem.
    """
    damage = (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, OSError)
    with _whole(path, *damage), zipfile.ZipFile(path) as archive:
        _check_entries(path, archive.infolist())
        for entry in archive.infolist():
            if entry.CRC:  # torch.load does not look at it; 0: torch was told to write none
                with archive.open(entry) as part:  # at its end zipfile compares the checksum
                    while part.read(1 << 22):
                        pass


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise store.StoreError(
            f"{path} is a TorchScript program, not weights: where you trust it, load it with "
            "torch.jit.load and save its state_dict()."
        )
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise store.StoreError(
            f"{path}: its entry {packed[0]} is compressed, which torch never writes and which can "
            "hide any size. Unpack it, or save it again with torch.save."
        )
    tricks = [
        name for name in names if name.startswith("/") or "\\" in name or ".." in name.split("/")
    ]
    if (
        tricks
        or len(set(names)) < len(names)
        or sum(entry.file_size for entry in entries) > path.stat().st_size
    ):
        raise store.StoreError(
            f"{path}: its entries overlap, repeat or leave their folder ({', '.join(tricks[:1])}): "
            "torch.save did not write this file. Nothing was loaded."
        )


def _torch(path: Path) -> dict:
    """Return what torch.load reads with weights_only: tensors, plain containers and argparse's bag
    of settings.
    """
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # DINO's and MAE's files hold one; it has no code
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises six types here: which one says little, the text says it
        if found := re.search(
            r"(?i)(?:unsupported (?:global|class|operand)|unrecognized function|new object for "
            r"type)"
            r"\W+(?:global )?([\w.<>]+)",
            str(error),
        ):
            raise store.StoreError(
                f"{path} holds {found[1]}, which only unpickling could read, and that would run "
                "whatever code the file "
                "brings: refused. Where you trust it, save its weights alone, in the environment "
                "that wrote it: "
                'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW).'
            ) from error
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise store.StoreError(
            f"{path} is no whole torch file with weights: {reason}. Fetch it again, or save its "
            "state dict alone."
        ) from error
    if not isinstance(tree, dict):
        raise store.StoreError(
            f"{path} holds a {type(tree).__name__}: expected a dict of tensors, or of such dicts."
        )
    return tree
