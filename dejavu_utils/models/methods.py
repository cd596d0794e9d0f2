"""What a criterion needs around the encoder while it trains: predictor, slow copy, prototypes,
class scores.

A method is called with a list of views and returns the loss of the joint batch; what it adds to the
encoder is thrown away after training (but for the supervised classifier, whose scores are attacked
too).
"""

from __future__ import annotations

import copy
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dejavu_utils.models import criteria, encoders
from dejavu_utils.models.distributed import gather


class TwoViews(nn.Module):
    """VICReg, Barlow Twins, SimCLR: one function of the two views' projections."""

    views = 2  # large ones
    bf16 = False  # the networks compute in bfloat16; a loss never does

    def __init__(
        self, encoder: encoders.Encoder, classes: int, criterion: str, **constants: float
    ) -> None:
        super().__init__()
        self.encoder, self.criterion, self.constants = (
            encoder,
            getattr(criteria, criterion),
            constants,
        )

    def run(self, network: nn.Module, views: list[Tensor]) -> list[Tensor]:
        """Return `network`'s output for each view, of the joint batch of all processes; views share
        one pass.
        """
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.bf16):
            out = network(torch.cat(views))
        out = out.float() if out.dtype == torch.bfloat16 else out
        return [gather(part) for part in out.chunk(len(views))]

    def forward(self, views: list[Tensor], labels: Tensor, share: float) -> Tensor:
        """Return the loss of the joint batch: views each (n, 3, s, s), labels (n,), `share` of the
        training done.
        """
        z1, z2 = self.run(self.encoder, views)
        return self.criterion(z1, z2, **self.constants)

    def after_step(self, share: float) -> None:
        """Update what no gradient reaches; `share` of the training is done."""


class BYOL(TwoViews):
    """A predictor guesses what a slow copy of the encoder, the target, says of the other view."""

    def __init__(self, encoder: encoders.Encoder, classes: int, momentum: float = 0.996) -> None:
        super().__init__(encoder, classes, "byol")
        width = encoder.projector[-1].out_features
        inner = encoder.projector[0][
            0
        ].out_features  # the paper's predictor has the projector's widths
        hidden = nn.Linear(width, inner), nn.BatchNorm1d(inner), nn.ReLU()
        self.predictor = nn.Sequential(*hidden, nn.Linear(inner, width))
        self.target, self.momentum = _frozen_copy(encoder), momentum

    def forward(self, views: list[Tensor], labels: Tensor, share: float) -> Tensor:
        with torch.no_grad():
            targets = self.run(self.target, views)
        predicted = self.run(lambda x: self.predictor(self.encoder(x)), views)
        return criteria.byol(*predicted, *targets)

    def after_step(self, share: float) -> None:
        _follow(self.target, self.encoder, cosine(self.momentum, 1.0, share))


class DINO(TwoViews):
    """Student and teacher agree on soft prototypes; the student also sees small local views."""

    def __init__(
        self,
        encoder: encoders.Encoder,
        classes: int,
        momentum: float = 0.996,
        prototypes: int = 1024,
        student_temperature: float = 0.1,
        teacher_start: float = 0.04,
        teacher_temperature: float = 0.07,
        teacher_warmup: float = 0.05,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__(encoder, classes, "dino")
        self.head = Prototypes(encoder.projector[-1].out_features, prototypes)
        self.teacher, self.teacher_head = _frozen_copy(encoder), _frozen_copy(self.head)
        self.register_buffer("centre", torch.zeros(prototypes))
        self.momentum, self.student_temperature, self.centre_momentum = (
            momentum,
            student_temperature,
            centre_momentum,
        )
        self.warm = (teacher_start, teacher_temperature, teacher_warmup)

    def forward(self, views: list[Tensor], labels: Tensor, share: float) -> Tensor:
        large, small = views[: self.views], views[self.views :]
        with torch.no_grad():
            teacher = torch.stack(self.run(lambda x: self.teacher_head(self.teacher(x)), large))
        given = self.run(lambda x: self.head(self.encoder(x)), large)
        given += self.run(lambda x: self.head(self.encoder(x)), small) if small else []
        start, end, warmup = self.warm
        temperature = start + (end - start) * min(1.0, share / max(warmup, 1e-9))
        loss = criteria.dino(
            torch.stack(given), teacher, self.centre.clone(), self.student_temperature, temperature
        )
        if (
            self.training
        ):  # after the loss: this batch is compared with the centre of those before it
            self.centre.lerp_(teacher.mean((0, 1)).to(self.centre), 1 - self.centre_momentum)
        return loss

    def after_step(self, share: float) -> None:
        momentum = cosine(self.momentum, 1.0, share)
        _follow(self.teacher, self.encoder, momentum)
        _follow(self.teacher_head, self.head, momentum)


class Prototypes(nn.Module):
    """Cosine of a projection with each prototype: DINO's last layer, weight-normalised with its
    norm fixed at 1.
    """

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(prototypes, width) * 0.02)

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(F.normalize(z, dim=-1), F.normalize(self.weight, dim=-1))


class Supervised(TwoViews):
    """The baseline: class scores from the projector through BatchNorm, ReLU and a linear layer,
    from one view.
    """

    views = 1

    def __init__(self, encoder: encoders.Encoder, classes: int, smoothing: float = 0.0) -> None:
        super().__init__(encoder, classes, "supervised", smoothing=smoothing)
        encoder.add_classifier(classes)

    def forward(self, views: list[Tensor], labels: Tensor, share: float) -> Tensor:
        (scores,) = self.run(lambda x: self.encoder.classifier(self.encoder(x)), views)
        return criteria.supervised(scores, gather(labels), **self.constants)


METHODS = {
    "vicreg": TwoViews,
    "barlow_twins": TwoViews,
    "simclr": TwoViews,
    "byol": BYOL,
    "dino": DINO,
    "supervised": Supervised,
}


def constants(criterion: str) -> dict[str, float]:
    """Return the constants of a criterion and their defaults; ValueError names the criteria that
    are known.
    """
    if criterion not in METHODS:
        raise ValueError(
            f'criterion "{criterion}" is not known: expected one of {", ".join(METHODS)}'
        )
    method = METHODS[criterion]
    source = getattr(criteria, criterion) if method is TwoViews else method.__init__
    parameters = inspect.signature(source).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def build(criterion: str, encoder: encoders.Encoder, classes: int, given: dict) -> TwoViews:
    """Return the method that trains `encoder` by `criterion` with the constants `given`; others
    keep their default.
    """
    if unknown := set(given) - set(constants(criterion)):
        raise ValueError(
            f"{criterion}: {', '.join(sorted(unknown))} is not a constant of it; it has "
            f"{', '.join(constants(criterion)) or 'none'}"
        )
    method = METHODS[criterion]
    return (
        method(encoder, classes, criterion, **given)
        if method is TwoViews
        else method(encoder, classes, **given)
    )


def cosine(start: float, end: float, share: float) -> float:
    """Return a value on the half cosine from `start` to `end` after a share in [0, 1] of the
    training.
    """
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def _follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move every weight of `slow` a little towards `fast`: momentum * slow + (1 - momentum) *
    fast.
    """
    get_ema_multi_avg_fn(momentum)(list(slow.parameters()), list(fast.parameters()), None)
