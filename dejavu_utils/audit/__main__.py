"""`python -m dejavu_utils.audit`: an audit from a terminal, from anywhere.

Exit status: 0 no evidence, 3 memorizes, 4 undecided, 2 an error in what was passed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """\
an encoder: timm:NAME, torchvision:NAME, hub:REPOSITORY:NAME, hf:NAME_OR_FOLDER,
package.module:function, or a file that this package wrote; without --weights its pretrained ones.
pictures: a folder or zip of class folders, or with a boxes.csv; in a clone also a data set of
data_manifests/.
exit status: 0 no evidence, 3 memorizes, 4 undecided, 2 an error in what was passed."""


def _yes_or_no(text: str) -> bool:
    """Return the truth value of "True" or "False", as Python and the notebook write them."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected True or False")
    return text == "True"


def parser() -> argparse.ArgumentParser:
    """Return the parser; settings have the names that the notebook and error messages use."""
    found = argparse.ArgumentParser(
        prog="python -m dejavu_utils.audit",
        description="Does an encoder remember its training images?",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--encoder", required=True, help="the network, such as torchvision:resnet50")
    found.add_argument("--weights", default="", help="file with its weights")
    found.add_argument("--images", required=True, help="pictures that it was trained on: members")
    found.add_argument("--public", default="", help="pictures of the same classes, no members")
    found.add_argument("--held-out", default="", help="pictures like the members, not trained on")
    found.add_argument("--reference", default="", help="a second model, trained without members")
    found.add_argument("--reference-weights", default="", help="file with its weights")
    found.add_argument("--out", default="", help="the report; default: a name of the encoder, here")
    found.add_argument("--json", action="store_true", help="print the result as JSON")
    found.add_argument("--device", default="", help="cpu or cuda; default: cuda where there is one")

    settings = found.add_argument_group("settings")
    settings.add_argument("--k", type=int, help="public neighbours that vote (20)")
    settings.add_argument("--seed", type=int, help="of folds and samples (0)")
    settings.add_argument("--audit.margin", type=float, help="score that would matter (0.05)")
    settings.add_argument("--audit.limit", type=int, help="pictures at most (3000); 0: all")
    settings.add_argument(
        "--audit.labels",
        type=_yes_or_no,
        help="False: pictures without classes; a weaker audit, without --public",
    )
    settings.add_argument(
        "--audit.limit_gib", type=float, help="GiB that reading a file or a set may take (8)"
    )
    settings.add_argument("--audit.classifier", help="naive_bayes, or network, which is slower")
    settings.add_argument("--crop.kind", help="periphery (outside the boxes), or corner")
    settings.add_argument("--crop.min_side", type=int, help="px of the shorter side; 0: what fits")
    settings.add_argument("--reading.layer", help="the layer to judge, such as backbone")
    settings.add_argument("--reading.size", type=int, help="px of the encoder's input")
    settings.add_argument(
        "--reading.prefix", help="of its tensors, where a file has several copies"
    )
    settings.add_argument("--reading.unused", help="tensors that no forward pass uses (a pattern)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of an audit, after printing what it found."""
    options = vars(parser().parse_args(arguments))
    names = ("encoder", "weights", "images", "public", "held_out")
    asked = {name: options[name] for name in (*names, "reference", "reference_weights")}
    settings, crop = {}, {}
    for name, value in options.items():
        group, _, key = name.rpartition(".")
        if value is None or name in asked:
            continue
        if group == "crop":
            crop[key] = value
        elif group or name in ("k", "seed"):
            settings[key] = value

    from dejavu_utils.audit import command  # takes seconds: only now

    out = Path(options["out"]) if options["out"] else None
    settings |= {"crop": crop}
    return command.conduct(asked, settings, out, Path(), options["json"], options["device"])


if __name__ == "__main__":
    sys.exit(main())
