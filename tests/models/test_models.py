"""Encoders: the trunk's name, the projector's shape, all layers in one pass."""

import pytest
import timm
import torch
import torchvision

from dejavu_utils.models.encoders import Encoder, embed, projector, trunk


def test_small_trunk_width():
    assert trunk("small8")(torch.zeros(2, 3, 32, 32)).shape == (2, 32)


def test_patch_trunk_width():
    assert trunk("patch8")(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_resnet_is_torchvisions():
    ours, theirs = trunk("resnet18"), torchvision.models.resnet18(zero_init_residual=True)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("spec", ["resnet18", "resnet18-s", "resnet50"])
def test_the_same_seed_gives_torchvisions_weights(spec):
    torch.manual_seed(5)
    ours = trunk(spec).state_dict()
    torch.manual_seed(5)
    theirs = torchvision.models.get_model(
        spec.removesuffix("-s"), zero_init_residual=True
    ).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "conv1.weight")


def test_timm_vit_is_timms_and_takes_other_sizes():
    ours = trunk("vit_tiny_patch16_224", 64).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs.eval()(x))
    assert ours(torch.zeros(1, 3, 32, 32)).shape == (1, 192)  # DINO's local crops


def test_vit_of_small_patches_in_an_encoder():
    encoder = Encoder("vit_tiny_patch16_224:patch_size=4,depth=2", "16-8", 32)
    assert encoder.trunk.patch_embed.num_patches == 64 and len(encoder.trunk.blocks) == 2
    shapes = {
        name: tuple(z.shape) for name, z in encoder.eval().layers(torch.zeros(2, 3, 32, 32)).items()
    }
    assert shapes == {"backbone": (2, 192), "block1": (2, 16), "projector": (2, 8)}


@pytest.mark.parametrize("spec", ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_timm_models_of_every_kind(spec):
    size = 224 if "swin" in spec else 64
    assert Encoder(spec, "", size).eval()(torch.zeros(1, 3, size, size)).ndim == 2


def test_small_stem_keeps_the_resolution():
    net = trunk("resnet18-s")
    assert net.maxpool(net.relu(net.bn1(net.conv1(torch.zeros(2, 3, 32, 32))))).shape[-2:] == (
        32,
        32,
    )


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "resnt18",
            '"resnt18" is not known: nearest: resnet18, .*"small<width>".*"resnet101".*timm',
        ),
        ("vit_tiny_patch16_225", "nearest: vit_tiny_patch16_224"),
        ("small", "is not known"),
        (
            "vit_tiny_patch16_224:patch=4",
            "refuses its options: .*unexpected keyword argument 'patch'",
        ),
        ("vit_tiny_patch16_224:patch_size", '"patch_size" cannot be read; expected "name=number'),
        ("vit_tiny_patch16_224:checkpoint_path='x.pth'", "cannot be read"),
        ("vit_tiny_patch16_224:num_classes=10", "refuses its options"),
    ],
)
def test_unknown_trunk_names_what_is_known(spec, message):
    with pytest.raises(ValueError, match=message):
        trunk(spec)


def test_projector_last_layer_is_bare():
    blocks = projector(10, "20-30-5")
    assert [type(m).__name__ for m in blocks[0]] == ["Linear", "BatchNorm1d", "ReLU"]
    assert blocks[-1].bias is None and blocks[-1].out_features == 5


def test_no_projector():
    encoder = Encoder("small4", "", 32).eval()
    x = torch.randn(2, 3, 32, 32)
    assert list(encoder.layers(x)) == ["backbone"] and torch.equal(encoder(x), encoder.trunk(x))
    with pytest.raises(ValueError, match='projector is "", expected widths'):
        encoder.add_classifier(3)


@pytest.mark.parametrize("spec", ["512-", "a-b", "512--8", "0-8", "-8"])
def test_projector_that_cannot_be_read(spec):
    with pytest.raises(ValueError, match=f'projector "{spec}" cannot be read: expected widths'):
        projector(10, spec)


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


def test_embed_gives_all_layers_in_one_forward_pass():
    encoder, images = (
        Encoder("small4", "8-8-8", 32),
        torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8),
    )
    calls = []
    encoder.trunk.register_forward_hook(lambda *_: calls.append(1))
    out = embed(encoder, images, None, batch=3)
    assert list(out) == ["backbone", "block1", "block2", "projector"] and len(calls) == 2
    encoder.eval()
    for layer in out:
        torch.testing.assert_close(
            out[layer], embed(encoder, images, [layer])[layer], rtol=1e-5, atol=1e-6
        )


def test_unknown_layer_and_the_mode_after_it():
    encoder = Encoder("small4", "8-8-8", 32).train()
    with pytest.raises(ValueError, match="block9.*backbone, block1, block2, projector"):
        embed(encoder, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ("block9",))
    assert encoder.training
