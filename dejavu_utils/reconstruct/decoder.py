"""Decoders: a diffusion U-Net draws pictures that have a given representation (RCDM, Bordes et al.
2022; paper §5).

The representation enters where the time does: standardised, through one linear layer, it is added
to the embedding of the time. U-Net, noise schedules, samplers and the moving average are
diffusers'; the loop, the own_format and exact resume are those of `train`.
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
    "unconditional": 0.1,
}  # share of the pictures that are learned without any, for guidance


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
    """A U-Net told what to draw: `widths` {"projector": d, "backbone": d} are the representations
    it can be given.

    The buffers `mean` and `std` of each hold the public set's statistics; a representation that is
    not given adds nothing to the time embedding.
    """

    def __init__(self, widths: dict[str, int], size: int, constants: dict) -> None:
        super().__init__()
        known = NET | constants
        if unknown := set(constants) - set(NET):
            raise ValueError(
                f"decoder: {', '.join(sorted(unknown))} is no constant of it; it has "
                f"{', '.join(NET)}."
            )
        if not known["conditions"] or (unknown := set(known["conditions"]) - set(PARTS)):
            raise ValueError(
                f"decoder: conditions {known['conditions']}; expected some of {', '.join(PARTS)}."
            )
        self.size, self.constants = size, known
        self.net = _unet(
            size, *(known[name] for name in ("channels", "layers", "attention", "patch"))
        )
        inner = self.net.time_embedding.linear_2.out_features
        widths = dict(
            sorted(widths.items())
        )  # one order, whoever asks: equal seeds make equal weights
        self.parts = nn.ModuleDict(
            {name: nn.Linear(width, inner) for name, width in widths.items()}
        )
        for name, width in widths.items():
            self.register_buffer(f"mean_{name}", torch.zeros(width))
            self.register_buffer(f"std_{name}", torch.ones(width))

    def standardise(self, representations: dict[str, Tensor]) -> None:
        """Take mean and deviation of each representation (n, d), of the public set's pictures."""
        for name, values in representations.items():
            getattr(self, f"mean_{name}").copy_(values.mean(0))
            getattr(self, f"std_{name}").copy_(values.std(0).clamp(min=1e-6))

    def forward(
        self, noisy: Tensor, time: Tensor, given: dict[str, Tensor], weight: dict[str, Tensor]
    ) -> Tensor:
        """Return the prediction (n, 3, s, s) for noisy pictures at `time` (n,), given
        representations (n, d).

        `weight` (n,) of each representation is 1 where it counts, 0 where the picture is drawn
        without.
        """
        told = sum(
            weight[name][:, None]
            * layer((given[name] - getattr(self, f"mean_{name}")) / getattr(self, f"std_{name}"))
            for name, layer in self.parts.items()
            if name in given
        )
        if isinstance(told, int):
            told = noisy.new_zeros(len(noisy), self.net.time_embedding.linear_2.out_features)
        patch = self.constants["patch"]
        layout = (
            torch.channels_last if noisy.is_cuda else torch.contiguous_format
        )  # the faster one for group norms
        folded = F.pixel_unshuffle(noisy, patch).contiguous(memory_format=layout)
        return F.pixel_shuffle(self.net(folded, time, told).sample, patch).float()

    def scheduler(self, solver: str = "ddpm") -> DDPMScheduler | DPMSolverMultistepScheduler:
        """Return diffusers' "ddpm" (its noise in training, and 1,000 steps of sampling) or few-step
        "dpm++" sampler.
        """
        common = {
            "num_train_timesteps": self.constants["timesteps"],
            "beta_schedule": self.constants["schedule"],
            "prediction_type": self.constants["predicts"],
        }
        if solver == "ddpm":
            return DDPMScheduler(**common)
        return DPMSolverMultistepScheduler(
            **common, lambda_min_clipped=-5.1, timestep_spacing="trailing"
        )


class Denoiser(nn.Module):
    """What a decoder needs while it learns: the loss of a batch of pictures with noise, and a
    moving average.
    """

    def __init__(self, decoder: Decoder, bf16: bool) -> None:
        super().__init__()
        self.decoder, self.bf16, self.noise = decoder, bf16, decoder.scheduler()
        self.average = EMAModel(
            decoder.parameters(), decay=decoder.constants["average"], foreach=True
        )

    def forward(self, views: list[Tensor], told: tuple, share: float) -> Tensor:
        """Return the mean squared error: `views` are pictures in [-1, 1] and noise, `told` (time,
        given, weight).
        """
        (pictures, noise), (time, given, weight) = views, told
        noisy = self.noise.add_noise(pictures, noise, time)
        target = noise
        if self.decoder.constants["predicts"] == "v_prediction":
            target = self.noise.get_velocity(pictures, noise, time)
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self.bf16):
            found = self.decoder(noisy, time, given, weight)
        return F.mse_loss(found, target)

    def after_step(self, share: float) -> None:
        self.average.step(self.decoder.parameters())


class Batches:
    """Feeds pictures with noise, a time and a condition each, all drawn from one stream an
    epoch.
    """

    def __init__(
        self, tensors: dict[str, Tensor], recipe: train.Recipe, constants: dict, device: str
    ) -> None:
        self.pixels, self.batch, self.device, self.constants = (
            tensors["pixels"],
            recipe.batch,
            device,
            constants,
        )
        self.given = {name: values for name, values in tensors.items() if name != "pixels"}
        self.steps = len(self.pixels) // recipe.batch
        if not self.steps:
            raise ValueError(
                f"decoder: {len(self.pixels)} public pictures for batches of {recipe.batch}. "
                "Lower batch."
            )
        kinds = [
            [float(name in PARTS[kind]) for kind in constants["conditions"]] + [0.0]
            for name in self.given
        ]
        self.kinds = dict(zip(self.given, torch.tensor(kinds, device=device), strict=True))

    def epoch(
        self, rng: torch.Generator
    ) -> Iterator[tuple[list[Tensor], tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]]:
        """Yield ([pictures, noise], (time, given, weight)) of each step."""
        draw = {"generator": rng, "device": rng.device}
        learned = len(self.constants["conditions"])
        for rows in torch.randperm(len(self.pixels), **draw).split(self.batch)[: self.steps]:
            n, rows = len(rows), rows.to(self.pixels.device)
            pictures = self.pixels[rows].to(self.device).float() / 127.5 - 1
            noise, time = (
                torch.randn(pictures.shape, **draw),
                torch.randint(self.constants["timesteps"], (n,), **draw),
            )
            kind = torch.randint(learned, (n,), **draw)
            kind = torch.where(
                torch.rand(n, **draw) < self.constants["unconditional"], learned, kind
            )
            given = {name: values[rows].to(self.device) for name, values in self.given.items()}
            yield (
                [pictures, noise],
                (time, given, {name: chosen[kind] for name, chosen in self.kinds.items()}),
            )


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
        self.recipe, self.epochs, self.seed, self.epoch, self.device = (
            recipe,
            epochs,
            seed,
            0,
            device,
        )
        self.dtype = train.precision(recipe.precision, device)
        given = {name: values for name, values in tensors.items() if name != "pixels"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.stream(seed, "weights").initial_seed())
            decoder = Decoder(
                {name: values.shape[1] for name, values in given.items()},
                recipe.size,
                recipe.constants,
            )
        decoder.standardise(given)
        if device.startswith("cuda"):
            decoder = decoder.to(device, memory_format=torch.channels_last)
        self.feed = Batches(tensors, recipe, decoder.constants, device)
        self.method = self.model = Denoiser(decoder, self.dtype == torch.bfloat16).train()
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
        return super().tensors() | {
            f"average.{i}": p for i, p in enumerate(self.method.average.shadow_params)
        }

    def restore(self, tensors: dict[str, Tensor], epoch: int, where: str | Path) -> None:
        """Continue from what `tensors()` returned at the end of `epoch`."""
        super().restore(
            {name: t for name, t in tensors.items() if not name.startswith("average.")},
            epoch,
            where,
        )
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
    if last.exists():
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
    widths = {
        name.removeprefix("mean_"): len(values)
        for name, values in tensors.items()
        if name.startswith("mean_")
    }
    decoder = Decoder(widths, meta["recipe"]["size"], meta["recipe"]["constants"])
    own_format.fill(decoder, tensors, path, "this decoder", "Check the decoder's constants.")
    return decoder.eval()


@torch.inference_mode()
def sample(
    decoder: Decoder,
    given: dict[str, Tensor],
    samples: int = 1,
    steps: int = 15,
    guidance: float = 1.0,
    seed: int | str = 0,
    device: str = "cpu",
    batch: int = 128,
    solver: str = "dpm++",
    precision: str = "auto",
) -> Tensor:
    """Return pictures with the given representations {part: (n, d)}: uint8 (n, samples, 3, s, s).

    Equal `seed` and `batch` start from equal noise, whatever the decoder; `precision` is a
    recipe's. `guidance` g above 1 moves each step from the unconditional prediction u to u + g (c -
    u). ValueError on representations that the decoder was not trained with.
    """
    if not any(set(given) == set(PARTS[kind]) for kind in decoder.constants["conditions"]):
        raise ValueError(
            f"decoder.sample: given {', '.join(given) or 'nothing'}; this decoder was trained "
            "with the "
            f"conditions {', '.join(decoder.constants['conditions'])}."
        )
    decoder, rng, found = decoder.to(device), train.stream(seed, "sample"), []
    bf16 = train.precision(precision, device) == torch.bfloat16
    rows = torch.arange(len(next(iter(given.values())))).repeat_interleave(samples)
    for part in rows.split(batch):
        told = {name: values[part].to(device) for name, values in given.items()}
        x = torch.randn(len(part), 3, decoder.size, decoder.size, generator=rng).to(device)
        sampler = decoder.scheduler(solver)
        sampler.set_timesteps(steps, device=device)
        for time in sampler.timesteps:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                predicted = _guided(decoder, x, time.expand(len(x)), told, guidance)
            x = sampler.step(
                predicted, time, x, **({"generator": rng} if solver == "ddpm" else {})
            ).prev_sample
        found.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(found).unflatten(0, (-1, samples))


def _guided(
    decoder: Decoder, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float
) -> Tensor:
    """Return the prediction u + g (c - u); with g = 1 that is c, the conditional one, alone."""
    one, none = (
        {name: torch.full((len(x),), value, device=x.device) for name in told}
        for value in (1.0, 0.0)
    )
    conditional = decoder(x, time, told, one)
    if guidance == 1:
        return conditional
    free = decoder(x, time, told, none)
    return free + guidance * (conditional - free)
