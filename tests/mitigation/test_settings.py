"""Settings: default values share encoders, sizes nest, duplicates go, fine-tuning starts right,
releases are exact.
"""

import dataclasses

import numpy as np
import pytest
import torch

from dejavu_utils import mitigation, store
from dejavu_utils.data import scenes, split
from dejavu_utils.models import launch, views
from dejavu_utils.models import pairs as build

PARAMS = {
    "seeds": [0],
    "dataset": "scenes",
    "rhos": [0.2, 0.0],
    "criteria": ["vicreg"],
    "epochs": [0, 2],
    "sizes": {"classes": 4, "attacked": 6, "shared": 0, "public": 10, "probe": 5, "control": 5},
    "recipe": {"encoder": "small4", "projector": "16-16-16", "batch": 12},
    "crop": {"kind": "periphery", "min_side": 8},
}


def test_the_defaults_value_is_the_default_pair(tmp_path):
    default = build.make(PARAMS, tmp_path)[0]
    wanted = {
        "constants.invariance": [25.0, 100.0],
        "views.scale_min": [0.04, 0.3],
        "weight_decay": [1e-6, 0.1],
        "encoder": ["small4", "small8"],
        "distinct": [1.0],
    }
    found = {
        (setting, value): pair
        for setting, value, pair in mitigation.trained(PARAMS, tmp_path, {"vicreg": wanted})
    }
    for (setting, value), pair in found.items():
        assert (pair.jobs["A"].folder == default.jobs["A"].folder) == (
            value == wanted[setting][0]
        ), (
            setting,
            value,
        )
        assert [pair.parts[side].digest for side in "ab"] == [
            default.parts[side].digest for side in "ab"
        ]
    recipe = found["constants.invariance", 100.0].jobs["A"].recipe
    assert (
        recipe.constants["invariance"] == 100.0
        and found["weight_decay", 0.1].jobs["B"].recipe.weight_decay == 0.1
    )
    assert found["views.scale_min", 0.3].jobs["A"].recipe.views == {
        "scale_min": 0.3,
        "strength": 0.4,
        "grey": 0.0,
        "blur": 0.0,
        "solarize": 0.0,
    }


def test_a_setting_of_one_criterion_keeps_that_criterions_own_recipe(tmp_path):
    params = PARAMS | {
        "recipe": PARAMS["recipe"] | {"simclr": {"lr": 0.02, "constants": {"temperature": 0.3}}}
    }
    made = mitigation.trained(
        params, tmp_path, {"simclr": {"constants.temperature": [0.3, 0.5], "lr": [0.04]}}
    )
    recipes = [pair.jobs["A"].recipe for *_, pair in made]
    assert [(r.constants["temperature"], r.lr) for r in recipes] == [
        (0.3, 0.02),
        (0.5, 0.02),
        (0.3, 0.04),
    ]


def _pixels(pair, model):
    return {
        image.numpy().tobytes()
        for image in store.read_tensors(pair.jobs[model].pixels)[0]["pixels"]
    }


def test_sizes_nest_and_attack_the_same_images(tmp_path):
    made = mitigation.trained(
        PARAMS, tmp_path, {"vicreg": {"trained": [6, 12], "trained_steps": [6, 12]}}
    )
    (_, _, small), (_, _, large), (_, _, same), (_, _, steps) = made
    assert small.parts["a"].digest == large.parts["a"].digest and len(large.parts["a"]) == 4 * 6
    for model in "AB":
        assert (
            _pixels(small, model) < _pixels(large, model) and len(_pixels(large, model)) == 4 * 12
        )
        attacked = {image.numpy().tobytes() for image in large.parts[model.lower()].pixels}
        assert attacked == _pixels(small, model)
    assert not _pixels(large, "A") & _pixels(large, "B")
    assert (
        same.jobs["A"].folder == small.jobs["A"].folder
    )  # the smallest does as many steps either way
    assert (large.jobs["A"].epochs, steps.jobs["A"].epochs) == ([0, 2], [0, 1])
    public = {image.numpy().tobytes() for image in large.parts["public"].pixels}
    assert not public & (_pixels(large, "A") | _pixels(large, "B"))


def test_the_papers_design_attacks_all(tmp_path):
    made = mitigation.trained(PARAMS, tmp_path, {"vicreg": {"sizes.attacked": [6, 12]}})
    assert [len(pair.parts["a"]) for *_, pair in made] == [24, 48]


def test_fewer_trained_than_attacked_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"16 of the attacked images would not be trained on.*sizes\.attacked"
    ):
        mitigation.trained(PARAMS, tmp_path, {"vicreg": {"trained": [4, 6]}})


@pytest.mark.parametrize("name", ["invariance", "constants", "sizes.many", "views.", "recipe.lr"])
def test_unknown_setting_names_what_there_is(tmp_path, name):
    with pytest.raises(ValueError, match="is not known"):
        pair = mitigation.trained(PARAMS, tmp_path, {"vicreg": {name: [1]}})[0][2]
        launch.fit_all(list(pair.jobs.values()), workers=1)


def test_near_duplicates_are_removed(tmp_path):
    images = scenes.make(classes=4, per_class=6, seed=5)
    assert split.distinct(images, 0.99).all()
    pixels = images.pixels.clone()
    pixels[7] = pixels[3]
    pixels[20] = (pixels[11].float() * 0.9 + 4).to(torch.uint8)  # paler, still the same picture
    copies = dataclasses.replace(images, pixels=pixels)
    assert np.flatnonzero(~split.distinct(copies, 0.99)).tolist() == [7, 20]
    assert split.distinct(images.subset([]), 0.99).shape == (0,)
    assert split.distinct(copies, 0.6)[:2].tolist() == [True, bool(_likeness(copies, 0, 1) <= 0.6)]
    pair = mitigation.trained(PARAMS, tmp_path, {"vicreg": {"distinct": [0.2]}})[0][2]
    assert (
        0 < len(_pixels(pair, "A")) < 24 == len(pair.parts["a"])
    )  # fewer trained on, all attacked


def _likeness(images, one, two):
    small = images.squares(16).flatten(1).double().numpy()
    return np.corrcoef(small[one], small[two])[0, 1]


def test_fine_tuning_starts_from_the_encoder_and_sees_x_alone(tmp_path):
    pair = build.make(PARAMS, tmp_path)[0]
    launch.fit_all(list(pair.jobs.values()), workers=1)
    still = PARAMS | {"recipe": PARAMS["recipe"] | {"lr": 0.0}}
    frozen = dataclasses.replace(
        pair,
        jobs={
            model: dataclasses.replace(job, recipe=build.recipe("vicreg", still["recipe"]))
            for model, job in pair.jobs.items()
        },
    )
    before, after = pair.encoder("A", 2), mitigation.finetuned(frozen, 2, 1).encoder("A", 1)
    for (
        name,
        weight,
    ) in before.trunk.named_parameters():  # without a rate only the running statistics move
        assert torch.equal(weight, after.trunk.get_parameter(name))
    tuned = mitigation.finetuned(pair, 2, 1)
    image = views.normalize(pair.parts["public"].squares(32))
    assert not torch.equal(tuned.encoder("A", 1)(image), before(image))
    assert mitigation.finetuned(pair, 2, 0) is pair
    again = mitigation.finetuned(pair, 2, 1)
    assert again.jobs["A"].folder == tuned.jobs["A"].folder and again.jobs["A"].done()


def test_release_rounds_to_the_levels_and_adds_the_noise_asked_for():
    like = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    assert torch.equal(mitigation.release(like, like), like)
    for bits in (1, 2, 8):
        out = mitigation.release(like, like, bits=bits)
        assert all(len(column.unique()) <= 2**bits for column in out.T)
        inside = (like > torch.quantile(like, 0.02, 0)) & (like < torch.quantile(like, 0.98, 0))
        step = (torch.quantile(like, 0.99, 0) - torch.quantile(like, 0.01, 0)) / (2**bits - 1)
        assert ((out - like).abs() <= 0.5001 * step)[inside].all()
    noisy = mitigation.release(like, like, noise=0.5, seed=1)
    assert torch.allclose((noisy - like).std(0) / like.std(0), torch.full((8,), 0.5), atol=0.03)
    assert torch.equal(noisy, mitigation.release(like, like, noise=0.5, seed=1))
    assert not torch.equal(noisy, mitigation.release(like, like, noise=0.5, seed=2))
    constant = torch.ones(5, 3)
    assert torch.isfinite(mitigation.release(constant, constant, bits=1, noise=0.1)).all()
    with pytest.raises(ValueError, match="noise -1, bits 0"):
        mitigation.release(like, like, noise=-1)
