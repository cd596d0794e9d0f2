"""Weights in other people's files: found under whatever prefix they have.

`checkpoint_files.read` returns the tensors of a file. `find` returns those that fill a given
network, all of them and with their shapes; `projector` the MLP that stands on it. StoreError says
what does not fit.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dejavu_utils.models import own_format
from dejavu_utils.store import StoreError

# Copies that their projects evaluate: an average over training steps.
AVERAGED = re.compile(r"(?i)(?<![a-z])(ema|swa|teacher|target)(?![a-z])")
# Words that tell the copies of one network, and their heads, apart.
BRANCH = re.compile(r"(?i)(?<![a-z])(ema|swa|teacher|target|student|momentum|online)(?![a-z])")
# Tensors that take part in training only.
UNUSED = re.compile(
    r"(?i)mask_?(ed|token)|queue|decoder|predict|prototype|last_layer|classifier|probe|callbacks"
    r"|criterion|loss|center|temperature|averaged"
)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# -- a network's weights in it --------------------------------------------------------------------


@dataclass
class Found:
    """Where the weights of a network are in a file."""

    prefix: str
    tensors: dict[str, Tensor]  # by the network's own names
    averaged: bool  # whether they are an average over training steps
    copies: list[str]  # prefixes of further copies of the same network
    rest: dict[str, Tensor]  # all that belongs to no copy, by its path in the file


class Misfit(StoreError):
    """The weights are those of another network: `problems` in words, `advice` what to type next."""

    def __init__(self, problems: list[str], advice: str = "") -> None:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        super().__init__(shown + more)
        self.advice = advice


def find(
    flat: dict[str, Tensor],
    network: nn.Module,
    prefix: str = "",
    convert: Callable | None = None,
) -> Found:
    """Return the weights of `network` in a file: every tensor, with its shape, under one prefix.

    Of several copies the averaged one is taken (EMA, teacher), or the first whose prefix contains
    `prefix`. `convert(tensors, network)` renames the original authors' tensors (timm has such
    functions); it is asked where the names do not fit.
    """
    wanted = {n: t for n, t in network.state_dict().items() if "num_batches_tracked" not in n}
    children = [name for name, _ in network.named_children()]
    plain = {name: name for name in wanted}
    numbered = {_numbered(name, children): name for name in wanted}
    names = max(plain, numbered, key=lambda each: max(_prefixes(flat, each).values(), default=0))

    counts = _prefixes(flat, names)
    problems = {where: _problems(flat, where, names, wanted) for where in counts}
    whole = [where for where in counts if not problems[where]]
    chosen = [where for where in whole or counts if prefix in where]
    if not chosen:
        where = f"under a prefix with {prefix!r}" if prefix else "in the file"
        first = ", ".join([*flat][:4]) or "a tensor without a name"
        known = ", ".join(whole) or f"it begins with {first}"
        raise Misfit([f"the network's tensors are not {where}: {known}"])

    # of equal rank the first in the file
    best = max(chosen, key=lambda where: (counts[where], _averaged(flat, where)))
    if not problems[best]:
        copies = [where for where in whole if where != best]
        taken = {where + stored for where in whole for stored in names}
        rest = {p: t for p, t in flat.items() if p not in taken and "num_batches" not in p}
        tensors = {name: flat[best + stored] for stored, name in names.items()}
        return Found(best, tensors, _averaged(flat, best), copies, rest)

    renamed = _converted(flat, best, network, convert)
    if renamed is None:
        raise Misfit(problems[best])
    return find(renamed, network, best, convert=None)


def _averaged(flat: dict[str, Tensor], where: str) -> bool:
    """Return whether the weights under a prefix are an averaged copy: by its name, or because they
    are of torch's AveragedModel, which counts what it has averaged.
    """
    counted = f"{where.removesuffix('module.')}n_averaged" in flat
    return counted or AVERAGED.search(where) is not None


def _prefixes(flat: dict[str, Tensor], names: dict[str, str]) -> dict[str, int]:
    """Return {prefix: how many of `names` are under it}, in the order of the file."""
    counts: dict[str, int] = {}
    for path in flat:
        parts = path.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in names:
                prefix = "".join(f"{part}." for part in parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
    return counts


def _numbered(name: str, children: list[str]) -> str:
    """Return a tensor's name in nn.Sequential(*network.children()): layer1.0.… is 4.0.…"""
    first, _, tail = name.partition(".")
    return f"{children.index(first)}.{tail}" if first in children else name


def _problems(flat: dict, prefix: str, names: dict, wanted: dict) -> list[str]:
    missing, shapes = [], []
    for stored, name in names.items():
        tensor = flat.get(prefix + stored)
        if tensor is None:
            missing.append(f"{name} is missing")
        elif tensor.shape != wanted[name].shape:
            expected = tuple(wanted[name].shape)
            shapes.append(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
    return shapes + missing


def _converted(
    flat: dict[str, Tensor], prefix: str, network: nn.Module, convert: Callable | None
) -> dict[str, Tensor] | None:
    """Return a file's tensors with those under `prefix` renamed by `convert`.

    None if it cannot rename them, or would also resize them.
    """
    near = {path[len(prefix) :]: t for path, t in flat.items() if path.startswith(prefix)}
    try:
        renamed = convert(dict(near), network)
    except Exception:  # the converter was written for other files: it may fail in any way
        return None
    for name in near.keys() & renamed.keys():
        tokens = 8 * renamed[name].shape[-1:].numel()  # class and register tokens are split off
        if abs(near[name].numel() - renamed[name].numel()) > tokens:
            return None
    outside = {path: t for path, t in flat.items() if not path.startswith(prefix)}
    return {prefix + name: tensor for name, tensor in renamed.items()} | outside


def unexplained(found: Found, network: nn.Module, classifier: tuple, unused: str) -> list[str]:
    """Return the tensors left over that a forward pass may use: then the network is another one.

    Those are tensors inside a part that the network has, single parameters and normalisations
    beside its parts; not the `classifier`, and nothing that UNUSED or the caller's `unused` names.
    """
    parts = {name.partition(".")[0] for name in network.state_dict() if "." in name}
    inside = {
        path.removeprefix(found.prefix): tensor
        for path, tensor in found.rest.items()
        if path.startswith(found.prefix) and tensor.ndim and tensor.is_floating_point()
    }
    flat_parts = {name.partition(".")[0] for name, t in inside.items() if t.ndim > 1}
    suspects = []
    for name in inside:
        first, _, tail = name.partition(".")
        known = UNUSED.search(name) or name.startswith(classifier)
        if known or unused and re.search(unused, name):
            continue
        if first in parts or not tail or first not in flat_parts:
            suspects.append(name)
    return suspects


def copy_into(network: nn.Module, tensors: dict[str, Tensor], part: str = "the network") -> None:
    """Copy `tensors` into a network, strictly; StoreError unless they fit, are floating-point
    numbers where it has such, and finite. `part` names it in errors.
    """
    own = network.state_dict()
    for name, tensor in tensors.items():
        if name in own and own[name].is_floating_point() and tensor.dtype not in FLOATS:
            raise StoreError(
                f"{name} of {part} is {tensor.dtype}: expected float16, bfloat16, float32 or "
                "float64."
            )
        if tensor.dtype in FLOATS and not tensor.isfinite().all():
            raise StoreError(
                f"{name} holds NaN or infinity: the training diverged; take an earlier checkpoint."
            )

    counters = {name: tensor for name, tensor in own.items() if "num_batches_tracked" in name}
    own_format.fill(network, counters | tensors, "what it holds", part, "Is it whole?")


# -- the MLP on top -------------------------------------------------------------------------------


@dataclass
class Head:
    """A projection head: Linear, BatchNorm, activation blocks with their weights."""

    prefix: str
    blocks: nn.ModuleList
    paths: list[str]  # of its tensors in the file


def projector(found: Found, width: int) -> Head | None:
    """Return the MLP on the representation (n, width), rebuilt from its tensors; None without one.

    It is a group of Linear and BatchNorm layers whose widths chain. Of several, that of the same
    copy (student, teacher, …) and nearest to the trunk in the file. Between its layers stands an
    activation: GELU where weight-normed prototypes follow (DINO's heads), else ReLU.
    """
    groups: dict[str, list[str]] = {}
    for path in found.rest:
        if not UNUSED.search(path):
            groups.setdefault(_group(path), []).append(path)

    branch = BRANCH.findall(found.prefix)
    ranks = {}
    for prefix, paths in groups.items():
        own = BRANCH.findall(prefix)
        if own in (branch, []) and _chain(paths, found.rest, width):
            near = os.path.commonprefix([prefix, found.prefix])
            ranks[prefix] = (own == branch, len(near))
    if not ranks:
        return None

    prefix = max(ranks, key=ranks.__getitem__)
    layers = _chain(groups[prefix], found.rest, width)
    prototypes = r"(last_layer|prototypes\d*)\.(weight_g|parametrizations)"
    gelu = any(re.search(prototypes, path) for path in found.rest)
    activation = nn.GELU if gelu else nn.ReLU
    return Head(prefix, _blocks(layers, found.rest, activation), groups[prefix])


def _group(path: str) -> str:
    """Return the part of a path before its first number, or before the layer's name."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    cut = numbers[0] if numbers else max(0, len(parts) - 2)
    return "".join(f"{part}." for part in parts[:cut])


def _chain(paths: list[str], tensors: dict[str, Tensor], width: int) -> list[str]:
    """Return the layers' paths in order, if they are an MLP that takes `width` numbers, else []."""
    layers = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    layers.sort(key=lambda path: [int(number) for number in re.findall(r"(?<=\.)\d+", "." + path)])

    linear = 0
    for layer in layers:
        weight = tensors.get(f"{layer}.weight")
        mean = tensors.get(f"{layer}.running_mean")
        is_matrix = weight is not None and weight.ndim == 2 and mean is None
        # a layer of no width could claim any size after it
        if is_matrix and weight.shape[1] == width and len(weight) > 0:
            width = len(weight)
            linear += 1
        elif mean is None or linear == 0 or mean.shape != (width,):
            return []
    # a single layer without a number is a classifier rather than a head
    return layers if linear > 1 or linear and re.search(r"\.\d+$", "." + layers[0]) else []


def _blocks(
    layers: list[str], tensors: dict[str, Tensor], activation: type[nn.Module]
) -> nn.ModuleList:
    """Return the layers as blocks: Linear, BatchNorm if there is one, and an activation between."""
    blocks: list[list[nn.Module]] = []
    for layer in layers:
        own = {p.rpartition(".")[2]: t for p, t in tensors.items() if p.rpartition(".")[0] == layer}
        if "running_mean" in own:
            module = nn.BatchNorm1d(len(own["running_mean"]), affine="weight" in own)
            blocks[-1].append(module)
        else:
            if blocks:
                blocks[-1].append(activation())
            wide, into = own["weight"].shape
            module = nn.Linear(into, wide, bias="bias" in own)
            blocks.append([module])
        copy_into(module, own, f"a layer {layer}")
    return nn.ModuleList(nn.Sequential(*block) for block in blocks)
