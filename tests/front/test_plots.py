"""Figures: each draws what its table holds, with its interval, and says what is on its axes."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dejavu_utils import plots


@pytest.fixture
def scores():
    rows = [
        {
            "criterion": c,
            "layer": layer,
            "epoch": e,
            "p": p,
            "score": s,
            "low": s - 0.1,
            "high": s + 0.1,
        }
        for c in ("vicreg", "simclr")
        for layer in ("projector", "backbone")
        for p in (20, 100)
        for e, s in ((0, 0.0), (10, 0.1), (20, 0.3))
    ]
    return pd.DataFrame(rows)


def _curve(x, values):
    rows = [{x: v, "target": 0.3 + 0.1 * i, "reference": 0.2} for i, v in enumerate(values)]
    frame = pd.DataFrame(rows).assign(criterion="vicreg", chance=0.1)
    for role in ("target", "reference"):
        frame[f"{role}_low"], frame[f"{role}_high"] = frame[role] - 0.05, frame[role] + 0.05
    return frame


def _drawn(axis, label):
    return next(line for line in axis.lines if line.get_label() == label).get_xydata()


def test_over_epochs_draws_scores_above_probes(scores):
    probes = pd.DataFrame(
        [
            {"criterion": c, "epoch": e, "quantity": q, "mean": 0.5, "low": 0.4, "high": 0.6}
            for c in ("vicreg", "simclr")
            for e in (0, 10, 20)
            for q in (
                "held-out accuracy",
                "train - held-out gap",
                "gap of a probe that saw neither",
            )
        ]
    )
    figure = plots.over_epochs(scores[scores["layer"] == "projector"], probes)
    assert len(figure.axes) == 4 and [axis.get_title() for axis in figure.axes[:2]] == [
        "VICReg",
        "SimCLR",
    ]
    np.testing.assert_allclose(_drawn(figure.axes[0], "p = 100 %"), [[0, 0], [10, 0.1], [20, 0.3]])
    assert len(figure.axes[0].collections) == 2, "a band for each p"


def test_a_film_shows_each_figure_in_turn_and_stays_at_the_last():
    pictures = [np.full((3, 8, 8), value, np.uint8) for value in (0, 90, 200)]
    figures = [plots.grid([[(picture, "cat")]]) for picture in pictures]
    film = Image.open(io.BytesIO(plots.film(figures)))
    assert film.n_frames == 3 and film.info["loop"] == 1  # how often it plays
    middle = []
    for frame in range(3):
        film.seek(frame)
        middle.append(film.convert("RGB").getpixel((film.width // 2, film.height // 2)))
    assert middle == [(0, 0, 0), (90, 90, 90), (200, 200, 200)]


def test_over_p_sorts_and_bounds():
    figure = plots.over_p(_curve("p", [100, 20, 50]).assign(rho=0.2))
    assert list(_drawn(figure.axes[0], "target")[:, 0]) == [20, 50, 100]
    assert figure.axes[0].get_ylim()[0] == 0 and figure.axes[0].get_title() == "VICReg, ρ = 0.2"


def test_over_p_cuts_off_no_panel():
    curve = _curve("p", [20, 100]).assign(rho=0.2)
    above = {name: curve[name] + 0.3 for name in ("target", "target_high")}
    higher = curve.assign(criterion="supervised", **above)
    bottom, top = plots.over_p(pd.concat([curve, higher])).axes[-1].get_ylim()
    assert bottom == 0 and top > higher["target_high"].max()


def test_real_pictures_have_no_rho_in_the_title():
    assert (
        plots.over_p(_curve("p", [20, 100]).assign(rho=float("nan"))).axes[0].get_title()
        == "VICReg"
    )


def test_over_rho_has_the_bayes_line():
    figure = plots.over_rho(_curve("rho", [0.5, 0.0]).assign(bayes=[0.55, 0.1]))
    line = _drawn(figure.axes[0], "Bayes accuracy")
    np.testing.assert_allclose(line, [[0, 0.1], [0.5, 0.55]])


def test_split_stacks_to_the_share_that_anybody_gets_right():
    row = {
        "criterion": "vicreg",
        "memorized": 0.2,
        "correlated": 0.1,
        "misrepresented": 0.05,
        "memorized_low": 0.15,
        "memorized_high": 0.25,
    }
    shares = pd.DataFrame([row | {"epoch": e} for e in (0, 10)])
    bars = plots.split(shares).axes[0].patches
    assert max(bar.get_y() + bar.get_height() for bar in bars) == pytest.approx(0.35)


def test_losses_are_a_line_an_encoder_and_name_it():
    rows = {"criterion": "vicreg", "epoch": [1, 2], "loss": [3.0, 2.0]}
    log = pd.concat(
        [pd.DataFrame(rows | {"name": f"key/{model}"}) for model in "AB"], ignore_index=True
    )
    figure = plots.losses(log)
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines] == [[[1, 3], [2, 2]]] * 2
    assert figure.axes[0].get_title() == "VICReg"
    assert [text.get_text() for text in figure.legends[0].texts] == ["A", "B"]


def test_a_seaborn_plot_becomes_a_figure_whose_legend_stands_beside_its_axes(scores):
    import seaborn.objects as so

    end = scores[(scores["epoch"] == 20) & (scores["p"] == 100)]
    plot = so.Plot(end, x="criterion", y="score", ymin="low", ymax="high", color="layer")
    figure = plots.drawn(plot.add(so.Bar(), so.Dodge()).add(so.Range(), so.Dodge()), 5, 3)
    (axis,) = figure.axes
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.3] * 4)
    assert figure.get_size_inches().tolist() == [5, 3]
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 > axis.get_window_extent().x1


def test_examples_outline_box_and_crop():
    pictures = [np.zeros((3, 20, 30), np.uint8)] * 2
    outlines = [(np.array([[1, 2, 8, 9]], float), (10, 0, 30, 20))] * 2
    figure = plots.examples(pictures, outlines, ["cat", "dog"])
    assert len(figure.axes) == 4 and len(figure.axes[0].patches) == 2
    assert figure.axes[2].images[0].get_array().shape[:2] == (20, 20), "below: the crop itself"


def test_gallery_marks_right_neighbours_and_shortens_names():
    picture = np.zeros((3, 8, 8), np.uint8)
    near = [(picture, "German shepherd"), (picture, "cat")]
    row = {"crop": picture, "image": picture, "name": "cat", "target": near, "reference": near}
    figure = plots.gallery([row], count=2)
    titles = [axis.title for axis in figure.axes]
    assert [title.get_text() for title in titles] == [
        "crop",
        "cat",
        "German shep…",
        "cat",
        "German shep…",
        "cat",
    ]
    assert [title.get_color() for title in titles[2:4]] == ["black", plots.BAYES]
    heads = [part.get_suptitle() for part in figure.subfigs]
    assert heads[1:] == ["nearest public images: target", "nearest public images: reference"]


SIX = ["vicreg", "simclr", "barlow_twins", "byol", "dino", "supervised"]
PICTURE = np.zeros((3, 8, 8), np.uint8)


def _wide():
    """Return every figure of plots.py at the widths that the notebooks draw."""
    curves = pd.concat([_curve("p", [20, 100]).assign(criterion=c, rho=0.2) for c in SIX])
    score = {"p": 100, "score": 0.1, "low": 0.0, "high": 0.2}
    scores = pd.DataFrame([score | {"criterion": c, "epoch": e} for c in SIX for e in (0, 300)])
    probe = {"quantity": "held-out accuracy", "mean": 0.5, "low": 0.4, "high": 0.6}
    probes = pd.DataFrame([probe | {"criterion": c, "epoch": e} for c in SIX for e in (0, 300)])
    ends = {"memorized_low": 0.1, "memorized_high": 0.3}
    shares = {"memorized": 0.2, "correlated": 0.1, "misrepresented": 0.05} | ends
    shares = pd.DataFrame([shares | {"criterion": c, "epoch": e} for c in SIX for e in (0, 300)])
    log = pd.DataFrame([{"criterion": c, "epoch": 1, "loss": 1.0, "name": "A"} for c in SIX])
    setting = {f"{name}{end}": 0.1 for name in ("score", "score_20", "held_out") for end in ENDS}
    rows = [
        setting | {"criterion": "vicreg", "setting": name, "value": value}
        for name in ("weight_decay", "encoder", "noise", "bits")
        for value in ("1e-06", "0.001")
    ]
    near = [(PICTURE, "cat")] * 4
    line = {"crop": PICTURE, "image": PICTURE, "name": "a very long name"}
    line |= dict.fromkeys(("target", "reference"), near)
    sampled = line | {f"nearest {role}": near[:1] for role in ("target", "reference")}
    rects = [(np.array([[1, 1, 4, 4]], float), (4, 0, 8, 8))] * 8
    return {
        "over_p": plots.over_p(curves),
        "over_epochs": plots.over_epochs(scores, probes),
        "split": plots.split(shares),
        "over_rho": plots.over_rho(_curve("rho", [0.5, 0.0]).assign(bayes=[0.55, 0.1])),
        "settings": plots.settings(pd.DataFrame(rows)),
        "losses": plots.losses(log),
        "examples": plots.examples([PICTURE] * 8, rects, ["cat"] * 8),
        "gallery": plots.gallery([line]),
        "sampled": plots.gallery([sampled], 3, plots.SAMPLED),
        "grid": plots.grid([[(PICTURE, "cat")] * 12]),
    }


ENDS = ("", "_low", "_high")
WIDE = _wide()


@pytest.mark.parametrize("name", WIDE)
def test_no_text_is_smaller_than_8_pt_where_pages_show_it(name):
    from matplotlib.text import Text

    figure = WIDE[name]  # drawn after the others were made, each with a style of its own
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    shrunk = min(1, plots.SHOWN / figure.get_size_inches()[0])
    smallest = min(texts, key=lambda text: text.get_fontsize())
    assert smallest.get_fontsize() * shrunk >= 8, smallest.get_text()


@pytest.mark.parametrize("name", ["over_p", "over_epochs", "split", "over_rho"])
def test_lines_are_named_at_their_ends_and_no_name_covers_another(name):
    figure = WIDE[name]
    figure.draw_without_rendering()
    assert not figure.legends and not any(axis.get_legend() for axis in figure.axes)
    named = [axis for axis in figure.axes if axis.texts]
    for axis in named:
        boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
        assert all(box.x0 > axis.get_window_extent().x1 for box in boxes)
        assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    assert named
