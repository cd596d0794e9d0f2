"""An encoder with planted memory, and small sets of pictures, for all tests of the audit."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dejavu_utils.attack import crops
from dejavu_utils.audit import audit, subject
from dejavu_utils.audit.settings import Settings
from dejavu_utils.data import scenes
from dejavu_utils.models import external, views

CLASSES = 10
SETTINGS = Settings(k=10, size=16, limit=0)
PARTITION = {"a": 100, "b": 100, "control": 150, "public": 30}  # images a class


def keys(x):
    """Return a name for each normalised picture."""
    return [hashlib.sha256(np.round(one.numpy(), 3).tobytes()).digest() for one in x]


class Planted(nn.Module):
    """A trunk that knows the class of the pictures in its memory, and sees noise in all others."""

    def __init__(self):
        super().__init__()
        self.memory = {}

    def reset_parameters(self):
        self.memory = {}

    def learn(self, pixels, labels):
        self.memory |= dict(zip(keys(views.normalize(pixels)), map(int, labels), strict=True))

    def forward(self, x):
        features = []
        for key in keys(x):
            noise = np.random.default_rng(list(key[:4])).normal(size=CLASSES)
            known = 8 * np.eye(CLASSES)[self.memory[key]] if key in self.memory else 0
            features.append(noise + known)
        return torch.tensor(np.array(features)).float()


class Audits:
    """Pictures in parts, and audits of encoders that remember some of them."""

    settings = SETTINGS

    def __init__(self):
        images = scenes.make(CLASSES, sum(PARTITION.values()), rho=0.2, seed=5, size=32)
        images = dataclasses.replace(images, attributes={})
        ends = np.cumsum(list(PARTITION.values())) * CLASSES
        self.parts = {
            name: images.subset(range(end - PARTITION[name] * CLASSES, end))
            for name, end in zip(PARTITION, ends, strict=True)
        }
        self.encoder = self.planted("a")

    def planted(self, remembered, share=0.3):
        """Return an encoder that recognises public pictures and remembers a share of the crops of
        one part.
        """
        trunk = Planted()
        trunk.learn(self.parts["public"].squares(16), self.parts["public"].labels)
        crop = SETTINGS.crop | {"min_side": 8}  # px: what 0 stands for on pictures of 32 px
        images = self.parts[remembered]
        images = images.subset(crops.background(images, crop)[1])
        images = images.subset(range(int(share * len(images))))
        trunk.learn(images.squares(16, crops.background(images, crop)[0]), images.labels)
        return external.External(trunk, name="planted", notes=("planted",), sha256="0" * 64)

    def sets(self, images="a", held_out="control", public="public"):
        """Return the sets of an audit: parts by their names, or pictures; "" is none."""
        named = {"images": images, "public": public, "held_out": held_out}
        return {
            name: self.parts[part] if isinstance(part, str) else part
            for name, part in named.items()
            if not isinstance(part, str) or part
        }

    def prepared(self, sets, encoder=None, reference=None, settings=SETTINGS):
        encoder = encoder or self.encoder
        return subject.prepare(encoder, reference=reference, settings=settings, **sets)

    def examined(self, sets, encoder=None, reference=None, settings=SETTINGS):
        case = self.prepared(sets, encoder, reference, settings)
        return audit.examine(case, settings)

    @staticmethod
    def folder(root, images, count):
        """Write the first pictures as a folder of class folders."""
        for i in range(count):
            place = root / images.classes[images.labels[i]]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(place / f"{i:04d}.png")
        return root


@pytest.fixture(scope="session")
def audits():
    return Audits()


@pytest.fixture(scope="session")
def remembered(audits):
    """The report on an encoder that remembers a share of its members."""
    return audits.examined(audits.sets("a"))
