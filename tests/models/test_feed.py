"""Feeding: decoded in workers or resident, the views are the same; a share of the batch is a slice
of the batch.
"""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from dejavu_utils.data import datasets, split
from dejavu_utils.models import feed, pairs, train
from dejavu_utils.models.feed import Feed
from dejavu_utils.models.train import stream

RECIPE = train.Recipe(batch=4, size=16, views={"local": 1, "solarize": 0.5}, workers=1)
SIZES = torch.tensor([[24, 20]]).expand(10, 2)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (10, 3, 20, 24), dtype=torch.uint8, generator=stream(0, "pixels"))


class Listed(list):
    """Pictures that a worker would decode."""


def _epoch(images, sizes=SIZES, **options):
    made = Feed(images, sizes, torch.arange(len(images)), RECIPE, 2, "cpu", **options)
    return list(made.epoch(stream(0, "epoch")))


def test_batches_have_the_views_of_the_plan_and_drop_the_rest(pixels):
    batches = _epoch(pixels)
    assert [len(labels) for _, labels in batches] == [4, 4]
    assert [tuple(view.shape) for view in batches[0][0]] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)]
    assert len({int(i) for _, labels in batches for i in labels}) == 8


def test_decoded_in_workers_equals_resident_but_for_rounding(pixels):
    for (ours, labels), (theirs, same) in zip(_epoch(pixels), _epoch(Listed(pixels)), strict=True):
        assert torch.equal(labels, same)
        for one, two in zip(ours, theirs, strict=True):
            # workers send whole grey values: half a value of 255, at most 1.9 times stronger after
            # the jitter
            off = (one - two).abs() > 2 / 255 / min(feed.augment.STD)
            assert (
                off.float().mean() < 0.02
            )  # solarization turns a rounded value at its threshold around


def test_processes_share_the_batch(pixels):
    whole = _epoch(pixels)
    parts = [_epoch(pixels, rank=rank, processes=2) for rank in range(2)]
    for i, (views, labels) in enumerate(whole):
        assert torch.equal(labels, torch.cat([part[i][1] for part in parts]))
        for j, view in enumerate(views):
            torch.testing.assert_close(
                view, torch.cat([part[i][0][j] for part in parts]), rtol=1e-5, atol=1e-5
            )


def test_a_batch_that_cannot_be_shared(pixels):
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared by 3 processes"):
        _epoch(pixels, processes=3)
    with pytest.raises(ValueError, match="a batch of 4 needs as many images, found 3"):
        _epoch(pixels[:3], SIZES[:3])


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """24 pictures of mixed sizes in two classes, in the layout of Pascal VOC, as `data.Images`."""
    folder = tmp_path / "data" / "pets"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations" / "xmls").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(24):
        name, (width, height) = f"{'ab'[i % 2]}x_{i}", (40 + i, 64 - i)
        grey = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(grey).save(folder / "images" / f"{name}.jpg")
        box = "".join(
            f"<{tag}>{value}</{tag}>"
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), (1, 1, 12, 12), strict=True)
        )
        xml = (
            f"<annotation><size><width>{width}</width><height>{height}</height></size><object><name>x</name>"
            f"<bndbox>{box}</bndbox></object></annotation>"
        )
        (folder / "annotations" / "xmls" / f"{name}.xml").write_text(xml)
    return datasets.read("pets", folder)


def test_pictures_that_do_not_fit_are_listed_and_decoded_again(on_disk, tmp_path):
    sizes = {"classes": 2, "attacked": 4, "public": 3}
    parts = split.parts(on_disk, split.partition(on_disk, sizes, 0))
    small = dataclasses.replace(RECIPE, resident=0.0)
    path = pairs.training_set(parts, "A", small, tmp_path, 0)
    assert path.suffix == ".parquet" and path == pairs.training_set(parts, "A", small, tmp_path, 0)
    read = feed.read_list(path)
    assert torch.equal(read["labels"], torch.from_numpy(parts["a"].labels))
    assert np.array_equal(read["sizes"], parts["a"].sizes) and torch.equal(
        read["images"][3], parts["a"].pixels[3]
    )
    training = train.Training(
        recipe=dataclasses.replace(TINY, resident=0.0), epochs=1, seed="0/A", **read
    )
    assert np.isfinite(training.run_epoch())
    fits = pairs.training_set(parts, "A", RECIPE, tmp_path, 0)
    assert fits.suffix == ".safetensors"


TINY = train.Recipe(
    encoder="small4", projector="8-8-8", batch=4, size=16, constants={}, workers=1, precision="fp32"
)
