"""Encoders: the trunk's name, the projector's shape, all layers in one pass."""

import pytest
import torch
import torchvision

from dejavu_utils.models import Encoder, embed, projector, trunk


def test_small_trunk_width():
    assert trunk("small8")(torch.zeros(2, 3, 32, 32)).shape == (2, 32)


def test_resnet_is_torchvisions():
    ours, theirs = trunk("resnet18"), torchvision.models.resnet18(zero_init_residual=True)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_small_stem_keeps_the_resolution():
    net = trunk("resnet18-s")
    assert net.maxpool(net.relu(net.bn1(net.conv1(torch.zeros(2, 3, 32, 32))))).shape[-2:] == (32, 32)


def test_unknown_trunk_names_what_is_known():
    with pytest.raises(ValueError, match='"resnt18" is not known.*resnet18'):
        trunk("resnt18")


def test_projector_last_layer_is_bare():
    blocks = projector(10, "20-30-5")
    assert [type(m).__name__ for m in blocks[0]] == ["Linear", "BatchNorm1d", "ReLU"]
    assert blocks[-1].bias is None and blocks[-1].out_features == 5


def test_layers_in_one_pass_and_embed_restores_mode():
    encoder = Encoder("small4", "16-16-8", 32)
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    encoder.train()
    out = embed(encoder, images, ("projector", "block1", "backbone"), batch=3)
    assert encoder.training
    shapes = {name: tuple(z.shape) for name, z in out.items()}
    assert shapes == {"projector": (7, 8), "block1": (7, 16), "backbone": (7, 16)}
    again = embed(encoder, images, ("projector",), batch=7)["projector"]
    torch.testing.assert_close(out["projector"], again, rtol=1e-4, atol=1e-5)


def test_unknown_layer():
    with pytest.raises(ValueError, match="block9.*backbone, block1, block2, projector"):
        embed(Encoder("small4", "8-8-8", 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ("block9",))
