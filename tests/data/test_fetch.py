"""Manifests, download, checksum, unpacking: a wrong or hostile archive leaves nothing behind and
says so.
"""

import functools
import hashlib
import http.server
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from dejavu_utils import store
from dejavu_utils.data import manifests

SCRIPT = store.PACKAGE.parent / "data_manifests" / "fetch.py"
spec = importlib.util.spec_from_file_location("fetch", SCRIPT)
fetch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fetch)

FIELDS = {
    "title",
    "source",
    "url",
    "how",
    "licence",
    "file",
    "sha256",
    "bytes",
    "verified",
    "places",
    "layout",
    "classes",
    "image_size",
    "min_side",
    "split",
}
GOOD = {"top/train/n01/images/n01_0.JPEG": b"1", "top/wnids.txt": b"n01\n"}


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return path


def make_tar(path, files, kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, "w:gz") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = (
                len(content) if kind == tarfile.REGTYPE else 0,
                kind,
                link,
            )
            out.addfile(info, io.BytesIO(content))
    return path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one manifest, `mini`, whose archive a server on this machine has."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data_manifests").mkdir()
    monkeypatch.delenv("DEJAVU_RUNS", raising=False)
    monkeypatch.setenv("DEJAVU_ROOT", str(tmp_path))
    monkeypatch.delenv("DEJAVU_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    served = make_zip(tmp_path / "served.zip", GOOD)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def manifest(**changes):
        content = {
            "title": "t",
            "source": "here",
            "url": f"{address}/served.zip",
            "how": "ask us.",
            "licence": "none",
            "file": "mini.zip",
            "unpack": "mini",
            "sha256": hashlib.sha256(served.read_bytes()).hexdigest(),
            "bytes": served.stat().st_size,
            "places": ["mini.zip", "mini"],
            "layout": "folder",
            "images": ["train"],
            "min_side": 16,
        } | changes
        import yaml

        (tmp_path / "data_manifests/mini.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "data"

    manifest()
    yield manifest
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", manifests.names())
def test_manifests_are_complete(name):
    entry = manifests.read(name)
    assert FIELDS <= set(entry) and (entry["verified"] is True) == bool(entry["sha256"]), name
    assert len(entry["sha256"]) in (0, 64) and (
        entry["layout"] == "scenes" or entry["places"] and entry["images"]
    )
    assert entry["split"] is None or {"rule", "seed", "sizes", "hash"} == set(entry["split"])
    real = Path(os.environ.get("DEJAVU_DATA", "-")) / (entry["file"] or "-")
    if entry["sha256"] and real.is_file():
        manifests.verify(entry, real)
        assert real.stat().st_size == entry["bytes"]


def test_there_are_six():
    assert set(manifests.names()) >= {
        "scenes",
        "tiny_imagenet",
        "tiny_imagenet_50",
        "imagenet",
        "pets",
        "coco128",
    }


def test_download_verify_unpack(repository, tmp_path):
    assert fetch.fetch("mini") == tmp_path / "data/mini"
    assert (tmp_path / "data/mini/wnids.txt").read_bytes() == b"n01\n"
    (tmp_path / "served.zip").unlink()
    assert fetch.fetch("mini") == tmp_path / "data/mini"  # nothing is downloaded twice
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["mini", "mini.zip"]


def test_wrong_checksum_keeps_nothing(repository, tmp_path):
    folder = repository(sha256="0" * 64)
    with pytest.raises(
        ValueError, match="served.zip has the wrong checksum: .*expected sha256:0000.*ask us"
    ):
        fetch.fetch("mini")
    assert list(folder.iterdir()) == []
    repository()
    fetch.fetch("mini")
    (folder / "mini.zip").write_bytes(b"changed")
    with pytest.raises(ValueError, match="wrong checksum"):
        fetch.fetch("mini")


def test_an_empty_checksum_is_said(repository, capsys):
    repository(sha256="", bytes=None)
    fetch.fetch("mini")
    assert "not verified" in capsys.readouterr().out


def test_no_network_says_what_to_do_by_hand(repository, tmp_path):
    repository(url="http://127.0.0.1:9/mini.zip")
    with pytest.raises(
        ConnectionError, match=r"cannot download mini from http://127.*ask us\. Put it into .*data"
    ):
        fetch.fetch("mini")
    assert not list((tmp_path / "data").iterdir())


def test_a_download_that_breaks_off_keeps_nothing(repository, tmp_path):
    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Short) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        repository(url=f"http://127.0.0.1:{server.server_port}/mini.zip")
        with pytest.raises(ConnectionError, match="mini"):
            fetch.fetch("mini")
    assert not list((tmp_path / "data").iterdir())


def test_a_data_set_without_address(repository, tmp_path):
    folder = repository(url=None)
    with pytest.raises(FileNotFoundError, match=r"looked for mini.zip, mini\. ask us"):
        fetch.fetch("mini")
    (folder / "mini").mkdir(parents=True)
    assert fetch.fetch("mini") == folder / "mini"


def test_command_line(repository, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path
        )

    assert "mini: t" in run().stdout
    done = run("mini")
    assert done.returncode == 0 and str(tmp_path / "data/mini") in done.stdout
    bad = run("other")
    assert bad.returncode == 1 and bad.stderr.startswith("error: no data set is called 'other'")


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/tmp/evil-dejavu", "..\\evil", "C:evil"]
)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_members_that_lead_outside_are_refused(tmp_path, make, name):
    path = make(tmp_path / "x.archive", GOOD | {name: b"evil"})
    with pytest.raises(ValueError, match="leads outside"):
        fetch.unpack(path, tmp_path / "in/out")
    assert not list((tmp_path / "in").iterdir()) and not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    path = make_tar(tmp_path / "x.tar.gz", {"link": b""}, kind, "/etc/passwd")
    with pytest.raises(ValueError, match="link or a device"):
        fetch.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_in_a_zip_are_refused(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    path = make_zip(tmp_path / "x.zip", {info: "/etc/passwd"})
    with pytest.raises(ValueError, match="link or a device"):
        fetch.unpack(path, tmp_path / "out")


def test_bombs_duplicates_and_damage_are_refused(tmp_path):
    bomb = make_zip(tmp_path / "bomb.zip", {"a": bytes(3_000_000)})
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        fetch.unpack(bomb, tmp_path / "out", cap=1_000_000)
    twice = make_tar(tmp_path / "twice.tar.gz", {"a": b"1"})
    with tarfile.open(tmp_path / "twice.tar", "w") as out:
        for _ in range(2):
            out.addfile(tarfile.TarInfo("a"))
    with pytest.raises(ValueError, match="not unpacked"):
        fetch.unpack(tmp_path / "twice.tar", tmp_path / "out")
    for path in (make_zip(tmp_path / "cut.zip", GOOD), twice):
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="was not unpacked"):
            fetch.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_unpack_drops_a_single_top_folder_only(tmp_path):
    one = fetch.unpack(make_tar(tmp_path / "x.tar.gz", GOOD), tmp_path / "one")
    assert sorted(p.name for p in one.iterdir()) == ["train", "wnids.txt"]
    two = fetch.unpack(make_zip(tmp_path / "x.zip", {"a/b": b"1", "c": b"2"}), tmp_path / "two")
    assert sorted(p.relative_to(two).as_posix() for p in two.rglob("*")) == ["a", "a/b", "c"]
