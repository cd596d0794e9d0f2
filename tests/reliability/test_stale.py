"""Whatever changes in a data set is noticed, and nothing else: its identity is its content."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dejavu_utils import store
from dejavu_utils.data import datasets, identity
from dejavu_utils.data.tree import Tree
from dejavu_utils.models import feed

MINE = "title: mine\nlayout: folder\nplaces: [mine, mine.zip]\nimages: [.]\nmin_side: 8\n"


@pytest.fixture(autouse=True)
def _runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path / "runs"))


def draw(path, shade):
    """Write a bitmap: every one has the same number of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9, 9, 3), shade, np.uint8)).save(path)


def pictures(folder):
    for shade, name in enumerate(("ant/1.bmp", "ant/2.bmp", "bee/1.bmp", "bee/2.bmp")):
        draw(folder / name, shade)
    return folder


def settled(folder, monkeypatch):
    """Make files of now count as old ones, whose hashes may be kept."""
    monkeypatch.setattr(store, "SETTLED", -1.0)
    return folder


def kept_in(folder):
    (kept,) = (folder / "runs" / "data" / "hashes").glob("*[!n].json")
    return kept


def replaced_in_place(root):
    """Another picture of the same size, date and inode, as `cp --preserve` would not even do."""
    before = (root / "ant/1.bmp").stat()
    content = (root / "bee/2.bmp").read_bytes()
    with (root / "ant/1.bmp").open("r+b") as file:
        file.write(content)
    os.utime(root / "ant/1.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "replaced by one of equal size": lambda root: draw(root / "ant/1.bmp", 200),
    "replaced in place, dates kept": replaced_in_place,
    "added": lambda root: draw(root / "ant/3.bmp", 9),
    "removed": lambda root: (root / "ant/1.bmp").unlink(),
    "renamed": lambda root: (root / "ant/1.bmp").rename(root / "ant/0.bmp"),
    "moved to another class": lambda root: (root / "ant/1.bmp").rename(root / "bee/3.bmp"),
    "a table of boxes": lambda root: (root / "boxes.csv").write_text("image\n"),
}
NO_CHANGES = {
    "touched": lambda root: os.utime(root / "ant/1.bmp", (1, 1)),
    "dated to the future": lambda root: os.utime(root / "ant/1.bmp", (4e9, 4e9)),
    "written again": lambda root: draw(root / "ant/1.bmp", 0),
    "a folder beside it": lambda root: draw(root.parent / "unrelated/1.bmp", 0),
    "a hidden file": lambda root: (root / "ant/.DS_Store").write_text("x"),
    "an empty folder": lambda root: (root / "cat").mkdir(),
}


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("change", CHANGES | NO_CHANGES)
def test_the_key_of_a_notebook_follows_the_content_of_its_data(
    repository, batch, tmp_path, monkeypatch, change, remembered
):
    (repository.root / "data_manifests").mkdir()
    (repository.root / "data_manifests" / "mine.yaml").write_text(MINE)
    repository.add("02_attack", parameters='profile = "tiny"  # a\ndataset = "mine"  # b\n')
    monkeypatch.setenv("DEJAVU_DATA", str(tmp_path / "data"))
    root = pictures(tmp_path / "data" / "mine")
    if remembered:
        settled(root, monkeypatch)

    before = batch.stage_key("02_attack", "tiny", {})
    assert batch.stage_key("02_attack", "tiny", {}) == before
    (CHANGES | NO_CHANGES)[change](root)
    assert (batch.stage_key("02_attack", "tiny", {}) != before) == (change in CHANGES)


def test_a_copy_of_a_data_set_is_the_same_data_set(tmp_path):
    root = pictures(tmp_path / "one")
    shutil.copytree(root, tmp_path / "two")
    with zipfile.ZipFile(tmp_path / "mine.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*.bmp"), reverse=True):
            file.write(path, path.relative_to(root))
    places = [root, tmp_path / "two", tmp_path / "mine.zip"]
    assert len({identity.of(Tree(place)) for place in places}) == 1
    assert len({datasets.folder(place).digest for place in places}) == 1


def test_pictures_that_are_not_held_are_told_by_content(tmp_path):
    root = pictures(tmp_path / "one")
    before = datasets.folder(root)
    draw(root / "ant/1.bmp", 200)
    after = datasets.folder(root)
    assert before.sizes.tolist() == after.sizes.tolist() and before.digest != after.digest


def test_what_is_trained_on_is_told_by_content_and_not_by_place(tmp_path):
    root = pictures(tmp_path / "one")
    shutil.copytree(root, tmp_path / "two")
    first = feed.write_list(tmp_path / "pixels", [datasets.folder(root)], {})
    again = feed.write_list(tmp_path / "pixels", [datasets.folder(tmp_path / "two")], {})
    assert first == again
    shutil.rmtree(root)  # the list leads to the copy now
    assert torch.equal(feed.read_list(again)["images"][0], torch.zeros(3, 9, 9, dtype=torch.uint8))

    draw(tmp_path / "two" / "ant/1.bmp", 200)
    assert feed.write_list(tmp_path / "pixels", [datasets.folder(tmp_path / "two")], {}) != first


def test_a_list_of_pictures_holds_any_name(tmp_path):
    root = pictures(tmp_path / "one")
    os.rename(root / "ant/1.bmp", os.fsencode(root) + b"/ant/caf\xe9.bmp")
    path = feed.write_list(tmp_path / "pixels", [datasets.folder(root)], {})
    images = feed.read_list(path)["images"]
    assert "ant/caf\udce9.bmp" in images.names
    assert all(picture.shape == (3, 9, 9) for picture in images)


def test_a_kept_hash_is_used_until_verify_is_full(tmp_path, monkeypatch):
    """Only a look at the kept hashes can tell: an untouched file has the same one anyway."""
    root = settled(pictures(tmp_path / "one"), monkeypatch)
    right = identity.of(Tree(root))
    kept = kept_in(tmp_path)
    entries = json.loads(kept.read_text())
    entries["ant/1.bmp"][1] = "0" * 32
    with store.artifact(kept) as temporary:
        temporary.write_text(json.dumps(entries))
    assert identity.of(Tree(root)) != right
    monkeypatch.setenv("VERIFY", "full")
    assert identity.of(Tree(root)) == right


def test_a_fresh_file_is_read_again(tmp_path):
    """It might change within the same tick of the clock."""
    identity.of(Tree(pictures(tmp_path / "one")))
    assert not (tmp_path / "runs").exists()


def test_damaged_hashes_are_made_again(tmp_path, monkeypatch, capsys):
    root = settled(pictures(tmp_path / "one"), monkeypatch)
    right = identity.of(Tree(root))
    kept = kept_in(tmp_path)
    kept.write_text(kept.read_text().replace("1", "2", 1))
    assert identity.of(Tree(root)) == right
    assert "is damaged: it is made again" in capsys.readouterr().out
    assert store.intact(kept)


@pytest.mark.parametrize(("place", "seen"), [(0, True), (50, True), (99, True), (25, False)])
def test_of_a_large_data_set_three_pieces_of_each_file_are_read(tmp_path, monkeypatch, place, seen):
    monkeypatch.setattr(identity, "WHOLE", 150_000)
    for name in ("a.bin", "b.bin"):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / name).write_bytes(bytes(200_000))
    before = identity.of(Tree(tmp_path / "one"))
    content = bytearray(200_000)
    content[place * 2000] = 1
    (tmp_path / "one" / "b.bin").write_bytes(content)
    assert (identity.of(Tree(tmp_path / "one")) != before) == seen


def test_annotations_are_read_again_when_their_content_changes(tmp_path):
    """Not their dates: a copy of the data set has others."""
    root = pictures(tmp_path / "one")
    mark = "<annotation><size><width>9</width><height>9</height></size><object><name>ant</name>"
    mark += "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>5</ymax></bndbox></object>"
    for path in sorted(root.rglob("*.bmp")):
        path.with_suffix(".xml").write_text(mark.format(5) + "</annotation>")
    entry = {"name": "mine", "layout": "boxes", "convert": "voc", "images": ["."]}
    assert datasets.load(entry, root).boxes[0].tolist() == [[0, 0, 5, 5]]
    before = (root / "ant/1.xml").stat()
    (root / "ant/1.xml").write_text(mark.format(7) + "</annotation>")
    os.utime(root / "ant/1.xml", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert datasets.load(entry, root).boxes[0].tolist() == [[0, 0, 7, 5]]
    shutil.copytree(root, tmp_path / "two")
    datasets.load(entry, tmp_path / "two")
    assert len(list((tmp_path / "runs" / "data").glob("mine-*"))) == 2


def test_nothing_is_kept_where_there_is_no_clone(tmp_path, monkeypatch):
    monkeypatch.delenv("DEJAVU_RUNS")
    monkeypatch.setenv("DEJAVU_ROOT", str(tmp_path))
    root = settled(pictures(tmp_path / "one"), monkeypatch)
    assert len(identity.of(Tree(root))) == 64
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["one"]
