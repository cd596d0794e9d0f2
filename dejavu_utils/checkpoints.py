"""Encoders on disk, in our own format: safetensors with a sidecar that says how to rebuild the network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dejavu_utils import store
from dejavu_utils.models import Encoder


def save(path: str | Path, encoder: Encoder, recipe, **meta) -> None:
    """Write the encoder's weights to `path` (.safetensors); `recipe` names its trunk, projector and image size."""
    build = {"encoder": recipe.encoder, "projector": recipe.projector, "size": recipe.size}
    store.write_tensors(path, encoder.state_dict(), {"parameters": build, "recipe": dataclasses.asdict(recipe), **meta})


def load(path: str | Path) -> Encoder:
    """Return the encoder stored at `path`, in evaluation mode on the CPU.

    The checksum is verified and every name and shape must match: StoreError says which did not.
    """
    tensors, meta = store.read_tensors(path)
    build = meta["parameters"]
    encoder = Encoder(build["encoder"], build["projector"], build["size"])
    fill(encoder, tensors, path)
    return encoder.eval()


def fill(module: torch.nn.Module, tensors: dict, where: str | Path) -> None:
    """Copy `tensors` into `module`, all of them and nothing else; StoreError names what does not fit."""
    own = module.state_dict()
    shapes = [f"{n} has shape {tuple(tensors[n].shape)}, expected {tuple(own[n].shape)}"
              for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    wrong = [f"missing {n}" for n in own.keys() - tensors.keys()]
    wrong += [f"unexpected {n}" for n in tensors.keys() - own.keys()]
    if problems := sorted(shapes + wrong):
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise store.StoreError(f"{where} does not fit this encoder: {'; '.join(problems[:5])}{more}. "
                               "Check the recipe's encoder and projector.")
    module.load_state_dict(tensors, strict=True)
