"""Other people's checkpoints: which layout a file has, by its key names, and which of its tensors
are trunk and head.

Each layout is one function from a file's content to `Parts`: the trunk's tensors under
torchvision's or timm's names, the projection head's numbered as in one nn.Sequential, and the names
of all else. The key names are those of each project's published code. Nothing is guessed in
silence: what is assumed stands in `notes`, and where two readings would give different features,
StoreError names the option that decides.
"""

import re
from dataclasses import dataclass, field

from torch import Tensor

from dejavu_utils.store import StoreError

CHILDREN = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}  # of a ResNet


@dataclass
class Parts:
    """What a layout's function found in a file."""

    which: str  # whose weights: "student", also where there is one network, or "teacher"
    trunk: dict[str, Tensor]
    head: dict[str, Tensor]  # "0.weight", "1.running_mean", …: positions in one nn.Sequential
    ignored: list[str]
    there: list[str] = field(
        default_factory=lambda: ["student"]
    )  # the networks that the file holds
    activation: str = "relu"  # between the head's layers, as that project's code has it
    ends_active: bool = False  # whether an activation follows the head's last layer
    padding: int | None = 1  # of a 3x3 stem; None: the file does not tell which project wrote it
    layout: str = ""
    scores: dict[str, Tensor] = field(
        default_factory=dict
    )  # of a classifier on the head, as Encoder.add_classifier's


@dataclass
class File:
    """A file's content: the tree as stored, the one flat state dict in it, and the names beside
    that.
    """

    tree: dict
    tensors: dict[str, Tensor]
    beside: list[str]
    wrapper: str = ""  # the key that held the state dict
    encoder: str | None = None  # the trunk that the caller named

    def has(self, *prefixes: str) -> bool:
        """Return whether a name starts with one of `prefixes`, which are regular expressions."""
        return any(re.match("|".join(prefixes), name) for name in self.tensors)


def under(tensors: dict, prefix: str) -> dict:
    """Return the entries whose names start with `prefix`, without it."""
    return {
        name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)
    }


def clean(state: dict) -> dict[str, Tensor]:
    """Return the tensors of a state dict without the wrappers' marks: torch.compile's and
    DataParallel's.
    """
    tensors = {
        str(name).replace("_orig_mod.", ""): v for name, v in state.items() if isinstance(v, Tensor)
    }
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = under(tensors, "module.")
    return tensors


def unwrap(tree: dict, encoder: str | None = None) -> File:
    """Return the content of a file, with the state dict that lies under one of the usual keys, or
    is the whole file.
    """
    tree = {str(name): value for name, value in tree.items()}
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(tree.get(wrapper), dict):
            return File(
                tree,
                clean(tree[wrapper]),
                [name for name in tree if name != wrapper],
                wrapper,
                encoder,
            )
    return File(
        tree,
        clean(tree),
        [n for n, value in tree.items() if not isinstance(value, Tensor)],
        "",
        encoder,
    )


def _choose(which: str | None, there: list[str], default: str = "student") -> str:
    chosen = which or (default if default in there else there[0])
    if chosen not in there:
        raise StoreError(
            f'which="{chosen}" is not in the file: it holds the {" and the ".join(there)}'
        )
    return chosen


def _parts(
    file: File,
    which: str,
    trunk: str,
    *heads: str,
    **more: str | bool | int | list[str] | dict[str, Tensor] | None,
) -> Parts:
    """Return the tensors below the prefix `trunk` and below the first of `heads` that is there; the
    rest is ignored.
    """
    head = next((prefix for prefix in heads if file.has(re.escape(prefix))), None)
    used = (trunk, head) if head else (trunk,)
    ignored = file.beside + [name for name in file.tensors if not name.startswith(used)]
    return Parts(
        which,
        under(file.tensors, trunk),
        under(file.tensors, head) if head else {},
        ignored,
        **more,
    )


def bare(file: File, which: str | None) -> Parts:
    """Return the parts of a network without a head, less its classifier.

    A ResNet, torchvision's or timm's (torch.hub's VICReg and Barlow Twins have the same names), a
    ViT, torch.hub's DINO included, or the timm model that `encoder` names.
    """
    names = "head" if file.has(_NAMES["timm"]) else "fc"
    if file.encoder:
        from timm.models import get_pretrained_cfg

        names = (
            getattr(get_pretrained_cfg(file.encoder.partition(":")[0]), "classifier", None) or names
        )
    classifier = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    parts = _parts(file, _choose(which, ["student"]), "")
    parts.ignored += [name for name in parts.trunk if name.startswith(classifier)]
    parts.trunk = {
        name: value for name, value in parts.trunk.items() if not name.startswith(classifier)
    }
    return parts


def dino(file: File, which: str | None) -> Parts:
    """Return the parts of DINO's training checkpoint; the teacher, as its authors evaluate, and no
    prototypes.
    """
    there = [who for who in ("student", "teacher") if isinstance(file.tree.get(who), dict)]
    chosen = _choose(which, there, "teacher")
    one = File(file.tree, clean(file.tree[chosen]), [name for name in file.tree if name != chosen])
    parts = _parts(one, chosen, "backbone.", "head.mlp.", there=there, activation="gelu")
    parts.head = {name if "." in name else f"0.{name}": value for name, value in parts.head.items()}
    return parts


def dejavu(file: File, which: str | None) -> Parts:
    """Return the parts of the paper's reference code: `net`, and `projector`, a Sequential of
    blocks (paper §2.2).

    Its supervised baseline has a classifier on the projector, whose scores are attacked too:
    BatchNorm, ReLU, Linear.
    """
    parts = _parts(file, _choose(which, ["student"]), "net.", "projector.")
    nested = {}
    for (
        name,
        value,
    ) in (
        parts.head.items()
    ):  # "1.0.weight" is the second block's Linear, "2.weight" a bare last Linear
        match = re.fullmatch(r"(\d+)\.(?:(\d)\.)?(\w+)", name)
        block, inner, kind = match.groups() if match else (None, None, name)
        nested[f"{3 * int(block) + int(inner or 0)}.{kind}" if match else name] = value
    blocks = [name.split(".") for name in parts.head]
    last = max((int(name[0]) for name in blocks if name[0].isdigit()), default=0)
    parts.ends_active = any(
        name[0] == str(last) and len(name) == 3 for name in blocks
    )  # a Sequential: with a ReLU
    parts.head = nested
    if file.has(r"fc\.2\.weight"):
        parts.scores = under(file.tensors, "fc.")
        parts.ignored = [name for name in parts.ignored if not name.startswith("fc.")]
    return parts


def lightly(file: File, which: str | None) -> Parts:
    """Return the parts of a lightly model: a ResNet, or its children in a Sequential, and a
    ProjectionHead.
    """
    names = {
        "student_backbone.": ("student", "student_head."),
        "teacher_backbone.": ("teacher", "teacher_head."),
        "backbone.": ("student", "projection_head."),
        "backbone_momentum.": ("teacher", "projection_head_momentum."),
    }
    there = {
        who: (trunk, head) for trunk, (who, head) in names.items() if file.has(re.escape(trunk))
    }
    chosen = _choose(which, list(there))
    trunk, head = there[chosen]
    dino_head = file.has(
        f"{head}last_layer.weight_g"
    )  # its prototypes, with weight norm: that head has GELUs
    parts = _parts(
        file,
        chosen,
        trunk,
        f"{head}layers.",
        there=list(there),
        activation="gelu" if dino_head else "relu",
    )
    if any(re.match(r"\d+\..*shortcut\.", name) for name in parts.trunk):
        raise StoreError(
            "the backbone is lightly's own ResNetGenerator in a Sequential, which loses its first "
            "ReLU: "
            "not supported; expected the children of a torchvision ResNet"
        )
    split = {name: name.partition(".") for name in parts.trunk}
    parts.trunk = {
        CHILDREN.get(split[name][0], split[name][0]) + "." + split[name][2]: value
        for name, value in parts.trunk.items()
    }
    return parts


def solo_learn(file: File, which: str | None) -> Parts:
    """Return the parts of a solo-learn checkpoint: its CIFAR stem pads by 2, old versions say
    encoder for backbone.
    """
    names = {
        "backbone.": "student",
        "encoder.": "student",
        "momentum_backbone.": "teacher",
        "momentum_encoder.": "teacher",
    }
    there = {who: prefix for prefix, who in names.items() if file.has(re.escape(prefix))}
    chosen = _choose(which, list(there))
    mark = "momentum_" if chosen == "teacher" else ""
    return _parts(
        file,
        chosen,
        there[chosen],
        f"{mark}projector.",
        f"{mark}head.mlp.",
        there=list(there),
        padding=2,
        activation="gelu" if file.has(r"head\.mlp\.") else "relu",
    )


def backbone(file: File, which: str | None) -> Parts:
    """Return the parts of {backbone.*, projector.*}: VICReg, Barlow Twins, stable-pretraining.

    stable-pretraining's wrapper holds both networks, and evaluates the teacher.
    """
    wrapped = [who for who in ("student", "teacher") if file.has(rf"backbone\.{who}\.")]
    there = wrapped or ["student"]
    chosen = _choose(which, there, "teacher")
    inner = f"{chosen}." if wrapped else ""
    return _parts(
        file, chosen, f"backbone.{inner}", f"projector.{chosen}.", "projector.", there=there
    )


def vissl(file: File, which: str | None) -> Parts:
    """Return the parts of a VISSL checkpoint; the student is its base_model, a teacher lies in the
    loss's state.
    """
    if (kind := file.tree.get("type", "consolidated")) != "consolidated":
        raise StoreError(
            f'it is a VISSL checkpoint of type "{kind}", which names other files: consolidate it '
            "first"
        )
    networks, beside = _vissl_networks(file)
    chosen = _choose(which, list(networks))
    trunk, heads = networks[chosen]
    trunk = {
        name.removeprefix("base_model.").removeprefix("_feature_blocks."): value
        for name, value in trunk.items()
    }
    head, unused = _vissl_head(heads)
    dino_head = any(re.match(r"\d+\.prototypes\d+\.weight_g", name) for name in heads)
    return Parts(
        chosen,
        trunk,
        head,
        beside + [f"heads.{name}" for name in unused],
        list(networks),
        activation="gelu" if dino_head else "relu",
    )


def _vissl_networks(file: File) -> tuple[dict[str, tuple[dict, dict]], list[str]]:
    """Return {"student", "teacher"} -> (trunk, heads), as far as they are there, and the names of
    all else.
    """
    classy, loss = file.tree.get("classy_state_dict"), file.tree.get("loss")
    if classy is None:
        return {"student": (file.tensors, {})}, file.beside
    try:
        model = classy["base_model"]["model"]
        networks = {"student": (clean(model["trunk"]), clean(model.get("heads") or {}))}
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            "it has a classy_state_dict, but no base_model > model > trunk in it"
        ) from error
    for name in ("momentum_teacher.", "moco_encoder."):
        if isinstance(loss, dict) and (trunk := under(loss, f"{name}trunk.")):
            networks["teacher"] = clean(trunk), clean(under(loss, f"{name}heads."))
    return networks, [name for name in file.tree if name != "classy_state_dict"] + [
        f"classy_state_dict.{name}" for name in classy if name != "base_model"
    ]


def _vissl_head(heads: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return VISSL's chain of heads numbered as one Sequential, and the names that are no part of
    it.

    A head is {i}.clf.{j}.* or {i}.projection_head.{j}.*. In VISSL's own SimCLR, MoCo and Barlow
    Twins recipes each head but the last ends with a ReLU, which has no name: one position is left
    free for it. Prototypes and probes stay out.
    """
    parsed = {
        name: re.fullmatch(r"(\d+)\.(?:clf|projection_head)\.(\d+)\.(\w+)", name) for name in heads
    }
    used = sorted(
        (int(match[1]), int(match[2]), match[3], name) for name, match in parsed.items() if match
    )
    chain, start, end = {}, 0, -1
    for i, (head, position, kind, name) in enumerate(used):
        if i and head != used[i - 1][0]:
            start = end + 2
        end = start + position
        chain[f"{end}.{kind}"] = heads[name]
    return chain, [name for name, match in parsed.items() if not match]


LAYOUTS = {
    "torchvision": bare,
    "timm": bare,
    "dino": dino,
    "vicreg": backbone,
    "vissl": vissl,
    "lightly": lightly,
    "solo-learn": solo_learn,
    "stable-pretraining": backbone,
    "dejavu": dejavu,
}
_NAMES = {
    "torchvision": r"layer1\.0\.",
    "timm": r"patch_embed\.",
    "vissl": r"(base_model\.)?_feature_blocks\.",
    "dejavu": r"net\.",
    "vicreg": r"backbone\.",
    "stable-pretraining": r"backbone\.",
    "solo-learn": r"(backbone|encoder)\.",
    "lightly": r"(student_)?backbone\.",
}
_LIGHTNING = (
    r"backbone\.student\.",
    r"callbacks_",
)  # what only stable-pretraining's files have beside a backbone


def _shows(file: File, layout: str) -> bool:
    """Return whether a file's names can be those of `layout`."""
    if layout == "dino":
        return any(isinstance(file.tree.get(who), dict) for who in ("student", "teacher"))
    return (
        layout == "vissl"
        and "classy_state_dict" in file.tree
        or layout == "timm"
        and file.encoder is not None
        or file.has(_NAMES[layout])
    )


def _guess(file: File) -> str | None:
    """Return the layout that a file's names show, the most telling names first; None if they show
    none.
    """
    lightly_own = (
        r"(student_)?backbone\.\d+\.",
        r"projection_head\.layers\.",
        r"student_head\.layers\.",
    )
    telling = {
        "vissl": True,
        "dino": True,
        "lightly": file.has(*lightly_own),
        "solo-learn": file.has(r"classifier\."),
        "stable-pretraining": file.wrapper == "state_dict" or file.has(*_LIGHTNING),
        "vicreg": True,
        "dejavu": True,
        "torchvision": True,
        "timm": file.has(_NAMES["timm"]),
    }
    return next(
        (layout for layout, enough in telling.items() if enough and _shows(file, layout)), None
    )


def recognise(
    tree: dict, layout: str = "auto", which: str | None = None, encoder: str | None = None
) -> Parts:
    """Return the parts of a file's content; StoreError if no layout fits, or the one that is asked
    for does not.
    """
    if layout not in ("auto", *LAYOUTS):
        raise StoreError(
            f'layout "{layout}" is not known: expected "auto", "own" or one of {", ".join(LAYOUTS)}'
        )
    file = unwrap(tree, encoder)
    name = _guess(file) if layout == "auto" else layout
    seen = ", ".join([*file.tensors][:4] or [*file.tree][:4]) or "nothing"
    if name is None:
        raise StoreError(
            f"its names ({seen}, …) are those of no known layout ({', '.join(LAYOUTS)}). "
            'Pass layout="timm" and encoder=… for another timm model'
        )
    if not _shows(file, name):
        raise StoreError(f'layout="{name}" does not fit its names ({seen}, …): pass layout="auto"')
    parts = LAYOUTS[name](file, which)
    parts.layout = name
    if layout == "auto" and LAYOUTS[name] is backbone and not file.has(*_LIGHTNING):
        parts.padding = None
    return parts
