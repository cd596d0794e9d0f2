"""Decoders: a diffusion U-Net that samples pictures with a given representation (RCDM, Bordes et
al. 2022; paper §5).

The representation enters where the time does: standardised, through one linear layer, it is added
to the embedding of the time. U-Net, noise schedules, samplers and the moving average are
diffusers'; the loop, the format on disk and exact resume are those of `train`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)  # lazy inside: two threads would race
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dejavu_utils import store
from dejavu_utils.models import own_format, train

# The representations that each condition is made of.
PARTS = {"projector": ("projector",), "backbone": ("backbone",), "both": ("projector", "backbone")}
# The constants of a decoder's recipe, for two CPU cores; the profile `imagenet` has the paper's.
NET = {
    "channels": [64, 128],  # width at each resolution, halved from one to the next
    "layers": 1,  # residual blocks at each
    "attention": [],  # resolutions, px, with self-attention
    "patch": 2,  # px: squares of so many pixels become channels, four times less work at 2
    "timesteps": 1000,  # of the diffusion in training
    # of the noise, see diffusers.DDPMScheduler; the paper's is "linear"
    "schedule": "squaredcos_cap_v2",
    "predicts": "v_prediction",  # or "epsilon", the noise
    "average": 0.995,  # decay of the moving average of the weights, which is what is kept
    "conditions": ["projector", "backbone", "both"],  # that it learns, each as often, see PARTS
    "unconditional": 0.1,  # share of the pictures that are learned without any, for guidance
}

Representations = dict[str, Tensor]  # {"projector": (n, d), "backbone": (n, d)}, or one of them


def _unet(
    size: int, channels: Sequence[int], layers: int, attention: Sequence[int], patch: int
) -> UNet2DModel:
    """Return diffusers' U-Net for `size`-px pictures folded into patches, with room for a
    condition.
    """
    sides = [size // patch >> level for level in range(len(channels))]
    kinds = ["Attn" if side * patch in attention else "" for side in sides]
    return UNet2DModel(
        sample_size=sides[0],
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        add_attention=bool(kinds[-1]),
        attention_head_dim=min(64, channels[0]),
        norm_num_groups=min(32, channels[0] // 4),
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )


class Decoder(nn.Module):
    """A U-Net and the layers that let representations in: `widths` {"projector": d, "backbone": d}.

    The buffers `mean_<name>` and `std_<name>` hold the public set's statistics; a representation
    that is not given adds nothing to the embedding of the time.
    """

    def __init__(self, widths: dict[str, int], size: int, constants: dict) -> None:
        super().__init__()
        self.size = size
        self.constants = _checked(constants)
        self.net = _unet(
            size,
            self.constants["channels"],
            self.constants["layers"],
            self.constants["attention"],
            self.constants["patch"],
        )
        self.inner = self.net.time_embedding.linear_2.out_features
        self.parts = nn.ModuleDict()
        for name in sorted(widths):  # one order, whoever asks: equal seeds make equal weights
            self.parts[name] = nn.Linear(widths[name], self.inner)
            self.register_buffer(f"mean_{name}", torch.zeros(widths[name]))
            self.register_buffer(f"std_{name}", torch.ones(widths[name]))

    def standardise(self, representations: Representations) -> None:
        """Take mean and standard deviation of each representation, of the public set's pictures."""
        for name, values in representations.items():
            getattr(self, f"mean_{name}").copy_(values.mean(0))
            getattr(self, f"std_{name}").copy_(values.std(0).clamp(min=1e-6))

    def condition(
        self, representations: Representations, weights: dict[str, Tensor], like: Tensor
    ) -> Tensor:
        """Return what is added to the embedding of the time (n, inner), on the device of `like`.

        `weights` (n,) of each representation is 1 where it counts, 0 where the picture is sampled
        without.
        """
        total = like.new_zeros(len(like), self.inner)
        for name, layer in self.parts.items():
            if name in representations:
                mean, std = getattr(self, f"mean_{name}"), getattr(self, f"std_{name}")
                standard = (representations[name] - mean) / std  # (n, d)
                total = total + weights[name][:, None] * layer(standard)
        return total

    def forward(
        self,
        noisy: Tensor,
        time: Tensor,
        representations: Representations,
        weights: dict[str, Tensor],
    ) -> Tensor:
        """Return the prediction (n, 3, s, s) for noisy pictures at `time` (n,), see `condition`."""
        added = self.condition(representations, weights, noisy)  # (n, inner)
        layout = torch.contiguous_format
        if noisy.is_cuda:
            layout = torch.channels_last  # the faster one for group norms
        patch = self.constants["patch"]
        folded = F.pixel_unshuffle(noisy, patch).contiguous(memory_format=layout)
        predicted = self.net(folded, time, added).sample  # (n, 3 patch², s / patch, s / patch)
        return F.pixel_shuffle(predicted, patch).float()

    def noise_schedule(self) -> DDPMScheduler:
        """Return how noise is added in training."""
        return DDPMScheduler(**self._schedule())

    def sampler(self, steps: int, device: str = "cpu") -> DPMSolverMultistepScheduler:
        """Return DPM-Solver++, which samples in few steps."""
        sampler = DPMSolverMultistepScheduler(
            **self._schedule(), lambda_min_clipped=-5.1, timestep_spacing="trailing"
        )
        sampler.set_timesteps(steps, device=device)
        return sampler

    def _schedule(self) -> dict:
        return {
            "num_train_timesteps": self.constants["timesteps"],
            "beta_schedule": self.constants["schedule"],
            "prediction_type": self.constants["predicts"],
        }


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
    return known


class Denoiser(nn.Module):
    """What a decoder needs while it learns: the loss of a batch of pictures with noise, and a
    moving average.
    """

    def __init__(self, decoder: Decoder, bf16: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.bf16 = bf16
        self.noise = decoder.noise_schedule()
        self.average = EMAModel(
            decoder.parameters(), decay=decoder.constants["average"], foreach=True
        )

    def forward(self, views: list[Tensor], given: tuple, share: float) -> Tensor:
        """Return the mean squared error: `views` are pictures in [-1, 1] and noise, `given` (time,
        representations, weights).
        """
        pictures, noise = views  # (n, 3, s, s) each
        time, representations, weights = given
        noisy = self.noise.add_noise(pictures, noise, time)
        target = noise
        if self.decoder.constants["predicts"] == "v_prediction":
            target = self.noise.get_velocity(pictures, noise, time)
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = self.decoder(noisy, time, representations, weights)
        return F.mse_loss(predicted, target)

    def after_step(self, share: float) -> None:
        self.average.step(self.decoder.parameters())


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
            time = self._integers(rng, self.constants["timesteps"], n)

            without = len(self.constants["conditions"])
            kind = self._integers(rng, without, n)
            chance = torch.rand(n, generator=rng, device=rng.device)
            kind = torch.where(chance < self.constants["unconditional"], without, kind)
            weights = {name: weight[kind] for name, weight in self.weights.items()}

            given = {
                name: values[rows].to(self.device) for name, values in self.representations.items()
            }
            yield [pictures, noise], (time, given, weights)

    def _integers(self, rng: torch.Generator, below: int, n: int) -> Tensor:
        return torch.randint(below, (n,), generator=rng, device=rng.device)


def _representations(tensors: dict[str, Tensor]) -> Representations:
    """Return what a public set's tensors hold besides the pixels."""
    return {name: values for name, values in tensors.items() if name != "pixels"}


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
        if device.startswith("cuda"):
            decoder = decoder.to(device, memory_format=torch.channels_last)

        self.feed = Batches(tensors, recipe, decoder.constants, device)
        self.method = Denoiser(decoder, self.dtype == torch.bfloat16).train()
        self.model = self.method
        if recipe.compile:
            decoder.net.compile()
        self.optimizer = train.make_optimizer(self.method, recipe)

    @property
    def encoder(self) -> Decoder:
        """The network that is kept: the decoder with the moving average of its weights."""
        kept = copy.deepcopy(self.method.decoder)
        self.method.average.copy_to(kept.parameters())
        return kept

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs: the method's, the optimiser's and the moving
        average.
        """
        found = super().tensors()
        for i, weights in enumerate(self.method.average.shadow_params):
            found[f"average.{i}"] = weights
        return found

    def restore(self, tensors: dict[str, Tensor], epoch: int, where: str | Path) -> None:
        """Continue from what `tensors()` returned at the end of `epoch`."""
        others = {n: values for n, values in tensors.items() if not n.startswith("average.")}
        super().restore(others, epoch, where)
        for i, weights in enumerate(self.method.average.shadow_params):
            weights.copy_(tensors[f"average.{i}"])
        self.method.average.optimization_step = epoch * self.feed.steps


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
    steps: int = 15,
    guidance: float = 1.0,
    seed: int | str = 0,
    device: str = "cpu",
    batch: int = 128,
    precision: str = "auto",
) -> Tensor:
    """Return pictures with the given representations: uint8 (n, samples, 3, s, s).

    Equal `seed` and `batch` start from equal noise, whatever the decoder; `precision` is a
    recipe's. `guidance` g above 1 moves each step from the unconditional prediction u to u + g (c -
    u). ValueError on representations that the decoder was not trained with.
    """
    known = [set(PARTS[kind]) for kind in decoder.constants["conditions"]]
    if set(representations) not in known:
        raise ValueError(
            f"decoder.sample: given {', '.join(representations) or 'nothing'}; this decoder was "
            f"trained with the conditions {', '.join(decoder.constants['conditions'])}."
        )
    decoder = decoder.to(device)
    rng = train.stream(seed, "sample")
    bf16 = train.precision(precision, device) == torch.bfloat16

    n = len(next(iter(representations.values())))
    found = []
    for rows in torch.arange(n).repeat_interleave(samples).split(batch):
        given = {name: values[rows].to(device) for name, values in representations.items()}
        x = torch.randn(len(rows), 3, decoder.size, decoder.size, generator=rng).to(device)
        sampler = decoder.sampler(steps, device)
        for time in sampler.timesteps:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                predicted = guided(decoder, x, time, given, guidance)
            x = sampler.step(predicted, time, x).prev_sample
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
