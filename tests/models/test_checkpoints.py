"""Other people's checkpoints: every layout by its published names, the same features as its source,
and refusals.
"""

import argparse
import copy
import functools
import importlib.util
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from dejavu_utils import store
from dejavu_utils.models import checkpoints, own_format
from dejavu_utils.models.encoders import Encoder, embed
from dejavu_utils.models.train import Recipe


def randomise(module, seed=0):
    """Give every weight and statistic of a network its own value, so that a swapped or a forgotten
    one shows.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=rng)
            value.copy_(0.5 + noise if "running_var" in name else value + 0.1 * (noise - 0.5))
    return module.eval()


@functools.cache
def resnet(name="resnet18", padding=None, seed=0):
    """Return a torchvision ResNet without its classifier; `padding` gives it a 3x3 stem."""
    net = torchvision.models.get_model(name, weights=None)
    net.fc = nn.Identity()
    if padding:
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, padding, bias=False), nn.Identity()
    return randomise(net, seed)


@functools.cache
def vit(size=64, seed=0, **more):
    import timm

    return randomise(
        timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=0, **more), seed
    )


def mlp(*widths, norm=True, bias=True, act=nn.ReLU, last_norm=False, seed=0):
    """Return Linear-BatchNorm-activation blocks and a last Linear in one Sequential, as most
    projects write it.
    """
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(i, o, bias=bias), *([nn.BatchNorm1d(o)] if norm else []), act()]
    layers += [nn.Linear(widths[-2], widths[-1], bias=bias)]
    return randomise(
        nn.Sequential(*layers, *([nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else [])),
        seed,
    )


def named(**modules):
    """Return one state dict of modules under their prefixes; two underscores stand for a dot."""
    return {
        f"{prefix.replace('__', '.')}.{name}": value
        for prefix, module in modules.items()
        for name, value in module.state_dict().items()
    }


class Dino(nn.Module):
    """A head with the names of DINO's: an MLP with GELUs, and weight-normed prototypes."""

    def __init__(self, width, seed):
        super().__init__()
        self.mlp = mlp(width, 32, 32, 16, norm=False, act=nn.GELU, seed=seed)
        self.last_layer = nn.utils.weight_norm(nn.Linear(16, 40, bias=False))


@pytest.fixture
def save(tmp_path):
    def write(content, name="file.pt"):
        save_file(content, tmp_path / name) if name.endswith(".safetensors") else torch.save(
            content, tmp_path / name
        )
        return tmp_path / name

    return write


@torch.no_grad()
def agrees(found, backbone, head=None, size=64):
    """Assert that an encoder that was read computes what its source does, in every layer that the
    source has.
    """
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    layers = found.layers(x)
    features = backbone(x)
    torch.testing.assert_close(layers["backbone"], features, rtol=1e-6, atol=1e-6)
    if head is None:
        assert list(layers) == ["backbone"]
    else:
        torch.testing.assert_close(layers["projector"], head(features), rtol=1e-6, atol=1e-6)
    assert not found.training


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d"])
def test_torchvision(save, name):
    source = resnet(name)
    found = checkpoints.read(save(source.state_dict() | {"fc.weight": torch.zeros(1000, 1)}))
    agrees(found, source)
    assert found.layout == "torchvision" and found.ignored == ("fc.weight",)
    assert any("ResNet-" in note for note in found.notes) and any(
        "normalisation" in note for note in found.notes
    )


def test_safetensors_half_precision_and_wrappers(save):
    source = copy.deepcopy(resnet()).half()
    state = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    found = checkpoints.read(save(state, "file.safetensors"))
    assert next(found.parameters()).dtype == torch.float32
    agrees(found, source.float())


def test_old_file_without_batch_counters(save):
    source = resnet()
    agrees(
        checkpoints.read(
            save({k: v for k, v in source.state_dict().items() if "num_batches" not in k})
        ),
        source,
    )


def test_reading_draws_no_random_number(save):
    path = save(vit().state_dict())
    before = torch.random.get_rng_state()
    checkpoints.read(path)
    checkpoints.read(path, encoder="vit_tiny_patch16_224")
    assert torch.equal(before, torch.random.get_rng_state())


def test_timm_vit_and_other_sizes(save):
    source = vit(dynamic_img_size=True)
    found = checkpoints.read(save(source.state_dict() | {"head.weight": torch.zeros(10, 192)}))
    agrees(found, source)
    agrees(found, source, size=96)
    assert found.layout == "timm" and found.ignored == ("head.weight",)
    assert any("attention heads" in note for note in found.notes) and any(
        "64 px" in note for note in found.notes
    )


def test_timm_model_by_name(save):
    import timm

    whole = randomise(timm.create_model("convnext_atto"))
    path = save(whole.state_dict())
    with pytest.raises(store.StoreError, match='no known layout.*layout="timm" and encoder='):
        checkpoints.read(path)
    found = checkpoints.read(path, layout="timm", encoder="convnext_atto")
    whole.reset_classifier(0)
    agrees(found, whole)
    assert set(found.ignored) == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.parametrize("which", [None, "student", "teacher"])
def test_dino_training_checkpoint(save, which):
    nets = {
        who: (vit(seed=seed), Dino(192, seed)) for seed, who in enumerate(("student", "teacher"))
    }
    states = {
        who: named(module__backbone=net, module__head=head) for who, (net, head) in nets.items()
    }
    path = save(
        states
        | {
            "optimizer": {"state": {}},
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_tiny", lr=0.1),
        }
    )
    found = checkpoints.read(path, which=which)
    net, head = nets[which or "teacher"]
    agrees(found, net, head.mlp)
    assert found.which == (which or "teacher") and {"optimizer", "head.last_layer.weight_g"} <= set(
        found.ignored
    )
    assert any("L2 normalisation and prototypes" in note for note in found.notes)
    assert list(found.layers(torch.zeros(1, 3, 64, 64))) == [
        "backbone",
        "block1",
        "block2",
        "projector",
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_vicreg_and_barlow_training_checkpoint(save, bias):
    net, head = resnet(), mlp(512, 32, 32, 16, bias=bias)
    extra = {"module.bn.running_mean": torch.zeros(16)}
    state = named(module__backbone=net, module__projector=head) | extra
    found = checkpoints.read(save({"epoch": 1, "model": state, "optimizer": {}}))
    agrees(found, net, head)
    assert found.layout == "vicreg" and set(found.ignored) == {
        "epoch",
        "optimizer",
        "bn.running_mean",
    }
    assert any("no bias in layer" in note for note in found.notes) is not bias


def test_lightly(save):
    from lightly.models.modules import heads

    source = nn.Sequential(*list(resnet().children())[:-1])
    for head in (
        heads.SimCLRProjectionHead(512, 32, 16),
        heads.SimSiamProjectionHead(512, 32, 16),
        heads.MoCoProjectionHead(512, 32, 16),
        heads.VICRegProjectionHead(512, 32, 16),
    ):
        randomise(head)
        found = checkpoints.read(save(named(backbone=source, projection_head=head)))
        agrees(found, nn.Sequential(source, nn.Flatten()), head)
        assert found.layout == "lightly" and found.ignored == ()


def test_lightly_momentum_and_dino(save):
    from lightly.models.modules import heads

    nets = [nn.Sequential(*list(resnet(seed=seed).children())[:-1]) for seed in (0, 1)]
    byol = [randomise(heads.BYOLProjectionHead(512, 32, 16), seed) for seed in (0, 1)]
    path = save(
        {
            "state_dict": named(
                backbone=nets[0],
                projection_head=byol[0],
                backbone_momentum=nets[1],
                projection_head_momentum=byol[1],
                prediction_head=byol[0],
            )
        }
    )
    agrees(checkpoints.read(path), nn.Sequential(nets[0], nn.Flatten()), byol[0])
    found = checkpoints.read(path, which="teacher")
    agrees(found, nn.Sequential(nets[1], nn.Flatten()), byol[1])
    assert any(name.startswith("prediction_head.") for name in found.ignored)

    dino = [randomise(heads.DINOProjectionHead(512, 32, 16, 40), seed) for seed in (0, 1)]
    path = save(
        named(
            student_backbone=nets[0],
            student_head=dino[0],
            teacher_backbone=nets[1],
            teacher_head=dino[1],
        )
    )
    agrees(
        checkpoints.read(path, which="teacher"),
        nn.Sequential(nets[1], nn.Flatten()),
        dino[1].layers,
    )
    agrees(checkpoints.read(path), nn.Sequential(nets[0], nn.Flatten()), dino[0].layers)


def test_lightlys_own_resnet_in_a_sequential_is_refused(save):
    from lightly.models import ResNetGenerator

    net = nn.Sequential(*list(ResNetGenerator("resnet-18").children())[:-1])
    with pytest.raises(store.StoreError, match="ResNetGenerator.*not supported"):
        checkpoints.read(save(named(backbone=net)))


@pytest.mark.parametrize("trunk", ["backbone", "encoder"])
def test_solo_learn_and_its_stem(save, trunk):
    nets, heads = (
        [resnet(padding=2, seed=seed) for seed in (0, 1)],
        [mlp(512, 32, 16, seed=seed) for seed in (0, 1)],
    )
    state = named(
        **{
            trunk: nets[0],
            "projector": heads[0],
            f"momentum_{trunk}": nets[1],
            "momentum_projector": heads[1],
            "classifier": nn.Linear(512, 10),
        }
    ) | {"queue": torch.zeros(2, 3)}
    path = save({"state_dict": state, "epoch": 2, "optimizer_states": []})
    found = checkpoints.read(path)
    agrees(found, nets[0], heads[0], size=32)
    assert found.layout == "solo-learn" and {"queue", "classifier.weight", "epoch"} <= set(
        found.ignored
    )
    assert any("padding 2" in note for note in found.notes)
    agrees(checkpoints.read(path, which="teacher"), nets[1], heads[1], size=32)


def test_stable_pretraining(save):
    net, head = resnet(padding=1), mlp(512, 32, 32, 16)
    state = named(backbone=net, projector=head)
    probe = {"callbacks_modules.linear_probe.weight": torch.zeros(10, 512)}
    found = checkpoints.read(
        save({"state_dict": state | probe, "pytorch-lightning_version": "2.6"})
    )
    agrees(found, net, head, size=32)
    assert found.layout == "stable-pretraining" and next(iter(probe)) in found.ignored
    path = save({"state_dict": state})
    with pytest.raises(
        store.StoreError, match='stem is 3x3.*layout="solo-learn" or layout="stable-pretraining"'
    ):
        checkpoints.read(path)
    agrees(checkpoints.read(path, layout="stable-pretraining"), net, head, size=32)


def test_stable_pretraining_teacher_and_a_head_that_cannot_be_told(save):
    nets = [vit(seed=seed) for seed in (0, 1)]
    heads = [mlp(192, 32, 32, 16, act=nn.GELU, seed=seed) for seed in (0, 1)]
    whole = [
        nn.Sequential(*head, nn.Identity(), nn.Linear(16, 40, bias=False)) for head in heads
    ]  # + prototypes
    state = named(
        backbone__student=nets[0],
        backbone__teacher=nets[1],
        projector__student=whole[0],
        projector__teacher=whole[1],
    ) | {"backbone.ema_coefficient": torch.zeros(())}
    path = save({"state_dict": state})
    with pytest.raises(
        store.StoreError, match="an activation or an L2 normalisation: pass blocks=3"
    ):
        checkpoints.read(path)
    found = checkpoints.read(path, blocks=3, activation="gelu")
    agrees(found, nets[1], heads[1])
    assert found.which == "teacher" and {"head 8.weight", "backbone.ema_coefficient"} <= set(
        found.ignored
    )
    agrees(checkpoints.read(path, which="student", blocks=0), nets[0])


def vissl(trunk, heads, **more):
    """Return VISSL's checkpoint (0.1.6) of a trunk's and a head's state dict."""
    model = {"trunk": trunk, "heads": heads}
    classy = {
        "base_model": {"model": model, "meta": {"trunk": {}}},
        "optimizer": {"optim": {}},
        "phase_idx": 0,
    }
    return {
        "phase_idx": 0,
        "iteration": 2,
        "type": "consolidated",
        "classy_state_dict": classy,
        "loss": {},
        **more,
    }


def test_vissl_simclr_and_moco(save):
    net, slow = resnet(), resnet(seed=1)
    first, second = randomise(nn.Linear(512, 32)), randomise(nn.Linear(32, 16), 1)
    heads = {
        f"{i}.clf.0.{name}": value
        for i, layer in enumerate((first, second))
        for name, value in layer.state_dict().items()
    }
    moco = named(moco_encoder__trunk___feature_blocks=slow) | {
        f"moco_encoder.heads.{k}": v for k, v in heads.items()
    }
    path = save(vissl(named(_feature_blocks=net), heads, loss=moco | {"queue": torch.zeros(16, 8)}))
    head = nn.Sequential(first, nn.ReLU(), second)
    found = checkpoints.read(path)
    agrees(found, net, head)
    assert found.layout == "vissl" and list(found.layers(torch.zeros(1, 3, 64, 64))) == [
        "backbone",
        "block1",
        "projector",
    ]
    assert {"loss", "classy_state_dict.optimizer"} <= set(found.ignored)
    assert any('which="teacher" reads the other' in note for note in found.notes)
    agrees(checkpoints.read(path, which="teacher"), slow, head)
    probe = {"0.channel_bn.weight": torch.zeros(512), "0.clf.clf.0.weight": torch.zeros(10, 512)}
    found = checkpoints.read(save(vissl(named(base_model___feature_blocks=net), probe)))
    agrees(found, net)
    assert set(found.ignored) >= {"heads.0.clf.clf.0.weight", "heads.0.channel_bn.weight"}


def test_vissl_dino_and_swav(save):
    net = vit()
    for act, mark in (
        (nn.GELU, "weight_g"),
        (nn.ReLU, "weight"),
    ):  # DINO's prototypes have weight norm, SwAV's not
        head = mlp(192, 32, 32, 16, act=act, norm=act is nn.ReLU)
        prototypes = {f"0.prototypes0.{mark}": torch.zeros(40, 16)}
        state = {
            f"0.projection_head.{name}": value for name, value in head.state_dict().items()
        } | prototypes
        found = checkpoints.read(save(vissl(net.state_dict(), state)))
        agrees(found, net, head)
        assert f"heads.0.prototypes0.{mark}" in found.ignored


def test_vissl_shards_are_refused(save):
    with pytest.raises(store.StoreError, match='type "shard_list".*consolidate'):
        checkpoints.read(save(vissl({}, {}, type="shard_list", shards=["../other.torch"])))


@pytest.mark.parametrize("relu", [False, True])
def test_dejavu_reference(save, relu):
    net = resnet()
    blocks = [
        nn.Sequential(nn.Linear(512, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()),
    ]
    last = nn.Linear(32, 16, bias=False)
    head = randomise(nn.Sequential(*blocks, nn.Sequential(last, nn.ReLU()) if relu else last))
    state = named(module__net=net, module__projector=head) | {
        "module.predictor.0.weight": torch.zeros(2)
    }
    found = checkpoints.read(save({"epoch": 50, "model": state, "optimizer": {}, "probes": {}}))
    agrees(found, net, head)
    assert found.layout == "dejavu" and {"predictor.0.weight", "probes"} <= set(found.ignored)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(found.layers(x)["block1"], blocks[0](net(x)), rtol=1e-6, atol=1e-6)
    agrees(checkpoints.read(save(state)), net, head)  # its final_weights.pt is the bare state dict


def test_dejavu_supervised_baseline_keeps_its_scores(save):
    net, head = resnet(), nn.Sequential(mlp(512, 32, 16)[:3], nn.Linear(32, 16, bias=False))
    scores = randomise(nn.Sequential(nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)))
    state = named(module__net=net, module__projector=head, module__fc=scores)
    path, x = save({"model": state}), torch.randn(2, 3, 64, 64)
    found = checkpoints.read(path)
    agrees(found, net, head)
    torch.testing.assert_close(
        found.layers(x)["logits"], scores(head(net(x))), rtol=1e-6, atol=1e-6
    )
    assert found.ignored == () and "logits" not in checkpoints.read(path, blocks=1).layers(x)
    del state["module.fc.0.running_var"]
    with pytest.raises(
        store.StoreError, match="does not fit its classifier: missing 0.running_var"
    ):
        checkpoints.read(save({"model": state}))


def test_own_format_and_embed(tmp_path):
    recipe = Recipe(encoder="small4", projector="16-16-8", size=32)
    source = randomise(Encoder(recipe.encoder, recipe.projector, recipe.size))
    source.add_classifier(3)
    path = tmp_path / "own.safetensors"
    own_format.save(path, source, recipe)
    found = checkpoints.read(path)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    ours, theirs = embed(source, images, None), embed(found, images, None)
    assert found.layout == "own" and list(ours) == list(theirs) == [
        "backbone",
        "block1",
        "block2",
        "projector",
        "logits",
    ]
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in ours)
    with pytest.raises(store.StoreError, match="own format, whose sidecar says all.*leave out"):
        checkpoints.read(path, blocks=1)


def test_a_sidecar_is_verified_whatever_the_layout(tmp_path):
    """The VISSL engine keeps VISSL's own files, with our sidecar."""
    source, path = resnet(), tmp_path / "epoch-0001.torch"
    with store.artifact(path) as temporary:
        torch.save(named(_feature_blocks=source), temporary)
    found = checkpoints.read(path)
    agrees(found, source)
    assert found.layout == "vissl" and found.sha256 == store.digest(path)
    torch.save(named(_feature_blocks=resnet(seed=1)), path)
    with pytest.raises(store.StoreError, match="is damaged: sha256"):
        checkpoints.read(path)


def test_embed_of_a_foreign_encoder(save):
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    source = resnet()
    found = checkpoints.read(save(source.state_dict())).train()
    from dejavu_utils.models.views import normalize

    with torch.no_grad():
        expected = source(normalize(images))
    torch.testing.assert_close(
        embed(found, images, None, batch=2)["backbone"], expected, rtol=1e-4, atol=1e-4
    )
    assert found.training


def changed(state, remove=None, add=None, replace=None):
    state = dict(state)
    if remove:
        del state[remove]
    return state | (add or {}) | (replace or {})


STATE = named(backbone=copy.deepcopy(resnet()).half(), projector=mlp(512, 32, 16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"remove": "backbone.layer3.0.bn1.weight"}, "missing layer3.0.bn1.weight"),
        ({"remove": "backbone.layer4.1.bn2.running_var"}, "missing layer4.1.bn2.running_var"),
        (
            {"add": {"backbone.layer3.0.bn9.weight": torch.zeros(2)}},
            "unexpected layer3.0.bn9.weight",
        ),
        ({"add": {"backbone.fc.weight": torch.zeros(10, 512)}}, "unexpected fc.weight"),
        (
            {"replace": {"backbone.layer2.0.conv1.weight": torch.zeros(128, 65, 3, 3)}},
            r"layer2.0.conv1.weight has shape \(128, 65, 3, 3\), expected \(128, 64, 3, 3\)",
        ),
        ({"remove": "projector.1.running_var"}, "head.*missing 0.1.running_var"),
        (
            {"remove": "projector.1.running_mean"},
            "layer 1 of its head .*neither a linear layer nor a batch",
        ),
        ({"add": {"projector.5.running_mean": torch.zeros(16)}}, "layer 5 of its head"),
        ({"add": {"projector.odd": torch.zeros(16)}}, 'its head has "odd"'),
        (
            {"replace": {"projector.3.weight": torch.zeros(16, 31)}},
            "block 2 of its head expects 31 values.*gives 32",
        ),
        (
            {"replace": {"projector.1.bias": torch.zeros(31)}},
            r"0.1.bias has shape \(31,\), expected \(32,\)",
        ),
        (
            {"replace": {"backbone.bn1.weight": torch.full((64,), float("nan"))}},
            "bn1.weight holds NaN",
        ),
        (
            {"replace": {"backbone.conv1.weight": torch.zeros(64, 3, 5, 5)}},
            r"first convolution is \(64, 3, 5, 5\)",
        ),
        (
            {"replace": {"backbone.conv1.weight": torch.zeros(70, 3, 7, 7)}},
            r"first convolution is \(70, 3, 7, 7\)",
        ),
        (
            {"replace": {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7).to_sparse()}},
            "conv1.weight is torch.sparse_coo",
        ),
        (
            {"replace": {"projector.3.weight": torch.zeros(1, 1).expand(10**9, 32)}},
            "more than the .* of the file",
        ),
    ],
)
def test_what_does_not_match_is_named(save, change, message):
    with pytest.raises(store.StoreError, match=message):
        checkpoints.read(save({"model": changed(STATE, **change)}))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "torchvison"}, 'layout "torchvison" is not known.*torchvision'),
        ({"layout": "vissl"}, 'layout="vissl" does not fit its names'),
        ({"which": "teacher"}, 'which="teacher" is not in the file: it holds the student'),
        ({"encoder": "resnet34"}, "missing layer1.2.bn1.bias"),
        ({"encoder": "resnt18"}, 'encoder "resnt18" is not known: nearest: resnet18'),
        ({"activation": "tanh"}, 'activation "tanh" is not known'),
        ({"blocks": 3}, "blocks=3: its head has 2 linear layers"),
    ],
)
def test_options_that_do_not_fit(save, options, message):
    with pytest.raises(store.StoreError, match=message):
        checkpoints.read(save({"model": STATE}), **options)


def test_a_whole_block_missing_is_no_smaller_network(save):
    state = {
        name: value
        for name, value in resnet().state_dict().items()
        if not name.startswith("layer4.1.")
    }
    with pytest.raises(
        store.StoreError, match="2-2-2-1 BasicBlocks, which is no known ResNet.*encoder="
    ):
        checkpoints.read(save(state))
    state = {
        name: value
        for name, value in vit().state_dict().items()
        if not name.startswith("blocks.11.")
    }
    with pytest.raises(store.StoreError, match="192 and 11 blocks.*encoder=.*depth=11"):
        checkpoints.read(save(state))
    source = vit(depth=2)
    agrees(
        checkpoints.read(save(source.state_dict()), encoder="vit_tiny_patch16_224:depth=2"), source
    )


class Evil:
    """Unpickled, this would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle", "module"])
def test_what_needs_unpickling_is_refused_and_not_run(tmp_path, kind):
    path, trap = tmp_path / "file.pt", tmp_path / "trap"
    content = {
        "state_dict": {"a": torch.zeros(9)},
        "extra": nn.ReLU() if kind == "module" else Evil(trap),
    }
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(
        store.StoreError, match="which only unpickling could read.*refused.*weights alone"
    ):
        checkpoints.read(path)
    assert not trap.exists()


def test_legacy_torch_file(tmp_path):
    source = resnet()
    torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    agrees(checkpoints.read(tmp_path / "old.pth"), source)


@pytest.mark.parametrize(
    "name, zipped", [("file.pt", True), ("file.pt", False), ("file.safetensors", False)]
)
@pytest.mark.parametrize("keep", [0.0, 1e-6, 0.5, 0.999])
def test_truncated_file(tmp_path, name, zipped, keep):
    path, state = tmp_path / name, mlp(100, 200, 100).state_dict()
    if name.endswith("pt"):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(
        store.StoreError, match="truncated or damaged|no whole torch file|no checkpoint that this"
    ):
        checkpoints.read(path)


def test_a_flipped_bit_is_found(save):
    path = save({"a": torch.zeros(9999)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(store.StoreError, match="truncated or damaged: Bad CRC-32"):
        checkpoints.read(path)


def rezip(path, **changes):
    """Write the zip again, with `changes` on how its entries are written."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", changes.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in entries + changes.get("more", []):
            archive.writestr(name, data)


def test_compressed_zip_is_refused(save):
    path = save({"conv1.weight": torch.zeros(15_000_000)})
    rezip(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(store.StoreError, match="is compressed, which torch never writes"):
        checkpoints.read(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a\\b", "file/data.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_path_tricks_are_refused(save, name):
    path = save({"a": torch.zeros(9)})
    rezip(path, more=[(name, b"x")])
    with pytest.raises(store.StoreError, match="overlap, repeat or leave their folder"):
        checkpoints.read(path)


def test_other_files(tmp_path, save):
    for content, message in (
        (b"", "no checkpoint"),
        (b"<html>not found</html>", "no checkpoint"),
        (b"\x1f\x8b compressed", "must be unpacked first"),
    ):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(store.StoreError, match=message):
            checkpoints.read(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        checkpoints.read(tmp_path)
    with pytest.raises(store.StoreError, match="holds a list"):
        checkpoints.read(save([torch.zeros(1)]))
    with pytest.raises(
        store.StoreError, match=r"its names \(a\) are those of no known layout|its names \(a, "
    ):
        checkpoints.read(save({"a": torch.zeros(1)}))
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(store.StoreError, match="is a TorchScript program"):
        checkpoints.read(tmp_path / "script.pt")


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
    """VISSL trains two steps of SimCLR on two images; its own model and our reading of its file
    must agree.
    """
    if importlib.util.find_spec("vissl") is None:  # not imported here: others check that it is not
        pytest.skip("VISSL is not installed")
    environment = os.environ | {"PYTHONPATH": str(store.PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", VISSL],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    for name, file in (("trained", "model_final_checkpoint_phase0.torch"), ("wide", "wide.torch")):
        found = checkpoints.read(tmp_path / file)
        theirs = torch.load(tmp_path / f"{name}-outputs.pt", weights_only=True)
        with torch.no_grad():
            ours = found.layers(theirs["x"])
        for layer in ("backbone", "projector"):
            torch.testing.assert_close(ours[layer], theirs[layer].flatten(1), rtol=1e-6, atol=1e-6)
        assert found.layout == "vissl" and list(ours) == ["backbone", "block1", "projector"]
