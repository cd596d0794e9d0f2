"""The batched views: seeded, per image, and each step equal to its one-image definition."""

import dataclasses

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from dejavu_utils.models import views
from dejavu_utils.models.train import stream
from dejavu_utils.models.views import Views

PLAIN = Views(scale_min=1.0, scale_max=1.0, flip=0.0, jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)


def _view(pixels, size, spec, rng, second=False):
    sizes = torch.tensor(pixels.shape[:1:-1]).expand(len(pixels), 2)
    return views.view(
        pixels, size, views.draw("second" if second else "first", sizes, spec, size, rng)
    )


@pytest.fixture
def pixels():
    return torch.randint(
        0, 256, (64, 3, 48, 48), dtype=torch.uint8, generator=stream(0, "test pixels")
    )


def test_same_stream_same_views(pixels):
    draws = [_view(pixels, 32, Views(), stream(seed, "v")) for seed in (1, 1, 2)]
    assert draws[0].shape == (64, 3, 32, 32) and draws[0].dtype == torch.float32
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_every_image_gets_its_own_view(pixels):
    same = pixels[:1].expand(64, -1, -1, -1)
    out = _view(same, 32, Views(), stream(0, "v"))
    assert len({tuple(image.flatten()[:50].tolist()) for image in out}) == 64


def test_crops_stay_inside_and_keep_their_area_and_aspect():
    rects = views.crop_rects(torch.tensor([[48, 40]]).expand(5000, 2), (0.06, 0.9), stream(0, "r"))
    w, h = rects[:, 2] - rects[:, 0], rects[:, 3] - rects[:, 1]
    assert (rects[:, :2] >= 0).all() and (rects[:, 2] <= 48).all() and (rects[:, 3] <= 40).all()
    share = w * h / (48 * 40)
    assert 0.04 < share.min() and share.max() < 0.93 and abs(share.mean() - 0.48) < 0.02
    free = (w < 48) & (h < 40)
    assert ((w / h)[free].log().abs() < torch.tensor(4 / 3).log() + 0.12).all()


@pytest.fixture
def whole(monkeypatch):
    """Crops that are the whole image."""
    monkeypatch.setattr(
        views, "crop_rects", lambda sizes, scale, rng: torch.cat([0 * sizes, sizes], 1)
    )


def test_identity_view_is_the_normalized_image(pixels, whole):
    out = _view(pixels, 48, PLAIN, stream(0, "v"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (views.MEAN, views.STD))
    torch.testing.assert_close(out, (pixels / 255 - mean) / std, rtol=1e-4, atol=1e-4)


def test_flip_mirrors(pixels, whole):
    plain, flipped = (
        _view(pixels, 48, dataclasses.replace(PLAIN, flip=p), stream(0, "v")) for p in (0.0, 1.0)
    )
    torch.testing.assert_close(flipped, plain.flip(-1), rtol=1e-4, atol=1e-4)


def test_jitter_equals_torchvision_step_by_step(pixels):
    """Brightness, contrast and saturation against torchvision, one image at a time, where nothing
    is clipped.
    """
    mild = (pixels.float() * 0.3 + 80).clamp(0, 255)
    spec = Views(jitter=1.0, strength=0.5, grey=0.0)
    gain, contrast, matrices = views.colour_matrices(64, spec, stream(3, "j"))
    luma = torch.tensor(views.LUMA)
    out = views.jitter_colours(mild, gain, contrast, matrices)
    for i in range(8):
        step = F.adjust_brightness(mild[i] / 255, float(gain[i]))
        mean = (step.mean((1, 2)) * luma).sum()
        step = contrast[i] * step + (1 - contrast[i]) * mean
        grey_before, grey_after = (
            (luma[:, None, None] * step).sum(0),
            (luma[:, None, None] * out[i] / 255).sum(0),
        )
        torch.testing.assert_close(
            out[i] / 255, torch.einsum("ij,jhw->ihw", matrices[i], step), rtol=1e-3, atol=1e-3
        )
        assert (grey_before - grey_after).abs().mean() < 0.1


def test_colour_matrix_keeps_grey_and_its_greyscale_is_grey():
    spec = Views(jitter=1.0, grey=0.5)
    _, _, matrix = views.colour_matrices(200, spec, stream(0, "m"))
    torch.testing.assert_close(
        matrix.sum(2), torch.ones(200, 3), rtol=0, atol=1e-5
    )  # white stays white
    grey = (matrix - matrix[:, :1]).abs().amax((1, 2)) < 1e-6
    assert 60 < grey.sum() < 140


def test_blur_equals_torchvision(pixels):
    sigma = torch.full((64,), 0.8)
    ours = views.gaussian_blur(pixels.float(), sigma, 2)
    wide = torch.nn.functional.pad(pixels.float(), (4, 4, 4, 4), mode="replicate")
    theirs = F.gaussian_blur(wide, [5, 5], [0.8, 0.8])
    torch.testing.assert_close(ours, theirs[..., 4:-4, 4:-4], rtol=1e-3, atol=0.05)


def test_solarize_is_for_the_second_view_only(pixels, whole):
    spec = dataclasses.replace(PLAIN, solarize=1.0)
    first, second = (
        _view(pixels, 48, spec, stream(0, "v"), second=second) for second in (False, True)
    )
    expected = torch.where(pixels >= 128, 255 - pixels.float(), pixels.float())
    torch.testing.assert_close(first, views.normalize(pixels), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(second, views.normalize(expected), rtol=1e-4, atol=1e-3)


def test_local_views_are_smaller_and_cover_less():
    spec = Views(scale_min=0.05, local=3, local_scale=0.3)
    assert views.plan(spec, 224) == [(224, "first"), (224, "second")] + [(96, "local")] * 3
    assert views.plan(Views(), 32, large=1) == [(32, "first")]
    sizes = torch.tensor([[64, 48]]).expand(2000, 2)
    share = {}
    for kind in ("first", "local"):
        rects = views.draw(kind, sizes, spec, 32, stream(0, kind)).rects
        share[kind] = ((rects[:, 2] - rects[:, 0]) * (rects[:, 3] - rects[:, 1])) / (64 * 48)
    assert 0.03 < share["local"].min() and share["local"].max() < 0.33
    assert 0.27 < share["first"].min() and share["first"].max() > 0.9


def test_pictures_of_different_sizes_get_crops_of_their_own_size():
    sizes = torch.tensor([[20, 400], [400, 20]]).repeat(500, 1)
    rects = views.crop_rects(sizes, (0.5, 1.0), stream(0, "r"))
    assert (rects[:, :2] >= 0).all() and (rects[:, 2:] <= sizes).all()
    assert (rects[::2, 3] - rects[::2, 1]).max() > 20 and (
        rects[1::2, 2] - rects[1::2, 0]
    ).max() > 20


def test_part_of_a_draw_gives_the_same_views(pixels):
    drawn = views.draw(
        "second", torch.tensor([[48, 48]]).expand(64, 2), Views(), 32, stream(0, "d")
    )
    whole, some = (
        views.view(pixels, 32, drawn),
        views.view(pixels[10:20], 32, drawn.part(slice(10, 20))),
    )
    torch.testing.assert_close(whole[10:20], some, rtol=1e-5, atol=1e-5)
