"""A sitting at a GPU: what has never run on one is run to a clock, the most valuable first.

    make sitting OUT=folder MINUTES=9 PART=check       # does the package work on this card?
    make sitting OUT=folder MINUTES=9 PART=evidence    # encoders of results/plan_gpu.md, speed
    .venv/bin/python results/sitting.py subset data/tiny-imagenet-40.zip    # cut the data set
    .venv/bin/python results/sitting.py report OUT [OUT2 ...]    # results/tiny_imagenet/README.md

Every step is a process of its own with a time limit taken from what is left. Its result is written
as it ends, so a kill loses only the step that runs; the same command again goes on with the next
one. A step that fails leaves its traceback, and the next one goes on. OUT gets at most eight files:
sitting.json (every step: status, seconds, result or reason), sitting.log, pilot.json, the executed
notebook, an archive of guesses a pair of encoders, drawings.png. Checkpoints stay in runs/sitting/.

Nothing is installed and nothing is downloaded: a step whose modules are missing is skipped, which
is said. SITTING_WHEELS may name a folder of wheels to use as well. `--tiny` does all of it with
small nets on composed scenes, for tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests" / "bench")]
from dejavu_utils import store  # noqa: E402  the path comes first

PLAN = HERE / "plan_gpu.md"
REPORT = HERE / "tiny_imagenet"  # README of all sittings; sittings/ holds their tables
PARTS = {"check": 200, "evidence": 560}  # seconds at most
PAIRS = 3  # archives of guesses in one OUT
LOG_LIMIT = 8 << 20  # bytes
SUBSET = ("tiny_imagenet_50", "tiny_imagenet_40")  # cut from, and what is cut


class Skipped(Exception):
    """A step that cannot run here, and why."""


@dataclass(frozen=True)
class Step:
    """One step: a process of its own."""

    name: str  # in sitting.json
    work: str  # function of sitting_steps.py
    most: float  # seconds it may take
    least: float = 5.0  # seconds without which it is not worth starting
    reserve: float = 0.0  # seconds to leave for what comes after
    argument: str = ""  # which pair of encoders
    instead_of: str = ""  # runs only where this step is not done


@dataclass(frozen=True)
class Place:
    """Where a sitting keeps what."""

    out: Path  # comes back
    work: Path  # checkpoints, caches and results on their way: stays here
    kept: Path | None  # earlier sittings
    tiny: bool

    @property
    def table(self) -> Path:
        """The file of all steps."""
        return self.out / "sitting.json"

    def result(self, name: str) -> Path:
        """The file in which a step leaves its result."""
        return self.work / f"{name.replace(' ', '-')}.result.json"

    def log(self, name: str) -> Path:
        """The file of what a step prints."""
        return self.work / f"{name.replace(' ', '-')}.log"


def plan() -> dict:
    """Return the block of results/plan_gpu.md that a program reads."""
    import yaml

    text = PLAN.read_text()
    block = text.split("```yaml\n")[1].split("```")[0]
    return yaml.safe_load(block)


def pair_names() -> list[str]:
    """Return the planned pairs of encoders, in their order: "vicreg-260", "simclr-260", ..."""
    planned = plan()
    return [f"{name}-{seed}" for seed in planned["seeds"] for name in planned["criteria"]]


PILOT = [
    Step("pilot", "pilot", most=70, reserve=15),
    Step("pilot compiled", "pilot_compiled", most=90, least=20, reserve=15),
]
TRACE = Step("trace", "trace", most=40)
SPEED = [
    Step("k-NN tf32", "search_tf32", most=60, least=15),
    Step("k-NN bf16", "search_bf16", most=60, least=15),
    Step("race", "race", most=45, least=15),
    Step("embedding", "embedding", most=40, least=15, argument="squares"),
    Step("embedding crops", "embedding", most=40, least=15, argument="crops"),
]
DECODER = Step("decoder", "decoder", most=70, least=45)


def check_steps(known: dict) -> list[Step]:
    """Return the steps of the first part. Where an earlier sitting has the pilot (of steps that are
    `known`), there is time for what it did not measure.
    """
    works = [
        Step("tests", "tests", most=70, reserve=100),
        Step("notebook", "notebook", most=90, reserve=60),
        Step("script", "script", most=80, reserve=60, instead_of="notebook"),
    ]
    if not _finished(known, "pilot"):
        return [*works, *PILOT, TRACE]
    return [*works, TRACE, *_not_measured(known)]


def _not_measured(known: dict) -> list[Step]:
    return [step for step in SPEED if not _finished(known, step.name)]


def evidence_steps(pending: list[str], known: dict, tiny: bool) -> list[Step]:
    """Return the steps of the second part: the first of the pairs, the card, the others."""
    pairs = [_pair_steps(name, tiny) for name in pending[:PAIRS]]
    first = pairs[0] if pairs else []
    others = [step for steps in pairs[1:] for step in steps]
    decoder = [] if _finished(known, "decoder") else [DECODER]
    return [
        Step("pilot", "pilot_short", most=40, reserve=0 if tiny else 400),
        *first,
        *_not_measured(known),
        *decoder,
        *others,
    ]


def _pair_steps(name: str, tiny: bool) -> list[Step]:
    needed = 5 if tiny else 2 * plan()["seconds"] + 60
    after = 0 if tiny else 90
    return [
        Step(f"train {name}", "train", most=420, least=needed, reserve=after, argument=name),
        Step(f"attack {name}", "attack", most=120, least=10, reserve=after / 3, argument=name),
        Step(f"probe {name}", "probe", most=120, least=10, argument=name),
        Step(f"views {name}", "probe_views", most=90, least=15, argument=name),
    ]


def steps(part: str, place: Place) -> list[Step]:
    """Return the steps of a part, or of both (""); a step of both parts once."""
    kept = _read(place.kept / "sitting.json") if place.kept else {}
    known = kept.get("steps", {})
    pending = [name for name in pair_names() if not _finished(known, f"attack {name}")]
    wanted: list[Step] = []
    if part in ("", "check"):
        wanted += check_steps(known)
    if part in ("", "evidence"):
        wanted += evidence_steps(pending, known, place.tiny)
    found: dict[str, Step] = {}
    for step in wanted:
        found.setdefault(step.name, step)
    return list(found.values())


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, content: dict) -> None:
    """Write JSON atomically; what is no number (NaN) becomes null."""
    with store.atomic(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
        temporary.write_text(text.replace("NaN", "null"))


def _finished(table: dict, name: str) -> bool:
    return table.get(name, {}).get("status") == "done"


def done(step: Step, table: dict, place: Place) -> bool:
    """Return whether a step need not run; a training counts while its encoders are here."""
    if step.instead_of:
        return _finished(table, step.instead_of) or _finished(table, step.name)
    if step.work == "train":
        later = [f"{what} {step.argument}" for what in ("attack", "probe", "views")]
        trained = (place.work / f"{step.argument}.trained").is_file()
        used = all(_finished(table, name) for name in later)
        return used or (_finished(table, step.name) and trained)
    return _finished(table, step.name)


def run(place: Place, seconds: float, part: str, only: list[str]) -> dict:
    """Return the table of all steps after running those that are not done, until the time is over.

    ValueError if OUT holds a sitting with other settings.
    """
    began = time.monotonic()
    place.out.mkdir(parents=True, exist_ok=True)
    place.work.mkdir(parents=True, exist_ok=True)
    content = _read(place.table)
    settings = {"tiny": place.tiny, "plan": store.key(plan=plan())}
    if content and content["settings"] != settings:
        raise ValueError(f"{place.out} holds a sitting with other settings: take another OUT.")
    content = content or {"settings": settings, "steps": {}}
    table = content["steps"]
    _use_wheels(place)

    planned = steps(part, place)
    wanted = [step for step in planned if not only or step.name in only]
    known = [step.name for step in planned]
    for name in only:
        if name not in known:
            raise ValueError(f"no step {name}; expected some of {', '.join(known)}.")
    waiting = Waiting(place)
    try:
        for step, following in zip(wanted, [*wanted[1:], None], strict=True):
            if done(step, table, place):
                print(f"{step.name}: done", flush=True)
                continue
            left = seconds - (time.monotonic() - began)
            limit = left if place.tiny else min(step.most, left - step.reserve)
            if left < step.least or limit < 1:
                reason = f"needs {step.least + step.reserve:.0f} s, {max(left, 0):.0f} s were left"
                entry = {"status": "skipped", "reason": reason, "seconds": 0.0}
            else:
                process = waiting.take(step)
                if following and not done(following, table, place):
                    waiting.start(following)
                entry = _one(step, process, place, limit)
            table[step.name] = entry
            content["minutes"] = content.get("minutes", 0.0) + entry["seconds"] / 60
            write(place.table, content)
            said = entry.get("reason") or entry["result"].get("line", "")
            print(f"{step.name}: {entry['status']}, {entry['seconds']:.0f} s {said}", flush=True)
    finally:
        waiting.end()
    return content


class Waiting:
    """The processes of steps: each is started while the one before it runs, since imports take
    seconds, and waits until it is told to begin.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.processes = place, {}

    def start(self, step: Step) -> None:
        """Start the process of a step; it imports what it needs and waits."""
        place = self.place
        command = [sys.executable, __file__, "step", step.work, str(place.out), str(place.work)]
        command += ["--name", step.name, "--argument", step.argument]
        command += ["--tiny"] if place.tiny else []
        for path in (place.result(step.name), place.log(step.name)):
            path.unlink(missing_ok=True)
        with place.log(step.name).open("wb") as output:
            self.processes[step.name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(place),
                start_new_session=True,
            )

    def take(self, step: Step) -> subprocess.Popen:
        """Return the process of a step, which waits."""
        if step.name not in self.processes:
            self.start(step)
        return self.processes.pop(step.name)

    def end(self) -> None:
        """End the processes that were not needed."""
        for process in self.processes.values():
            _end(process)


def _use_wheels(place: Place) -> None:
    """Put the wheels that SITTING_WHEELS names where the steps find them."""
    files, site = _wheels(), _site(place)
    if not files or site.is_dir():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    made = place.work / "site.part"
    shutil.rmtree(made, ignore_errors=True)
    answer = subprocess.run(
        [*pip, "--target", str(made), *files], capture_output=True, text=True, timeout=120
    )
    if answer.returncode:
        _log(place, f"wheels: {answer.stderr}")
        print("wheels: could not be used, see sitting.log", flush=True)
        return
    made.rename(site)


def _wheels() -> list[str]:
    folder = os.environ.get("SITTING_WHEELS")
    return sorted(map(str, Path(folder).glob("*.whl"))) if folder else []


def _site(place: Place) -> Path:
    """Return where the wheels are unpacked: another folder for other wheels."""
    names = [Path(file).name for file in _wheels()]
    return place.work / f"site-{store.key(wheels=names)}"


def _environment(place: Place) -> dict[str, str]:
    site = _site(place)
    paths = [str(ROOT), str(site) if site.is_dir() else "", os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DEJAVU_RUNS": str(place.work / "runs"),
        "PYTHONUNBUFFERED": "1",
    }


def _one(step: Step, process: subprocess.Popen, place: Place, limit: float) -> dict:
    """Return what became of a step, which was ended at its limit with all that it had started."""
    began = time.monotonic()
    over = False
    try:
        process.communicate(f"{limit:.1f}\n".encode(), timeout=limit)
    except subprocess.TimeoutExpired:
        over = True
    finally:
        _end(process)
    seconds = round(time.monotonic() - began, 1)
    said = place.log(step.name).read_text(errors="replace")
    _log(place, f"== {step.name}: {seconds} s of {limit:.0f} s\n{said}")
    entry = _read(place.result(step.name))
    if not entry:
        reason = f"over its limit of {limit:.0f} s" if over else f"ended with {process.returncode}"
        entry = {"status": "failed", "reason": reason, "traceback": said[-6000:]}
    return entry | {"seconds": seconds}


def _end(process: subprocess.Popen) -> None:
    """End the process of a step and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(place: Place, text: str) -> None:
    path = place.out / "sitting.log"
    before = path.read_text(errors="replace") if path.is_file() else ""
    with store.atomic(path) as temporary:
        temporary.write_text((before + text + "\n")[-LOG_LIMIT:])


def step(work: str, place: Place, name: str, argument: str) -> None:
    """Run one step in this process, when a line with its limit comes, and leave its result."""
    threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()
    import sitting_steps

    limit = float(sys.stdin.readline())
    try:
        result = getattr(sitting_steps, work)(place, argument, limit)
        entry = {"status": "done", "result": result | {"where": sitting_steps.where()}}
    except Skipped as error:
        entry = {"status": "skipped", "reason": str(error)}
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).split(".")[0]
        entry = {"status": "skipped", "reason": f"{missing} is not installed"}
    except Exception as error:  # whatever it was: the next step goes on
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:300]
        entry = {"status": "failed", "reason": reason, "traceback": traceback.format_exc()[-6000:]}
    write(place.result(name), entry)


def _stop_with(parent: int) -> None:
    """End this process and all that it has started when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def subset(target: Path) -> None:
    """Write the classes of the smaller data set, training pictures and boxes, to a zip file."""
    import zipfile

    from dejavu_utils.data import manifests

    larger, smaller = (manifests.read(name) for name in SUBSET)
    source = manifests.locate(larger)
    wanted = set(smaller["classes"])
    top = Path(smaller["file"]).stem
    with (
        zipfile.ZipFile(source) as whole,
        store.atomic(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as part,
    ):
        for name in sorted(whole.namelist()):
            inner = name.partition("/")[2]
            content = _cut(inner, wanted, whole.read(name))
            if content is None:
                continue
            entry = zipfile.ZipInfo(f"{top}/{inner}", date_time=(1980, 1, 1, 0, 0, 0))
            # Pictures do not compress: storing them keeps the bytes the same everywhere.
            part.writestr(entry, content)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB, sha256 {store.digest(target)}")


def _cut(name: str, wanted: set[str], content: bytes) -> bytes | None:
    """Return what the subset holds of a file of the whole, None where that is nothing."""
    if name in ("wnids.txt", "words.txt"):
        lines = content.decode().splitlines()
        kept = [line for line in lines if line.split("\t")[0].strip() in wanted]
        return "".join(f"{line}\n" for line in kept).encode()
    folder, _, rest = name.partition("/")
    in_it = folder == "train" and rest.partition("/")[0] in wanted
    return content if in_it and not name.endswith("/") else None


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("out", type=Path)
    running.add_argument("--minutes", type=float, default=9.0)
    running.add_argument("--part", choices=["", *PARTS], default="")
    running.add_argument("--only", default="", help="names of steps, with commas; for tests")
    running.add_argument("--work", type=Path, help="runs/sitting, if not given")
    running.add_argument("--tiny", action="store_true", help="small nets, for tests")
    alone = commands.add_parser("step")
    for name in ("function", "out", "work"):
        alone.add_argument(name)
    alone.add_argument("--argument", default="")
    alone.add_argument("--name")
    alone.add_argument("--tiny", action="store_true")
    cutting = commands.add_parser("subset")
    cutting.add_argument("target", type=Path)
    reporting = commands.add_parser("report")
    reporting.add_argument("outs", type=Path, nargs="*")
    reporting.add_argument("--into", type=Path, default=REPORT, help="another folder, for tests")
    options = parser.parse_args()

    if options.command == "subset":
        return subset(options.target)
    if options.command == "report":
        import sitting_report

        return sitting_report.report(options.outs, options.into)
    if options.command == "step":
        place = _place(Path(options.out), Path(options.work), options.tiny)
        return step(options.function, place, options.name, options.argument)
    seconds = 60 * options.minutes
    if options.part:
        seconds = min(seconds, PARTS[options.part])
    work = options.work or store.runs("sitting")
    place = _place(options.out.resolve(), work.resolve(), options.tiny)
    try:
        run(place, seconds, options.part, [name for name in options.only.split(",") if name])
    except ValueError as error:
        sys.exit(f"error: {error}")


def _place(out: Path, work: Path, tiny: bool) -> Place:
    return Place(out, work, None if tiny else REPORT / "sittings", tiny)


if __name__ == "__main__":
    sys.modules["sitting"] = sys.modules["__main__"]  # the steps raise this file's Skipped
    main()
