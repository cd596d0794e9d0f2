"""Data sets in memory, {relative name: bytes}, and mutations of them, drawn by a random.Random.

A mutation changes the files, or what is written of them: as a folder or as a zip.
"""

import functools
import io
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image

FORMATS = {
    ".jpg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".ppm": "PPM",
}
SIZE = (24, 20)  # px
NUMBERS = (
    "inf",
    "nan",
    "1e999",
    "-1",
    "1e400",
    "",
    "²",
    "9" * 400,
    "0x10",
    "\0",
    "1_0",
    "٣",
    "0.9",
)
NUMBERS += ("-0", "1,5", "null", "1e-320", "NaN", "99999999999999999999", "<b/>", "'", '"', "=1+1")
NAMES = ("caf\udce9", "a\nb", "a" * 200, "$(x)", "..", ".hidden", "con:1", "'\"", "²", "e\u0301")
NAMES += (
    "\u202egpj",
    "-rf",
    "%s",
    " ",
    "a\\b",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
)


def picture(rng, suffix, size=SIZE):
    shade = np.array([[[rng.randrange(256) for _ in range(3)]]], np.uint8)
    target = io.BytesIO()
    Image.fromarray(np.broadcast_to(shade, (size[1], size[0], 3))).save(target, FORMATS[suffix])
    return target.getvalue()


# -- data sets ------------------------------------------------------------------------------------


def classes(rng, start="", suffixes=tuple(FORMATS)):
    """Return a folder a class: two classes of three pictures."""
    return {
        f"{start}{name}/{name}_{i}{suffix}": picture(rng, suffix)
        for name in ("ant", "bee")
        for i, suffix in enumerate(rng.choice(suffixes) for _ in range(3))
    }


def boxes(rng):
    files = classes(rng)
    rows = [f"{name},24,20,1,2,9,10,{rng.choice(('', 'ant', 'x'))},," for name in files]
    text = "image,width,height,x0,y0,x1,y1,class,owner,split\n" + "\n".join(rows) + "\n"
    unused = "file,image,reason,detail\nx.xml,ant/ant_9.jpg,XML that cannot be parsed,line 1\n"
    return files | {"boxes.csv": text.encode(), "boxes.unused.csv": unused.encode()}


def xml(name, last):
    return (
        f"<annotation><size><width>24</width><height>20</height></size><object><name>{name}</name>"
        f"<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>{last}</xmax><ymax>12</ymax></bndbox></object>"
        "</annotation>"
    ).encode()


def voc(rng):
    files = {f"JPEGImages/{i}.jpg": picture(rng, ".jpg") for i in range(4)}
    return files | {f"Annotations/{i}.xml": xml(("ant", "bee")[i % 2], 9 + i) for i in range(4)}


def imagenet(rng):
    files = classes(rng, "train/", (".jpg",))
    marks = {name: f"boxes/{name[6:-4]}.xml" for name in files}
    return files | {mark: xml("n01", 11) for mark in marks.values()}


def yolo(rng):
    files = {f"images/train/{i}.png": picture(rng, ".png") for i in range(4)}
    marks = {f"labels/train/{i}.txt": f"{i % 2} .5 .5 .2 .2\n".encode() * (i + 1) for i in range(4)}
    return files | marks | {"data.yaml": b"names: [ant, bee]\nnc: 2\n"}


def coco(rng):
    files = {f"val/{i}.jpg": picture(rng, ".jpg") for i in range(4)}
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 24, "height": 20} for i in range(4)]
    marks = [
        {"id": i, "image_id": i, "category_id": i % 2, "bbox": [2, 3, 8, 9.5]} for i in range(4)
    ]
    names = [{"id": 0, "name": "ant"}, {"id": 1, "name": "bee"}]
    content = {"images": images, "annotations": marks, "categories": names}
    return files | {"annotations/instances_val.json": json.dumps(content).encode()}


def tiny_imagenet(rng):
    files = {}
    for wnid in ("n01", "n02"):
        names = [f"{wnid}_{i}.JPEG" for i in range(2)]
        for name in names:
            files[f"train/{wnid}/images/{name}"] = picture(rng, ".jpg", (64, 64))
        rows = "".join(f"{name}\t1\t2\t30\t40\n" for name in names)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = rows.encode()
    return files


LAYOUTS = {
    each.__name__: each for each in (classes, boxes, voc, imagenet, yolo, coco, tiny_imagenet)
}


def marks_of(files):
    """Return the names of annotations and tables."""
    return [name for name in files if not name.lower().endswith((*FORMATS, ".jpeg"))]


# -- mutations of files ---------------------------------------------------------------------------


def texts(files, rng):
    """Change one to four words or lines of a table or an annotation, or how it is encoded."""
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(marks_of(files) or list(files))
        text = files[name].decode("utf-8", "replace")
        for _ in range(rng.randint(1, 4)):
            words = list(re.finditer(r"[^\s,<>:\[\]{}\"]+", text))
            if words and rng.random() < 0.7:
                start, end = rng.choice(words).span()
                text = text[:start] + rng.choice(NUMBERS) + text[end:]
                continue
            lines = text.split("\n")
            at = rng.randrange(len(lines))
            lines[at : at + 1] = rng.choice(([], [lines[at]] * 2, [lines[at][:-1]], ["x"], [""]))
            text = "\n".join(lines)
        codec = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-7"))
        files[name] = text.encode(codec, "replace")


def long_texts(files, rng):
    """Repeat a line many times, nest without end, or write something very long."""
    name = rng.choice(marks_of(files) or list(files))
    content = files[name]
    last = content.split(b"\n")[-2:][0]
    aliases = b"".join(
        b"a%d: &a%d [%s]\n" % (i, i, b"*a%d," % (i - 1) * 9 if i else b"x") for i in range(12)
    )
    files[name] = rng.choice(
        (
            content + (last + b"\n") * 20_000,
            b"[" * 100_000,
            b"<a>" * 50_000,
            b'{"a":' * 50_000,
            content + b"x" * 3_000_000,
            b"<!DOCTYPE a [<!ENTITY b 'cc'><!ENTITY d '&b;&b;'>]>" + content,
            aliases + b"names: *a11\n",
            b"9" * 100_000,
            content * 300,
            b",".join([b"x"] * 100_000) + b"\n" + content,
        )
    )


def structures(files, rng):
    """Put a value of another type into JSON or YAML, or take one out; else as `texts`."""
    names = [name for name in files if name.endswith((".json", ".yaml"))]
    if not names or names[0].endswith(".yaml"):
        if names:
            values = (
                "{1: [a]}",
                "5",
                "[[a, b], c]",
                "{x: y}",
                "[2001-99-99]",
                "!!python/name:os",
                "",
            )
            values += (
                "{.inf: a}",
                '["\\ud800", b]',
                "[null, ~]",
                "[a, a]",
                "{0: ant, 1: bee, -1: c}",
            )
            files[names[0]] = b"names: " + rng.choice(values).encode() + b"\n"
        texts(files, rng)
        return
    content = json.loads(files[names[0]])
    values = (None, "", [], {}, -1, 10**400, 1e308, True, "9" * 9, "\ud800", [[]], {"id": []}, 1.5)
    for _ in range(rng.randint(1, 3)):
        part = content
        while True:
            keys = list(part) if isinstance(part, dict) else range(len(part))
            if not keys:
                break
            key = rng.choice(keys)
            deeper = isinstance(part[key], dict | list) and part[key]
            if deeper and rng.random() < 0.9:
                part = part[key]
                continue
            if rng.random() < 0.2:
                del part[key]
            else:
                part[key] = rng.choice(values)
            break
    files[names[0]] = json.dumps(content).encode()


def _chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


@functools.cache
def packed(length):
    """Return zeros, packed."""
    return zlib.compress(bytes(length), 9)


def png(size, depth=8, kind=2, rows=1, extra=b""):
    """Return a PNG that says it has a size, with any pixels."""
    head = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    parts = _chunk(b"IHDR", head) + extra + _chunk(b"IDAT", packed(rows))
    return b"\x89PNG\r\n\x1a\n" + parts + _chunk(b"IEND", b"")


def pictures(files, rng):
    """Put a picture in place of another one that is large, deep, many, or not what it says."""
    name = rng.choice([name for name in files if name not in marks_of(files)])
    large = rng.choice(((60_000, 60_000), (9_000, 9_000), (2**31 - 1, 1), (1, 200_000), (0, 0)))
    frames = [Image.new("P", SIZE, i) for i in range(40)]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = rng.choice((0, 3, 6, 9, 65535))
    Image.new("RGB", SIZE).save(turned, "JPEG", exif=exif)
    comment = _chunk(b"zTXt", b"a\0\0" + packed(50_000_000))
    profile = _chunk(b"iCCP", b"a\0\0" + packed(50_000_000))
    rows = SIZE[1] * (1 + 3 * SIZE[0])  # bytes
    files[name] = rng.choice(
        (
            png(large),
            png(large, rows=2_000_000),
            png(SIZE, rows=30_000_000),
            png(SIZE, 16),
            png(SIZE, rng.choice((1, 2, 4, 7)), rng.choice((0, 3, 5))),
            png(SIZE, rows=rows, extra=comment),
            png(SIZE, rows=rows, extra=profile),
            b"P6 %d %d 255\n" % large + bytes(100),
            b"P5 24 20 65535\n" + bytes(960),
            b"P6 24 20 " + b"9" * 5000,
            b"BM"
            + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, *large, 1, 24, 0, 0, 0, 0, 0, 0),
            b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"",
            bytes(1000),
            animated.getvalue(),
            turned.getvalue(),
        )
    )


def names(files, rng):
    """Call one to three files by names that nobody expects."""
    for _ in range(rng.randint(1, 3)):
        old = rng.choice(list(files))
        folder, _, last = old.rpartition("/")
        stem, _, suffix = last.rpartition(".")
        strange = rng.choice(NAMES)
        new = rng.choice(
            (
                f"{folder}/{strange}.{suffix}",
                f"{folder}/{strange}/{last}",
                f"{strange}/{last}",
                f"{folder}/{stem}.{suffix}.{strange}",
                f"{folder}/{stem}.{suffix.upper()}",
                f"{folder}/.{last}",
                last,
            )
        )
        files[os.path.normpath(new).lstrip("./") or "x"] = files.pop(old)


def gone(files, rng):
    """Take files away, or empty them."""
    for name in rng.sample(sorted(files), rng.randint(1, max(1, len(files) - 1))):
        if rng.random() < 0.3:
            files[name] = b""
        else:
            del files[name]


def twins(files, rng):
    """Put a second file beside one: the same stem, another suffix, or the same name in capitals."""
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(files))
        stem, _, suffix = name.rpartition(".")
        other = rng.choice(
            (f"{stem}.png", f"{stem}.txt", name.upper(), f"{stem}.{suffix}.{suffix}")
        )
        files[other] = files[name]


# -- mutations of what is written -----------------------------------------------------------------


def links(root, rng):
    """Put a link, a pipe or a folder where a picture might be."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for _ in range(rng.randint(1, 3)):
        where = rng.choice(folders)
        path = where / rng.choice(("l", "0.jpg", "0.txt", "0.xml", "boxes.csv", "data.yaml", "z"))
        if path.exists() or path.is_symlink():
            continue
        kind = rng.choice(("here", "above", "nowhere", "itself", "zero", "pipe", "folder", "file"))
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            files = sorted(each for each in root.rglob("*") if each.is_file())
            targets = {"here": ".", "above": "..", "nowhere": "no/such", "itself": path.name}
            targets |= {"zero": "/dev/zero", "file": str(rng.choice(files or [root]))}
            path.symlink_to(targets[kind])


def members(content, rng):
    """Change what a zip says of its members: encrypted, another method, a name twice, a bomb."""
    kind = rng.choice(("encrypted", "method", "twice", "bomb", "above", "comment", "nul"))
    if kind in ("encrypted", "method"):
        changed = bytearray(content)
        at = 0
        while (at := content.find(b"PK\1\2", at + 1)) > 0:
            if rng.random() < 0.5:
                changed[at + 8 if kind == "encrypted" else at + 10] |= rng.choice((1, 99, 12, 14))
        return bytes(changed)
    target = io.BytesIO(content)
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as file:
        inside = file.namelist()
        if kind == "twice":
            file.writestr(rng.choice(inside), b"other")
        elif kind == "bomb":
            name = rng.choice(("boxes.csv", "ant/9.png", "JPEGImages/9.xml", "labels/train/9.txt"))
            file.writestr(name, rng.choice((b" ", b"1,", b"[")) * 80_000_000)
        elif kind == "above":
            file.writestr(rng.choice(("../../x.jpg", "/etc/x.jpg", "a/../../x.txt")), b"x")
        elif kind == "nul":
            file.writestr("ant/x\x01.jpg", b"x")
        else:
            file.comment = bytes(60_000)
    return target.getvalue()


def archived(files, kind):
    """Return files as a zip or a tar."""
    target = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in files.items():
                text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                file.writestr(text, content)
        return target.getvalue()
    with tarfile.open(
        fileobj=target, mode={"tar": "w", "tgz": "w:gz", "txz": "w:xz"}[kind]
    ) as file:
        for name, content in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            file.addfile(item, io.BytesIO(content))
    return target.getvalue()


def tar_fields(content, rng):
    """Write other things into a header of a tar, with a fresh checksum."""
    if content[257:262] != b"ustar":
        return content
    changed = bytearray(content)
    heads = [
        at for at in range(0, len(content) - 512, 512) if content[at + 257 : at + 262] == b"ustar"
    ]
    at = rng.choice(heads)
    start, length = rng.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100)))
    values = (
        b"../x",
        b"/x",
        b"7" * 11,
        b"\x80" + b"\xff" * 11,
        b"1",
        b"2",
        b"3",
        b"6",
        b"x",
        b"L",
        b"-1",
    )
    changed[at + start : at + start + length] = rng.choice(values)[:length].ljust(length, b"\0")
    changed[at + 148 : at + 156] = b" " * 8
    changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)
