"""Methods: what surrounds an encoder in training; over two processes against one, in float64, for
every criterion.
"""

import copy

import pytest
import torch

from dejavu_utils.models import distributed, methods
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.recipe import CRITERIA

N = 8  # images of the joint batch
CONSTANTS = {"byol": {"momentum": 0.9}, "dino": {"prototypes": 12, "momentum": 0.9}}


def test_the_criteria_of_a_recipe_are_those_that_can_be_built():
    assert set(CRITERIA) == set(methods.METHODS)


def _method(criterion):
    torch.manual_seed(0)
    encoder = Encoder("small4", "16-16-8", 32)
    return methods.build(criterion, encoder, 5, CONSTANTS.get(criterion, {})).double().train()


def _batch(criterion):
    rng = torch.Generator().manual_seed(1)
    sides = [32] * methods.METHODS[criterion].views + ([16, 16] if criterion == "dino" else [])
    views = [torch.randn(N, 3, side, side, generator=rng, dtype=torch.float64) for side in sides]
    return views, torch.arange(N) % 5


def _state(model, method, views, labels):
    """Return the loss, the gradients and the buffers (running statistics, centre) after one
    pass.
    """
    loss = model(views, labels, 0.5)
    loss.backward()
    grads = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    return loss.detach(), grads, dict(method.named_buffers())


def _two(rank, meeting, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    for criterion in methods.METHODS:
        method = distributed.synchronise(_method(criterion), "cpu")
        views, labels = _batch(criterion)
        mine = slice(rank * N // 2, (rank + 1) * N // 2)
        model = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
        loss, grads, buffers = _state(model, method, [view[mine] for view in views], labels[mine])
        # as numpy: a tensor would travel through shared memory that ends with this process
        queue.put(
            (
                rank,
                criterion,
                loss.item(),
                {n: g.numpy() for n, g in grads.items()},
                {n: b.numpy() for n, b in buffers.items()},
            )
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def over_two(tmp_path_factory):
    """{(rank, criterion): (loss, gradients, buffers)} of two processes with half of the batch each,
    from one spawn.
    """
    # A file to meet at: a free port may be somebody else's by the time that it is used.
    meeting = tmp_path_factory.mktemp("two") / "meeting"
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=_two, args=(rank, meeting, queue)) for rank in range(2)]
    for child in children:
        child.start()
    found = {}
    for _ in range(2 * len(methods.METHODS)):
        rank, criterion, *rest = queue.get(timeout=120)
        found[rank, criterion] = rest
    for child in children:
        child.join(30)
    return found


@pytest.mark.parametrize("criterion", methods.METHODS)
def test_two_processes_equal_one(over_two, criterion):
    method = _method(criterion)
    loss, grads, buffers = _state(method, method, *_batch(criterion))
    assert len(grads) > 10
    for rank in range(2):
        value, their_grads, their_buffers = over_two[rank, criterion]
        assert value == pytest.approx(loss.item(), rel=1e-10)
        for name, grad in grads.items():
            torch.testing.assert_close(
                torch.from_numpy(their_grads[name]), grad, rtol=1e-6, atol=1e-9, msg=name
            )
        for name, buffer in buffers.items():
            torch.testing.assert_close(
                torch.as_tensor(their_buffers[name]), buffer, rtol=1e-6, atol=1e-9, msg=name
            )


@pytest.mark.parametrize("criterion", ["byol", "dino"])
def test_slow_copy_follows_at_the_momentum_of_the_schedule(criterion):
    method = _method(criterion)
    slow = method.target if criterion == "byol" else method.teacher
    before = copy.deepcopy(slow)
    with torch.no_grad():
        for weight in method.encoder.parameters():
            weight += 1
    method.after_step(0.5)  # half way the cosine from 0.9 to 1 is at 0.95
    for old, new, fast in zip(
        before.parameters(), slow.parameters(), method.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.95 * old + 0.05 * fast)
    assert not any(weight.requires_grad for weight in slow.parameters())


def test_dino_centre_is_a_running_mean_of_the_teacher_and_the_temperature_warms_up():
    method = _method("dino")
    views, labels = _batch("dino")
    with torch.no_grad():
        seen = torch.stack(
            [
                method.teacher_head(copy.deepcopy(method.teacher)(torch.cat(views[:2]))[part])
                for part in (slice(0, N), slice(N, 2 * N))
            ]
        ).mean((0, 1))
    early, late = (copy.deepcopy(method)(views, labels, share).item() for share in (0.0, 0.5))
    assert early != late
    method(views, labels, 0.0)
    torch.testing.assert_close(method.centre, 0.1 * seen)


def test_supervised_gives_the_encoder_class_scores():
    method = _method("supervised")
    found = method.encoder.eval().layers(torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    assert list(found) == ["backbone", "block1", "block2", "projector", "logits"] and found[
        "logits"
    ].shape == (2, 5)


def test_unknown_names():
    with pytest.raises(ValueError, match='criterion "simclear" is not known.*barlow_twins'):
        methods.constants("simclear")
    with pytest.raises(
        ValueError, match="byol: temperature is not a constant of it; it has momentum"
    ):
        methods.build("byol", Encoder("small4", "8-8-8", 32), 2, {"temperature": 1.0})


def test_bf16_never_reaches_the_loss(monkeypatch):
    method, seen = _method("simclr").float(), []
    method.bf16 = True
    method.criterion = lambda z1, z2, **_: (
        seen.append((z1.dtype, torch.is_autocast_enabled("cpu"))) or z1.sum()
    )
    method([view.float() for view in _batch("simclr")[0]], torch.zeros(N), 0.0)
    assert seen == [(torch.float32, False)]
