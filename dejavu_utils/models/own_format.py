"""Our encoders on disk: safetensors, and a sidecar that says how to rebuild the network."""

import dataclasses
from pathlib import Path

from torch import nn

from dejavu_utils import store
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.recipe import Recipe


def save(path: str | Path, encoder: Encoder, recipe: Recipe, **meta: int | str) -> None:
    """Write the encoder's weights to `path` (.safetensors); `recipe` names its trunk, projector and
    image size.
    """
    build = {"encoder": recipe.encoder, "projector": recipe.projector, "size": recipe.size}
    store.write_tensors(
        path,
        encoder.state_dict(),
        {"parameters": build, "recipe": dataclasses.asdict(recipe), **meta},
    )


def load(path: str | Path) -> Encoder:
    """Return the encoder stored at `path`, in evaluation mode on the CPU.

    The checksum is verified and every name and shape must match: StoreError says which did not.
    """
    tensors, meta = store.read_tensors(path)
    build = meta["parameters"]
    encoder = Encoder(build["encoder"], build["projector"], build["size"])
    if "classifier.2.weight" in tensors:  # the supervised baseline's
        encoder.add_classifier(len(tensors["classifier.2.weight"]))
    fill(encoder, tensors, path)
    return encoder.eval()


def fill(
    module: nn.Module,
    tensors: dict,
    where: str | Path,
    part: str = "this encoder",
    advice: str = "Check the recipe's encoder and projector.",
    assign: bool = False,
) -> None:
    """Copy `tensors` into `module`, all of them and nothing else; StoreError names what does not
    fit.

    `assign` puts the tensors themselves in the place of the module's, which may have no memory yet.
    """
    own = module.state_dict()
    shapes = [
        f"{n} has shape {tuple(tensors[n].shape)}, expected {tuple(own[n].shape)}"
        for n in own.keys() & tensors.keys()
        if own[n].shape != tensors[n].shape
    ]
    wrong = [f"missing {n}" for n in own.keys() - tensors.keys()]
    wrong += [f"unexpected {n}" for n in tensors.keys() - own.keys()]
    if problems := sorted(shapes + wrong):
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise store.StoreError(
            f"{where} does not fit {part}: {'; '.join(problems[:5])}{more}. {advice}"
        )
    module.load_state_dict(tensors, strict=True, assign=assign)
