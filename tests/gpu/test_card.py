"""What a GPU must not change: neighbours, losses, a resumed training, crops and views.

`make sitting` runs these on a card and keeps what `record_property` states.
"""

import copy

import pytest
import torch

from dejavu_utils.attack import knn
from dejavu_utils.data.resampling import resample
from dejavu_utils.models import methods, pairs, train, views

pytestmark = pytest.mark.gpu

RECIPE = {"encoder": "small8", "projector": "32-32-32", "batch": 32, "size": 32}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions in float32, not TF32: what is compared here is the order of additions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _pictures(n):
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 40, 40), generator=source, dtype=torch.uint8)
    return pixels, torch.arange(n) % 4


def _training(device, precision="fp32", criterion="vicreg", epochs=3):
    recipe = pairs.recipe(criterion, RECIPE | {"precision": precision})
    pixels, labels = _pictures(96)
    return train.Training(pixels, recipe, epochs, "card", device, labels, 4)


def _distance(one, two):
    """Return how far two lists of tensors are apart, as a share of the first one's length."""
    first = torch.cat([tensor.detach().cpu().double().flatten() for tensor in one])
    second = torch.cat([tensor.detach().cpu().double().flatten() for tensor in two])
    return float((first - second).norm() / first.norm())


def _banks():
    source = torch.Generator().manual_seed(1)
    normal = torch.randn(4000, 64, generator=source)
    copied = normal.clone()
    copied[500:700] = normal[7]
    return {
        "normal": normal,
        "binary codes": normal.sign(),
        "a row copied 200 times": copied,
        "a collapsed encoder": torch.ones(4000, 64),
        "nearly collapsed": 1000 + normal * 1e-3,
    }


@pytest.mark.parametrize("name", list(_banks()))
def test_search_gives_the_neighbours_of_float64(name, device):
    bank = _banks()[name]
    queries = bank[::200].clone()
    k = 5

    differences = queries.double()[:, None] - bank.double()  # (q, n, d)
    distances = differences.square().sum(2)  # (q, n)
    expected = distances.argsort(dim=1, stable=True)[:, :k]  # ties to the lower row

    found, columns = knn.search(queries.to(device), bank.to(device), k)
    here, columns_here = knn.search(queries, bank, k)
    assert torch.equal(columns.cpu(), columns_here) and torch.equal(found.cpu(), here)
    assert torch.equal(columns.cpu(), expected)


@pytest.mark.parametrize("criterion", list(methods.METHODS))
def test_a_step_in_bf16_is_near_that_of_the_cpu(criterion, device, record_property):
    here = _training("cpu", "fp32", criterion)
    there = _training(device, "bf16", criterion)
    made, labels = next(here.feed.epoch(train.stream(0, "views")))

    loss_here = here.model(made, labels, 0.0)
    loss_here.backward()
    loss_there = there.model([view.to(device) for view in made], labels.to(device), 0.0)
    loss_there.backward()

    error = abs(float(loss_there) - float(loss_here)) / abs(float(loss_here))
    gradients = [
        [weight.grad for weight in side.encoder.parameters() if weight.grad is not None]
        for side in (here, there)
    ]
    off = _distance(*gradients)
    record_property("relative error of the loss", f"{error:.1e}")
    record_property("relative error of the gradient", f"{off:.1e}")
    assert error < 0.03 and 0 < off < 0.4


def test_a_step_in_float32_is_that_of_the_cpu(device, record_property):
    here, there = _training("cpu"), _training(device)
    made, labels = next(here.feed.epoch(train.stream(0, "views")))

    loss_here = here.model(made, labels, 0.0)
    loss_there = there.model([view.to(device) for view in made], labels.to(device), 0.0)

    error = abs(float(loss_there) - float(loss_here)) / abs(float(loss_here))
    record_property("relative error of the loss", f"{error:.1e}")
    assert error < 1e-4


def test_a_resumed_training_ends_like_an_uninterrupted_one(device, record_property):
    whole, again = _training(device), _training(device)
    start = copy.deepcopy([weight.detach().cpu() for weight in whole.encoder.parameters()])
    losses = [whole.run_epoch() for _ in range(3)]
    for _ in range(3):
        again.run_epoch()

    first, second = _training(device), _training(device)
    first.run_epoch()
    state = {name: value.detach().cpu() for name, value in first.tensors().items()}
    second.restore(state, 1, "a test")
    resumed = [second.run_epoch() for _ in range(2)]

    weights = list(whole.encoder.parameters())
    off = _distance(weights, list(second.encoder.parameters()))
    twice = _distance(weights, list(again.encoder.parameters()))
    moved = _distance(start, weights)
    record_property("relative distance of the weights", f"{off:.1e}")
    record_property("of two uninterrupted trainings", f"{twice:.1e}")
    record_property("of the start", f"{moved:.1e}")

    # A card adds in an order of its own each time: no two trainings have the same bits.
    assert off < 1e-5 + 5 * twice and resumed == pytest.approx(losses[1:], rel=1e-3)
    assert off < moved / 10


def test_crops_are_those_of_the_cpu_to_rounding(device):
    pixels, _ = _pictures(64)
    source = torch.Generator().manual_seed(2)
    corner = torch.randint(0, 20, (64, 2), generator=source).float()
    rects = torch.cat([corner, corner + 12.5], 1)
    flip = torch.arange(64) % 2 == 0

    here = resample(pixels, rects, 24, flip)
    there = resample(pixels.to(device), rects.to(device), 24, flip.to(device))
    assert float((there.cpu() - here).abs().max()) < 1e-3  # of 255


@pytest.mark.parametrize("kind", ["first", "second", "local"])
def test_views_are_those_of_the_cpu_to_rounding(kind, device):
    pixels, _ = _pictures(64)
    how = views.Views(local=1)
    sizes = torch.full((64, 2), 40)
    drawn = views.draw(kind, sizes, how, 32, torch.Generator().manual_seed(3))
    moved = views.Draw(*(None if value is None else value.to(device) for value in drawn))

    here = views.view(pixels, 32, drawn)
    there = views.view(pixels.to(device), 32, moved)
    off = (there.cpu() - here).abs() * 255 * min(views.STD)  # in levels of 255
    assert (
        float((off > 0.01).float().mean()) < 1e-4
    )  # a pixel at the threshold of solarize may flip


def test_a_decoder_takes_a_step(device):
    from dejavu_utils.reconstruct import decoder

    constants = {"channels": [8, 16], "blocks": [1, 1], "conditions": ["projector"]}
    recipe = pairs.recipe("vicreg", RECIPE | {"size": 16, "batch": 8})
    recipe = type(recipe)(**vars(recipe) | {"constants": constants, "criterion": "rcdm"})
    pixels = _pictures(16)[0][..., :16, :16].contiguous()
    tensors = {"pixels": pixels, "projector": torch.randn(16, 12)}
    training = decoder.Training(tensors, recipe, 1, "card", device)
    before = copy.deepcopy([weight.detach().cpu() for weight in training.encoder.parameters()])

    loss = training.run_epoch()
    drawn = decoder.sample(
        training.encoder.eval(), {"projector": torch.randn(2, 12)}, steps=2, device=device
    )

    assert loss > 0 and _distance(before, list(training.encoder.parameters())) > 0
    assert drawn.shape == (2, 1, 3, 16, 16)
