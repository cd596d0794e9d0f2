"""Views to play with in JupyterLab (ipywidgets); where nothing runs, a still picture stands in their place."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping

import numpy as np

from dejavu_utils import plots
from dejavu_utils.game import Game


def _image(png: bytes = b""):
    """Return an image that keeps its own size in a column, and shrinks where that is too wide."""
    import ipywidgets

    return ipywidgets.Image(value=png, layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))


class View:
    """A widget and the picture that papermill, an HTML page or a printer shows instead."""

    def __init__(self, widget, still: bytes):
        self.widget, self.still = widget, still

    def _repr_mimebundle_(self, **options):
        return (self.widget._repr_mimebundle_(**options) or {}) | {"image/png": base64.b64encode(self.still).decode()}


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=100, bbox_inches="tight")
    return file.getvalue()


def _enlarged(pixels, side: int = 240) -> bytes:
    """Return (3, h, w) uint8 pixels as a PNG, `side` px wide, with the pixels left as squares."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.moveaxis(np.asarray(pixels), 0, -1)).resize((side, side), Image.Resampling.NEAREST).save(
        file, "PNG")
    return file.getvalue()


def pick(figures: Mapping[str, Callable], label: str = "image") -> View:
    """Return a menu of figures, each drawn when it is first chosen; the still picture is the first one."""
    import ipywidgets

    drawn = {next(iter(figures)): _png(next(iter(figures.values()))())}
    still = next(iter(drawn.values()))
    menu, picture = ipywidgets.Dropdown(options=list(figures), description=label), _image(still)

    def show(change):
        if change["new"] not in drawn:
            drawn[change["new"]] = _png(figures[change["new"]]())
        picture.value = drawn[change["new"]]
    menu.observe(show, "value")
    return View(ipywidgets.VBox([menu, picture]), still)


def _told(game: Game, row: dict | None) -> str:
    """Return what stands beside the picture: the question, or the answer and the running score."""
    played, total = len(game.guesses), len(game.rounds)
    if row is None:
        return f"Round {played + 1} of {total}. This is background only. What stood in front of it?"
    said = {"you": game.guesses[-1]} | row["said"]
    answers = "; ".join(f"{who}: {name} {'✓' if name == row['name'] else '✗'}" for who, name in said.items())
    score = ", ".join(f"{who} {count}" for who, count in game.score().items())
    return f"It was <b>{row['name']}</b>. {answers}.<br>Right so far, of {played}: {score}."


def play(game: Game) -> View:
    """Return the game: a crop, a button for each class, then both models' neighbours and the running score.

    The still picture is the first round, answered by the models alone. ValueError if there is no round.
    """
    import ipywidgets

    if not game.rounds:
        raise ValueError("widgets.play: there is no round to play; pass ids to game.start.")
    picture, text = _image(), ipywidgets.HTML()
    names = [ipywidgets.Button(description=name) for name in game.classes]
    more = ipywidgets.Button(description="next crop", button_style="primary")

    def show(row=None):
        picture.value = _png(plots.gallery([row])) if row else _enlarged(game.row["crop"])
        text.value, more.disabled = _told(game, row), row is None or game.row is None
        for button in names:
            button.disabled = row is not None
    for button in names:
        button.on_click(lambda pressed: show(game.guess(pressed.description)))
    more.on_click(lambda pressed: show())
    show()
    first, right, total = game.rounds[0], game.auto(), len(game.rounds)
    said = first["said"]
    figure = plots.gallery([first])
    figure.suptitle(f"The target says {said['target']}, the reference {said['reference']}. Of {total} rounds the "
                    f"target gets {right['target']} right, the reference {right['reference']}.", fontsize=9)
    choices = ipywidgets.HBox([*names, more], layout=ipywidgets.Layout(flex_flow="row wrap"))
    return View(ipywidgets.VBox([text, picture, choices]), _png(figure))


def plane(table):
    """Return the privacy-utility plane as an SVG in HTML; a point says its setting and numbers under the mouse.

    Columns: knob, value, score, low, high, held_out, held_low, held_high, and front: whether no other setting is better
    in both. A knob is a colour and a shape; settings on the front are filled.
    """
    figure, [[axis]] = plots._axes(1, width=6.4, height=4.4)
    texts = {}
    looks = zip((plots.TARGET, plots.REFERENCE, plots.BAYES, "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^vPX",
                strict=True)
    for (knob, part), (colour, shape) in zip(table.groupby("knob", sort=False), list(looks) * 2, strict=False):
        for row in part.to_dict("records"):
            x, y, fill = row["held_out"], row["score"], colour if row["front"] else "white"
            axis.errorbar(x, y, [[y - row["low"]], [row["high"] - y]], [[x - row["held_low"]], [row["held_high"] - x]],
                          fmt="none", ecolor=colour, elinewidth=1, alpha=0.5)
            axis.plot(x, y, shape, color=colour, mfc=fill, label=knob, gid=f"setting-{len(texts)}")
            texts[f"setting-{len(texts)}"] = (
                f"{knob} = {row['value']}: déjà vu score {y:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], held-out "
                f"accuracy {x:.3f} [{row['held_low']:.3f}, {row['held_high']:.3f}]{', on the front' * row['front']}")
    axis.axhline(0, color="grey", lw=1, ls=":")
    axis.set(xlabel="usefulness: held-out accuracy of a linear probe", ylabel="memory: déjà vu score")
    once = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(once.values(), once, fontsize=8)
    return _titled(figure, texts, "déjà vu score against held-out accuracy, a point for each setting")


def _titled(figure, texts: dict[str, str], label: str):
    """Return a figure as SVG in HTML; the parts whose gid is in `texts` show that text under the mouse."""
    import re
    from html import escape

    from IPython.display import HTML

    file = io.StringIO()
    figure.savefig(file, format="svg")
    svg = file.getvalue()
    svg = re.sub(r'<g id="([\w-]+)">', lambda found: found[0] + (
        f"<title>{escape(texts[found[1]])}</title>" if found[1] in texts else ""), svg[svg.index("<svg"):])
    return HTML(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))
