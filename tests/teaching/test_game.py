"""The game and the views, driven without a browser: what is shown is what the models and the reader
said.
"""

import base64
import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dejavu_utils import plots
from dejavu_utils.attack import references
from dejavu_utils.teaching import game, widgets

CLASSES = ("anchor", "star", "sun")


def row(name, target, reference, shade=100):
    pixels = torch.full((3, 8, 8), shade, dtype=torch.uint8)
    near = [(pixels, name)] * 4
    return {
        "crop": pixels,
        "image": pixels,
        "name": name,
        "target": near,
        "reference": near,
        "said": {"target": target, "reference": reference},
    }


@pytest.fixture
def new():
    rounds = [
        ("sun", "sun", "star", 10),
        ("star", "sun", "star", 20),
        ("anchor", "anchor", "star", 30),
    ]
    return game.Game([row(*each) for each in rounds], CLASSES)


def test_the_score_counts_right_guesses_of_the_rounds_played(new):
    assert new.auto() == {"target": 2, "reference": 1}
    assert new.score() == {"you": 0, "target": 0, "reference": 0}
    assert new.guess("star")["name"] == "sun"
    assert new.score() == {"you": 0, "target": 1, "reference": 0}
    new.guess("star")
    assert new.score() == {"you": 1, "target": 1, "reference": 1}
    new.guess("anchor")
    assert new.score() == {"you": 2, "target": 2, "reference": 1} and new.row is None


def test_a_wrong_move_is_one_clear_error_and_changes_nothing(new):
    with pytest.raises(ValueError, match=r"no class 'moon'; guess one of anchor, star, sun\."):
        new.guess("moon")
    assert new.guesses == []
    for _ in range(3):
        new.guess("sun")
    with pytest.raises(ValueError, match="all 3 rounds are played"):
        new.guess("sun")
    assert len(new.guesses) == 3
    with pytest.raises(ValueError, match="no round to play"):
        widgets.play(game.Game([], CLASSES))


class Parts:
    """As much of a pair as the game asks for."""

    def __init__(self, classes):
        self.parts = {"public": type("Public", (), {"classes": classes})}


def inference(ids, said):
    rows = [
        {
            "id": name,
            "role": role,
            "layer": layer,
            "epoch": 7,
            "prediction": guess if layer == "projector" else 0,
        }
        for name, pair in zip(ids, said, strict=True)
        for role, guess in zip(game.PLAYERS[1:], pair, strict=True)
        for layer in ("projector", "backbone")
    ]
    return pd.DataFrame(rows)


def test_a_game_takes_the_models_guesses_from_the_attack(monkeypatch):
    asked = []

    def neighbours(pair, epoch, ids):
        asked.append((epoch, ids))
        return [{"name": "sun", "id": name} for name in ids]

    monkeypatch.setattr(references, "neighbours", neighbours)
    table = inference(["b", "a"], [(2, 1), (0, 2)])
    new = game.start(Parts(CLASSES), table, ["a", "b"])
    assert asked == [(7, ["a", "b"])]
    assert [one["said"] for one in new.rounds] == [
        {"target": "anchor", "reference": "sun"},
        {"target": "sun", "reference": "star"},
    ]
    assert new.auto() == {"target": 1, "reference": 1} and new.classes == CLASSES
    many = tuple(f"class {i}" for i in range(21)) + ("sun",)
    assert game.start(Parts(many), table, ["a"]).classes == ("sun",)
    assert game.start(Parts(CLASSES), table, []).rounds == []


def test_history_is_a_row_per_epoch_of_each_image(monkeypatch):
    def neighbours(pair, epoch, ids, k=4):
        return [{"at": (epoch, name, k)} for name in ids]

    monkeypatch.setattr(references, "neighbours", neighbours)
    found = game.history(None, [0, 5], ["a", "b"])
    assert found["b"] == [
        {"at": (0, "b", 4), "title": "epoch 0"},
        {"at": (5, "b", 4), "title": "epoch 5"},
    ]
    assert game.history(None, [0], []) == {}


def pixel(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[5, 5].tolist()


def test_the_widget_plays_a_game(new):
    view = widgets.play(new)
    text, box, picture = view.widget.children
    *names, more = box.children
    assert [button.description for button in names] == list(CLASSES)
    assert "Round 1 of 3" in text.value and "sun" not in text.value  # the answer is not given away
    assert pixel(picture.value) == [10, 10, 10] and more.disabled
    names[1].click()  # star: wrong
    assert text.value == (
        "It was <b>sun</b>. you: star ✗; target: sun ✓; reference: star ✗."
        "<br>Right so far, of 1: you 0, target 1, reference 0."
    )
    assert all(button.disabled for button in names) and not more.disabled
    more.click()
    assert "Round 2 of 3" in text.value and pixel(picture.value) == [20, 20, 20]
    assert not any(button.disabled for button in names)
    names[1].click()
    more.click()
    names[0].click()
    assert "of 3: you 2, target 2, reference 1" in text.value
    assert more.disabled and all(button.disabled for button in names)  # the end


def test_where_nothing_runs_a_picture_stands_beside_the_widget(new):
    bundle = widgets.play(new)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).format == "PNG"
    assert new.guesses == []


def test_a_menu_draws_a_figure_when_it_is_chosen_and_once():
    drawn = []

    def figure(name):
        drawn.append(name)
        return plots.gallery([row("sun", "sun", "sun") | {"title": name}])

    view = widgets.pick(
        {name: lambda name=name: figure(name) for name in ("a", "a much longer name")}
    )
    menu, picture = view.widget.children
    first = picture.value
    assert drawn == ["a"] and view.still == first
    menu.value = "a much longer name"
    assert drawn == ["a", "a much longer name"] and picture.value != first
    menu.value = "a"
    assert len(drawn) == 2 and picture.value == first
