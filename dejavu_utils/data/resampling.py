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
    start = start[:, None, None]  # (n, 1, 1)
    stop = stop[:, None, None]
    scale = (stop - start) / size  # pixels a sample

    sample = torch.arange(size, device=start.device)[:, None] + 0.5  # (size, 1)
    pixel = torch.arange(length, device=start.device) + 0.5  # (length,)
    centre = start + sample * scale  # (n, size, 1)

    radius = scale.clamp(min=1.0)
    distance = (pixel - centre).abs()  # (n, size, length)
    triangle = (1 - distance / radius).clamp(min=0)

    from_start = pixel >= start.floor()
    to_stop = pixel <= stop.ceil()
    weight = triangle * (from_start & to_stop)

    total = weight.sum(-1, keepdim=True).clamp(min=1e-12)
    return weight / total


def resample(pixels: Tensor, rects: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Return rectangles of images resampled to squares: float32 (n, 3, size, size), in the units of
    `pixels`.

    `pixels` (n, 3, H, W) uint8 or float; `rects` (n, 4) x0, y0, x1, y1 in pixels, half-open; `flip`
    (n,) bool mirrors horizontally. One batched matrix product per axis, on the device of `pixels`,
    with no loop over images. No pixel outside a rectangle has any part in the result, bit for bit
    (pixels must be finite: 0 * infinity is not 0).
    """
    n, channels, height, width = pixels.shape
    x0, y0, x1, y1 = rects.to(pixels.device, torch.float32).unbind(1)
    across = _weights(x0, x1, width, size)  # (n, size, width)
    down = _weights(y0, y1, height, size)  # (n, size, height)

    if flip is not None:
        mirrored = flip.to(across.device)[:, None, None]
        across = torch.where(mirrored, across.flip(1), across)

    rows = pixels.float().reshape(n, channels * height, width)
    narrow = torch.bmm(rows, across.transpose(1, 2))  # (n, channels * height, size)

    columns = narrow.view(n * channels, height, size)
    down = down.repeat_interleave(channels, 0)  # (n * channels, size, height)
    squares = torch.bmm(down, columns)
    return squares.view(n, channels, size, size)
