"""The SSL views of the paper (its appendix; FFCV-SSL's pipeline), for a whole batch at once, on the
batch's device.

`draw` decides everything that is random about a batch of views, `finish` applies it to crops,
`view` does both to whole pictures. Apart, so that crops can be cut elsewhere (in workers that
decode) and a batch can be split.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dejavu_utils.data.resampling import resample
from dejavu_utils.models.recipe import Views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)
SKEW = ((0, -1, 1), (1, 0, -1), (-1, 1, 0))  # turns around the grey axis
SIGMA = 2.0  # px at 224 px, of the strongest blur


class Draw(NamedTuple):
    """All that is random about one view of n images; `rects` (n, 4) in px of the picture,
    everything else (n, ...).
    """

    rects: Tensor
    flip: Tensor
    gain: Tensor
    contrast: Tensor
    matrix: Tensor
    sigma: Tensor | None  # of the blur, px; None: not blurred
    solarize: Tensor | None  # None: not solarized

    def part(self, rows: slice) -> Draw:
        """Return the draw of some of the images."""
        return Draw(*(None if values is None else values[rows] for values in self))


@functools.cache
def _constant(values: tuple, device: torch.device) -> Tensor:
    """Return a tensor of `values`, copied to the device once: a copy from the CPU's memory waits
    until a GPU has done all that it was given.
    """
    with torch.inference_mode(False):  # whoever asks first, training may use it
        return torch.tensor(values, device=device)


def normalize(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 255] shifted and scaled to ImageNet's mean and deviation, float32 (n, 3,
    h, w).
    """
    mean = 255 * _constant(MEAN, pixels.device)[:, None, None]
    std = 255 * _constant(STD, pixels.device)[:, None, None]
    return (pixels.float() - mean) / std


def _uniform(n: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return torch.rand(n, generator=rng, device=rng.device) * (high - low) + low


def crop_rects(sizes: Tensor, scale: tuple[float, float], rng: torch.Generator) -> Tensor:
    """Return (n, 4) random-resized-crop rectangles: area uniform in the scale range, log aspect in
    [3/4, 4/3].

    `sizes` (n, 2): width and height of each picture, in px.
    """
    n, (width, height) = len(sizes), sizes.to(rng.device).float().unbind(1)
    area = _uniform(n, *scale, rng) * width * height
    aspect = torch.exp(_uniform(n, math.log(3 / 4), math.log(4 / 3), rng))
    w = torch.sqrt(area * aspect).round().clamp(min=1).minimum(width)
    h = torch.sqrt(area / aspect).round().clamp(min=1).minimum(height)
    x = (_uniform(n, 0, 1, rng) * (width - w + 1)).floor()
    y = (_uniform(n, 0, 1, rng) * (height - h + 1)).floor()
    return torch.stack([x, y, x + w, y + h], 1)


def colour_matrices(n: int, views: Views, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (gain, contrast, matrix): brightness, contrast and one 3x3 matrix for saturation, hue
    and greyscale.

    Every step of the jitter but contrast's mean is linear in RGB, so one product per image does
    them all. Hue turns around the grey axis, as FFCV's jitter does.
    """
    device = rng.device
    on = (_uniform(n, 0, 1, rng) < views.jitter).float()
    strength = views.strength * on
    gain = 1 + strength * _uniform(n, -0.4, 0.4, rng)
    contrast = 1 + strength * _uniform(n, -0.4, 0.4, rng)
    saturation = 1 + strength * _uniform(n, -0.2, 0.2, rng)
    angle = strength * _uniform(n, -0.1, 0.1, rng) * 2 * math.pi
    luma = _constant(LUMA, device).expand(3, 3)
    eye, third = torch.eye(3, device=device), torch.full((3, 3), 1 / 3, device=device)
    skew = _constant(SKEW, device) / math.sqrt(3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    hue = cos * eye + sin * skew + (1 - cos) * third
    matrix = hue @ (saturation[:, None, None] * eye + (1 - saturation)[:, None, None] * luma)
    grey = (_uniform(n, 0, 1, rng) < views.grey)[:, None, None]
    return gain, contrast, torch.where(grey, luma @ matrix, matrix)


def jitter_colours(images: Tensor, gain: Tensor, contrast: Tensor, matrix: Tensor) -> Tensor:
    """Return colour-jittered images, in [0, 255]."""
    luma = _constant(LUMA, images.device)
    mean = (images.mean((2, 3)) * luma).sum(1) * gain
    flat = matrix @ (images.flatten(2) * (gain * contrast)[:, None, None])
    offset = matrix.sum(2) * ((1 - contrast) * mean)[:, None]
    return (flat + offset[..., None]).clamp(0, 255).view_as(images)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Return images blurred by a Gaussian of one `sigma` (px) an image, cut off at `radius` px,
    edges replicated.
    """
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None]
    n, c, h, w = images.shape
    for shape in ((1, -1), (-1, 1)):
        pad = (radius, radius, 0, 0) if shape == (1, -1) else (0, 0, radius, radius)
        wide = torch.nn.functional.pad(images, pad, mode="replicate").transpose(0, 1)
        images = torch.nn.functional.conv2d(wide, kernel.view(n, 1, *shape), groups=n).transpose(
            0, 1
        )
    return images


def plan(views: Views, size: int, large: int = 2) -> list[tuple[int, str]]:
    """Return (side in px, kind) of each view of an image: the `large` ones ("first", "second"),
    then the "local" ones.

    The first view is blurred, the second solarized (§2.2 of the paper's code); local ones are
    blurred half as often.
    """
    side = max(8, 8 * round(size * views.local_side / 8))
    return [(size, kind) for kind in ("first", "second")[:large]] + [(side, "local")] * views.local


def draw(kind: str, sizes: Tensor, views: Views, size: int, rng: torch.Generator) -> Draw:
    """Return what is random about one view of n pictures of `sizes` (n, 2), px; every number comes
    from `rng`.
    """
    n, split = len(sizes), views.local_scale if views.local else views.scale_min
    scale = (views.scale_min, split) if kind == "local" else (split, views.scale_max)
    flip = _uniform(n, 0, 1, rng) < views.flip
    rects = crop_rects(sizes, scale, rng)
    colours = colour_matrices(n, views, rng)
    blurred = {"first": views.blur, "second": 0.0, "local": views.blur / 2}[kind]
    sigma = solarize = None
    if blurred > 0:
        sigma = _uniform(n, 0.1, SIGMA, rng) * (_uniform(n, 0, 1, rng) < blurred) * size / 224
    if kind == "second" and views.solarize > 0:
        solarize = _uniform(n, 0, 1, rng) < views.solarize
    return Draw(rects, flip, *colours, sigma, solarize)


def finish(crops: Tensor, drawn: Draw) -> Tensor:
    """Return views, normalized float32: crops (n, 3, s, s) in [0, 255], already flipped, with
    colours and blur.
    """
    images = jitter_colours(crops.float(), drawn.gain, drawn.contrast, drawn.matrix)
    if drawn.solarize is not None:
        threshold = torch.where(drawn.solarize, 128.0, torch.inf)[:, None, None, None]
        images = torch.where(images >= threshold, 255 - images, images)
    if drawn.sigma is not None:
        images = gaussian_blur(images, drawn.sigma, math.ceil(2 * SIGMA * images.shape[-1] / 224))
    return normalize(images)


def view(pixels: Tensor, size: int, drawn: Draw) -> Tensor:
    """Return one view of each image: normalized float32 (n, 3, size, size) of `pixels` (n, 3, H, W)
    uint8.
    """
    return finish(resample(pixels, drawn.rects, size, drawn.flip), drawn)
