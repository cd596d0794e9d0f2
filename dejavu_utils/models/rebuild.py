"""A network from the names and shapes of its weights: ResNets, ViTs, projection heads. No file is
read here.
"""

import math

import torch
from torch import Tensor, nn

from dejavu_utils.models import encoders
from dejavu_utils.store import StoreError

DEPTHS = {
    ("BasicBlock", (2, 2, 2, 2)): 18,
    ("BasicBlock", (3, 4, 6, 3)): 34,
    ("Bottleneck", (3, 4, 6, 3)): 50,
    ("Bottleneck", (3, 4, 23, 3)): 101,
    ("Bottleneck", (3, 8, 36, 3)): 152,
    ("Bottleneck", (3, 24, 36, 3)): 200,
}
VIT_HEADS = {
    192: 3,
    384: 6,
    768: 12,
    1024: 16,
    1280: 16,
}  # width -> attention heads of ViT-Ti, S, B, L, H
VIT_DEPTHS = (12, 24, 32)
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
NAME_IT = "Pass encoder=… to name the trunk yourself (see models.trunk)"


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    """Return one more than the largest number that follows `prefix` in a name; 0 if there is
    none.
    """
    tails = [name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)]
    return 1 + max((int(tail) for tail in tails if tail.isdigit()), default=-1)


def trunk(
    tensors: dict[str, Tensor], padding: int | None, encoder: str | None
) -> tuple[nn.Module, list[str], int]:
    """Return (trunk, notes, image size): the trunk of `tensors` without its weights, and what was
    assumed.

    `encoder` names it (see models.trunk), else its names and shapes do: then it is on the meta
    device, so that no shape in a file can fill the memory before it was compared. `padding` is that
    of a 3x3 stem (None: not known). StoreError says why a trunk cannot be told.
    """
    size, note = _image_size(tensors)
    if encoder:
        try:
            found, notes = encoders.trunk(encoder, size), [f"trunk: {encoder}, as asked for{note}"]
        except ValueError as error:
            raise StoreError(str(error)) from None
    elif "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        with torch.device("meta"):
            found, notes = _resnet(tensors)
    elif "patch_embed.proj.weight" in tensors and "blocks.0.attn.qkv.weight" in tensors:
        with torch.device("meta"):
            found, notes = _vit(tensors)
    else:
        raise StoreError(
            f"its trunk ({', '.join([*tensors][:3])}, …) is no ResNet and no ViT that the shapes "
            "could "
            f"tell. {NAME_IT}"
        )
    stem = getattr(found, "conv1", None)
    if isinstance(stem, nn.Conv2d) and stem.kernel_size == (3, 3):
        if padding is None:
            raise StoreError(
                "its stem is 3x3, which solo-learn pads by 2 pixels and stable-pretraining by 1: "
                "pass "
                'layout="solo-learn" or layout="stable-pretraining"'
            )
        stem.padding = (padding, padding)
        notes.append(
            f"stem: 3x3, stride 1, padding {padding}, no pooling (assumed: none of it has a name)"
        )
    return found, notes, size


def _image_size(tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Return the image size (px) that a ViT's position embeddings were made for, else 224, and a
    note.
    """
    position, patch = (
        getattr(tensors.get(name), "shape", ()) for name in ("pos_embed", "patch_embed.proj.weight")
    )
    if (len(position), len(patch)) != (3, 4) or 0 in (*position, *patch):
        return 224, ""
    size = math.isqrt(position[1]) * patch[-1]  # also with the class token: isqrt(n² + 1) = n
    return size, f"; position embeddings for {size} px"


def _resnet(tensors: dict[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """Return a torchvision ResNet of any known depth, width multiplier, width per group, and
    stem.
    """
    from torchvision.models import resnet

    name = "Bottleneck" if "layer1.0.conv3.weight" in tensors else "BasicBlock"
    layers = tuple(_count(tensors, f"layer{i}.") for i in (1, 2, 3, 4))
    if (name, layers) not in DEPTHS:
        known = ", ".join("-".join(map(str, blocks)) for _, blocks in DEPTHS)
        raise StoreError(
            f"its trunk has {'-'.join(map(str, layers))} {name}s, which is no known ResNet; known "
            "are "
            f"{known}. {NAME_IT}"
        )
    stem, second = tensors["conv1.weight"], tensors.get("layer1.0.conv2.weight")
    wide, kernel = stem.shape[0], stem.shape[-1]
    if (
        stem.ndim != 4
        or second is None
        or second.ndim != 4
        or wide % 64
        or kernel not in (3, 7)
        or stem.shape[1] != 3
    ):
        raise StoreError(
            f"its first convolution is {tuple(stem.shape)}: expected (64 n, 3, 7, 7) or (64 n, 3, "
            "3, 3). "
            f"{NAME_IT}"
        )
    groups = second.shape[0] // second.shape[1] if name == "Bottleneck" else 1
    per_group = 64 * second.shape[0] // (groups * wide) if name == "Bottleneck" else 64
    block = getattr(resnet, name)
    net = resnet.ResNet(block, layers, groups=groups, width_per_group=per_group)
    if (
        wide != 64
    ):  # torchvision's constructor has no width multiplier: its parts are made again, wider
        net.inplanes = wide
        net.conv1, net.bn1 = nn.Conv2d(3, wide, 7, 2, 3, bias=False), nn.BatchNorm2d(wide)
        for i, blocks in enumerate(layers):
            setattr(
                net,
                f"layer{i + 1}",
                net._make_layer(  # noqa: SLF001 how torchvision's constructor makes them, too
                    block, wide << i, blocks, stride=1 if i == 0 else 2
                ),
            )
    net.fc = nn.Identity()
    if kernel == 3:
        encoders.small_stem(net)
    width = f", {wide // 64} times as wide" if wide != 64 else ""
    inner = f", {per_group} a group in {groups}" if (groups, per_group) != (1, 64) else ""
    usual = (
        []
        if kernel == 3
        else ["stem: stride 2, then 3x3 max pooling by 2 (assumed: it has no name)"]
    )
    return net, [
        f"trunk: ResNet-{DEPTHS[name, layers]}{width}{inner}, from the shapes; strides and "
        "epsilons as in "
        "torchvision's",
        *usual,
        "image size: not in the file",
    ]


def _vit(tensors: dict[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """Return timm's ViT with a class token and learned position embeddings, of any known width and
    depth.
    """
    patch = tensors["patch_embed.proj.weight"]
    if patch.ndim != 4 or 0 in patch.shape:
        raise StoreError(
            f"its patch_embed.proj.weight is {tuple(patch.shape)}: expected (width, 3, patch, "
            "patch)"
        )
    width, depth, size = patch.shape[0], _count(tensors, "blocks."), _image_size(tensors)[0]
    if width not in VIT_HEADS or depth not in VIT_DEPTHS:
        raise StoreError(
            f"its trunk is a ViT of width {width} and {depth} blocks; known are widths "
            f"{', '.join(map(str, VIT_HEADS))} and {', '.join(map(str, VIT_DEPTHS))} blocks. "
            f"{NAME_IT}, "
            f'such as "vit_tiny_patch16_224:embed_dim={width},depth={depth},num_heads=…"'
        )
    spec = (
        f"vit_tiny_patch16_224:patch_size={patch.shape[-1]},embed_dim={width},depth={depth},"
        f"num_heads={VIT_HEADS[width]}"
    )
    return encoders.trunk(spec, size), [
        f'trunk: "{spec}", from the shapes',
        f"{VIT_HEADS[width]} attention heads (assumed from the width: MoCo v3's "
        "ViT-S has 12), backbone = class token after the last norm, epsilon 1e-6 (assumed)",
        f"image size: {size} px by the position embeddings, which timm interpolates for other "
        "sizes",
    ]


def _positions(head: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return {position: {"weight": …, "bias": …}} in order."""
    at: dict[int, dict[str, Tensor]] = {}
    for name, value in head.items():
        number, _, kind = name.partition(".")
        if not number.isdigit() or not kind:
            raise StoreError(
                f'its head has "{name}", which is no numbered layer. Pass blocks=0 to read the '
                "trunk only"
            )
        at.setdefault(int(number), {})[kind] = value
    return dict(sorted(at.items()))


def _groups(at: dict[int, dict[str, Tensor]], limit: int | None) -> list[list[int]]:
    """Return the positions of the first `limit` blocks: a linear layer, and a batch normalisation
    right behind it.
    """
    groups: list[list[int]] = []
    for position, tensors in at.items():
        if getattr(tensors.get("weight"), "ndim", 0) == 2:
            if len(groups) == limit:
                break
            groups.append([position])
        elif "running_mean" in tensors and groups and groups[-1] == [position - 1]:
            groups[-1].append(position)
        else:
            raise StoreError(
                f"layer {position} of its head ({', '.join(tensors)}) is neither a linear layer "
                "nor a "
                f"batch normalisation after one. Pass blocks={len(groups)} to read the head up to "
                "there"
            )
    if limit is not None and not 0 < limit <= len(groups):
        raise StoreError(f"blocks={limit}: its head has {len(groups)} linear layers")
    return groups


def _check_gaps(at: dict[int, dict[str, Tensor]], groups: list[list[int]]) -> list[bool]:
    """Return whether an activation follows each block but the last; StoreError where a gap may be
    something else.
    """
    active = []
    for i, (group, after) in enumerate(zip(groups, groups[1:], strict=False)):
        gap = after[0] - group[-1] - 1
        odd_norm = i > 0 and gap == 1 and len(group) != len(groups[i - 1])
        prototypes = (
            i > 0
            and gap == 1
            and len(group) == 1
            and i + 2 == len(groups)
            and "bias" in at[group[0]]
            and "bias" not in at[after[0]]
        )
        if gap > 1 or odd_norm or prototypes:
            raise StoreError(
                f"between block {i + 1} of its head and the next stands something without "
                "weights, an "
                f"activation or an L2 normalisation: pass blocks={i + 1} to read the head up to "
                "there"
            )
        active.append(gap == 1)
    return active


def head(
    tensors: dict[str, Tensor], width: int, activation: str, ends_active: bool, limit: int | None
) -> tuple[nn.ModuleList, dict[str, Tensor], list[str]]:
    """Return (blocks, their tensors under the blocks' names, names left out): Linear, BatchNorm,
    activation each.

    `width` is the trunk's; `limit` the number of blocks to read (None: all). What follows the last
    layer has no name: nothing, unless `ends_active`.
    """
    if limit == 0:
        return nn.ModuleList(), {}, list(tensors)
    if activation not in ACTIVATIONS:
        raise StoreError(
            f'activation "{activation}" is not known: expected one of {", ".join(ACTIVATIONS)}'
        )
    at = _positions(tensors)
    groups = _groups(at, limit)
    active = [*_check_gaps(at, groups), ends_active and limit is None]
    blocks, named, last = [], {}, width
    for i, (group, act) in enumerate(zip(groups, active, strict=False)):
        wide, into = at[group[0]]["weight"].shape
        if into != last:
            raise StoreError(
                f"block {i + 1} of its head expects {into} values, the layer before it gives {last}"
            )
        layers = [nn.Linear(into, wide, bias="bias" in at[group[0]])]
        layers += [nn.BatchNorm1d(wide, affine="weight" in at[position]) for position in group[1:]]
        blocks.append(nn.Sequential(*layers, *([ACTIVATIONS[activation]()] if act else [])))
        named |= {
            f"{i}.{k}.{kind}": value
            for k, position in enumerate(group)
            for kind, value in at[position].items()
        }
        last = wide
    used = set().union(*groups)
    return (
        nn.ModuleList(blocks),
        named,
        [name for name in tensors if int(name.partition(".")[0]) not in used],
    )
