"""Rectangles of pictures, resampled to squares: batched, and blind to what is outside of them."""

import torch
from torch import Tensor


def _weights(start: Tensor, stop: Tensor, length: int, size: int) -> Tensor:
    """Return the (n, size, length) triangle-filter weights that resample [start, stop) to `size`
    samples.

    Antialiased when shrinking, bilinear when growing. Weights outside [start, stop) are exactly 0,
    so a crop cannot see a pixel beyond its own edge: cutting and resampling in one step equals
    cutting first.
    """
    scale = (stop - start) / size
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale[:, None]
    pixel = torch.arange(length, device=start.device) + 0.5
    radius = scale.clamp(min=1.0)[:, None, None]
    weight = (1 - (pixel - centre[..., None]).abs() / radius).clamp(min=0)
    inside = (pixel >= start[:, None, None].floor()) & (pixel <= stop[:, None, None].ceil())
    weight = weight * inside
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)


def resample(pixels: Tensor, rects: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Return rectangles of images resampled to squares: float32 (n, 3, size, size), in the units of
    `pixels`.

    `pixels` (n, 3, H, W) uint8 or float; `rects` (n, 4) x0, y0, x1, y1 in pixels, half-open; `flip`
    (n,) bool mirrors horizontally. One batched matrix product per axis, on the device of `pixels`,
    with no loop over images. No pixel outside a rectangle has any part in the result, bit for bit
    (pixels must be finite: 0 * infinity is not 0).
    """
    rects = rects.to(pixels.device, torch.float32)
    across = _weights(rects[:, 0], rects[:, 2], pixels.shape[-1], size)
    down = _weights(rects[:, 1], rects[:, 3], pixels.shape[-2], size)
    if flip is not None:
        across = torch.where(flip[:, None, None].to(across.device), across.flip(1), across)
    n, channels, height, width = pixels.shape
    wide = torch.bmm(pixels.float().reshape(n, channels * height, width), across.transpose(1, 2))
    down = down[:, None].expand(-1, channels, -1, -1).reshape(n * channels, size, height)
    return torch.bmm(down, wide.view(n * channels, height, size)).view(n, channels, size, size)
