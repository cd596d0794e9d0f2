"""Decoders: networks that turn noise into pictures with a given representation (after RCDM, Bordes
et al. 2022; paper §5).

A picture x is mixed with Gaussian noise, (1 - t) x + t noise at time t from 0 to 1, and the network
predicts x. The representation enters where the time does: standardised, through one linear layer,
it is added to the embedding of the time. The loop, the format on disk and exact resume are those of
`train`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.optim import Muon
from torch import Tensor, nn

from dejavu_utils import store
from dejavu_utils.models import own_format, train
from dejavu_utils.reconstruct.unet import UNet

# The representations that each condition is made of.
PARTS = {"projector": ("projector",), "backbone": ("backbone",), "both": ("projector", "backbone")}
# The constants of a decoder's recipe, for two CPU cores; the profile `imagenet` has the paper's.
NET = {
    "channels": [64, 192],  # width at each resolution, halved from one to the next
    "blocks": [1, 2],  # residual blocks at each
    "attention": [],  # resolutions, px, with self-attention
    "patch": 2,  # px: squares of so many pixels become channels, four times less work at 2
    "conditions": ["projector", "backbone", "both"],  # that it learns, each as often, see PARTS
    "unconditional": 0.1,  # share of the pictures that are learned without any, for guidance
}
VECTOR = 256  # width of the embedding of time and representation
EARLIEST = 0.1  # times below count as this one in the loss: at 0 its weight would have no bound

Representations = dict[str, Tensor]  # {"projector": (n, d), "backbone": (n, d)}, or one of them


class Decoder(nn.Module):
    """A U-Net and the layers that let representations in: `widths` {"projector": d, "backbone": d}.

    The buffers `mean_<name>` and `std_<name>` hold the public set's statistics; a representation
    that is not given adds nothing to the embedding of the time.
    """

    def __init__(self, widths: dict[str, int], size: int, constants: dict) -> None:
        super().__init__()
        self.size = size
        self.constants = _checked(constants)
        self.net = UNet(
            size,
            self.constants["channels"],
            self.constants["blocks"],
            self.constants["attention"],
            self.constants["patch"],
            VECTOR,
        )
        self.time = nn.Sequential(nn.Linear(64, VECTOR), nn.SiLU(), nn.Linear(VECTOR, VECTOR))
        self.parts = nn.ModuleDict()
        for name in sorted(widths):  # one order, whoever asks: equal seeds make equal weights
            self.parts[name] = nn.Linear(widths[name], VECTOR)
            self.register_buffer(f"mean_{name}", torch.zeros(widths[name]))
            self.register_buffer(f"std_{name}", torch.ones(widths[name]))

    def standardise(self, representations: Representations) -> None:
        """Take mean and standard deviation of each representation, of the public set's pictures."""
        for name, values in representations.items():
            getattr(self, f"mean_{name}").copy_(values.mean(0))
            getattr(self, f"std_{name}").copy_(values.std(0).clamp(min=1e-6))

    def forward(
        self,
        noisy: Tensor,
        time: Tensor,
        representations: Representations,
        weights: dict[str, Tensor],
    ) -> Tensor:
        """Return the clean pictures (n, 3, s, s) that it predicts for noisy ones at `time` (n,).

        `weights` (n,) of each representation is 1 where it counts, 0 where the picture is predicted
        without.
        """
        vector = self.time(_waves(time))  # (n, VECTOR)
        for name, values in representations.items():
            mean = getattr(self, f"mean_{name}")
            std = getattr(self, f"std_{name}")
            added = self.parts[name]((values - mean) / std)  # (n, VECTOR)
            vector = vector + weights[name][:, None] * added
        return self.net(noisy, F.silu(vector)).float()


def _waves(time: Tensor) -> Tensor:
    """Return sines and cosines (n, 64) of times (n,), from slow to fast."""
    frequencies = torch.logspace(0, 3, 32, device=time.device)
    angles = time[:, None] * frequencies  # (n, 32)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _checked(constants: dict) -> dict:
    """Return the constants with the defaults of those not given; ValueError names what is wrong."""
    if unknown := set(constants) - set(NET):
        raise ValueError(
            f"decoder: {', '.join(sorted(unknown))} is no constant of it; it has {', '.join(NET)}."
        )
    known = NET | constants
    if not known["conditions"] or set(known["conditions"]) - set(PARTS):
        raise ValueError(
            f"decoder: conditions {known['conditions']}; expected some of {', '.join(PARTS)}."
        )
    if len(known["channels"]) != len(known["blocks"]):
        raise ValueError(
            f"decoder: channels {known['channels']} and blocks {known['blocks']}; expected one of "
            "each for every resolution."
        )
    return known


def mix(pictures: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return pictures (n, 3, s, s) with noise at times (n,): the picture at 0, noise alone at 1."""
    time = time[:, None, None, None]
    return (1 - time) * pictures + time * noise


class Denoiser(nn.Module):
    """What a decoder needs while it learns: the loss of a batch of pictures with noise."""

    def __init__(self, decoder: Decoder, bf16: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.bf16 = bf16

    def forward(self, views: list[Tensor], given: tuple, share: float) -> Tensor:
        """Return the mean squared error: `views` are pictures in [-1, 1] and noise, `given` (time,
        representations, weights).

        Divided by the time squared it is that of the velocity, noise - picture, which flow matching
        learns.
        """
        pictures, noise = views  # (n, 3, s, s) each
        time, representations, weights = given
        noisy = mix(pictures, noise, time)
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = self.decoder(noisy, time, representations, weights)
        error = (predicted - pictures).square().mean((1, 2, 3))  # (n,)
        return (error / time.clamp(min=EARLIEST).square()).mean()

    def after_step(self, share: float) -> None:
        """Do nothing: the weights that are kept are the last ones."""


class Batches:
    """Feeds pictures with noise, a time and a condition each, all drawn from one generator an
    epoch.
    """

    def __init__(
        self, tensors: dict[str, Tensor], recipe: train.Recipe, constants: dict, device: str
    ) -> None:
        self.pixels = tensors["pixels"]
        self.representations = _representations(tensors)
        self.batch = recipe.batch
        self.constants = constants
        self.device = device
        self.steps = len(self.pixels) // recipe.batch
        if not self.steps:
            raise ValueError(
                f"decoder: {len(self.pixels)} public pictures for batches of {recipe.batch}. "
                "Lower batch."
            )
        # The weight of each representation under each condition; the last one is "without".
        self.weights = {}
        for name in self.representations:
            weight = [float(name in PARTS[kind]) for kind in constants["conditions"]]
            self.weights[name] = torch.tensor([*weight, 0.0], device=device)

    def epoch(
        self, rng: torch.Generator
    ) -> Iterator[tuple[list[Tensor], tuple[Tensor, Representations, dict[str, Tensor]]]]:
        """Yield ([pictures, noise], (time, representations, weights)) of each step."""
        order = torch.randperm(len(self.pixels), generator=rng, device=rng.device)
        for rows in order.split(self.batch)[: self.steps]:
            n = len(rows)
            rows = rows.to(self.pixels.device)
            pictures = self.pixels[rows].to(self.device).float() / 127.5 - 1  # in [-1, 1]
            noise = torch.randn(pictures.shape, generator=rng, device=rng.device)
            # Most of them in the middle, where it is decided what a picture shows.
            time = torch.randn(n, generator=rng, device=rng.device).sigmoid()

            without = len(self.constants["conditions"])
            kind = torch.randint(without, (n,), generator=rng, device=rng.device)
            chance = torch.rand(n, generator=rng, device=rng.device)
            kind = torch.where(chance < self.constants["unconditional"], without, kind)
            weights = {name: weight[kind] for name, weight in self.weights.items()}

            given = {
                name: values[rows].to(self.device) for name, values in self.representations.items()
            }
            yield [pictures, noise], (time, given, weights)


def _representations(tensors: dict[str, Tensor]) -> Representations:
    """Return what a public set's tensors hold besides pixels and labels."""
    return {name: tensors[name] for name in PARTS["both"] if name in tensors}


class Training(train.Training):
    """One decoder in training; `tensors` holds "pixels" uint8 (n, 3, s, s) of X and a
    representation (n, d) or more.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        recipe: train.Recipe,
        epochs: int,
        seed: int | str,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.epochs = epochs
        self.seed = seed
        self.epoch = 0
        self.device = device
        self.dtype = train.precision(recipe.precision, device)

        representations = _representations(tensors)
        widths = {name: values.shape[1] for name, values in representations.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.stream(seed, "weights").initial_seed())
            decoder = Decoder(widths, recipe.size, recipe.constants)
        decoder.standardise(representations)
        decoder = decoder.to(device, memory_format=torch.channels_last)

        self.feed = Batches(tensors, recipe, decoder.constants, device)
        self.method = Denoiser(decoder, self.dtype == torch.bfloat16).train()
        self.model = self.method
        if recipe.compile:
            decoder.net.compile()
        self.optimizer = _optimizer(decoder, recipe)

    @property
    def encoder(self) -> Decoder:
        """The network that is kept."""
        return self.method.decoder


def _optimizer(decoder: Decoder, recipe: train.Recipe) -> torch.optim.Optimizer:
    """Return Muon of the weights between hidden layers, which learn faster with it, and AdamW of
    the others.
    """
    outer = [decoder.net.conv_in, decoder.net.conv_out, decoder.time, decoder.parts]
    others = {id(weight) for module in outer for weight in module.parameters()}
    hidden = [weight for weight in decoder.parameters() if id(weight) not in others]
    groups = [
        {"params": hidden},
        {"params": [w for w in decoder.parameters() if id(w) in others], "use_fallback": True},
    ]
    return Muon(groups, lr=0.0, weight_decay=recipe.weight_decay)


def constants() -> dict[str, set[str]]:
    """Return {}: this engine trains decoders, no criterion of an encoder."""
    return {}


def fit(job: train.Job, every: float = 30.0) -> None:
    """Train the decoder of `job` to its end, from its last state if there is one: killed and
    resumed, the same bits.

    As `train.fit`: a state every `every` seconds, a line of JSON per epoch, FloatingPointError
    where a loss diverges.
    """
    torch.set_num_threads(job.recipe.threads)
    tensors = store.read_tensors(job.pixels)[0]
    training = Training(tensors, job.recipe, max(job.epochs), job.seed, job.device)
    last = Path(job.folder) / "last.safetensors"
    if store.intact(last):
        state, meta = store.read_tensors(last)
        training.restore(state, meta["epoch"], last)
    train.run_epochs(training, job, last, every, writes=True)
    for path in (last, store.sidecar(last)):
        path.unlink(missing_ok=True)


def load(job: train.Job) -> Decoder:
    """Return the trained decoder of `job`, in evaluation mode on the CPU; StoreError if what is
    stored does not fit.
    """
    path = job.checkpoint(max(job.epochs))
    tensors, meta = store.read_tensors(path)
    widths = {}
    for name, values in tensors.items():
        if name.startswith("mean_"):
            widths[name.removeprefix("mean_")] = len(values)
    decoder = Decoder(widths, meta["recipe"]["size"], meta["recipe"]["constants"])
    own_format.fill(decoder, tensors, path, "this decoder", "Check the decoder's constants.")
    return decoder.eval()


@torch.inference_mode()
def sample(
    decoder: Decoder,
    representations: Representations,
    samples: int = 1,
    steps: int = 10,
    guidance: float = 1.0,
    seed: int | str = 0,
    device: str = "cpu",
    batch: int = 128,
    precision: str = "auto",
) -> Tensor:
    """Return pictures with the given representations: uint8 (n, samples, 3, s, s).

    Equal `seed` and `batch` start from equal noise, whatever the decoder; `precision` is a
    recipe's. `guidance` g above 1 moves each prediction from the unconditional one u to
    u + g (c - u). ValueError on representations that the decoder was not trained with.
    """
    known = [set(PARTS[kind]) for kind in decoder.constants["conditions"]]
    if set(representations) not in known:
        raise ValueError(
            f"decoder.sample: given {', '.join(representations) or 'nothing'}; this decoder was "
            f"trained with the conditions {', '.join(decoder.constants['conditions'])}."
        )
    decoder = decoder.to(device, memory_format=torch.channels_last)
    rng = train.stream(seed, "sample")
    bf16 = train.precision(precision, device) == torch.bfloat16
    times = torch.linspace(1, 0, steps + 1, device=device)

    n = len(next(iter(representations.values())))
    found = []
    for rows in torch.arange(n).repeat_interleave(samples).split(batch):
        given = {name: values[rows].to(device) for name, values in representations.items()}
        x = torch.randn(len(rows), 3, decoder.size, decoder.size, generator=rng).to(device)
        for time, after in zip(times[:-1], times[1:], strict=True):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                clean = guided(decoder, x, time, given, guidance)
            x = clean + after / time * (x - clean)  # so much of the noise is left
        found.append(to_pixels(x).cpu())
    return torch.cat(found).unflatten(0, (-1, samples))


def guided(
    decoder: Decoder, x: Tensor, time: Tensor, representations: Representations, guidance: float
) -> Tensor:
    """Return the prediction u + g (c - u); with g = 1 that is c, the conditional one, alone."""
    ones = torch.ones(len(x), device=x.device)
    times = time.expand(len(x))
    conditional = decoder(x, times, representations, dict.fromkeys(representations, ones))
    if guidance == 1:
        return conditional
    without = dict.fromkeys(representations, torch.zeros_like(ones))
    unconditional = decoder(x, times, representations, without)
    return unconditional + guidance * (conditional - unconditional)


def to_pixels(x: Tensor) -> Tensor:
    """Return pictures in [-1, 1] as uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
