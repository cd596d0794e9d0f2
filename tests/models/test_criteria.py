"""Criteria against lightly's implementations: value and gradient, in float64."""

import pytest
import torch

from dejavu_utils.models import criteria

JOINT = {name: getattr(criteria, name) for name in ("vicreg", "barlow_twins", "simclr")}


@pytest.fixture(params=[(16, 32), (64, 8), (2, 5)], ids=str)
def views(request):
    rng = torch.Generator().manual_seed(sum(request.param))
    z1, z2 = torch.randn(2, *request.param, generator=rng, dtype=torch.float64)
    return (3 * z1 + 1).requires_grad_(), (0.2 * z2 - 2).requires_grad_()


def _same(ours, theirs, views):
    own, peer = ours(*views), theirs(*views)
    torch.testing.assert_close(own, peer, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(own, views), torch.autograd.grad(peer, views), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_vicreg_equals_lightly(views):
    from lightly.loss import VICRegLoss

    _same(criteria.vicreg, VICRegLoss(), views)


def test_vicreg_coefficients_equal_lightly(views):
    from lightly.loss import VICRegLoss

    peer = VICRegLoss(lambda_param=100.0, mu_param=10.0, nu_param=3.0)
    _same(
        lambda a, b: criteria.vicreg(a, b, invariance=100.0, variance=10.0, covariance=3.0),
        peer,
        views,
    )


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_equals_lightly(views, temperature):
    from lightly.loss import NTXentLoss

    _same(lambda a, b: criteria.simclr(a, b, temperature), NTXentLoss(temperature), views)


@pytest.mark.parametrize("redundancy", [0.0051, 0.1])
def test_barlow_twins_equals_lightly(views, redundancy):
    from lightly.loss import BarlowTwinsLoss

    _same(lambda a, b: criteria.barlow_twins(a, b, redundancy), BarlowTwinsLoss(redundancy), views)


def test_byol_equals_lightly(views):
    from lightly.loss import NegativeCosineSimilarity

    peer, (t1, t2) = NegativeCosineSimilarity(), [view.detach().flip(0).cos() for view in views]
    _same(
        lambda a, b: criteria.byol(a, b, t1, t2),
        lambda a, b: 4 + 2 * peer(a, t2) + 2 * peer(b, t1),
        views,
    )


@pytest.mark.parametrize("locals_", [0, 3])
def test_dino_equals_lightly(views, locals_):
    from lightly.loss import DINOLoss

    n, c = views[0].shape
    rng = torch.Generator().manual_seed(n)
    teacher, small = torch.randn(2 + locals_, n, c, generator=rng, dtype=torch.float64).split(
        [2, locals_]
    )
    peer = DINOLoss(c, student_temp=0.25).double()
    centre = torch.randn(c, generator=rng, dtype=torch.float64)
    peer.center.data[:] = centre
    # temperatures that float32 holds exactly: lightly makes the teacher's one
    _same(
        lambda a, b: criteria.dino(torch.stack([a, b, *small]), teacher, centre, 0.25, 0.0625),
        lambda a, b: peer(list(teacher), [a, b, *small], teacher_temp=0.0625),
        views,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_supervised_is_the_mean_negative_log_probability(views, smoothing):
    scores = views[0].detach()
    labels = torch.arange(len(scores)) % scores.shape[1]
    log = scores - scores.exp().sum(1, keepdim=True).log()
    by_hand = -((1 - smoothing) * log[range(len(scores)), labels] + smoothing * log.mean(1)).mean()
    torch.testing.assert_close(criteria.supervised(scores, labels, smoothing), by_hand)


@pytest.mark.parametrize("loss", JOINT.values(), ids=JOINT.keys())
def test_order_of_images_does_not_matter(loss, views):
    order = torch.randperm(len(views[0]))
    torch.testing.assert_close(loss(*views), loss(views[0][order], views[1][order]))


@pytest.mark.parametrize("loss", JOINT.values(), ids=JOINT.keys())
def test_views_are_interchangeable(loss, views):
    torch.testing.assert_close(loss(*views), loss(*views[::-1]))


def test_byol_of_perfect_predictions_is_zero_and_of_opposite_ones_eight(views):
    z1, z2 = (view.detach() for view in views)
    assert criteria.byol(z1, z2, 3 * z2, 2 * z1).item() == pytest.approx(0, abs=1e-12)
    assert criteria.byol(z1, z2, -z2, -z1).item() == pytest.approx(8)


def test_vicreg_of_a_collapsed_batch_is_the_variance_term():
    z = torch.ones(8, 4, dtype=torch.float64)
    assert criteria.vicreg(z, z).item() == pytest.approx(25 * (1 - 0.01))
