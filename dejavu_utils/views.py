"""The SSL views of the paper (its appendix; FFCV-SSL's pipeline), for a whole batch at once, on the batch's device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu_utils.crops import resample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Views:
    """The augmentation's parameters; the defaults are the paper's, for 224-px images."""

    scale_min: float = 0.08   # smallest share of the image's area that a crop covers
    scale_max: float = 1.0
    flip: float = 0.5         # probabilities from here on
    jitter: float = 0.8
    strength: float = 1.0     # of the colour jitter: brightness .4, contrast .4, saturation .2, hue .1, all times this
    grey: float = 0.2
    blur: float = 1.0         # of a Gaussian blur of view 1, sigma .1-2 px at 224 px
    solarize: float = 0.2     # of view 2


def normalize(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 255] shifted and scaled to ImageNet's mean and deviation, float32 (n, 3, h, w)."""
    mean = 255 * torch.tensor(MEAN, device=pixels.device)[:, None, None]
    std = 255 * torch.tensor(STD, device=pixels.device)[:, None, None]
    return (pixels.float() - mean) / std


def _uniform(n: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return torch.rand(n, generator=rng, device=rng.device) * (high - low) + low


def crop_rects(n: int, width: int, height: int, views: Views, rng: torch.Generator) -> Tensor:
    """Return (n, 4) random-resized-crop rectangles: area uniform in the scale range, log aspect in [3/4, 4/3]."""
    area = _uniform(n, views.scale_min, views.scale_max, rng) * width * height
    aspect = torch.exp(_uniform(n, math.log(3 / 4), math.log(4 / 3), rng))
    w = torch.sqrt(area * aspect).round().clamp(1, width)
    h = torch.sqrt(area / aspect).round().clamp(1, height)
    x = (_uniform(n, 0, 1, rng) * (width - w + 1)).floor()
    y = (_uniform(n, 0, 1, rng) * (height - h + 1)).floor()
    return torch.stack([x, y, x + w, y + h], 1)


def _colour_matrices(n: int, views: Views, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (gain, contrast, matrix): brightness, contrast and one 3x3 matrix for saturation, hue and greyscale.

    Every step of the jitter but contrast's mean is linear in RGB, so one product per image does them all. Hue turns
    around the grey axis, as FFCV's jitter does.
    """
    device = rng.device
    on = (_uniform(n, 0, 1, rng) < views.jitter).float()
    strength = views.strength * on
    gain = 1 + strength * _uniform(n, -0.4, 0.4, rng)
    contrast = 1 + strength * _uniform(n, -0.4, 0.4, rng)
    saturation = 1 + strength * _uniform(n, -0.2, 0.2, rng)
    angle = strength * _uniform(n, -0.1, 0.1, rng) * 2 * math.pi
    luma = torch.tensor(LUMA, device=device).expand(3, 3)
    eye, third = torch.eye(3, device=device), torch.full((3, 3), 1 / 3, device=device)
    skew = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    hue = cos * eye + sin * skew + (1 - cos) * third
    matrix = hue @ (saturation[:, None, None] * eye + (1 - saturation)[:, None, None] * luma)
    grey = (_uniform(n, 0, 1, rng) < views.grey)[:, None, None]
    return gain, contrast, torch.where(grey, luma @ matrix, matrix)


def _jitter(images: Tensor, views: Views, rng: torch.Generator) -> Tensor:
    """Return colour-jittered images, in [0, 255]."""
    gain, contrast, matrix = _colour_matrices(len(images), views, rng)
    luma = torch.tensor(LUMA, device=images.device)
    mean = (images.mean((2, 3)) * luma).sum(1) * gain
    flat = matrix @ (images.flatten(2) * (gain * contrast)[:, None, None])
    offset = matrix.sum(2) * ((1 - contrast) * mean)[:, None]
    return (flat + offset[..., None]).clamp(0, 255).view_as(images)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Return images blurred by a Gaussian of one `sigma` (px) an image, edges replicated."""
    radius = max(1, math.ceil(2 * float(sigma.max())))
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None]
    n, c, h, w = images.shape
    for shape in ((1, -1), (-1, 1)):
        pad = (radius, radius, 0, 0) if shape == (1, -1) else (0, 0, radius, radius)
        wide = torch.nn.functional.pad(images, pad, mode="replicate").transpose(0, 1)
        images = torch.nn.functional.conv2d(wide, kernel.view(n, 1, *shape), groups=n).transpose(0, 1)
    return images


def view(pixels: Tensor, size: int, views: Views, rng: torch.Generator, second: bool = False) -> Tensor:
    """Return one view of each image: normalized float32 (n, 3, size, size).

    `pixels` (n, 3, H, W) uint8 on the device of `rng`. The first view is blurred, the second solarized (§2.2 of the
    paper's code). Every draw comes from `rng`, so the same state gives the same views.
    """
    n, _, height, width = pixels.shape
    flip = _uniform(n, 0, 1, rng) < views.flip
    images = resample(pixels, crop_rects(n, width, height, views, rng), size, flip)
    images = _jitter(images, views, rng)
    if second:
        solarize = (_uniform(n, 0, 1, rng) < views.solarize)[:, None, None, None]
        images = torch.where(solarize & (images >= 128), 255 - images, images)
    elif views.blur > 0:
        sigma = _uniform(n, 0.1, 2.0, rng) * (_uniform(n, 0, 1, rng) < views.blur) * size / 224
        images = _blur(images, sigma)
    return normalize(images)
