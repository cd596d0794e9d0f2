"""Other people's encoders: a named network, weights from a file, and what had to be assumed.

A network is never guessed from the shapes of its tensors: the user names it (`encoder`), and a file
of weights must fill it completely. What a file cannot say (strides, padding, pooling, activation,
the input's mean and standard deviation) comes from the named network and stands in `assumed`.
"""

import ast
import difflib
import functools
import hashlib
import inspect
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dejavu_utils import limited, store
from dejavu_utils.limited import LIMIT_GIB
from dejavu_utils.models import checkpoint_files, encoders, own_format, weights
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.views import MEAN, STD
from dejavu_utils.store import StoreError

FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".tar", ".torch", ".bin")
FORMS = (
    "timm:NAME, torchvision:NAME, hub:REPOSITORY:NAME, hf:NAME_OR_FOLDER, package.module:function, "
    "or a file that this package wrote"
)
IMAGENET = "input: ImageNet's mean and standard deviation"
# Networks that are proposed to somebody who has a file and no name.
COMMON = [f"torchvision:resnet{depth}" for depth in (18, 34, 50, 101, 152)]
COMMON += [f"timm:vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")]
COMMON += [f"timm:vit_{size}_patch14_dinov2" for size in ("small", "base", "large")]
COMMON += [f"timm:vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large")]
COMMON += ["timm:vit_huge_patch14_gap_224", "torchvision:resnet18-s", "torchvision:resnet50-s"]


@dataclass
class Factory:
    """A network, and what it wants as input."""

    network: nn.Module
    mean: tuple = MEAN
    std: tuple = STD
    size: int = 0  # px; 0: not known
    preprocess: Callable | None = None  # takes pictures in 0..1, instead of mean and std
    convert: Callable | None = None  # renames the original authors' tensors, see weights.find
    classifier: tuple = ()  # names of the layers that were cut off
    notes: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


class Trunk(nn.Module):
    """A network as a trunk: (n, 3, s, s) with ImageNet's mean and standard deviation -> (n, d)."""

    def __init__(self, made: Factory) -> None:
        super().__init__()
        self.network = made.network
        self.preprocess = made.preprocess
        self.features = ""  # how they were made of the last output, where that was no vector
        self.same = made.preprocess is None and (tuple(made.mean), tuple(made.std)) == (MEAN, STD)
        for name, values in (("mean", made.mean), ("std", made.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.same:
            unit = x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)
            x = self.preprocess(unit) if self.preprocess else (unit - self.mean) / self.std
        return self.pooled(self.network(x))

    def pooled(self, out: Any) -> Tensor:
        """Return features (n, d) of what the network returned: pooled maps, tokens, or features."""
        if hasattr(out, "last_hidden_state"):  # transformers' outputs
            tokens = out.last_hidden_state.ndim == 3
            pooled = None if tokens else getattr(out, "pooler_output", None)
            out = out.last_hidden_state if pooled is None else pooled.flatten(1)
        if not isinstance(out, Tensor):
            raise ValueError(
                f"the network returns a {type(out).__name__}: expected features (n, d). Name a "
                "function of yours that returns a module with them: ENCODER=package.module:function"
            )
        if out.ndim == 4:  # (n, c, h, w)
            self.features = "the mean over the map that it returns"
            return out.mean((2, 3))
        if out.ndim == 3 and self.has_class_token():  # (n, tokens, d)
            self.features = "the class token of the last layer"
            return out[:, 0]
        if out.ndim == 3:
            self.features = "the mean token of the last layer"
            return out.mean(1)
        return out

    def has_class_token(self) -> bool:
        names = [name for name, _ in self.network.named_parameters()]
        return any(name.endswith(("cls_token", "class_embedding")) for name in names)


class External(Encoder):
    """An encoder of somebody else, with `layers` and `forward` of encoders.Encoder.

    `notes` say what was read and what was left out, `assumed` what no file or configuration told.
    """

    def __init__(
        self,
        trunk: nn.Module,
        projector: nn.ModuleList | None = None,
        *,
        name: str = "",
        size: int = 0,
        mean: tuple = MEAN,
        std: tuple = STD,
        notes: tuple[str, ...] = (),
        assumed: tuple[str, ...] = (),
        sha256: str = "",
    ) -> None:
        nn.Module.__init__(self)  # the parts are there already: nothing is built from specs
        self.trunk = trunk
        self.projector = nn.ModuleList() if projector is None else projector
        self.classifier = None
        self.name = name
        self.size = size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.notes = tuple(notes)
        self.assumed = tuple(assumed)
        self.sha256 = sha256


def encoder(
    spec: str,
    file: str | None = None,
    prefix: str = "",
    unused: str = "",
    limit_gib: float = LIMIT_GIB,
    size: int = 0,
) -> External:
    """Return the encoder that `spec` names, in evaluation mode on the CPU, in float32.

    `spec`: FORMS. `file` holds its weights; without one they are the pretrained ones of its source.
    Of several copies in a file the one whose prefix contains `prefix` is read. `unused` is a
    regular expression of tensors that no forward pass uses, where `weights.unexplained` asks.
    `size` is that of the pictures that it will see (px; 0: what it wants).
    Reading a file takes at most `limit_gib` GiB of memory; on other systems than Linux only its
    headers are compared with that.

    StoreError says what is wrong with a file, ValueError with a name, FileNotFoundError what is not
    there.
    """
    check(spec, file, limit_gib)
    _check_pattern(unused)
    if Path(spec).is_file():
        with _one_error(Path(spec), limit_gib):
            return _ours(Path(spec), limit_gib)

    with torch.random.fork_rng(devices=[]):  # reading an encoder draws no numbers
        made = _make(spec, pretrained=not file)
    made.network.float().eval()
    trunk = Trunk(made).eval()
    width = _width(trunk, size or made.size or 224, spec)
    made.notes.insert(0, f"network: {spec}")
    if trunk.features:
        made.assumed.append(f"features: {trunk.features}")

    head = None
    if file:
        with _one_error(Path(file), limit_gib):
            head = _load(made, width, spec, Path(file), prefix, unused, limit_gib)
        digest = store.digest(Path(file))
    else:
        made.notes += ["weights: its source's own", "projector: none"]
        state = made.network.state_dict().values()
        digest = hashlib.sha256(b"".join(_bytes(tensor) for tensor in state)).hexdigest()

    wanted = f"{made.size} px" if made.size else "size not known"
    made.notes.append(
        f"input by default: {wanted}, mean {_numbers(made.mean)}, std {_numbers(made.std)}"
    )
    return External(
        trunk,
        head.blocks if head else None,
        name="/".join(Path(file or spec).parts[-2:]),
        size=made.size,
        mean=made.mean,
        std=made.std,
        notes=tuple(made.notes),
        assumed=tuple(made.assumed),
        sha256=digest,
    ).eval()


def check(spec: str, file: str | None = None, limit_gib: float = LIMIT_GIB) -> None:
    """Raise FileNotFoundError or ValueError, in a moment, if there can be no such encoder."""
    if file and not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}; expected a file of weights.")
    if Path(spec).is_file():
        if not store.sidecar(spec).is_file():
            with _one_error(Path(spec), limit_gib):
                advice = _unnamed(spec, limit_gib)
            raise ValueError(advice)
        return
    kind, _, name = spec.partition(":")
    if spec.endswith(FILES) or "/" in kind:
        raise FileNotFoundError(f"there is no file {spec}; expected {FORMS}.")
    if not name:
        raise ValueError(
            f"{spec} names no encoder: expected {FORMS}, such as torchvision:{spec} or timm:{spec}."
        )


@contextmanager
def _one_error(file: Path, limit_gib: float) -> Iterator[None]:
    """Turn whatever reading `file` raises into one StoreError; a missing file stays one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise limited.as_refusal(error, file, limit_gib) from error


def _check_pattern(unused: str) -> None:
    try:
        re.compile(unused)
    except re.error as error:
        raise ValueError(
            f"reading.unused={unused!r} is no regular expression ({error}): expected one such as "
            "'decoder|mask_token'."
        ) from error


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# -- networks -------------------------------------------------------------------------------------


def _make(spec: str, pretrained: bool) -> Factory:
    """Return the network of `spec`; ValueError says why there is none."""
    kind, _, name = spec.partition(":")
    makers = {"timm": _timm, "torchvision": _torchvision, "hub": _hub, "hf": _hf}
    if kind not in makers:
        return _function(kind, name)
    try:
        return makers[kind](name, pretrained)
    except ModuleNotFoundError as error:
        raise ValueError(f"ENCODER={spec} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # each library has its own words for no such name and no network
        where = "fetched or built" if pretrained else "built"
        hint = _misspelt(kind, name)
        if pretrained and not hint:
            hint = " Pass its weights as a file: WEIGHTS=…"
        raise ValueError(
            f"ENCODER={spec} could not be {where} ({type(error).__name__}: {error}).{hint}"
        ) from error


def _misspelt(kind: str, name: str) -> str:
    """Return a sentence for a name that timm or torchvision does not have; "" where it has it."""
    if kind == "timm":
        from timm import list_models
    elif kind == "torchvision":
        from torchvision.models import list_models
    else:
        return ""

    plain = re.split("[:.-]", name)[0]  # without options, tag, and variant
    known = list_models()
    if plain in known:
        return ""
    near = difflib.get_close_matches(plain, known, 3)
    return f" Did you mean {', '.join(near)}?" if near else f" {kind} has no {plain}."


def _timm(name: str, pretrained: bool) -> Factory:
    """Return a timm model, such as vit_base_patch16_224.mae, or vit_tiny_patch16_224:img_size=64.

    Its configuration belongs to its pretrained weights: for others it holds only if the name has a
    tag (the part behind the dot).
    """
    import timm
    from timm.data import resolve_model_data_config

    name, _, text = name.partition(":")
    options = dict(_option(pair) for pair in text.split(",") if pair)
    try:  # ViTs then take other sizes too
        network = timm.create_model(
            name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **options
        )
    except TypeError:
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)

    config = resolve_model_data_config(network)
    made = Factory(network, size=options.get("img_size", config["input_size"][-1]))
    made.convert = getattr(inspect.getmodule(type(network)), "checkpoint_filter_fn", None)
    classifier = network.pretrained_cfg.get("classifier") or ()
    made.classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if pretrained or "." in name:
        made.mean, made.std = tuple(config["mean"]), tuple(config["std"])
        made.notes.append(f"size, mean and standard deviation: timm's configuration of {name}")
    else:
        made.assumed.append(
            f"{IMAGENET} (timm's own weights of this name use {_numbers(config['mean'])}; a name "
            "with its tag takes them)"
        )
    return made


def _option(pair: str) -> tuple[str, object]:
    key, _, value = pair.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _torchvision(name: str, pretrained: bool) -> Factory:
    """Return a torchvision model without its last linear layer.

    Of ResNets there are variants: resnet18-s has the 3x3 stem for small pictures, resnet18-s2 pads
    it by two as solo-learn does; resnet50-w2 is twice as wide, as VISSL's are.
    """
    import torchvision

    if pretrained:
        known = torchvision.models.get_model_weights(name).DEFAULT
        network = torchvision.models.get_model(name, weights=known)
        cfg = known.transforms()
        made = Factory(network, tuple(cfg.mean), tuple(cfg.std), cfg.crop_size[0])
        made.notes.append(f"size, mean and standard deviation: torchvision's transforms of {name}")
    else:
        made = Factory(resnet(name) if "resnet" in name else torchvision.models.get_model(name))
        made.assumed.append(IMAGENET)
        made.size = 0 if "-s" in name else 224
    _cut(made, last_only=False)
    return made


def resnet(name: str) -> nn.Module:
    """Return a torchvision ResNet, also of VISSL's depths and widths: "resnet200-w2"."""
    from torchvision.models import get_model
    from torchvision.models.resnet import Bottleneck, ResNet

    name, _, variant = name.partition("-")
    network = ResNet(Bottleneck, [3, 24, 36, 3]) if name == "resnet200" else get_model(name)
    if variant.startswith("s"):
        encoders.small_stem(network, padding=int(variant[1:] or 1))
    elif variant.startswith("w"):
        width = 64 * int(variant[1:])
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
        network.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        network.bn1 = nn.BatchNorm2d(width)
        network.inplanes = width
        for i, stage in enumerate(stages):
            stride = 1 if i == 0 else 2
            # torchvision has no other way to build a stage
            make = network._make_layer  # noqa: SLF001
            setattr(network, f"layer{i + 1}", make(type(stage[0]), width << i, len(stage), stride))
    elif variant:
        raise ValueError(f"the variant -{variant} is none of -s, -s2, -w2, -w4")
    return network


def _cut(made: Factory, last_only: bool) -> None:
    """Replace the last linear layer by nothing: the features are what goes into it.

    With `last_only`, if it is the network's own attribute fc, head or classifier.
    """
    linear = [name for name, module in made.network.named_modules() if type(module) is nn.Linear]
    if not linear or last_only and linear[-1] not in ("fc", "head", "classifier"):
        return
    parent, _, last = linear[-1].rpartition(".")
    setattr(made.network.get_submodule(parent), last, nn.Identity())
    made.classifier = (linear[-1],)
    made.notes.append(f"its last linear layer {linear[-1]} is cut off")


def _hub(name: str, pretrained: bool) -> Factory:
    """Return what a hubconf.py returns: owner/repository[:branch]:NAME, or a local folder:NAME."""
    repository, _, entry = name.rpartition(":")
    source = "local" if Path(repository).is_dir() else "github"
    how = {"source": source, "trust_repo": True}  # the user typed it
    try:
        network = torch.hub.load(repository, entry, pretrained=pretrained, **how)
    except TypeError as error:
        if "pretrained" not in str(error):
            raise
        network = torch.hub.load(repository, entry, **how)
    made = Factory(network)
    made.notes.append(f"the code of {repository} was run")
    made.assumed.append(IMAGENET)
    _cut(made, last_only=True)
    return made


def _hf(name: str, pretrained: bool) -> Factory:
    """Return transformers' AutoModel of a name or folder: its class token, else its mean token."""
    import transformers

    if pretrained:
        network, info = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
        missing = [key for key in info["missing_keys"] if not key.startswith("pooler")]
        if missing:
            raise ValueError(f"its file lacks {', '.join(sorted(missing)[:5])}")
    else:
        config = transformers.AutoConfig.from_pretrained(name)
        network = transformers.AutoModel.from_config(config)
    pictures = getattr(network, "vision_model", network)  # of CLIP and its like
    made = Factory(pictures)
    made.notes.append(f"the code of transformers for {name} was run")
    if pictures is not network:
        made.notes.append("its part for pictures alone")
        network = pictures

    pooler = getattr(network, "pooler", None)
    if pooler is not None and list(pooler.parameters()):
        network.pooler = None  # for classification, untrained in self-supervised models
        made.classifier = ("pooler",)
    if getattr(network.config, "mask_ratio", None):
        network.config.mask_ratio = 0.0
        made.notes.append("no patch is masked")
    made.size = int(getattr(network.config, "image_size", 0) or 0)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        made.assumed.append(IMAGENET)
    else:
        made.mean, made.std = tuple(processor.image_mean), tuple(processor.image_std)
        size = getattr(processor, "crop_size", None) or processor.size
        made.size = size.get("height") or size.get("shortest_edge") or made.size
        made.notes.append("size, mean and standard deviation: its image processor's")
    return made


def _function(module: str, name: str) -> Factory:
    """Return what a function of the user's returns: a module, or (module, preprocessing).

    A preprocessing takes pictures in 0..1, (n, 3, s, s). A module may have an attribute size (px).
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = pkgutil.resolve_name(f"{module}:{name}")()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"ENCODER={module}:{name} was not found ({error}): expected {FORMS}. Modules are "
            "looked for in the current folder and in PYTHONPATH."
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    network, preprocess = made if isinstance(made, tuple) else (made, None)

    made = Factory(network, size=getattr(network, "size", 0), preprocess=preprocess)
    made.notes.append(f"the code of {module}:{name} was run")
    if preprocess is None:
        made.assumed.append(IMAGENET)
    return made


# -- weights --------------------------------------------------------------------------------------


def _load(
    made: Factory,
    width: int,
    spec: str,
    file: Path,
    prefix: str,
    unused: str,
    limit_gib: float,
) -> weights.Head | None:
    """Fill the network from a file and return the head; StoreError with the next command."""
    flat = checkpoint_files.read(file, limit_gib)
    try:
        found = weights.find(flat, made.network, prefix, made.convert)
        head = weights.projector(found, width)
        for path in head.paths if head else ():
            del found.rest[path]
        _check_rest(made, found, unused)
        _check_twin(made.network, spec, flat)
        weights.copy_into(made.network, found.tensors)
    except weights.Misfit as error:
        advice = error.advice or _advice(spec, flat)
        raise StoreError(
            f"{file} does not fit {spec}: {error}. Next: {advice} WEIGHTS={shlex.quote(str(file))}"
        ) from error
    except StoreError as error:
        raise StoreError(f"{file}: {error}") from error

    made.notes += _described(found, head)
    made.assumed += _assumed(made.network, spec, head)
    return head


def _described(found: weights.Found, head: weights.Head | None) -> list[str]:
    """Return what was read and what was left out, as notes."""
    kind = "averaged copy, " if found.averaged else ""
    notes = [f"weights: {kind}under {found.prefix or 'no prefix'}"]
    if found.copies:
        notes.append(f"further copies, chosen by reading.prefix: {', '.join(found.copies)}")
    if head:
        widths = "-".join(str(block[0].out_features) for block in head.blocks)
        notes.append(f"projector: {widths}, under {head.prefix}")
    else:
        notes.append("projector: none")
    groups = dict.fromkeys(re.split(r"\.\d", path)[0] for path in found.rest)
    if groups:
        more = f" and {len(groups) - 12} more" if len(groups) > 12 else ""
        notes.append(f"not used by a forward pass: {', '.join([*groups][:12])}{more}")
    return notes


def _assumed(network: nn.Module, spec: str, head: weights.Head | None) -> list[str]:
    """Return what has no tensor, so that a file fits networks that differ in it."""
    modules = list(network.modules())
    facts = []
    stem = next((module for module in modules if isinstance(module, nn.Conv2d)), None)
    if stem is not None:
        facts.append(
            f"first convolution {stem.kernel_size[0]}x{stem.kernel_size[1]}, stride "
            f"{stem.stride[0]}, padding {stem.padding[0] if stem.padding else 0}"
        )
    blurred = any("blur" in type(module).__name__.lower() for module in modules)
    facts.append("anti-aliasing" if blurred else "no anti-aliasing")
    if _attention_heads(network):
        facts.append(f"{_attention_heads(network)} attention heads")
    if isinstance(getattr(network, "global_pool", None), str):
        facts.append(f"pooling: {network.global_pool}")
    assumed = [f"what has no weights is as in {spec}: {', '.join(facts)}"]
    if head and len(head.blocks) > 1:
        activation = type(head.blocks[0][-1]).__name__
        assumed.append(f"{activation} between the projector's layers, none after the last")
    return assumed


def _check_rest(made: Factory, found: weights.Found, unused: str) -> None:
    left = weights.unexplained(found, made.network, made.classifier, unused)
    if left:
        shown = f"it also holds {', '.join(left[:5])}, which that network lacks"
        first = left[0].partition(".")[0]
        raise weights.Misfit(
            [f'{shown} (if no forward pass uses it: P="reading.unused={first}")'],
        )


def _check_twin(network: nn.Module, spec: str, flat: dict[str, Tensor]) -> None:
    """Raise Misfit where the names in a file show another network with the same tensors."""
    names = " ".join(flat)
    moco = "base_encoder." in names and "momentum_encoder." in names
    if moco and getattr(network, "embed_dim", 0) == 384 and _attention_heads(network) == 6:
        option = "," if spec.count(":") > 1 else ":"
        command = f"ENCODER={spec}{option}num_heads=12"
        raise weights.Misfit(["MoCo v3's ViT-S has 12 attention heads"], command)

    solo = all(name in names for name in ("backbone.conv1.", "classifier.", "projector."))
    stem = getattr(network, "conv1", None)
    if (
        solo
        and isinstance(stem, nn.Conv2d)
        and (stem.kernel_size, stem.padding) == ((3, 3), (1, 1))
    ):
        raise weights.Misfit(["solo-learn pads its 3x3 stem by two"], f"ENCODER={spec}2")


def _attention_heads(network: nn.Module) -> int:
    return next((m.num_heads for m in network.modules() if hasattr(m, "num_heads")), 0)


def _advice(spec: str, flat: dict[str, Tensor]) -> str:
    """Return the next command for a file that does not fit `spec`: one that works, if one does."""
    named = FORMS.rpartition(", or")[0]
    if any("embeddings.patch_embeddings" in path for path in flat):
        named = "hf:FOLDER (its names are those of transformers; the folder holds config.json)"
    fitting = (candidate for candidate in COMMON if candidate != spec and _fits(candidate, flat))
    return f"ENCODER={next(fitting, named)}"


@functools.cache
def _outline(spec: str) -> Factory:
    """Return a named network without its weights: no memory, and little time."""
    with torch.device("meta"):
        return _make(spec, pretrained=False)


def _fits(spec: str, flat: dict[str, Tensor]) -> bool:
    """Return whether a file has all tensors of a named network, and none that it lacks."""
    try:
        made = _outline(spec)
        found = weights.find(flat, made.network, "", made.convert)
    except ValueError:
        return False
    return not weights.unexplained(found, made.network, made.classifier, "")


def _unnamed(file: str, limit_gib: float) -> str:
    """Return the advice for a file that is given as the encoder."""
    advice = f"{_advice('', checkpoint_files.read(file, limit_gib))} WEIGHTS={shlex.quote(file)}"
    return f"{file} holds weights, and not the network that they are of. Next: {advice}"


def _width(trunk: nn.Module, size: int, spec: str) -> int:
    """Return the width d of the features; ValueError unless two passes of a picture of `size` px
    give one (1, d).
    """
    picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            one, two = trunk(picture), trunk(picture)
    except Exception as error:  # it is somebody else's code
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"ENCODER={spec} fails on a picture of {size} px ({reason}). Pass the size that it was "
            "made for, as reading.size, or a function that returns a module with features (n, d): "
            "ENCODER=package.module:function."
        ) from error
    if one.ndim != 2 or len(one) != 1:
        raise ValueError(f"{spec} returns {tuple(one.shape)} for one picture: expected (1, d).")
    if not torch.allclose(one, two, rtol=1e-3, atol=1e-3 * one.abs().max().item()):
        raise ValueError(f"{spec} gives two answers for one picture: something in it is random.")
    return one.shape[1]


def _numbers(values: tuple) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


# -- files of this package ------------------------------------------------------------------------


def _ours(path: Path, limit_gib: float) -> External:
    """Return an encoder that this package trained, or that VISSL trained for it."""
    meta = store.verify(path)
    build = _build(path, meta)
    known = {"name": "/".join(path.parts[-2:]), "size": build["size"], "sha256": meta["sha256"]}
    if path.suffix == ".safetensors":
        checkpoint_files.read(path, limit_gib)

        def attempt() -> None:  # the sidecar could ask for any size
            _own(path)

        limited.run(attempt, path, limit_gib)
        own = _own(path)
        note = (f"network: {build['encoder']}, projector {build['projector'] or 'none'}, ours",)
        found = External(own.trunk, own.projector, notes=note, **known)
        found.classifier = own.classifier
        return found.eval()

    if not re.fullmatch(r"resnet(50|101|152|200)(-w[24])?", build["encoder"]):
        raise StoreError(
            f"{store.sidecar(path)} names {build['encoder']!r}: expected a ResNet of VISSL's, such "
            "as resnet50 or resnet50-w2."
        )
    with torch.random.fork_rng(devices=[]):
        made = Factory(resnet(build["encoder"]), classifier=("fc",))
        made.network.fc = nn.Identity()
    made.network.eval()
    width = made.network.layer4[-1].bn3.num_features
    spec = "VISSL's " + build["encoder"]
    head = _load(made, width, spec, path, "classy_state_dict", "", limit_gib)
    blocks = head.blocks if head else None
    return External(made.network, blocks, notes=tuple(made.notes), **known).eval()


def _own(path: Path) -> Encoder:
    """Return the encoder of a file of this package; StoreError if its sidecar describes none."""
    try:
        return own_format.load(path)
    except Exception as error:  # whatever its numbers make torch stumble over
        if isinstance(error, StoreError) or limited.out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        raise StoreError(
            f"{store.sidecar(path)} describes no encoder ({reason}). Take the sidecar that was "
            "written with the file."
        ) from error


def _build(path: Path, meta: dict) -> dict:
    """Return the part of a sidecar that says how to build the network; StoreError if it cannot."""
    build = meta.get("parameters")
    wanted = {"encoder": str, "projector": str, "size": int}
    for name, kind in wanted.items():
        value = build.get(name) if isinstance(build, dict) else None
        if not isinstance(value, kind):
            raise StoreError(
                f"{store.sidecar(path)} says {name}={value!r} under parameters: expected "
                f"{'a text' if kind is str else 'a number of pixels'}. Take the sidecar that was "
                "written with the file."
            )
    return build
