"""Embedding and sampling, each next to its limit: the same network's forward passes alone, on
tensors that are ready.

Not a test: speed depends on what else runs.
"""

from __future__ import annotations

import contextlib

import bench_common

KINDS = ("squares", "crops")


def embedding(device: str, sizes: dict, kinds: tuple[str, ...] = KINDS) -> list[dict]:
    """Return a row per encoder and kind: "squares" that are ready as uint8, and "crops" cut out of
    larger pictures.
    """
    return [
        bench_common.row(
            "embedding",
            f"{encoder[0]}, {encoder[1]}, {encoder[2]} px: {what}",
            "images/s",
            device,
            _full(device),
            _embedding,
            device,
            *encoder,
            what == "crops",
            sizes,
        )
        for encoder in sizes["encoders"]
        for what in kinds
    ]


def _full(device: str) -> str:
    """Return what full precision is here: cuDNN's convolutions may round factors to TF32."""
    import torch

    return "tf32" if device == "cuda" and torch.backends.cudnn.allow_tf32 else "float32"


def _embedding(
    device: str, spec: str, projector: str, side: int, images: int, cut: bool, sizes: dict
) -> dict:
    """Return images/s of `models.embed` (or, with `cut`, of all that the attack does) and of the
    forward passes.
    """
    import torch

    from dejavu_utils.attack import references
    from dejavu_utils.models import encoders, views

    torch.set_num_threads(sizes["threads"])
    encoder, batch = encoders.Encoder(spec, projector, side).eval(), min(500, images)
    squares, layers = (
        torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8),
        ("projector", "backbone"),
    )
    if cut:
        large, rects = _pictures(images, side)
        took = bench_common.best(
            lambda: references.embed_images({"A": encoder}, large, side, layers, rects, device),
            device,
            sizes["repeats"],
        )
    else:
        took = bench_common.best(
            lambda: encoders.embed(encoder, squares, layers, device=device),
            device,
            sizes["repeats"],
        )
    encoder.to(device)
    ready = views.normalize(squares[:batch].to(device)).contiguous(
        memory_format=torch.channels_last
    )

    @torch.inference_mode()
    def alone():
        for _ in range(images // batch):
            encoder.layers(ready)

    limit = bench_common.best(alone, device, sizes["repeats"])
    return {"value": images / took, "limit": images // batch * batch / limit}


def _pictures(images: int, side: int):
    """Return pictures half as large again as the encoder's square, and a rectangle of each."""
    import numpy as np
    import torch

    from dejavu_utils.data.images import Images

    large, some = side * 3 // 2, np.arange(images)
    pixels = torch.randint(0, 256, (images, 3, large, large), dtype=torch.uint8)
    rects = np.stack([some % 5, some % 7, large - some % 3, large - some % 4], 1)
    return Images(
        some.astype(str),
        some * 0,
        [np.zeros((0, 4), np.float32)] * images,
        ("none",),
        np.full((images, 2), large),
        pixels,
    ), rects


def sampling(device: str, sizes: dict) -> list[dict]:
    """Return a row: pictures/s of an untrained decoder, next to its U-Net's forward passes
    alone.
    """
    from dejavu_utils.models import train

    how, precision = sizes["decoder"], str(train.precision("auto", device)).removeprefix("torch.")
    what = f"U-Net {'-'.join(map(str, how['channels']))}, {how['size']} px, {how['steps']} steps"
    return [
        bench_common.row(
            "sampling", what, "pictures/s", device, precision, _sampling, device, sizes
        )
    ]


def _sampling(device: str, sizes: dict) -> dict:
    """Return pictures/s of `decoder.sample` and of the forward passes that it needs, at the same
    precision.
    """
    import torch

    from dejavu_utils.reconstruct import decoder

    torch.set_num_threads(sizes["threads"])
    how = dict(sizes["decoder"])
    size, steps, guidance, pictures, batch = (
        how.pop(n) for n in ("size", "steps", "guidance", "pictures", "batch")
    )
    net = (
        decoder.Decoder({"projector": 512}, size, how | {"conditions": ["projector"]})
        .eval()
        .to(device)
    )
    told, batch = {"projector": torch.randn(pictures, 512)}, min(batch, pictures)
    took = bench_common.best(
        lambda: decoder.sample(net, told, 1, steps, guidance, device=device, batch=batch),
        device,
        sizes["repeats"],
    )
    noise = torch.randn(batch, 3, size, size, device=device)
    vector = torch.randn(batch, decoder.VECTOR, device=device)
    passes = (
        pictures // batch * steps * (1 if guidance == 1 else 2)
    )  # guidance predicts with and without condition

    @torch.inference_mode()
    def alone():
        with _autocast(device):
            for _ in range(passes):
                net.net(noise, vector)

    limit = bench_common.best(alone, device, sizes["repeats"])
    return {"value": pictures / took, "limit": pictures // batch * batch / limit}


def _autocast(device: str):
    """Return the precision in which `decoder.sample` works on this device."""
    import torch

    from dejavu_utils.models import train

    dtype = train.precision("auto", device)
    return torch.autocast(device, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()
