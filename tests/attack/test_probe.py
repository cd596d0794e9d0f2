"""The probe equals an independent logistic regression, the paper's recipe learns, and bad input is
named.
"""

import numpy as np
import pytest
import torch

from dejavu_utils.attack import probe


def clusters(n, classes, d=16, spread=1.0, seed=0):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    y = np.arange(n) % classes
    return torch.from_numpy(centres[y] + spread * random.normal(size=(n, d))).float(), y


@pytest.mark.parametrize("classes", [2, 7])
def test_lbfgs_finds_where_the_gradient_of_its_loss_vanishes(classes):
    x, y = clusters(200, classes, spread=1.5)
    labels, model = torch.from_numpy(y), probe.fit_lbfgs(x, torch.from_numpy(y), 1e-2, 500, 1e-6)
    z = x.double()
    z = (z - z.mean(0)) / z.std(0, correction=0)
    found = torch.from_numpy(model.decision_function(x.double().numpy())).reshape(200, -1)
    logits = (
        torch.cat([-found, found], 1) / 2 if classes == 2 else found
    )  # of two classes: the difference
    centred = logits - logits.mean(1, keepdim=True)
    line = torch.linalg.lstsq(
        torch.cat([z, torch.ones(200, 1)], 1), centred
    ).solution.requires_grad_()
    loss = (
        torch.nn.functional.cross_entropy(z @ line[:-1] + line[-1], labels)
        + 1e-2 / 2 * line[:-1].square().sum()
    )
    loss.backward()
    assert line.grad.abs().max() < 1e-5
    assert torch.allclose(z @ line[:-1].detach() + line[-1].detach(), centred, atol=1e-9)


@pytest.mark.parametrize("method", probe.METHODS)
def test_separable_classes_are_learned_and_noise_is_not(method):
    x, y = clusters(300, 5, spread=0.1)
    z, t = clusters(200, 5, spread=0.1, seed=1)
    found = probe.linear_probe(x, y, z, t, 5, method, extra=(z[:7], t[:7]))
    assert found["train"] == found["test"] == found["extra"] == 1 and found["gap"] == 0
    random = np.random.default_rng(3)
    found = probe.linear_probe(
        x, random.integers(0, 5, 300), z, random.integers(0, 5, 200), 5, method
    )
    assert found["gap"] == found["train"] - found["test"] and found["test"] < 0.35


def test_more_features_than_images_overfit_and_the_gap_shows_it():
    random = np.random.default_rng(4)
    x, y = random.normal(size=(60, 200)), np.arange(60) % 3
    found = probe.linear_probe(x, y, random.normal(size=(300, 200)), np.arange(300) % 3, 3)
    assert found["train"] == 1 and found["gap"] > 0.5


def test_row_order_and_scale_do_not_matter_to_lbfgs():
    x, y = clusters(200, 4, spread=2)
    z, t = clusters(300, 4, spread=2, seed=1)
    order = np.random.default_rng(0).permutation(200)
    expected = probe.linear_probe(x, y, z, t, 4)
    assert probe.linear_probe(x[order], y[order], z, t, 4) == pytest.approx(expected, abs=0.01)
    assert probe.linear_probe(x * 1e3 + 5, y, z * 1e3 + 5, t, 4) == pytest.approx(
        expected, abs=0.01
    )


def test_same_seed_same_sgd_probe():
    x, y = clusters(100, 3, spread=2)
    first, again, other = (
        probe.fit_sgd(x[None], torch.from_numpy(y), 3, seed, 3, (10, 0.1), 64)[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("method", probe.METHODS)
@pytest.mark.parametrize("count", [1, 4])
def test_views_that_are_the_images_themselves_change_nothing(method, count):
    x, y = clusters(150, 4, spread=2)
    z, t = clusters(200, 4, spread=2, seed=1)
    plain = probe.linear_probe(x, y, z, t, 4, method)
    seen = probe.linear_probe(x, y, z, t, 4, method, views=x.expand(count, -1, -1))
    assert seen == pytest.approx(plain, abs=0.006)
    if count == 1:
        assert seen == plain


@pytest.mark.parametrize("method", probe.METHODS)
def test_the_probe_learns_from_the_views_and_is_judged_on_the_images(method):
    x, y = clusters(150, 4, spread=0.1)
    mirrored = probe.linear_probe(x, y, x, y, 4, method, views=-x.expand(3, -1, -1))
    assert mirrored["train"] == mirrored["test"] < 0.1
    noisy = x + torch.randn(10, *x.shape, generator=torch.Generator().manual_seed(0))
    assert probe.linear_probe(x, y, x, y, 4, method, views=noisy)["train"] > 0.9


def test_the_paper_recipe_is_a_loop_of_gradient_steps_on_scaled_features():
    """By hand in float64: the gradient of the cross-entropy is (softmax - one-hot) x."""
    x, y = clusters(90, 3, d=5)
    views = torch.stack([x, 2 * x + 1])
    found = probe.fit_sgd(views, torch.from_numpy(y), 3, 7, 3, (10, 0.1), 64)

    flat = views.double().flatten(0, 1)
    scale = flat.std(0, correction=0) * 5**0.5
    generator = torch.Generator().manual_seed(7)
    line = ((torch.rand(3, 6, generator=generator) * 2 - 1) * 5**-0.5).double()
    speed = torch.zeros_like(line)
    for epoch in range(3):
        scaled = (views[epoch % 2].double() - flat.mean(0)) / scale
        z = torch.cat([scaled, torch.ones(90, 1)], 1)
        for rows in torch.randperm(90, generator=generator).split(64):
            share = (z[rows] @ line.T).softmax(1) - torch.eye(3)[y[rows]]
            speed = 0.9 * speed + share.T @ z[rows] / len(rows)
            line = line - 10 * speed  # six steps in all: the rate is set every 50
    logits = z @ line.T
    again = views[0].double() @ found[0].T + found[1]
    assert torch.allclose(again, logits, atol=1e-3)


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_any_number_of_classes_and_one_test_row(classes):
    x, y = clusters(max(20, classes), classes)
    for method in probe.METHODS:
        found = probe.linear_probe(x, y, x[:1], y[:1], classes, method, steps=5, epochs=1)
        assert 0 <= found["train"] <= 1 and found["test"] in (0, 1)
    assert probe.knn_accuracy(x, y, x[:1], y[:1], k=1, classes=classes) == 1


def test_constant_features_give_chance():
    found = probe.linear_probe(
        torch.ones(40, 3), np.arange(40) % 4, torch.ones(8, 3), np.arange(8) % 4, 4
    )
    assert found["train"] == found["test"] == 0.25


def test_knn_accuracy():
    x, y = clusters(300, 5, spread=0.1)
    z, t = clusters(50, 5, spread=0.1, seed=1)
    assert probe.knn_accuracy(x, y, z, t, k=20) == 1
    assert probe.knn_accuracy(x, y, z, (t + 1) % 5, k=20, classes=5) == 0
    assert (
        probe.knn_accuracy(x[:5], y[:5], z, t, k=20) == 1
    )  # one vote each: the nearest wins the tie


@pytest.mark.parametrize(
    "change, text",
    [
        ({"method": "adam"}, "adam"),
        ({"train_y": np.zeros(3)}, "3 labels"),
        ({"test_y": np.full(4, 9)}, "expected 0 to 1"),
        ({"test_x": torch.full((4, 2), torch.nan)}, "test: features"),
        ({"test_x": torch.zeros(4, 3)}, "feature widths"),
        ({"views": torch.zeros(2, 5, 2)}, "views .2, 5, 2. of 6 images"),
        ({"views": torch.zeros(2, 6, 3)}, "feature widths"),
        ({"train_x": torch.zeros(0, 2), "train_y": np.zeros(0)}, "n >= 1"),
    ],
)
def test_bad_input_is_one_clear_error(change, text):
    given = {
        "train_x": torch.zeros(6, 2),
        "train_y": np.arange(6) % 2,
        "test_x": torch.zeros(4, 2),
        "test_y": np.arange(4) % 2,
        "classes": 2,
    }
    with pytest.raises(ValueError, match=text):
        probe.linear_probe(**{**given, **change})
