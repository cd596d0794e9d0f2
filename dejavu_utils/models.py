"""Encoders: a trunk that turns images into a representation (backbone), and the projector that SSL puts on top."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: the basic residual block."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small(width: int = 48) -> nn.Sequential:
    """Return a 3-block residual trunk for 32-px images on a CPU: (n, 3, s, s) -> (n, 4 * width)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )


def _torchvision_resnet(name: str, small_stem: bool) -> nn.Module:
    """Return a torchvision ResNet without its classifier; `small_stem` is 3x3, stride 1, no pooling (for <= 64 px)."""
    import torchvision

    trunk = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    if small_stem:
        trunk.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        trunk.maxpool = nn.Identity()
    trunk.fc = nn.Identity()
    return trunk


def trunk(spec: str) -> nn.Module:
    """Return the trunk that `spec` names: "small48" (width 48), or a torchvision ResNet, "-s" for the small-image stem.

    Examples: "small32", "resnet18", "resnet50-s", "resnet101". ValueError names what is known.
    """
    if match := re.fullmatch(r"small(\d+)", spec):
        return small(int(match[1]))
    if match := re.fullmatch(r"((?:wide_)?resnet\d+(?:_2)?)(-s)?", spec):
        return _torchvision_resnet(match[1], small_stem=bool(match[2]))
    raise ValueError(f'encoder "{spec}" is not known: expected "small<width>" or a torchvision ResNet such as '
                     '"resnet18", "resnet18-s" (3x3 stem), "resnet101"')


def projector(width: int, spec: str) -> nn.ModuleList:
    """Return the projector's blocks for `spec` "512-512-512": Linear-BatchNorm-ReLU each, the last a bare Linear.

    The paper's reference is "8192-8192-8192" (§2.2); the last layer has no bias.
    """
    widths = [width, *map(int, spec.split("-"))]
    blocks = [nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())
              for i, o in zip(widths[:-2], widths[1:-1], strict=True)]
    return nn.ModuleList([*blocks, nn.Linear(widths[-2], widths[-1], bias=False)])


class Encoder(nn.Module):
    """Trunk and projector. `layers(x)` gives every representation, `forward(x)` the projector's output."""

    def __init__(self, encoder: str = "small48", projector_spec: str = "512-512-512", image_size: int = 32):
        super().__init__()
        self.trunk = trunk(encoder)
        was_training = self.trunk.training
        with torch.no_grad():  # the trunk's width is read off, in eval mode so that no batch statistic changes
            width = self.trunk.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
        self.trunk.train(was_training)
        self.projector = projector(width, projector_spec)
        self.classifier: nn.Module | None = None

    def add_classifier(self, classes: int) -> None:
        """Put BatchNorm, ReLU and a linear layer over the projector: the supervised baseline, with a layer "logits"."""
        width = self.projector[-1].out_features
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
        return self.layers(x)["projector"]


@torch.inference_mode()
def embed(encoder: Encoder, images: Tensor, layers: tuple[str, ...] = ("projector", "backbone"), batch: int = 500,
          device: str = "cpu") -> dict[str, Tensor]:
    """Return {layer: float32 (n, d)} on the CPU for normalised uint8 squares (n, 3, s, s), in evaluation mode.

    Always full precision, so that two embeddings of one image differ by rounding only. The encoder's mode is restored.
    """
    from dejavu_utils.views import normalize

    was_training = encoder.training
    encoder.eval().to(device)
    out = {layer: [] for layer in layers}
    for chunk in images.split(batch):
        found = encoder.layers(normalize(chunk.to(device)).contiguous(memory_format=torch.channels_last))
        for layer in layers:
            if layer not in found:
                raise ValueError(f'layer "{layer}" is not in this encoder: expected one of {", ".join(found)}')
            out[layer].append(found[layer].float().cpu())
    encoder.train(was_training)
    return {layer: torch.cat(parts) for layer, parts in out.items()}
