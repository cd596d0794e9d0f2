"""The pretended GPU refuses what a GPU refuses and else gives the CPU's numbers. Pieces run on it
in test_reference.
"""

import os
import subprocess
import sys

import pytest

from dejavu_utils import store

TESTS = str(store.PACKAGE.parent / "tests")
START = (
    f"import sys; sys.path.insert(0, {TESTS!r}); import torch, pretended_gpu; "
    "pretended_gpu.start()\n"
)
WRONG = {
    "two devices": "torch.zeros(3, device='cuda') + torch.zeros(3)",
    "weights left behind": "torch.nn.Linear(3, 2)(torch.zeros(4, 3).cuda())",
    "a generator of the CPU": "torch.rand(3, device='cuda', generator=torch.Generator())",
    "an index on the GPU": "torch.zeros(3)[torch.tensor([1], device='cuda')]",
    "integers multiplied": "torch.eye(2).long().cuda() @ torch.eye(2).long().cuda()",
    "numpy without cpu": "torch.zeros(3).to('cuda').numpy()",
}
RIGHT = """
import copy
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
twin, x = copy.deepcopy(net), torch.randn(5, 3, 8, 8)
for module, value in ((net.to("cuda"), x.to("cuda")), (twin, x)):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    module(value).square().mean().backward()
    optimizer.step()
    print(value.device.type, value.is_cuda, module[0].weight.device.type, module(value).cpu().detach().numpy().tolist())
"""


VIEW = """
constant = torch.tensor([1.0, 2.0], device="cuda")
with torch.inference_mode():
    print((constant[:, None] * torch.ones(2, 2, device="cuda")).sum().item())
"""


@pytest.fixture(scope="module")
def said():
    """What one process prints: the wrong things that it was let do, then the numbers."""
    tried = "".join(
        f"try:\n    {code}\n    print({name!r})\nexcept (RuntimeError, TypeError):\n    pass\n"
        for name, code in WRONG.items()
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{START}{tried}print('numbers')\n{RIGHT}"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_view_in_inference_mode_of_a_tensor_made_before():
    command = [sys.executable, "-c", START + VIEW]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "6.0\n", done.stderr


def test_what_a_gpu_refuses_is_refused(said):
    let_through, _, _ = said.partition("numbers\n")
    assert let_through == ""


def test_what_a_gpu_does_gives_the_numbers_of_the_cpu(said):
    _, _, numbers = said.partition("numbers\n")
    there, here = numbers.splitlines()
    assert there.startswith("cuda True cuda [") and here.startswith("cpu False cpu [")
    assert there.partition("[")[2] == here.partition("[")[2]
