"""Pictures without classes: what the alignment of their parts tells, and what it cannot."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dejavu_utils.attack import crops
from dejavu_utils.audit import __main__ as terminal
from dejavu_utils.audit import audit, membership
from dejavu_utils.data.images import Images
from dejavu_utils.models import external, own_format, views
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.recipe import Recipe

SIZE = 24
CORNER = {"kind": "corner"}


def keys(x):
    """Return a name for each normalised picture."""
    return [hashlib.sha256(np.round(one.numpy(), 3).tobytes()).digest() for one in x]


class Aligned(nn.Module):
    """A trunk that gives corner and whole of the pictures it learned one code, and all others noise
    of their own.
    """

    def __init__(self):
        super().__init__()
        self.memory = {}

    def reset_parameters(self):
        self.memory = {}

    def learn(self, images):
        corners = images.squares(SIZE, crops.background(images, CORNER)[0])
        for pixels in (corners, images.squares(SIZE)):
            names = zip(keys(views.normalize(pixels)), images.ids, strict=True)
            self.memory |= {key: int(name.rpartition("-")[2]) for key, name in names}

    def forward(self, x):
        found = []
        for key in keys(x):
            noise = np.random.default_rng(list(key[:4])).normal(size=16)
            known = key in self.memory
            code = np.random.default_rng(self.memory[key]).normal(size=16) if known else 0
            found.append(noise + 3 * code)
        return torch.tensor(np.array(found)).float()


def pictures(seed, n=160):
    """Return noisy pictures of 40 px without classes or boxes."""
    random = np.random.default_rng(seed)
    return Images(
        np.array([f"{seed}-{1000 * seed + i}" for i in range(n)]),
        np.zeros(n, np.int64),
        [np.zeros((0, 4), np.float32)] * n,
        ("picture",),
        np.full((n, 2), 40),
        torch.from_numpy(random.integers(0, 256, (n, 3, 40, 40), dtype=np.uint8)),
    )


def encoder(learned):
    trunk = Aligned()
    trunk.learn(learned)
    return external.External(trunk, name="aligned")


def test_members_that_are_aligned_are_found_and_others_are_not():
    members, held_out, others = pictures(1), pictures(2), pictures(3)
    model = encoder(members.subset(range(80)))  # half of them
    settings = {"labels": False, "size": SIZE}

    yes = audit.run(model, members, held_out=held_out, **settings)
    assert yes.controls["passed"].all(), yes.controls
    assert yes.verdict.word == "memorizes" and yes.status == 3
    assert 0.15 < yes.verdict.score < 0.35  # half of the members above nearly all: AUC .75
    assert "cannot be said without classes" in yes.verdict.sentence

    no = audit.run(model, others, held_out=held_out, **settings)
    assert no.verdict.word != "memorizes" and no.verdict.low <= 0 <= no.verdict.high


def test_the_page_says_what_cannot_be_claimed():
    members, held_out = pictures(1, 60), pictures(2, 60)
    found = audit.run(encoder(members), members, held_out=held_out, labels=False, size=SIZE)
    page = found.html()
    assert "The pictures have no classes" in page and "alignment gap" in page
    assert "Three numbers of each image" in page and "déjà vu:" not in page
    assert "Class by class" not in page and "Look at them" not in page
    assert any("may be ordinary overfitting" in limit for limit in found.case.limits)
    assert json.dumps(found.summary())

    table = membership.as_csv(found.statistics)
    assert table.columns.tolist() == ["id", "score", "member"] and len(table) == 120
    assert len(found.membership) == 3 * len(membership.RATES)


def test_few_pictures_are_undecided_and_fewer_are_refused():
    model = encoder(pictures(1, 30))
    few = audit.run(model, pictures(1, 30), held_out=pictures(2, 30), labels=False, size=SIZE)
    assert few.verdict.word == "undecided" and few.verdict.why == "few"
    with pytest.raises(ValueError, match="HELD_OUT: 7 of 7 pictures have a usable corner crop"):
        audit.run(model, pictures(1, 30), held_out=pictures(2, 7), labels=False, size=SIZE)


def test_different_storage_is_no_membership():
    """Held-out pictures are smoother than members: a control must find it."""
    members, held_out = pictures(1), pictures(2)
    smooth = nn.functional.avg_pool2d(held_out.pixels.float(), 3, 1, 1).byte()
    held_out.pixels.copy_(smooth)
    found = audit.run(encoder(members), members, held_out=held_out, labels=False, size=SIZE)
    assert found.verdict.word == "undecided" and found.verdict.why == "control"


def test_plain_folders_from_a_terminal(tmp_path, capsys):
    sets = {"members": pictures(1, 60), "fresh": pictures(2, 60)}
    for name, images in sets.items():
        (tmp_path / name / "some" / "deep").mkdir(parents=True)
        for i, pixels in enumerate(images.pixels):
            place = tmp_path / name / ("some/deep" if i % 2 else "")
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{i:03d}.png")

    torch.manual_seed(1)
    network = tmp_path / "e.safetensors"
    recipe = Recipe(encoder="small4", projector="8-8", size=SIZE)
    own_format.save(network, Encoder("small4", "8-8", SIZE).eval(), recipe)
    common = [f"--encoder={network}", f"--images={tmp_path / 'members'}", "--reading.size=24"]
    assert terminal.main(common) == 2  # classes are expected, and the error says how to do without
    said = capsys.readouterr().err
    assert "audit.labels=False" in said and len(said.splitlines()) == 1

    assert terminal.main([*common, "--audit.labels=False"]) == 2
    assert capsys.readouterr().err.startswith("error: HELD_OUT: nothing was passed")

    out = tmp_path / "report.html"
    more = [f"--held-out={tmp_path / 'fresh'}", "--audit.labels=False", f"--out={out}"]
    assert terminal.main([*common, *more]) in (0, 4)
    assert "60 members" in capsys.readouterr().out and out.is_file()
    ids = [line.split(",")[0] for line in out.with_suffix(".csv").read_text().splitlines()[1:]]
    assert len(ids) == len(set(ids)) == 120 and "members/some/deep/001.png" in ids
