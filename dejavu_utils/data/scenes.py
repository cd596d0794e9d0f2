"""The embedded default data set: composed scenes whose truth is known, made in seconds from what is
already installed.

A scene is a *background*, a random window of one of the photographs that scikit-image's wheel
carries, and a *foreground*, a disc with a pictograph of the DejaVu Sans font that matplotlib
carries, with its exact bounding box. With probability `rho` the photograph is the class's own, else
it is drawn uniformly over all of them. So the best accuracy from the background alone is known:
what a model infers above it about its training images is memorized.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dejavu_utils.data.images import Images

FAMILIES = (
    "grass.png",
    "brick.png",
    "coffee.png",
    "chelsea.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
    "gravel.png",
    "coins.png",
    "motorcycle_left.png",
    "moon.png",
    "cell.png",
    "rocket.jpg",
    "clock_motion.png",
    "page.png",
)  # no pictures of people
PICTOGRAPHS = {
    "umbrella": "\u2602",
    "anchor": "\u2693",
    "airplane": "\u2708",
    "telephone": "\u260e",
    "star": "\u2605",
    "scissors": "\u2702",
    "snowflake": "\u2744",
    "heart": "\u2665",
    "envelope": "\u2709",
    "sun": "\u2600",
    "gear": "\u2699",
    "skull": "\u2620",
    "club": "\u2663",
    "note": "\u266b",
    "flag": "\u2691",
}


def bayes_accuracy(rho: float, classes: int) -> float:
    """Return the best accuracy that the background alone allows: rho + (1 - rho) / classes.

    The posterior of the class given its background family is rho + (1 - rho)/C for the family's own
    class and (1 - rho)/C for every other, so no rule can be right more often. It is attained where
    families are recognisable.
    """
    return rho + (1 - rho) / classes


@functools.cache
def _photographs(count: int) -> list:
    """Return the first `count` background photographs as RGB pictures, the shorter side at most 512
    px.
    """
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    photos = []
    for name in FAMILIES[:count]:
        photo = Image.open(folder / name).convert("RGB")
        shorter = min(photo.size)
        if shorter > 512:
            photo = photo.reduce(shorter // 512 + 1)
        photos.append(photo)
    return photos


@functools.cache
def _sign(glyph: str, tilt: int) -> Image.Image:
    """Return the pictograph, turned by `tilt` degrees, white on black, inside the disc inscribed in
    256 px.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), 200)
    sign = Image.new("L", (256, 256))
    ImageDraw.Draw(sign).text((128, 128), glyph, fill=255, font=font, anchor="mm")
    sign = sign.rotate(tilt, Image.Resampling.BICUBIC)
    sign = sign.crop(sign.getbbox())

    factor = 210 / math.hypot(*sign.size)
    width = round(sign.width * factor)
    height = round(sign.height * factor)
    sign = sign.resize((width, height), Image.Resampling.BICUBIC)

    canvas = Image.new("L", (256, 256))
    canvas.paste(sign, ((256 - width) // 2, (256 - height) // 2))
    return canvas


@functools.cache
def _masks(glyph: str, side: int, tilt: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the coverage in [0, 1] of a disc of diameter `side` and of the pictograph on it: two
    (side, side).
    """
    disc = Image.new("L", (256, 256))
    ImageDraw.Draw(disc).ellipse((0, 0, 255, 255), fill=255)

    masks = []
    for image in (disc, _sign(glyph, tilt)):
        small = image.resize((side, side), Image.Resampling.BOX)
        masks.append(np.asarray(small, np.float32) / 255)
    return masks[0], masks[1]


def _background(rng: np.random.Generator, family: int, classes: int, size: int) -> np.ndarray:
    """Return a random window of the family's photograph, turned, mirrored and tinted: float (size,
    size, 3).
    """
    photo = _photographs(classes)[family]
    side = rng.uniform(0.25, 0.6) * min(photo.size)
    x = rng.uniform(0, photo.width - side)
    y = rng.uniform(0, photo.height - side)
    box = (x, y, x + side, y + side)
    window = photo.resize((size, size), Image.Resampling.BILINEAR, box=box)

    pixels = np.asarray(window, np.float32)  # (size, size, 3)
    pixels = np.rot90(pixels, rng.integers(4))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]

    tint = rng.uniform(0.6, 1.3, 3)
    return np.clip(pixels * tint, 0, 255)


def _object(
    rng: np.random.Generator, label: int, classes: int, size: int, shade: int
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Return (coverage, pixels, x, y): a light or dark (`shade`) pictograph on a disc of
    class-coded hue.
    """
    side = int(rng.integers(round(0.46 * size), round(0.58 * size) + 1))
    tilt = 3 * int(rng.integers(-5, 6))  # degrees
    glyph = list(PICTOGRAPHS.values())[label]
    disc, sign = _masks(glyph, side, tilt)

    hue = label / classes + rng.normal(0, 0.2 / classes)
    saturation = rng.uniform(0.75, 1.0)
    value = rng.uniform(0.65, 0.9)
    rgb = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    colour = 255 * np.array(rgb, np.float32)

    ink = rng.uniform(215, 255) if shade else rng.uniform(0, 40)
    pixels = colour + sign[..., None] * (ink - colour)  # (side, side, 3)

    x, y = rng.integers(0, size - side + 1, 2)
    return disc, pixels, int(x), int(y)


def _scene(
    seed: int, index: int, classes: int, rho: float, size: int, objects: bool
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Return (pixels, box, family, shade) of scene `index`; its stream depends on nothing but
    (seed, index).
    """
    rng = np.random.default_rng([seed, index])
    label = index % classes
    family = label if rng.random() < rho else int(rng.integers(classes))
    shade = int(rng.integers(2))
    pixels = _background(rng, family, classes, size)
    disc, colours, x, y = _object(rng, label, classes, size, shade)

    side = len(disc)
    if objects:
        region = pixels[y : y + side, x : x + side]
        region += disc[..., None] * (colours - region)

    box = np.array([[x, y, x + side, y + side]], np.float32)
    return np.round(pixels).astype(np.uint8), box, family, shade


def make(
    classes: int = 10,
    per_class: int = 100,
    rho: float = 0.2,
    seed: int = 0,
    size: int = 48,
    objects: bool = True,
) -> Images:
    """Return classes * per_class scenes as `Images`, balanced, with exact boxes and attributes
    `family`, `shade`.

    `rho` in [0, 1] is the background-object correlation, `size` the side in px, `objects=False`
    leaves the pictographs out (the same backgrounds, for leak tests). The same arguments give the
    same pixels everywhere.
    """
    limit = min(len(FAMILIES), len(PICTOGRAPHS))
    if not 1 <= classes <= limit or not 0 <= rho <= 1:
        raise ValueError(
            f"scenes.make: expected 1 <= classes <= {limit} and 0 <= rho <= 1, found {classes=}, "
            f"{rho=}"
        )
    n = classes * per_class
    digest = hashlib.sha256(f"{seed}/scenes".encode()).digest()
    stream = int.from_bytes(digest[:4], "little")
    scenes = [_scene(stream, i, classes, rho, size, objects) for i in range(n)]
    pixels, boxes, family, shade = zip(*scenes, strict=True)

    stacked = torch.from_numpy(np.stack(pixels))  # (n, size, size, 3)
    return Images(
        ids=np.array([f"scene-{i:06d}" for i in range(n)]),
        labels=np.arange(n) % classes,
        boxes=list(boxes),
        classes=tuple(PICTOGRAPHS)[:classes],
        sizes=np.full((n, 2), size),
        attributes={"family": np.array(family), "shade": np.array(shade)},
        pixels=stacked.permute(0, 3, 1, 2).contiguous(),
    )
