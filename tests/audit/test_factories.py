"""An audit end to end by each form that names an encoder, as a user types it: a verdict and a page
that says what was read.
"""

import re

import pytest
import timm
import torch
import torchvision

from dejavu_utils.audit import __main__ as terminal
from dejavu_utils.models import own_format, train
from dejavu_utils.models.encoders import Encoder

HUBCONF = """
import torch

dependencies = ["torch"]


def tiny(pretrained=False):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
"""


@pytest.fixture(scope="module")
def pictures(audits, tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name in ("a", "public", "control"):
        audits.folder(root / name, audits.parts[name], 120)
    return root


def torchvision_checkpoint(root):
    """A checkpoint as a training script leaves it: wrapped, with a prefix and other things."""
    network = torchvision.models.shufflenet_v2_x0_5()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, root / "model.pt")
    return "torchvision:shufflenet_v2_x0_5", root / "model.pt"


def timm_weights(root):
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), root / "model.pt")
    return "timm:test_resnet", root / "model.pt"


def hub_folder(root):
    (root / "hubconf.py").write_text(HUBCONF)
    return f"hub:{root}:tiny", ""


def function(root):
    (root / "my_models.py").write_text(HUBCONF)
    return "my_models:tiny", ""


def transformers_folder(root):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(root / "hf")
    return f"hf:{root / 'hf'}", ""


def our_own(root):
    recipe = train.Recipe(encoder="small4", projector="8-8", size=32)
    own_format.save(root / "own.safetensors", Encoder("small4", "8-8", 32).eval(), recipe)
    return str(root / "own.safetensors"), ""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (torchvision_checkpoint, "weights: under .*module"),
        (timm_weights, "network: timm:test_resnet"),
        (hub_folder, "the code of .* was run"),
        (function, "the code of my_models:tiny was run"),
        (transformers_folder, "the code of transformers for .* was run"),
        (our_own, "network: small4, projector 8-8, ours"),
    ],
)
def test_an_audit_by_each_form(pictures, tmp_path, monkeypatch, capsys, make, said):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder, weights = make(tmp_path)
    command = [f"--encoder={encoder}", f"--weights={weights}", f"--images={pictures / 'a'}"]
    command += [f"--public={pictures / 'public'}", f"--held-out={pictures / 'control'}"]
    status = terminal.main([*command, "--k=5", "--reading.size=32", "--out=report.html"])
    out = capsys.readouterr()
    assert status in (0, 4), out.err  # nothing was trained on these pictures
    page = (tmp_path / "report.html").read_text()
    assert re.search(said, page)
