"""Encoders: a trunk that turns images into a representation (backbone), and the projector that SSL
puts on top.
"""

from __future__ import annotations

import ast
import copy
import difflib
import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dejavu_utils.models.views import normalize


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: the basic residual block."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut = (
            nn.Conv2d(width_in, width_out, 1, stride, bias=False) if stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


def small(width: int = 48) -> nn.Sequential:
    """Return a 3-block residual trunk for 32-px images on a CPU: (n, 3, s, s) -> (n, 4 * width)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def patch(width: int = 64) -> nn.Sequential:
    """Return one residual block on patches of 4 px, for small images on a CPU: (n, 3, s, s) ->
    (n, 2 * width).

    Most of the time that `small` takes goes into its layers at half of the image's resolution; this
    trunk has none.
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 4, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def small_stem(resnet: nn.Module, padding: int = 1) -> None:
    """Give a torchvision ResNet the stem for images of at most 64 px, in place: 3x3, stride 1, no
    pooling.
    """
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, 3, 1, padding, bias=False)
    resnet.maxpool = nn.Identity()


def _torchvision_names() -> list[str]:
    import torchvision

    return [
        name
        for name in torchvision.models.list_models()
        if re.fullmatch(r"(wide_)?resnet\d+(_2)?", name)
    ]


def _torchvision_resnet(name: str, small_images: bool) -> nn.Module:
    """Return a torchvision ResNet without its classifier, with the usual or the small-image
    stem.
    """
    import torchvision

    trunk = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    if small_images:
        small_stem(trunk)
    trunk.fc = nn.Identity()
    return trunk


def _options(spec: str, text: str) -> dict:
    """Return {"patch_size": 4, …} for the text "patch_size=4,…" after the colon of `spec`."""
    try:
        pairs = [item.split("=") for item in text.split(",")] if text else []
        options = {name.strip(): ast.literal_eval(value.strip()) for name, value in pairs}
        if not all(isinstance(value, (bool, int, float)) for value in options.values()):
            raise ValueError(
                "only numbers: a text could name a file or an address to load weights from"
            )
        return options
    except (ValueError, SyntaxError):
        raise ValueError(
            f'encoder "{spec}": "{text}" cannot be read; expected "name=number,…", such as '
            '"vit_tiny_patch16_224:patch_size=4"'
        ) from None


def _timm(spec: str, name: str, options: dict, image_size: int) -> nn.Module:
    """Return a timm model that ends with its pooled features; ViTs also take images of another
    size.

    Which models have a fixed input size, or can interpolate it, is asked of their constructors:
    those that know neither argument (convolutional nets) refuse it before anything is built.
    """
    import timm

    for sizes in ({"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}, {}):
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, **sizes, **options)
        except TypeError as error:
            argument = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not argument or argument[1] not in sizes:
                raise ValueError(
                    f'encoder "{spec}": timm\'s {name} refuses its options: {error}'
                ) from error
        except (AssertionError, RuntimeError, KeyError) as error:
            raise ValueError(
                f'encoder "{spec}" cannot be built for {image_size}-px images: '
                f"{type(error).__name__} {error}"
            ) from error
    raise AssertionError("unreachable: the last attempt names no size")


def trunk(spec: str, image_size: int = 224) -> nn.Module:
    """Return the trunk that `spec` names, with random weights: (n, 3, s, s) -> (n, d).

    "small48" is the small CPU net of width 48, "patch64" the one on patches of width 64. A
    torchvision ResNet goes by its name, "-s" adds the small-image stem: "resnet18-s", "resnet101".
    Any other name is timm's, with options for its constructor after a colon:
    "vit_small_patch16_224", "vit_tiny_patch16_224:patch_size=4" (a ViT on 32 px). `image_size` (px)
    matters only to models with position embeddings. ValueError names what is known, nearest names
    first.
    """
    if match := re.fullmatch(r"small(\d+)", spec):
        return small(int(match[1]))
    if match := re.fullmatch(r"patch(\d+)", spec):
        return patch(int(match[1]))
    known = _torchvision_names()
    if (match := re.fullmatch(r"(\w+?)(-s)?", spec)) and match[1] in known:
        return _torchvision_resnet(match[1], small_images=bool(match[2]))
    import timm

    name, _, options = spec.partition(":")
    if timm.is_model(name):
        return _timm(spec, name, _options(spec, options), image_size)
    near = difflib.get_close_matches(
        name, dict.fromkeys(["small48", "patch64", *known, *timm.list_models()]), n=4
    )
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(
        f'encoder "{spec}" is not known: {hint}expected "small<width>", "patch<width>", a '
        'torchvision ResNet such as "resnet18", "resnet18-s" (3x3 stem), "resnet101", or a timm '
        'model such as "vit_tiny_patch16_224"'
    )


def projector(width: int, spec: str) -> nn.ModuleList:
    """Return the projector's blocks for `spec` "512-512-512": Linear-BatchNorm-ReLU each, the last
    a bare Linear.

    The paper's reference is "8192-8192-8192" (§2.2); the last layer has no bias. An empty spec is
    no projector.
    """
    if not spec:
        return nn.ModuleList()
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", spec):
        raise ValueError(
            f'projector "{spec}" cannot be read: expected widths such as "512-512-512", or "" for '
            "none"
        )
    widths = [width, *map(int, spec.split("-"))]
    blocks = [
        nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())
        for i, o in zip(widths[:-2], widths[1:-1], strict=True)
    ]
    return nn.ModuleList([*blocks, nn.Linear(widths[-2], widths[-1], bias=False)])


@torch.no_grad()
def width_of(trunk: nn.Module, image_size: int) -> int:
    """Return the width d of the trunk's output; ValueError unless it is (n, d). No batch statistic
    changes.
    """
    was_training = trunk.training
    shape = tuple(trunk.eval()(torch.zeros(1, 3, image_size, image_size)).shape)
    trunk.train(was_training)
    if len(shape) != 2:
        raise ValueError(
            f"the trunk returns {shape} for one {image_size}-px image: expected (1, d). "
            "Choose an encoder that pools its features."
        )
    return shape[1]


class Encoder(nn.Module):
    """Trunk and projector. `layers(x)` gives every representation, `forward(x)` the projector's
    output.

    Without a projector (`projector_spec` is "") that is the backbone's.
    """

    def __init__(
        self, encoder: str = "small48", projector_spec: str = "512-512-512", image_size: int = 32
    ) -> None:
        super().__init__()
        self.trunk = trunk(encoder, image_size)
        self.projector = projector(width_of(self.trunk, image_size), projector_spec)
        self.register_module("classifier", None)

    def add_classifier(self, classes: int) -> None:
        """Put BatchNorm, ReLU and a linear layer on the projector: the supervised baseline, with a
        layer "logits".
        """
        if len(self.projector) == 0:
            raise ValueError(
                'the supervised baseline classifies the projector\'s output: projector is "", '
                'expected widths such as "512-512-512"'
            )
        width = list(self.projector.parameters())[-1].shape[0]
        self.classifier = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes))

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """Return {"backbone", "block1", …, "projector"} -> (n, d), from one forward pass."""
        out = {"backbone": self.trunk(x)}
        z = out["backbone"]
        for i, block in enumerate(self.projector, 1):
            z = block(z)
            out["projector" if i == len(self.projector) else f"block{i}"] = z
        if self.classifier is not None:
            out["logits"] = self.classifier(z)
        return out

    def forward(self, x: Tensor) -> Tensor:
        z = self.trunk(x)
        for block in self.projector:
            z = block(z)
        return z


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """Return the same network with weights drawn anew, by each layer's own rule (else normal,
    deviation 0.02).
    """
    fresh = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for weight in fresh.parameters():
            weight.normal_(0, 0.02)
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh


@torch.inference_mode()
def embed(
    encoder: Encoder,
    images: Tensor,
    layers: Iterable[str] | None = ("projector", "backbone"),
    batch: int = 500,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Return {layer: float32 (n, d)} on the CPU for normalised uint8 squares (n, 3, s, s), in
    evaluation mode.

    All layers come from one forward pass; `layers=None` is all that the encoder has. Always full
    precision, so that two embeddings of one image differ by rounding only. The encoder's mode is
    restored.
    """
    was_training = encoder.training
    encoder.eval().to(device)
    parts: list[dict[str, Tensor]] = []
    try:
        for chunk in images.split(batch):
            found = encoder.layers(
                normalize(chunk.to(device)).contiguous(memory_format=torch.channels_last)
            )
            wanted = list(found) if layers is None else list(layers)
            if missing := [layer for layer in wanted if layer not in found]:
                raise ValueError(
                    f'layer "{missing[0]}" is not in this encoder: expected one of '
                    f"{', '.join(found)}"
                )
            parts.append({layer: found[layer].float().cpu() for layer in wanted})
    finally:
        encoder.train(was_training)
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
