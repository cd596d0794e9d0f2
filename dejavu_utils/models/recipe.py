"""`Recipe`: how encoders are trained, and `Views`: on which augmentations. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

CRITERIA = ("vicreg", "barlow_twins", "simclr", "byol", "dino", "supervised")


@dataclass(frozen=True)
class Views:
    """The augmentation's parameters; the defaults are the paper's, for 224-px images."""

    scale_min: float = 0.08  # smallest share of the image's area that a crop covers
    scale_max: float = 1.0
    flip: float = 0.5  # probabilities from here on
    jitter: float = 0.8
    # of the colour jitter: brightness .4, contrast .4, saturation .2, hue .1, all times this
    strength: float = 1.0
    grey: float = 0.2
    blur: float = 1.0  # of a Gaussian blur of view 1, sigma .1-2 px at 224 px
    solarize: float = 0.2  # of view 2
    local: int = 0  # small views beside the two large ones (DINO); 0 is none
    local_side: float = 0.43  # side of a local view, share of the large one's, rounded to 8 px
    # with local views: they cover scale_min to this, the large ones this to scale_max
    local_scale: float = 0.4


@dataclass(frozen=True)
class Recipe:
    """How encoders are trained; the defaults are for two CPU cores, the profile `imagenet` has the
    paper's (§2.2).
    """

    criterion: str = "vicreg"  # one of CRITERIA
    encoder: str = "patch64"  # trunk, see encoders.trunk
    projector: str = "512-512-512"  # widths of the projector's layers
    size: int = 32  # px, side of the square that the encoder sees
    batch: int = 50  # images a step; the last incomplete batch of an epoch is dropped
    optimizer: str = "adamw"  # "adamw" or "lars"
    lr: float = 0.01  # peak, per 256 images: the step uses lr * batch / 256
    weight_decay: float = 1e-6  # on weights only, not on biases and norms
    warmup: float = 0.05  # share of the steps with a linearly rising rate
    constants: dict = field(
        default_factory=lambda: {"temperature": 0.2}
    )  # of the criterion, e.g. {"invariance": 25.0}
    views: dict = field(
        default_factory=lambda: {
            "scale_min": 0.04,
            "strength": 0.4,
            "grey": 0.0,
            "blur": 0.0,
            "solarize": 0.0,
        }
    )  # see Views
    precision: str = "auto"  # "fp32", "bf16" or "auto": bf16 where the processor computes it
    threads: int = 1  # CPU threads of one job: 1 and 2 give different bits
    compile: bool = False  # torch.compile of the trunk: a minute first, faster on a GPU
    resident: float = 8.0  # GiB of pixels kept on the device; more are decoded in workers
    workers: int = 0  # processes that decode; 0 is one less than there are cores
    processes: int = 1  # that share each batch, one device each, started by torchrun
    nodes: int = 1  # machines of so many processes each, started by srun
    sync_bn: bool = False  # batch norms over the joint batch of all processes
    engine: str = "own"  # "own", or "vissl" for VISSL's training engine
