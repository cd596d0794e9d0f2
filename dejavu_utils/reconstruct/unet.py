"""The network of a decoder: a U-Net from pictures to pictures that a vector steers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64  # channels of an attention head


def _normalize(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // 16), width)


class Attention(nn.Module):
    """Self-attention between all positions of a picture, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.norm = _normalize(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[2:]
        qkv = self.qkv(self.norm(x)).flatten(2)  # (n, 3 c, h w)
        qkv = qkv.unflatten(1, (3, self.heads, -1)).transpose(3, 4)  # (n, 3, heads, h w, c / heads)
        query, key, value = qkv.unbind(1)
        y = F.scaled_dot_product_attention(query, key, value)  # (n, heads, h w, c / heads)
        y = y.transpose(2, 3).flatten(1, 2).unflatten(2, side)  # (n, c, h, w)
        return x + self.out(y)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the vector scales and shifts what is between them."""

    def __init__(self, width_in: int, width_out: int, vector: int, attention: bool = False) -> None:
        super().__init__()
        self.norm1 = _normalize(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.film = nn.Linear(vector, 2 * width_out)
        self.norm2 = _normalize(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # a block starts as its shortcut

        self.shortcut = nn.Identity()
        if width_in != width_out:
            self.shortcut = nn.Conv2d(width_in, width_out, 1)
        self.attention = Attention(width_out) if attention else nn.Identity()

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))  # (n, out, h, w)

        scale, shift = self.film(vector)[:, :, None, None].chunk(2, 1)  # (n, out, 1, 1) each
        y = self.norm2(y) * (1 + scale) + shift

        y = self.conv2(F.silu(y))
        return self.attention(self.shortcut(x) + y)


class UNet(nn.Module):
    """Blocks at falling, then at rising resolution: (n, 3, s, s) and (n, vector) -> (n, 3, s, s).

    Squares of `patch` pixels become channels first. `channels` and `blocks` are the width and the
    number of blocks at each resolution, halved from one to the next; `attention` lists the
    resolutions (px, of `size`-px pictures) whose blocks attend.
    """

    def __init__(
        self,
        size: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        attention: Sequence[int],
        patch: int,
        vector: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(3 * patch**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        self.upsample = nn.ModuleList()
        self.up = nn.ModuleList()

        levels = len(channels)
        for level, width in enumerate(channels):
            attends = size >> level in attention
            widths = [width] * blocks[level]
            self.down.append(nn.ModuleList(Block(width, width, vector, attends) for _ in widths))
            if level == levels - 1:
                continue
            below = channels[level + 1]
            self.downsample.append(nn.Conv2d(width, below, 3, 2, padding=1))
            self.upsample.append(nn.Conv2d(below, width, 1))
            widths[0] = 2 * width  # what came from below, and what went down here
            self.up.append(nn.ModuleList(Block(i, width, vector, attends) for i in widths))

        self.norm_out = _normalize(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3 * patch**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch)  # (n, 3 patch², s / patch, s / patch)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))

        kept = []
        for level, stage in enumerate(self.down):
            for block in stage:
                x = block(x, vector)
            if level < len(self.downsample):
                kept.append(x)
                x = self.downsample[level](x)

        for level in reversed(range(len(self.up))):
            x = F.interpolate(self.upsample[level](x), scale_factor=2.0)
            x = torch.cat([x, kept[level]], 1)
            for block in self.up[level]:
                x = block(x, vector)

        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch)
