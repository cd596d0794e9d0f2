"""Views to play with in JupyterLab (ipywidgets); where nothing runs, a still picture stands in
their place.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dejavu_utils import plots
from dejavu_utils.teaching.game import Game

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure


def _image(png: bytes = b"") -> ipywidgets.Image:
    """Return an image that keeps its own size in a column, and shrinks where that is too wide."""
    import ipywidgets

    return ipywidgets.Image(
        value=png, layout=ipywidgets.Layout(align_self="flex-start", max_width="100%")
    )


class View:
    """A widget and the picture that papermill, an HTML page or a printer shows instead."""

    def __init__(self, widget: ipywidgets.Widget, still: bytes) -> None:
        self.widget, self.still = widget, still

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return (self.widget._repr_mimebundle_(**options) or {}) | {
            "image/png": base64.b64encode(self.still).decode()
        }


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=100, bbox_inches="tight")
    return file.getvalue()


def pick(figures: Mapping[str, Callable], label: str = "image") -> View:
    """Return a menu of figures, each drawn when it is first chosen; the still picture is the first
    one.
    """
    import ipywidgets

    names = list(figures)
    still = _png(figures[names[0]]())
    drawn = {names[0]: still}
    menu = ipywidgets.Dropdown(options=names, description=label)
    picture = _image(still)

    def show(change: dict[str, Any]) -> None:
        name = change["new"]
        if name not in drawn:
            picture.layout.visibility = "hidden"  # no old picture under a new name
            drawn[name] = _png(figures[name]())
        picture.value = drawn[name]
        picture.layout.visibility = "visible"

    menu.observe(show, "value")
    return View(ipywidgets.VBox([menu, picture]), still)


def _told(game: Game, row: dict | None) -> str:
    """Return what stands beside the picture: the question, or the answer and the running score."""
    played, total = len(game.guesses), len(game.rounds)
    if row is None:
        return f"Round {played + 1} of {total}. This is background only. What stood in front of it?"
    said = {"you": game.guesses[-1]} | row["said"]
    answers = "; ".join(
        f"{who}: {name} {'✓' if name == row['name'] else '✗'}" for who, name in said.items()
    )
    score = ", ".join(f"{who} {count}" for who, count in game.score().items())
    return f"It was <b>{row['name']}</b>. {answers}.<br>Right so far, of {played}: {score}."


def play(game: Game) -> View:
    """Return the game: a crop, a button for each class, then both models' neighbours and the
    running score.

    The still picture is the first round, answered by the models alone. ValueError if there is no
    round.
    """
    import ipywidgets

    if not game.rounds:
        raise ValueError("widgets.play: there is no round to play; pass ids to game.start.")
    picture = _image()
    text = ipywidgets.HTML(layout=ipywidgets.Layout(min_height="4em"))  # two lines, or one
    names = [ipywidgets.Button(description=name) for name in game.classes]
    more = ipywidgets.Button(description="next crop", button_style="primary")

    def show(row: dict | None = None) -> None:
        picture.value = _png(plots.gallery([row])) if row else plots.png(game.row["crop"], 240)
        text.value = _told(game, row)
        more.disabled = row is None or game.row is None
        for button in names:
            button.disabled = row is not None

    for button in names:
        button.on_click(lambda pressed: show(game.guess(pressed.description)))
    more.on_click(lambda pressed: show())
    show()
    first = game.rounds[0]
    said = first["said"]
    right = game.auto()
    figure = plots.gallery([first])
    figure.suptitle(
        f"The target says {said['target']}, the reference {said['reference']}.\nOf "
        f"{len(game.rounds)} rounds the target gets {right['target']} right, the reference "
        f"{right['reference']}.",
        fontsize="medium",
    )
    choices = ipywidgets.HBox([*names, more], layout=ipywidgets.Layout(flex_flow="row wrap"))
    return View(ipywidgets.VBox([text, choices, picture]), _png(figure))
