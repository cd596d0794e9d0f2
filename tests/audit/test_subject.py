"""What an audit looks at is made comparable, and every bad input is one clear error."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from dejavu_utils.audit import audit, sources
from dejavu_utils.data.images import Images
from dejavu_utils.models import external, views

CLASSES = 10


def joined(one, other, **changes):
    """Return the pictures of both."""
    return Images(
        np.r_[one.ids, other.ids],
        np.r_[one.labels, other.labels],
        one.boxes + other.boxes,
        one.classes,
        np.r_[one.sizes, other.sizes],
        torch.cat([one.pixels, other.pixels]),
        **changes,
    )


def twins(images, count, shift=1):
    """Return almost the same pictures, under other ids."""
    few = images.subset(range(count))
    pixels = (few.pixels.int() + shift).clamp(0, 255).byte()
    ids = np.array([f"twin-{name}" for name in few.ids])
    return dataclasses.replace(few, ids=ids, pixels=pixels)


@pytest.mark.parametrize("shift", [0, 1])
def test_pictures_that_look_like_attacked_ones_are_left_out_of_x(audits, shift):
    public = joined(audits.parts["public"], twins(audits.parts["a"], 40, shift))
    case = audits.prepared(audits.sets("a", public=public))
    assert len(case.public) == len(audits.parts["public"])
    note = "40 public pictures look like one of the attacked images"
    assert any(note in each for each in case.notes)


@pytest.mark.parametrize("shift", [0, 1])
def test_members_that_are_there_twice_count_once(audits, shift):
    twice = joined(audits.parts["a"], twins(audits.parts["a"], 40, shift))
    case = audits.prepared(audits.sets(twice))
    once = audits.prepared(audits.sets("a"))
    assert len(case.members) == len(once.members)
    assert any("IMAGES: 40 pictures look like an earlier one" in note for note in case.notes)


def test_a_picture_that_is_there_five_times_counts_once(audits):
    held_out = audits.parts["control"]
    for i in range(4):
        copy = twins(audits.parts["control"], 1)
        held_out = joined(held_out, dataclasses.replace(copy, ids=np.array([f"copy {i}"])))
    case = audits.prepared(audits.sets("a", held_out=held_out))
    assert len(case.held_out) == len(audits.prepared(audits.sets("a")).held_out)
    assert any("HELD_OUT: 4 pictures look like an earlier one" in note for note in case.notes)


def test_held_out_pictures_that_are_members_are_left_out(audits):
    held_out = joined(audits.parts["control"], twins(audits.parts["a"], 25))
    case = audits.prepared(audits.sets("a", held_out=held_out))
    assert any("25 held-out pictures look like one of the training" in note for note in case.notes)
    assert not any(name.startswith("twin") for name in case.held_out.ids)


def test_nothing_left_is_an_error(audits):
    with pytest.raises(ValueError, match=r"PUBLIC: no picture of 10 of 10 classes.*1000 were left"):
        audits.prepared(audits.sets("a", public=audits.parts["a"]))
    with pytest.raises(ValueError, match=r"HELD_OUT: 0 of 0 pictures have a usable"):
        audits.prepared(audits.sets("a", "a"))


def test_classes_are_matched_by_name(audits):
    public = audits.parts["public"]
    labels = CLASSES - 1 - public.labels
    turned = dataclasses.replace(public, classes=public.classes[::-1], labels=labels)
    found = [audits.prepared(audits.sets("a", public=each)).public for each in (public, turned)]
    assert found[0].digest == found[1].digest


def test_too_little_is_an_error_that_says_what_to_pass(audits):
    def fails(message, settings=audits.settings, **sets):
        with pytest.raises(ValueError, match=message):
            audits.prepared(audits.sets(**sets), settings=settings)

    members, public = audits.parts["a"], audits.parts["public"]
    fails(
        r"IMAGES: 18 of 19 pictures have a usable periphery crop, at least 20",
        images=members.subset(range(19)),
    )
    fails(
        "PUBLIC: no picture of 1 of 10 classes of IMAGES, such as 'umbrella'; its",
        public=public.subset(public.labels > 0),
    )
    fails("of 1 classes; at least 2", images=members.subset(members.labels == 3))
    many = dataclasses.replace(audits.settings, k=301)
    fails("PUBLIC: 300 pictures, fewer than k = 301", settings=many)
    layer = dataclasses.replace(audits.settings, layer="block9")
    fails("has no layer 'block9', it has backbone. Pass reading.layer=backbone", settings=layer)


def test_without_boxes_the_corner_is_attacked(audits):
    nothing = np.zeros((0, 4), np.float32)
    bare = {
        name: dataclasses.replace(each, boxes=[nothing] * len(each))
        for name, each in audits.sets("a").items()
    }
    case = audits.prepared(bare)
    assert case.crop["kind"] == "corner" and len(case.members) == len(audits.parts["a"])
    assert case.rects(case.members)[0].tolist() == [0, 23, 9, 32]
    assert any("no boxes" in limit for limit in case.limits)


def test_what_is_not_attacked_is_counted(audits):
    members = audits.parts["a"].subset(audits.parts["a"].labels < 7)
    limited = dataclasses.replace(audits.settings, limit=100)
    case = audits.prepared(audits.sets(members), settings=limited)
    public, held_out = audits.parts["public"], audits.parts["control"]
    assert len(case.members) == len(case.held_out) == 100
    said = " ".join(case.notes)
    assert f"IMAGES: {len(members) - 100} of {len(members)} pictures have no back" in said
    assert f"PUBLIC: {(public.labels >= 7).sum()} pictures are of classes that are not" in said
    assert f"HELD_OUT: {(held_out.labels >= 7).sum()} pictures are of classes that are" in said
    assert "or are beyond audit.limit" in said


# -- encoders ---------------------------------------------------------------------------------


class Wrong(nn.Module):
    """Means of the channels, but for one fault."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x):
        found = x.mean((2, 3))  # (n, 3)
        if self.fault == "batch":
            return found - found.mean(0)
        if self.fault == "dropout":
            return nn.functional.dropout(found.repeat(1, 20), training=True)
        if self.fault == "constant":
            return 0 * found + 3
        if self.fault == "nan":
            return found / 0 * 0
        return {"features": found}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("batch", "ENCODER: it gives a picture another answer alone than among others"),
        ("dropout", "ENCODER: it gives a picture another answer .*, or is random"),
        ("constant", "ENCODER: it gives 8 pictures one answer: it has collapsed, or lacks its"),
        ("nan", "ENCODER: it gives NaN or infinity"),
        ("dictionary", "ENCODER: it fails on a picture of 16 px"),
    ],
)
def test_an_encoder_that_is_no_function_of_one_picture_is_refused(audits, fault, message):
    encoder = external.External(Wrong(fault), name="wrong")
    with pytest.raises(ValueError, match=message):
        audit.load(encoder, **audits.sets("a"), settings=audits.settings)


def test_an_encoder_that_fails_on_one_picture_names_it(audits):
    case = audits.prepared(audits.sets("a"))
    bad = case.members.ids[300]
    dark = case.squares(case.members.subset([300]), 16)
    wanted = views.normalize(dark)[0]

    class Dark(nn.Module):
        def forward(self, x):
            found = x.mean((2, 3))
            found[[torch.allclose(each, wanted, atol=1e-4) for each in x]] = float("nan")
            return found

    wrong = dataclasses.replace(case, encoder=external.External(Dark(), name="dark"))
    with pytest.raises(ValueError, match=f"NaN or infinity for 1 of .* such as {bad}"):
        audit.examine(wrong, audits.settings)


# -- sources ----------------------------------------------------------------------------------


def test_a_folder_of_class_folders(audits, tmp_path):
    members = audits.parts["a"]
    root = audits.folder(tmp_path / "mine", members, 60)
    (root / "umbrella" / "broken.png").write_bytes(b"no picture")
    (root / "notes.txt").write_text("not a picture")
    found = sources.pictures(str(root))
    assert found.classes == tuple(sorted(members.classes)) and len(found) == 60
    assert [name for name, _ in found.skipped] == ["notes.txt", "umbrella/broken.png"]
    assert torch.equal(found.pixels[0], members.pixels[int(found.ids[0][-8:-4])])
    with pytest.raises(
        ValueError, match=r"PUBLIC: the pictures in .* are in 0 folders, and 7 lie directly in it"
    ):
        sources.pictures(str(root / "umbrella"), "PUBLIC")
    with pytest.raises(ValueError, match="1 folders, .*Pass its folder mine"):
        sources.pictures(str(tmp_path))


@pytest.mark.parametrize("name", ["", "no/such/folder", "imagenett"])
def test_images_that_are_not_there(name):
    with pytest.raises(
        FileNotFoundError, match=f"PUBLIC: {name or 'nothing was passed'}; expected a folder.*pets"
    ):
        sources.pictures(name, "PUBLIC")


def test_without_a_clone_there_are_folders_and_no_data_sets(audits, tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_ROOT", str(tmp_path))  # has no notebooks/
    root = audits.folder(tmp_path / "pets", audits.parts["a"], 20)
    assert len(sources.pictures(str(root))) == 20
    with pytest.raises(FileNotFoundError, match="expected a folder or zip of class folders.$"):
        sources.pictures("imagenet")


@pytest.mark.parametrize(
    ("encoder", "weights", "message"),
    [
        ("gone.pt", "", "REFERENCE: there is no file gone.pt; expected timm:NAME"),
        ("torchvision:resnet18", "gone.pt", "REFERENCE: there is no file gone.pt; expected a file"),
    ],
)
def test_an_encoder_that_is_not_there(encoder, weights, message):
    with pytest.raises(FileNotFoundError, match=message):
        sources.encoder(encoder, weights, "REFERENCE")


def test_a_part_of_our_own_pair_that_is_none(audits):
    pair = type("Pair", (), {"parts": audits.parts, "jobs": {}})
    params = {
        "encoder": {"target": "", "reference": ""},
        "sets": {"images": "c", "public": "", "held_out": ""},
        "epochs": [1],
    }
    with pytest.raises(ValueError, match=r"'c' is neither a part .*\(a, b, control, public\)"):
        sources.demonstration(params, pair)
