"""Other people's encoders: eleven layouts, every factory form, harmless and harmful files.

Features of what was read are compared with those of the network that wrote the file.
"""

import argparse
import datetime
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from dejavu_utils import store
from dejavu_utils.models import checkpoint_files, external, views, weights
from dejavu_utils.models.encoders import Encoder, embed

VIT = "timm:vit_tiny_patch16_224"
SIZE = 64
SMALL = f"{VIT}:img_size={SIZE},depth=2"


def randomised(network, seed=0):
    """Give every weight and statistic a value of its own, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + noise if "running_var" in name else value + 0.1 * (noise - 0.5))
    return network.eval()


def resnet18(seed=0):
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return randomised(network, seed)


def vit(seed=0, **options):
    options = {"img_size": SIZE, "depth": 2, "num_classes": 0} | options
    return randomised(timm.create_model("vit_tiny_patch16_224", **options), seed)


def mlp(*widths, norm=False, activation=nn.ReLU, seed=0):
    layers = []
    for narrow, wide in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(narrow, wide), *([nn.BatchNorm1d(wide)] if norm else []), activation()]
    return randomised(nn.Sequential(*layers[:-1]), seed)


def under(prefix, module):
    """Return the state dict of a module with a prefix."""
    state = module if isinstance(module, dict) else module.state_dict()
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def saved(tmp_path, content, name="file.pt"):
    path = tmp_path / name
    torch.save(content, path)
    return str(path)


@torch.no_grad()
def assert_same(found, network, head=None, size=SIZE):
    """Assert that features equal those of the source: cosine above .9999, and in scale."""
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    layers = found.layers(x)
    expected = {"backbone": network(x).flatten(1)}
    if head is not None:
        expected["projector"] = head(expected["backbone"])
    assert {"backbone", "projector"} & layers.keys() == expected.keys()
    for layer, features in expected.items():
        cosine = torch.cosine_similarity(layers[layer], features, dim=1)
        assert cosine.min() > 0.9999, (layer, cosine)
        torch.testing.assert_close(layers[layer], features, rtol=1e-3, atol=1e-4)
    assert not found.training


def told(encoder):
    return " | ".join(encoder.notes)


# -- eleven layouts -------------------------------------------------------------------------------


def test_moco_v2(tmp_path):
    network, key = resnet18(), resnet18(1)
    head, slow = mlp(512, 512, 128), mlp(512, 512, 128)
    state = under("module.encoder_q.", network) | under("module.encoder_q.fc.", head)
    state |= under("module.encoder_k.", key) | under("module.encoder_k.fc.", slow)
    state |= {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1).long()}
    file = saved(tmp_path, {"epoch": 200, "arch": "resnet18", "state_dict": state})
    found = external.encoder("torchvision:resnet18", file)
    assert_same(found, network, head)
    assert "under state_dict.module.encoder_q." in told(found)
    assert "further copies, chosen by reading.prefix: state_dict.module.encoder_k." in told(found)
    assert "not used by a forward pass" in told(found) and "module.queue" in told(found)
    other = external.encoder("torchvision:resnet18", file, prefix="encoder_k")
    assert_same(other, key, slow)


def test_moco_v3(tmp_path):
    network, head = resnet18(), mlp(512, 512, 128, norm=True)
    state = under("module.base_encoder.", network) | under("module.base_encoder.fc.", head)
    state |= under("module.momentum_encoder.", resnet18(1))
    state |= under("module.predictor.", mlp(128, 512, 128))
    found = external.encoder("torchvision:resnet18", saved(tmp_path, {"state_dict": state}))
    assert_same(found, network, head)


def test_moco_v3_small_vit_has_twice_the_heads(tmp_path):
    """Six and twelve attention heads have the same tensors, and other features."""
    network = timm.create_model("vit_small_patch16_224", depth=2, num_classes=0, num_heads=12)
    state = under("module.base_encoder.", randomised(network))
    state |= under("module.momentum_encoder.", network)
    file, spec = saved(tmp_path, {"state_dict": state}), "timm:vit_small_patch16_224:depth=2"
    with pytest.raises(store.StoreError, match=r"12 attention heads.*ENCODER=.*num_heads=12") as e:
        external.encoder(spec, file)
    found = external.encoder(advised(e), file)
    assert_same(found, network, size=224)


def test_swav(tmp_path):
    network, head = resnet18(), mlp(512, 512, 128, norm=True)
    state = under("module.", network) | under("module.projection_head.", head)
    state |= {"module.prototypes.weight": torch.randn(30, 128)}
    found = external.encoder("torchvision:resnet18", saved(tmp_path, state))
    assert_same(found, network, head)
    assert "not used by a forward pass: module.prototypes.weight" in told(found)


def test_simclr_with_the_head_as_fc(tmp_path):
    network, head = resnet18(), mlp(512, 512, 128)
    state = under("backbone.", network) | under("backbone.fc.", head)
    file = saved(tmp_path, {"arch": "resnet18", "state_dict": state})
    assert_same(external.encoder("torchvision:resnet18", file), network, head)


@pytest.mark.slow
def test_lightly(tmp_path):
    """Its examples keep a ResNet's children in one Sequential, and give the copies names."""
    heads = pytest.importorskip("lightly.models.modules.heads")
    nets = [nn.Sequential(*list(resnet18(seed).children())[:-1]) for seed in (0, 1)]
    simclr = [
        randomised(make(512, 64, 32), seed)
        for seed, make in enumerate((heads.SimCLRProjectionHead, heads.BYOLProjectionHead))
    ]
    state = under("backbone.", nets[0]) | under("projection_head.", simclr[0])
    state |= under("backbone_momentum.", nets[1])
    state |= under("projection_head_momentum.", simclr[1])
    state |= under("prediction_head.", heads.BYOLPredictionHead(32, 64, 32))
    file = saved(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.6"})
    assert_same(external.encoder("torchvision:resnet18", file), nets[0], simclr[0])
    momentum = external.encoder("torchvision:resnet18", file, prefix="momentum")
    assert_same(momentum, nets[1], simclr[1])


def test_lightly_dino(tmp_path):
    heads = pytest.importorskip("lightly.models.modules.heads")
    nets = [resnet18(seed) for seed in (0, 1)]
    dino = [randomised(heads.DINOProjectionHead(512, 64, 32, 40), seed) for seed in (0, 1)]
    state = under("student_backbone.", nets[0]) | under("student_head.", dino[0])
    state |= under("teacher_backbone.", nets[1]) | under("teacher_head.", dino[1])
    found = external.encoder("torchvision:resnet18", saved(tmp_path, state))
    assert_same(found, nets[1], dino[1].layers)
    assert "averaged copy, under teacher_backbone." in told(found)
    assert "GELU between the projector's layers" in " ".join(found.assumed)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["torchvision:resnet18-s", "torchvision:resnet18-s2"])
def test_solo_learn_pads_its_stem_by_two(tmp_path, spec):
    network, head = resnet18(), mlp(512, 64, 32, norm=True)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 2, bias=False), nn.Identity()
    state = under("backbone.", network) | under("projector.", head)
    state |= under("momentum_backbone.", resnet18(1)) | under("classifier.", nn.Linear(512, 10))
    file = saved(tmp_path, {"state_dict": state, "hyper_parameters": {"lr": 0.1}})
    if spec.endswith("-s"):
        with pytest.raises(store.StoreError, match="solo-learn pads its 3x3 stem by two") as error:
            external.encoder(spec, file)
        spec = advised(error)
    found = external.encoder(spec, file)
    assert_same(found, network, head, size=32)
    assert "padding 2" in " ".join(found.assumed)


def test_mae_with_its_decoder(tmp_path):
    network = vit()
    state = network.state_dict() | {"mask_token": torch.zeros(1, 1, 192)}
    state |= {"decoder_embed.weight": torch.zeros(512, 192), "decoder_norm.bias": torch.zeros(512)}
    state |= under("decoder_blocks.0.mlp.", mlp(192, 192, 192))
    found = external.encoder(
        SMALL, saved(tmp_path, {"model": state, "args": argparse.Namespace(lr=1.0)})
    )
    assert_same(found, network)
    for name in ("mask_token", "decoder_embed", "decoder_blocks"):
        assert name in told(found)
    assert "pooling: token" in " ".join(found.assumed)
    assert any("timm's own weights of this name use (0.5, 0.5, 0.5)" in a for a in found.assumed)


def test_dinov2(tmp_path):
    network = vit(init_values=1.0)
    state = network.state_dict() | {"mask_token": torch.zeros(1, 192)}
    file = saved(tmp_path, state)
    assert_same(external.encoder(f"{SMALL},init_values=1.0", file), network)
    with pytest.raises(store.StoreError, match=r"also holds blocks\.0\.ls1\.gamma.*which that"):
        external.encoder(SMALL, file)


def dinov2_with_registers(network):
    """Return timm's state dict under the authors' names: one position for the class token too."""
    state = dict(network.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    position = torch.full((1, 1, 192), 0.3)
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    return state | {"mask_token": torch.zeros(1, 192)}


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_dinov2_with_registers(tmp_path, prefix):
    network = vit(init_values=1.0, reg_tokens=4, no_embed_class=True)
    state, more, head = dinov2_with_registers(network), {}, None
    if prefix:
        head = mlp(192, 64, 32, activation=nn.GELU)
        more = under("teacher.dino_head.mlp.", head)
        more |= {"teacher.dino_head.last_layer.weight_g": torch.zeros(9, 1)}
        more |= under(
            "student.backbone.",
            dinov2_with_registers(vit(init_values=1.0, seed=1, reg_tokens=4, no_embed_class=True)),
        )
    file = saved(tmp_path, under(prefix, state) | more)
    found = external.encoder(f"{SMALL},init_values=1.0,reg_tokens=4,no_embed_class=True", file)
    assert_same(found, network, head)
    with pytest.raises(store.StoreError, match="also holds register_tokens, which that network"):
        external.encoder(f"{SMALL},init_values=1.0", file)


def test_ijepa(tmp_path):
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    network = vit(**options)
    state = {
        "encoder": under("module.", vit(seed=1, **options)),
        "predictor": under("module.predictor_blocks.0.mlp.", mlp(192, 192, 192)),
        "target_encoder": under("module.", network),
        "epoch": 300,
    }
    spec = f"{SMALL},class_token=False,global_pool=avg,fc_norm=False"
    file = saved(tmp_path, state)
    found = external.encoder(spec, file)
    assert_same(found, network)
    assert "averaged copy, under target_encoder.module." in told(found)
    assert "pooling: avg" in " ".join(found.assumed)
    with pytest.raises(store.StoreError, match=r"cls_token is missing.*ENCODER=.* WEIGHTS="):
        external.encoder(SMALL, file)


@pytest.mark.parametrize("attribute", ["model", "encoder"])
def test_lightning_module(tmp_path, attribute):
    network, head = resnet18(), mlp(512, 128)
    state = under(f"{attribute}.", network)
    if attribute == "encoder":
        state |= under("projection.", head)
    file = saved(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.4.0"})
    found = external.encoder("torchvision:resnet18", file)
    assert_same(found, network, head if attribute == "encoder" else None)


def test_transformers_folder_and_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14
    )
    network = randomised(transformers.Dinov2Model(config))
    network.save_pretrained(tmp_path / "model")
    processor = transformers.BitImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.25] * 3, crop_size={"height": 42, "width": 42}
    )
    processor.save_pretrained(tmp_path / "model")

    def features(x):
        unit = x * torch.tensor(views.STD).view(3, 1, 1) + torch.tensor(views.MEAN).view(3, 1, 1)
        return network(pixel_values=(unit - 0.5) / 0.25).last_hidden_state[:, 0]

    spec = f"hf:{tmp_path / 'model'}"
    found = external.encoder(spec)
    assert_same(found, features, size=56)
    assert "its image processor's" in told(found) and "transformers" in told(found)
    assert found.size == 42 and found.std == (0.25, 0.25, 0.25)

    file = saved(tmp_path, {"state_dict": under("student.", network)})
    assert_same(external.encoder(spec, file), features, size=56)
    with pytest.raises(store.StoreError, match=r"ENCODER=hf:FOLDER .*transformers.*WEIGHTS="):
        external.encoder(SMALL, file)


def test_transformers_pooler_is_not_used(tmp_path):
    """It is there in the folder and in the file, and made for another task."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=16
    )
    network = randomised(transformers.BeitModel(config))
    network.save_pretrained(tmp_path / "model")
    file = saved(tmp_path, {"state_dict": under("student.", network)})

    def features(x):
        return network(pixel_values=x).last_hidden_state[:, 0]

    for weights_file in (None, file):
        found = external.encoder(f"hf:{tmp_path / 'model'}", weights_file)
        assert_same(found, features)
        assert "features: the class token of the last layer" in found.assumed


def test_transformers_clip_is_its_part_for_pictures(tmp_path):
    transformers = pytest.importorskip("transformers")
    part = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    pictures = part | {"image_size": 64, "patch_size": 16}
    config = transformers.CLIPConfig(vision_config=pictures, text_config=part)
    network = randomised(transformers.CLIPModel(config))
    network.save_pretrained(tmp_path)

    def features(x):
        return network.vision_model(pixel_values=x).last_hidden_state[:, 0]

    found = external.encoder(f"hf:{tmp_path}")
    assert_same(found, features)
    assert "its part for pictures alone" in told(found) and found.size == 64


def test_transformers_mae_masks_nothing(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=16
    )
    randomised(transformers.ViTMAEModel(config)).save_pretrained(tmp_path)
    found = external.encoder(f"hf:{tmp_path}")
    assert "no patch is masked" in told(found)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(found(x), found(x), rtol=1e-4, atol=1e-4)


# -- VISSL, and other training code ---------------------------------------------------------------


def test_vissl(tmp_path):
    network, slow, head = resnet18(), resnet18(1), mlp(512, 32, 16)
    heads = {"0.clf.0.weight": head[0].weight, "0.clf.0.bias": head[0].bias}
    heads |= {"1.clf.0.weight": head[2].weight, "1.clf.0.bias": head[2].bias}
    loss = under("moco_encoder.trunk._feature_blocks.", slow) | under("moco_encoder.heads.", heads)
    loss |= {"queue": torch.zeros(16, 8)}
    model = {"trunk": under("_feature_blocks.", network), "heads": heads}
    classy = {"base_model": {"model": model, "meta": {"trunk": {}}}, "optimizer": {"optim": {}}}
    content = {"type": "consolidated", "classy_state_dict": classy, "loss": loss, "iteration": 2}
    file = saved(tmp_path, content, "x.torch")
    assert_same(external.encoder("torchvision:resnet18", file), network, head)
    assert_same(external.encoder("torchvision:resnet18", file, prefix="moco"), slow, head)

    model["trunk"] = under("base_model._feature_blocks.", network)
    model["heads"] = {
        "0.channel_bn.weight": torch.ones(512),
        "0.clf.clf.0.weight": torch.ones(9, 512),
    }
    assert_same(external.encoder("torchvision:resnet18", saved(tmp_path, content)), network)


@pytest.mark.slow
def test_vissl_wide_resnet(tmp_path):
    network = randomised(external.resnet("resnet50-w2"))
    network.fc = nn.Identity()
    assert sum(p.numel() for p in network.parameters()) > 90e6
    file = saved(tmp_path, under("_feature_blocks.", network))
    assert_same(external.encoder("torchvision:resnet50-w2", file), network)


def test_a_vissl_file_of_our_engine(tmp_path):
    """It has our sidecar, which names the network and is verified."""
    network = external.resnet("resnet50")
    network.fc = nn.Identity()
    head, path = mlp(2048, 16, 8, norm=True), tmp_path / "epoch-0001.torch"
    heads = under("0.clf.", head)
    model = {"trunk": under("_feature_blocks.", randomised(network)), "heads": heads}
    content = {"classy_state_dict": {"base_model": {"model": model}}}
    meta = {"parameters": {"encoder": "resnet50", "projector": "16-8", "size": 40}}
    with store.artifact(path, meta) as temporary:
        torch.save(content, temporary)
    found = external.encoder(str(path))
    assert_same(found, network, head, size=40)
    assert found.size == 40 and found.sha256 == store.digest(path)

    model["trunk"]["_feature_blocks.conv1.weight"] += 1
    torch.save(content, path)
    with pytest.raises(store.StoreError, match="is damaged: sha256"):
        external.encoder(str(path))


VISSL = """
import sys, torch
from dejavu_utils.vissl_engine import shim
shim()
from tools.run_distributed_engines import hydra_main
from vissl.models import build_model
from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

def outputs(name, state, options):
    config = convert_to_attrdict(compose_hydra_configuration(options))[1]
    model = build_model(config.MODEL, config.OPTIMIZER)
    if state is None:
        state = {"trunk": model.trunk.state_dict(), "heads": model.heads.state_dict()}
        torch.save({"classy_state_dict": {"base_model": {"model": state}}}, f"{name}.torch")
    model.trunk.load_state_dict(state["trunk"])
    model.heads.load_state_dict(state["heads"])
    model.eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.save({"x": x, "backbone": model.trunk(x, ["res5avg"])[0], "projector": model(x)[0]}, f"{name}-outputs.pt")

options = ["config=test/cpu_test/test_cpu_resnet_simclr", "config.OPTIMIZER.use_larc=False", "config.CHECKPOINT.DIR=.",
           "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[2048,64],use_relu:true,skip_last_layer_relu_bn:false}],"
           "[mlp,{dims:[64,128]}]]"]
wide = ["config.MODEL.TRUNK.RESNETS.WIDTH_MULTIPLIER=2",
        "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[4096,64],use_relu:true,use_bn:true,skip_last_layer_relu_bn:false}],"
        "[mlp,{dims:[64,32]}]]"]
hydra_main(options)
trained = torch.load("model_final_checkpoint_phase0.torch", weights_only=True)
outputs("trained", trained["classy_state_dict"]["base_model"]["model"], options)
outputs("wide", None, options + wide)
"""


@pytest.mark.slow
def test_a_file_that_vissl_wrote(tmp_path):
    """VISSL trains two steps of SimCLR; its own model and our reading of its file must agree."""
    pytest.importorskip("vissl")
    environment = os.environ | {"PYTHONPATH": str(store.PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", VISSL]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for name, file, spec in (
        ("trained", "model_final_checkpoint_phase0.torch", "torchvision:resnet50"),
        ("wide", "wide.torch", "torchvision:resnet50-w2"),
    ):
        found = external.encoder(spec, str(tmp_path / file))
        theirs = torch.load(tmp_path / f"{name}-outputs.pt", weights_only=True)
        with torch.no_grad():
            ours = found.layers(theirs["x"])
        for layer in ("backbone", "projector"):
            torch.testing.assert_close(ours[layer], theirs[layer].flatten(1), rtol=1e-6, atol=1e-6)
        assert list(ours) == ["backbone", "block1", "projector"]


def test_dino(tmp_path):
    nets = {"student": vit(seed=1), "teacher": vit()}
    head = mlp(192, 32, 32, 16, activation=nn.GELU)
    content = {"epoch": 3, "args": argparse.Namespace(arch="vit_tiny"), "optimizer": {"state": {}}}
    for who, network in nets.items():
        content[who] = under("module.backbone.", network) | under("module.head.mlp.", head)
        content[who] |= {"module.head.last_layer.weight_g": torch.zeros(40, 1)}
    file = saved(tmp_path, content)
    assert_same(external.encoder(SMALL, file), nets["teacher"], head)
    assert_same(external.encoder(SMALL, file, prefix="student"), nets["student"], head)
    with pytest.raises(store.StoreError, match="under a prefix with 'momentum': student.*teacher"):
        external.encoder(SMALL, file, prefix="momentum")


def test_vicreg_and_the_papers_code(tmp_path):
    network = resnet18()
    head = mlp(512, 32, 32, 16, norm=True)[:-1]
    state = under("module.backbone.", network) | under("module.projector.", head)
    state |= {"module.bn.running_mean": torch.zeros(16), "module.bn.running_var": torch.ones(16)}
    file = saved(tmp_path, {"model": state, "optimizer": {}})
    assert_same(external.encoder("torchvision:resnet18", file), network, head)

    blocks = nn.Sequential(head[:3], head[3:6], head[6])
    state = under("module.net.", network) | under("module.projector.", blocks)
    found = external.encoder("torchvision:resnet18", saved(tmp_path, {"model": state}))
    assert_same(found, network, head)
    assert list(found.layers(torch.zeros(1, 3, 64, 64))) == [
        "backbone",
        "block1",
        "block2",
        "projector",
    ]


# -- factories ------------------------------------------------------------------------------------

FUNCTION = """
import torch
from torch import nn

class Mean(nn.Module):
    size = 48

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((2, 3)) * self.scale

def of_one_size():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))

def plain():
    return Mean()

def unit():
    return Mean(), lambda pictures: 2 * pictures

def maps():
    return nn.Conv2d(3, 8, 3)

def random():
    return nn.Sequential(nn.Flatten(), Noise())

class Noise(nn.Module):
    def forward(self, x):
        return torch.randn(len(x), 8)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_encoders.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_encoders", None)


def test_a_function_of_ones_own(here):
    pixels = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    plain = external.encoder("my_encoders:plain")
    normalized = views.normalize(pixels).mean((2, 3))
    torch.testing.assert_close(embed(plain, pixels, None)["backbone"], normalized)
    assert plain.size == 48 and "code of my_encoders:plain was run" in told(plain)
    assert plain.assumed == ("input: ImageNet's mean and standard deviation",)

    unit = external.encoder("my_encoders:unit")
    expected = 2 * pixels.float().mean((2, 3)) / 255
    torch.testing.assert_close(embed(unit, pixels, None)["backbone"], expected)
    assert unit.assumed == ()

    file = saved(here, {"state_dict": {"net.scale": torch.full((3,), 2.0)}})
    found = external.encoder("my_encoders:plain", file)
    torch.testing.assert_close(embed(found, pixels, None)["backbone"], 2 * normalized)

    maps = external.encoder("my_encoders:maps")
    assert maps(torch.zeros(2, 3, 48, 48)).shape == (2, 8)
    assert "features: the mean over the map that it returns" in maps.assumed

    assert external.encoder("my_encoders:of_one_size", size=32)
    with pytest.raises(ValueError, match=r"fails on a picture of 224 px .*as reading.size"):
        external.encoder("my_encoders:of_one_size")
    with pytest.raises(ValueError, match="two answers for one picture"):
        external.encoder("my_encoders:random")
    with pytest.raises(ValueError, match="my_encoders:nothing was not found.*expected timm:NAME"):
        external.encoder("my_encoders:nothing")


HUBCONF = """
dependencies = ["torch", "torchvision"]

def resnet(pretrained=True):
    import torch, torchvision
    torch.manual_seed(int(pretrained))
    return torchvision.models.resnet18()

def features():
    import torch
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
"""


def test_a_local_copy_of_a_hub_repository(tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    found = external.encoder(f"hub:{tmp_path}:resnet")
    torch.manual_seed(1)
    network = torchvision.models.resnet18().eval()
    network.fc = nn.Identity()  # random in the file that barlowtwins' and swav's hubconf.py read
    assert_same(found, network)
    assert f"code of {tmp_path} was run" in told(found) and "fc is cut off" in told(found)

    other = resnet18(5)
    file = saved(tmp_path, {"model": under("module.", other)})
    assert_same(external.encoder(f"hub:{tmp_path}:resnet", file), other)
    assert external.encoder(f"hub:{tmp_path}:features")(torch.ones(1, 3, 9, 9)).shape == (1, 3)
    with pytest.raises(ValueError, match="ENCODER=hub:.*nothing could not be"):
        external.encoder(f"hub:{tmp_path}:nothing")


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "densenet121", "vit_b_32"])
def test_torchvision_models_lose_their_classifier(tmp_path, name):
    network = randomised(torchvision.models.get_model(name))
    found = external.encoder(f"torchvision:{name}", saved(tmp_path, network.state_dict()))
    seen = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        network(x)
        torch.testing.assert_close(found(x), seen[0])
    assert found.size == 224


def test_timm_configuration_and_pretrained_weights(monkeypatch):
    network = vit()

    def offline(name, pretrained=False, **options):
        if name == "resnet18":
            raise OSError("no network")
        return network

    monkeypatch.setattr(timm, "create_model", offline)
    found = external.encoder(SMALL)
    assert found.mean == found.std == (0.5, 0.5, 0.5) and found.size == SIZE
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(pixels / 127.5 - 1)
    got = embed(found, pixels, None)["backbone"]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert len(found.sha256) == 64 and not found.assumed
    with pytest.raises(ValueError, match=r"could not be fetched.*no network.*WEIGHTS="):
        external.encoder("timm:resnet18")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_name_that_a_library_does_not_have_is_compared_with_its_own(library):
    with pytest.raises(ValueError, match=r"[Uu]nknown model.*Did you mean .*resnet50") as caught:
        external.encoder(f"{library}:resnet51")
    assert "WEIGHTS" not in str(caught.value)
    with pytest.raises(ValueError, match=f"{library} has no qqqqqq"):
        external.encoder(f"{library}:qqqqqq")


def test_a_tag_names_the_input(tmp_path):
    network = vit()
    file = saved(tmp_path, network.state_dict())
    tagged = SMALL.replace("224:", "224.augreg_in21k:")
    found = external.encoder(tagged, file)
    assert found.mean == (0.5, 0.5, 0.5)
    assert external.encoder(SMALL, file).mean == views.MEAN


def test_our_own_file(tmp_path):
    from dejavu_utils.models import own_format, train

    recipe = train.Recipe(encoder="small4", projector="16-16-8", size=32)
    source = randomised(Encoder(recipe.encoder, recipe.projector, recipe.size))
    source.add_classifier(3)
    path = tmp_path / "own.safetensors"
    own_format.save(path, source, recipe)
    found = external.encoder(str(path))
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    ours, theirs = embed(source, images, None), embed(found, images, None)
    assert list(ours) == list(theirs) == ["backbone", "block1", "block2", "projector", "logits"]
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in ours)
    assert found.size == 32 and not found.assumed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "resnet50 names no encoder: expected timm:NAME.*torchvision:resnet50"),
        ("gone.pt", "there is no file gone.pt; expected timm:NAME"),
        ("some/folder", "there is no file some/folder"),
        ("timm:resnt18", "ENCODER=timm:resnt18 could not be"),
        ("torchvision:resnt18", "ENCODER=torchvision:resnt18 could not be"),
        ("torchvision:squeezenet1_0-s", "could not be"),
    ],
)
def test_names_that_are_none(spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        external.encoder(spec)


def test_reading_draws_no_random_number(tmp_path):
    file = saved(tmp_path, vit().state_dict())
    before = torch.random.get_rng_state()
    external.encoder(SMALL, file)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_encoder_in_training_mode_is_embedded_in_evaluation_mode(tmp_path):
    network = resnet18()
    found = external.encoder("torchvision:resnet18", saved(tmp_path, network.state_dict())).train()
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(views.normalize(images))
    embedded = embed(found, images, None, batch=2)["backbone"]
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-4)
    assert found.training


# -- what does not fit ----------------------------------------------------------------------------


def advised(error):
    """Return the ENCODER= of an error's advice."""
    return str(error.value).partition("ENCODER=")[2].split(" ")[0]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("resnet34", "torchvision:resnet34"),
        ("vit_small_patch16_224", "timm:vit_small_patch16_224"),
        ("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
    ],
)
def test_a_file_without_a_name_gets_a_command_that_works(tmp_path, name, spec):
    network = timm.create_model(name, num_classes=0).eval()
    file = saved(tmp_path, under("module.backbone.", network), "it's.pt")
    for first in ((file, None), ("torchvision:resnet18", file)):
        with pytest.raises((ValueError, store.StoreError), match=r"Next: ENCODER=.* WEIGHTS=") as e:
            external.encoder(*first)
        assert advised(e) == spec
    assert_same(external.encoder(spec, file), network, size=224)


STATE = under("backbone.", resnet18()) | under("projector.", mlp(512, 32, 16, norm=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.layer3.0.bn1.weight": None}, "layer3.0.bn1.weight is missing"),
        ({"backbone.layer4.1.bn2.running_var": None}, "layer4.1.bn2.running_var is missing"),
        ({"backbone.layer3.0.bn9.weight": torch.zeros(2)}, "also holds layer3.0.bn9.weight"),
        ({"backbone.dist_token": torch.zeros(1, 1, 9)}, "also holds dist_token.*reading.unused"),
        ({"backbone.norm_pre.weight": torch.zeros(9)}, "also holds norm_pre.weight"),
        (
            {"backbone.layer2.0.conv1.weight": torch.zeros(128, 65, 3, 3)},
            r"layer2.0.conv1.weight has shape \(128, 65, 3, 3\), expected \(128, 64, 3, 3\)",
        ),
        ({"backbone.bn1.weight": torch.full((64,), float("nan"))}, "bn1.weight holds NaN"),
        (
            {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7).to_sparse()},
            "conv1.weight is torch.sparse_coo",
        ),
        ({"projector.3.weight": torch.zeros(1, 1).expand(10**9, 32)}, "larger than the file"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    state = {name: tensor for name, tensor in (STATE | change).items() if tensor is not None}
    file = saved(tmp_path, {"model": state})
    with pytest.raises(store.StoreError, match=message):
        external.encoder("torchvision:resnet18", file)


def test_the_user_says_what_is_unused(tmp_path):
    file = saved(tmp_path, STATE | {"backbone.dist_token": torch.zeros(1, 1, 9)})
    found = external.encoder("torchvision:resnet18", file, unused="dist_token")
    assert "backbone.dist_token" in told(found)


@pytest.mark.parametrize(
    "change", [{"projector.1.running_mean": None}, {"projector.3.weight": torch.zeros(16, 31)}]
)
def test_what_is_no_mlp_is_no_projector(tmp_path, change):
    state = {name: tensor for name, tensor in (STATE | change).items() if tensor is not None}
    found = external.encoder("torchvision:resnet18", saved(tmp_path, state))
    assert "projector: none" in told(found) and len(found.projector) == 0


# -- files ----------------------------------------------------------------------------------------


class Config:
    """A class of the training code's own, which the reader does not have."""

    def __init__(self):
        self.lr = 0.1


def attribute_dict():
    utilities = pytest.importorskip("pytorch_lightning.utilities.parsing")
    return utilities.AttributeDict(lr=0.1)


def omega():
    return pytest.importorskip("omegaconf").OmegaConf.create({"a": {"b": [1, "two"]}})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        np.float64(71.2),
        np.arange(3),
        pathlib.Path("/runs"),
        pathlib.PureWindowsPath("C:/runs"),
        argparse.Namespace(out=pathlib.Path("/runs"), best=np.float32(1)),
        datetime.datetime(2024, 1, 1),
        types.SimpleNamespace(a=1),
        Config(),
        omega,
        attribute_dict,
        nn.ReLU(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_harmless_values_beside_the_weights(tmp_path, value, zipped):
    value = value() if isinstance(value, types.FunctionType) else value
    if isinstance(value, nn.Module) and not zipped:
        pytest.skip("torch's old format stores the source code of modules")
    network = mlp(4, 8, 2, norm=True)
    state = network.state_dict()
    for content in ({"state_dict": state, "value": value}, state | {"value": value}):
        torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        found = weights.find(checkpoint_files.read(tmp_path / "file.pt"), network)
        assert found.tensors and all(torch.equal(found.tensors[n], state[n]) for n in found.tensors)


def test_a_network_saved_whole_is_read_as_data(tmp_path):
    network = vit()
    assert_same(external.encoder(SMALL, saved(tmp_path, {"epoch": 1, "net": network})), network)


def test_numpy_weights(tmp_path):
    network = resnet18()
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    file = saved(tmp_path, {"model_state_dict": state})
    assert_same(external.encoder("torchvision:resnet18", file), network)


def test_half_precision_safetensors_in_wrappers(tmp_path):
    network = resnet18().half()
    save_file(under("module._orig_mod.", network), tmp_path / "file.safetensors")
    found = external.encoder("torchvision:resnet18", str(tmp_path / "file.safetensors"))
    assert next(found.parameters()).dtype == torch.float32
    assert_same(found, network.float())


@pytest.mark.parametrize("name", ["swa", "second", ""])
def test_the_average_that_torch_keeps_is_preferred(tmp_path, name):
    """Whatever it is called: torch's AveragedModel counts what it has averaged."""
    average = torch.optim.swa_utils.AveragedModel(resnet18(2))
    content = {"model": resnet18().state_dict(), name: average.state_dict()}
    file = saved(tmp_path, content if name else average.state_dict())
    found = external.encoder("torchvision:resnet18", file)
    assert_same(found, average.module)
    assert "weights: averaged copy, under " in told(found)


def test_old_file_without_batch_counters(tmp_path):
    network = resnet18()
    state = {n: tensor for n, tensor in network.state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(external.encoder("torchvision:resnet18", str(tmp_path / "old.pth")), network)


class Evil:
    """Unpickled, this would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Eval(Evil):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


@pytest.mark.parametrize("evil", [Evil, Eval])
@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, kind, evil):
    path, trap = tmp_path / "file.pt", tmp_path / "trap"
    content = {"state_dict": {"a": torch.zeros(9)}, "extra": evil(trap)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(store.StoreError, match="code to run: refused|no whole torch file"):
        checkpoint_files.read(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "zipped"), [("file.pt", True), ("file.pt", False), ("file.safetensors", False)]
)
@pytest.mark.parametrize("keep", [0.0, 1e-6, 0.5, 0.999])
def test_truncated_file(tmp_path, name, zipped, keep):
    path, state = tmp_path / name, mlp(100, 200, 100).state_dict()
    if name.endswith("pt"):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(store.StoreError, match="truncated or damaged|no whole|no checkpoint"):
        checkpoint_files.read(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(9999)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(store.StoreError, match="truncated or damaged"):
        checkpoint_files.read(path)


def test_compressed_zip_and_program_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"conv1.weight": torch.zeros(15_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    assert path.stat().st_size < 100_000
    with pytest.raises(store.StoreError, match="compressed"):
        checkpoint_files.read(path)
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(store.StoreError, match="TorchScript"):
        checkpoint_files.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no checkpoint"),
        (b"<html>not found</html>", "no checkpoint"),
        (b"\x1f\x8b compressed", "not compressed"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(store.StoreError, match=message):
        checkpoint_files.read(tmp_path / "x.pt")
    torch.save([1, "two"], tmp_path / "list.pt")
    with pytest.raises(store.StoreError, match="holds no tensor"):
        checkpoint_files.read(tmp_path / "list.pt")


# -- the command line -----------------------------------------------------------------------------


NAMES = ["O'Brien", 'a "b"', "back\\slash", "with space", "US$100", "#1", "$(HOME)", "naïve"]


def make_audit(tmp_path, **variables):
    command = [shutil.which("make"), "-s", "audit"]
    command += [f"{name}={value}" for name, value in variables.items()]
    environment = os.environ | {"DEJAVU_RUNS": str(tmp_path / "runs")}
    return subprocess.run(
        command, cwd=store.PACKAGE.parent, capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("name", NAMES)
def test_make_audit_passes_any_path_on(tmp_path, name):
    """Quotes, backslashes and dollars in a path reach Python as they were typed."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$IMAGES" "$WEIGHTS" "$P"\n')
    python.chmod(0o755)
    done = make_audit(tmp_path, PYTHON=python, IMAGES=f"/data/{name}", WEIGHTS=name, P=name)
    assert done.stdout.splitlines() == [f"/data/{name}", name, name], done.stderr


def test_make_audit_says_which_file_is_not_there(tmp_path):
    name = tmp_path / """O'Brien "$1" \\ x.pt"""
    given = {"ENCODER": "torchvision:resnet18", "IMAGES": "i", "PUBLIC": "p", "WEIGHTS": name}
    done = make_audit(tmp_path, PYTHON=sys.executable, **given)
    assert done.returncode != 0
    assert f"ENCODER: there is no file {name}" in done.stdout + done.stderr

    done = make_audit(tmp_path, PYTHON=sys.executable, ENCODER="torchvision:resnet18")
    assert done.returncode != 0
    assert "make audit ENCODER=torchvision:resnet50 WEIGHTS=model.pt" in done.stderr
    assert done.stderr.startswith("error: IMAGES not given")
