"""Folders, archives and annotations that are damaged, hostile or odd are read, item by item, or end
in one StoreError.

Each case is a layout, a mutation and a seed; a failure prints all three, and
`judge(*make(layout, mutation, seed, folder))` repeats it.
"""

import importlib.util
import io
import json
import os
import random
import resource
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dejavu_utils import limited, store
from dejavu_utils.data import boxes, datasets, manifests, pictures
from dejavu_utils.data.tree import Tree


def load(path):
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


mutations = load(Path(__file__).with_name("input_mutations.py"))
of_bytes = load(Path(__file__).with_name("checkpoint_mutations.py"))
convert = load(store.PACKAGE.parent / "data_manifests" / "convert.py")
fetch = load(store.PACKAGE.parent / "data_manifests" / "fetch.py")

GIB = 2**30
FIRST = 1000 * (1 + int(os.environ.get("DEJAVU_SEED", "0")))  # of the many mutants
BYTES = ("bits", "edges", "truncated", "inserted", "swapped", "numbers")
FILES = ("texts", "long_texts", "structures", "pictures", "names", "gone", "twins")
CASES = [(layout, mutation) for layout in mutations.LAYOUTS for mutation in ("bytes", *FILES)]
CASES += [(layout, mutation) for layout in mutations.LAYOUTS for mutation in ("links", "members")]
CASES += [(f"{kind} archive", "bytes") for kind in ("zip", "tar", "tgz", "txz")]
CASES += [("zip archive", "members"), ("tar archive", "tar_fields"), ("zip archive", "directories")]
CASES += [(layout, "directories") for layout in ("classes", "boxes", "yolo")]


@pytest.fixture(autouse=True)
def _runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path / "runs"))


def make(layout, mutation, seed, folder):
    """Return (layout, path) of a data set that one mutation changed, as a folder or an archive."""
    rng = random.Random(f"{layout} {mutation} {seed}")
    kind, _, archive = layout.partition(" ")
    files = mutations.LAYOUTS[rng.choice(list(mutations.LAYOUTS)) if archive else kind](rng)
    if mutation in FILES:
        getattr(mutations, mutation)(files, rng)
    elif mutation == "bytes" and not archive and rng.random() < 0.7:
        marks = mutations.marks_of(files) or list(files)
        name = rng.choice(marks if rng.random() < 0.5 else list(files))
        files[name] = getattr(of_bytes, rng.choice(BYTES))(files[name] or b"x", rng)
        mutation = ""

    if mutation == "links" or (mutation in (*FILES, "") and rng.random() < 0.5):
        root = folder / "set"
        for name, content in files.items():
            path = Path(os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(name)))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError:  # a file where a folder should be
                continue
        root.mkdir(exist_ok=True)
        if mutation == "links":
            mutations.links(root, rng)
        return layout, root

    content = mutations.archived(files, kind if archive else "zip")
    if mutation == "bytes":
        content = getattr(of_bytes, rng.choice(BYTES))(content, rng)
    elif mutation == "directories":
        content = of_bytes.directories(content, rng)
    elif mutation in ("members", "tar_fields"):
        content = getattr(mutations, mutation)(content, rng)
    path = folder / f"set.{kind if archive else 'zip'}"
    path.write_bytes(content)
    return layout, path


def read(layout, path):
    """Read a data set as its users do; StoreError or FileNotFoundError if that cannot be done."""
    if layout.endswith("archive"):
        fetch.unpack(path, path.parent / "unpacked")
        return
    if layout in ("classes", "boxes"):
        check(datasets.folder(path))
        return

    said = limited.run(lambda: converted(layout, path), path, 8, 8)
    if said:
        raise store.StoreError(said)
    table = path.with_name("out.csv")
    unused = table.with_name("out.unused.csv")
    tree = Tree(path)
    rules = pictures.Rules(class_from="column")

    def again():
        found = pictures.read(tree, "", boxes.read_table(table, unused), rules, what=str(path))
        check(found)

    limited.run(again, path, 8, 8)


def converted(layout, path):
    """Return what convert.py says of a data set that it does not read, or nothing."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            code = convert.main([layout, str(path), "--out", str(path.with_name("out.csv"))])
        except SystemExit as error:
            return str(error)
    return said.getvalue().strip() if code else ""


def check(images):
    """Fail unless what was read can be used: every picture has its size, or says what ails it."""
    assert len(set(images.ids.tolist())) == len(images)
    assert all(isinstance(each, str) for pair in images.skipped for each in pair)
    assert len(images.digest) == 64
    for i in range(len(images)):
        if images.sizes[i].prod() > 4_000_000:
            continue  # is decoded, but takes its time
        try:
            pixels = images.pixels[i]
        except ValueError as error:
            assert "cannot be decoded" in str(error)
            continue
        assert tuple(pixels.shape[1:]) == tuple(images.sizes[i][::-1])
        box = images.boxes[i]
        assert np.isfinite(box).all() and (box >= 0).all()
        assert (box <= np.tile(images.sizes[i], 2)).all()


def judge(layout, path):
    """Return "read", or "refused", or in other words what is wrong with how it was refused."""
    started = time.monotonic()
    before = os.times()
    try:
        read(layout, path)
        verdict = "read"
    except (store.StoreError, FileNotFoundError) as error:
        text = str(error)
        named = str(path) in text
        short = len(text) < 2000 and text.count("\n") < 2
        ours = "fault of ours" in text
        verdict = "refused" if named and short and not ours else f"says {text!r}"
    except BaseException as error:
        verdict = f"raises {type(error).__name__}: {str(error)[:200]}"
    waited = time.monotonic() - started
    spent = sum(os.times()[:4]) - sum(before[:4])
    if min(spent, waited) > 20 or waited > 300:  # other programs may use the processor
        return f"took {waited:.0f} s, {spent:.0f} s of them of the processor, and {verdict}"
    return verdict


def peak(who):
    return resource.getrusage(who).ru_maxrss * 1024 / GIB


def examine(layout, mutation, seeds, folder):
    """Judge mutants and return {verdict: number}; fail with the seeds of those gone wrong."""
    before = peak(resource.RUSAGE_SELF)
    counts, wrong = {"read": 0, "refused": 0}, {}
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        verdict = judge(*make(layout, mutation, seed, place))
        if verdict in counts:
            counts[verdict] += 1
        else:
            wrong[f"{layout} {mutation} {seed}"] = verdict

    assert not wrong, json.dumps(wrong, indent=1)
    assert peak(resource.RUSAGE_SELF) < before + 1
    assert peak(resource.RUSAGE_CHILDREN) < peak(resource.RUSAGE_SELF) + 8
    return counts


# -- mutants --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", mutations.LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_was_not_mutated_is_read(layout, kind, tmp_path):
    """Else all mutants could be refused for another reason."""
    files = mutations.LAYOUTS[layout](random.Random(0))
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        path.write_bytes(mutations.archived(files, "zip"))
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    assert judge(layout, path) == "read"


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "txz"])
def test_an_archive_that_was_not_mutated_is_unpacked(kind, tmp_path):
    path = tmp_path / f"set.{kind}"
    path.write_bytes(mutations.archived(mutations.voc(random.Random(0)), kind))
    assert judge(f"{kind} archive", path) == "read"
    assert len(list((tmp_path / "unpacked").rglob("*.xml"))) == 4


@pytest.mark.parametrize(("layout", "mutation"), CASES)
def test_a_few_mutants(layout, mutation, tmp_path):
    examine(layout, mutation, range(2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "mutation"), CASES)
def test_many_mutants(layout, mutation, tmp_path):
    counts = examine(layout, mutation, range(FIRST, FIRST + 35), tmp_path)
    print(f"\n{layout} {mutation}: {counts}")


# -- one by one -----------------------------------------------------------------------------------

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")


def class_folders(root, count=3):
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 40), (i, 9, 9)).save(root / name / f"{i}.jpg")
    return root


@pytest.mark.parametrize("count", [1, 2])
def test_links_to_the_folder_itself_are_listed_once(tmp_path, count):
    """Six pictures are six, and the walk ends."""
    root = class_folders(tmp_path / "set")
    for i in range(count):
        (root / "ant" / f"l{i}").symlink_to(".")
    images = datasets.folder(root)
    assert len(images) == 6 and len(images.skipped) == count


def test_a_pipe_is_listed_and_never_opened(tmp_path):
    root = class_folders(tmp_path / "set")
    os.mkfifo(root / "ant" / "9.jpg")
    assert datasets.folder(root).skipped == [("ant/9.jpg", "no plain file")]


def test_a_pipe_is_no_data_set(tmp_path):
    os.mkfifo(tmp_path / "set.zip")
    with pytest.raises(store.StoreError, match="set.zip"):
        datasets.folder(tmp_path / "set.zip")
    assert "neither a folder nor a zip" in converted("voc", tmp_path / "set.zip")


@on_linux
def test_a_table_larger_than_the_budget(tmp_path):
    """Kilobytes of a zip are 80 MB of text, and many more as a table."""
    import zipfile

    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("ant/1.jpg", b"x")
        file.writestr("boxes.csv", b"image,width\n" + b"a,1\n" * 20_000_000)
    with pytest.raises(
        store.StoreError, match=r"its budget of 0.25 GiB \(limit_gib=0.25\).*pass a larger"
    ):
        datasets.folder(path, limit_gib=0.25)


@on_linux
def test_what_never_ends_is_one_error(tmp_path, monkeypatch):
    """A decoder that hangs on one picture, after any number that were fine."""
    monkeypatch.setattr(limited, "PATIENCE", 1.0)
    root = class_folders(tmp_path / "set")
    monkeypatch.setattr(pictures.readers, "measure", lambda *_: [0 for _ in iter(int, 1)])
    with pytest.raises(store.StoreError, match="set takes too much processor time"):
        datasets.folder(root)


def test_our_own_fault_is_said_with_the_file(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "set")
    monkeypatch.setattr(pictures, "Rules", None)
    with pytest.raises(
        store.StoreError, match="set could not be read, by a fault of ours .TypeErr"
    ):
        datasets.folder(root)


def test_many_large_pictures_are_decoded_one_after_another(tmp_path):
    """257 KB a file, 88 million pixels: eight at once would take 20 GiB."""
    root = class_folders(tmp_path / "set")
    Image.new("1", (9_400, 9_400)).save(root / "ant" / "9.png")
    images = datasets.folder(root)
    assert len(images) == 7 and images.sizes.max() == 9_400


def test_an_archive_unpacks_to_no_more_than_the_cap(tmp_path):
    import zipfile

    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x", bytes(3_000_000))
    with pytest.raises(store.StoreError, match="it holds more than 2000000 bytes"):
        fetch.unpack(path, tmp_path / "out", cap=2_000_000)
    assert [each.name for each in tmp_path.iterdir()] == ["set.zip"]
    assert fetch.CAP <= 32 * GIB


MANIFESTS = {
    "": "found nothing, expected a mapping",
    "5": "found int, expected a mapping",
    "[a]": "found list, expected a mapping",
    "a: [": "is no YAML file",
    "a: 2001-99-99": "is no YAML file",
    "\x00": "is no YAML file",
    "title: mine\nlayout: folder": "places, min_side missing",
    "how: 7": "how is 7, expected a text",
    "file: [a]": r"file is \['a'\], expected a text",
    "classes: [1]": r"classes is \[1\], expected a number or a list of names",
    "names: {a: b}": "names is .*, expected a list of names",
    "colour: red": "colour unknown",
}


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_broken_manifest_is_one_line(repository, text):
    folder = repository.root / "data_manifests"
    folder.mkdir()
    usual = "title: mine\nlayout: folder\nplaces: [mine]\nimages: [.]\nmin_side: 8\n"
    whole = usual + text if ": " in text and "title" not in text else text
    (folder / "mine.yaml").write_text(whole)
    with pytest.raises(store.StoreError, match=MANIFESTS[text]) as error:
        manifests.read("mine")
    assert "\n" not in str(error.value) and "data_manifests/mine.yaml" in str(error.value)
