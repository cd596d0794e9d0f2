"""Mutations of checkpoints, each drawn by a random.Random: of bytes, or of what is in a file."""

import io
import json
import pickletools
import struct
import zipfile

import torch

EXTREMES = (0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
GLOBALS = (
    "builtins bytearray",
    "builtins eval",
    "builtins getattr",
    "builtins list",
    "os system",
    "posix mkdir",
    "argparse Namespace",
    "collections OrderedDict",
    "collections Counter",
    "torch FloatStorage",
    "torch LongStorage",
    "torch QInt8Storage",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "numpy.core.multiarray _reconstruct",
    "numpy ndarray",
    "my.code Config",
    "my.code run",
)


# -- bytes of any format --------------------------------------------------------------------------


def bits(data, rng):
    """Flip one to eight bits anywhere."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def edges(data, rng):
    """Flip bits near the beginning or the end, where the headers are."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = min(rng.randrange(600), len(changed) - 1)
        changed[rng.choice((place, len(changed) - 1 - place))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(data, rng):
    """Keep a part, often nearly all of it or nearly nothing."""
    kept = rng.choice((rng.randrange(len(data)), rng.randrange(64), len(data) - rng.randint(1, 64)))
    return data[:kept]


def inserted(data, rng):
    """Insert random bytes, or repeat, delete or move a piece."""
    start, length = rng.randrange(len(data)), rng.randint(1, 200)
    piece = data[start : start + length]
    rest = data[:start] + data[start + length :]
    place = rng.randrange(len(rest))
    changed = {
        "new": data[:start] + rng.randbytes(length) + data[start:],
        "twice": data[:start] + piece + data[start:],
        "gone": rest,
        "moved": rest[:place] + piece + rest[place:],
    }
    return changed[rng.choice(sorted(changed))]


def swapped(data, rng):
    """Put the beginning of another format before the rest, or in its place."""
    beginnings = (b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x04\x95", b"\x1f\x8b\x08", b"")
    beginnings += (struct.pack("<Q", 100) + b'{"a":', b"\x93NUMPY\x01", b"\x89HDF\r\n", b"\x7fELF")
    beginning = rng.choice(beginnings)
    kept = rng.choice((0, len(beginning), rng.randrange(len(data))))
    return beginning + data[kept:]


def numbers(data, rng):
    """Write an extreme number over one to three places."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        size = rng.choice((2, 4, 8))
        value = rng.choice(EXTREMES) % 256**size
        near = rng.choice((600, len(changed)))
        place = rng.randrange(min(near, len(changed)))
        place = rng.choice((place, max(0, len(changed) - place - size)))
        changed[place : place + size] = value.to_bytes(size, "little")
    return bytes(changed)


# -- pickles --------------------------------------------------------------------------------------


def _operations(data):
    """Return the operations of the first pickle in `data` as pieces of bytes, with their names."""
    found = [(code.name, place) for code, _, place in pickletools.genops(data)]
    ends = [place for _, place in found[1:]] + [found[-1][1] + 1]
    return [(name, data[place:end]) for (name, place), end in zip(found, ends, strict=True)]


def _integer(rng):
    return b"\x8a\x09" + rng.choice(EXTREMES).to_bytes(9, "little")


def edited_pickle(data, rng):
    """Change one to four operations: a number, a global, an order; or make it nest."""
    pieces = _operations(data)
    length = sum(len(piece) for _, piece in pieces)
    for _ in range(rng.randint(1, 4)):
        names = rng.choice((("BININT", "BININT1", "BININT2"), ("GLOBAL",), ()))
        fitting = [i for i, (name, _) in enumerate(pieces) if name in names or not names]
        i = rng.choice(fitting or range(len(pieces)))
        if names and names[0] == "GLOBAL":
            module, _, name = rng.choice(GLOBALS).partition(" ")
            pieces[i] = ("GLOBAL", f"c{module}\n{name}\n".encode())
        elif names:
            pieces[i] = ("LONG1", _integer(rng))
        else:
            other = rng.choice(pieces)
            deep = ("nested", b"]" * rng.choice((10, 3000)))
            call = ("call", b"cbuiltins\nbytearray\n" + _integer(rng) + b"\x85R")
            pieces[i : i + 1] = rng.choice(
                ([], [other], [pieces[i]] * 2, [deep], [pieces[i], call])
            )
    return b"".join(piece for _, piece in pieces) + data[length:]


def pickles(data, rng):
    """Edit the pickle of a torch file: the entry of a zip, with fresh checksums, or a whole one."""
    if not data.startswith(b"PK"):
        # the old format: a magic number, a version, the system, then the content
        start = 0
        for _ in range(3):
            start += len(b"".join(piece for _, piece in _operations(data[start:])))
        return data[:start] + edited_pickle(data[start:], rng)
    return _zipped(
        {
            name: edited_pickle(content, rng) if name.endswith("data.pkl") else content
            for name, content in _entries(data).items()
        }
    )


# -- zip files ------------------------------------------------------------------------------------


def _entries(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def _zipped(entries, compression=zipfile.ZIP_STORED):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return target.getvalue()


def directories(data, rng):
    """Edit the directory of a zip: fields of its entries and of its end; or pack it otherwise."""
    if rng.random() < 0.1:
        return _zipped(_entries(data), zipfile.ZIP_DEFLATED)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        # (signature, offsets of fields of 2 bytes, of 4, of 8)
        signature, two, four, eight = rng.choice(
            (
                (b"PK\x01\x02", (6, 8, 10, 28, 30, 32, 34), (16, 20, 24, 42), ()),
                (b"PK\x03\x04", (4, 6, 8, 26, 28), (14, 18, 22), ()),
                (b"PK\x05\x06", (4, 6, 8, 10, 20), (12, 16), ()),
                (b"PK\x06\x06", (), (16, 20), (4, 24, 32, 40, 48)),
                (b"PK\x06\x07", (), (4, 16), (8,)),
            )
        )
        starts = [i for i in range(len(data) - 4) if data[i : i + 4] == signature]
        if not starts:
            continue
        size, offsets = rng.choice([(s, o) for s, o in ((2, two), (4, four), (8, eight)) if o])
        place = rng.choice(starts) + rng.choice(offsets)
        old = int.from_bytes(changed[place : place + size], "little")
        new = rng.choice((old + 1, old ^ 1, old ^ 8, old - 1, rng.choice(EXTREMES)))
        changed[place : place + size] = (new % 256**size).to_bytes(size, "little")
    return bytes(changed)


# -- safetensors ----------------------------------------------------------------------------------


def headers(data, rng):
    """Edit the header of a safetensors file: types, shapes, places, names, or its JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(header))
        entry = header[name]
        field = rng.choice(("dtype", "shape", "data_offsets", "name", "junk", "gone"))
        if field == "dtype":
            entry[field] = rng.choice(("F8_E4M3", "F4", "I64", "BOOL", "C64", "F128", "", None, 7))
        elif field == "gone":
            del header[name]
        elif field == "name":
            header[rng.choice(("__metadata__", "", "²", "\n", "a" * 5000, "b.²"))] = entry
        elif field == "junk":
            header[name] = rng.choice(([], {}, None, 1e400, {"dtype": []}, [[[[]]]] * 9))
        else:
            size = rng.choice((*EXTREMES, -1, 0.5, "1", None))
            old = entry.get(field, [0])
            old = old if isinstance(old, list) else [old]  # an earlier turn has changed it
            entry[field] = rng.choice(([size], [0, size], [*old, size], [size, *old], size, []))
        header = {key: value for key, value in header.items() if isinstance(value, dict)} or {
            "a": {}
        }
    text = json.dumps(header).encode()
    wrong = rng.choice((0, 0, 0, 1, -1, 2**40))
    return struct.pack("<Q", len(text) + wrong) + text + data[8 + length :]


# -- what is in a file ----------------------------------------------------------------------------

STRANGE = ("²", "layer.²", "projector.²", "1" * 5000, "a." * 500, "\ud800", "", ".", "..", "x\ny")
STRANGE += ("projector.9", "norm", "blocks.0.²", "__metadata__", None, 7, ("t",), "٣.weight")


def contents(state, rng):
    """Return a state dict with one to three of its tensors changed, renamed, gone or added."""
    state = dict(state)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(state, key=str))
        tensor = state[name]
        changed = {
            "integers": lambda t: (t * 100).to(rng.choice((torch.int8, torch.int64, torch.bool))),
            "float8": lambda t: t.to(rng.choice((torch.float8_e4m3fn, torch.float8_e5m2fnuz))),
            "half": lambda t: t.to(rng.choice((torch.float16, torch.bfloat16, torch.float64))),
            "complex": lambda t: t.to(rng.choice((torch.complex64, torch.complex128))),
            "sparse": lambda t: t.float().to_sparse(),
            "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            "meta": lambda t: t.to("meta"),
            "nothing": lambda t: t.reshape(-1)[:0],
            "no width": lambda t: t.new_zeros((rng.choice((0, 7)), 0, 10**9)),
            "expanded": lambda t: t.reshape(-1)[:1].expand(10**9),
            "scalar": lambda t: t.sum(),
            "transposed": lambda t: t.mT if t.ndim > 1 else t[::2],
            "infinite": lambda t: torch.full_like(t, float(rng.choice(("nan", "inf")))),
            "list": lambda t: t.tolist(),
            "text": lambda t: "weights",
            "dict": lambda t: {"weight": t, "²": t},
        }
        what = rng.choice((*sorted(changed), "gone", "renamed", "deep"))
        if what == "gone":
            del state[name]
        elif what == "renamed":
            state[rng.choice(STRANGE)] = state.pop(name)
        elif what == "deep":
            for _ in range(rng.choice((50, 300))):  # pickle itself writes no deeper ones
                tensor = {"a": tensor}
            state[name] = tensor
        elif isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
            plain = tensor.dtype in (torch.float32, torch.int64)
            plain = plain and 0 < tensor.numel() < 10**6  # an expanded one would be written whole
            try:
                state[name] = changed[what](tensor) if plain else tensor
            except (RuntimeError, IndexError):  # NaN has no integer, a scalar no slice
                del state[name]
    return state


def sidecars(entry, rng):
    """Return the content of a sidecar with one to three of its fields changed or gone."""
    entry = json.loads(json.dumps(entry))
    for _ in range(rng.randint(1, 3)):
        inner = entry.get("parameters")
        part = rng.choice((entry, inner if isinstance(inner, dict) and inner else entry))
        if not part:
            break
        name = rng.choice(sorted(part))
        values = (None, "", [], {}, 0, -1, 1, 3, 10**5, 10**9, 0.5, True, "9" * 12, "²", "small0")
        values += ("small99999", "1000000-1000000", "16-" * 50 + "8", "vit_tiny_patch16_224")
        values += ("vit_tiny_patch16_224:embed_dim=99999999", "resnet18-s", "resnet50-w9999")
        if rng.random() < 0.3:
            del part[name]
        else:
            part[name] = rng.choice(values)
    return entry
