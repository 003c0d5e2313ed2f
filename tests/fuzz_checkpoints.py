"""Reads damaged checkpoint files by the thousand: none may hang, bloat or crash the reader.

    python tests/fuzz_checkpoints.py [--seeds 1 2 3 4] [--count 25000] [--keep FOLDER]

Every file of a seed is made from the seed and its number alone, so that a failure comes again with
`--seeds SEED --first NUMBER --count 1`. A child process reads them, and is replaced where it hangs
or dies. A file may take 5 s, and 64 MB and ten times its size of resident memory, the pages that it
maps included. Anything that is raised and no CheckpointError is a fault, and so is a message that
tells where the file is, is no line of text or is longer than 2000 characters. Linux only, which
tells a process its peak memory.
"""

import argparse
import multiprocessing
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "support"))

import pack  # noqa: F401
import torch
from mutations import KINDS, Sources
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError, read_checkpoint

SECONDS = 5.0
MB = 1_000_000
ROOM, TIMES = 64 * MB, 10
ADDRESS_SPACE = 8_000 * MB  # beyond what the child has at its start, to keep the machine alive
LONGEST_MESSAGE = 2000
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Result:
    """What became of one file; `fault` says what was wrong, empty if nothing."""

    number: int
    kind: str
    outcome: str = "killed"
    fault: str = ""
    seconds: float = 0.0
    memory: int = 0
    size: int = 0


@dataclass
class Report:
    """What became of all of them."""

    outcomes: Counter = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, seed: int, result: Result) -> None:
        kind = result.kind
        self.outcomes[kind, result.outcome] += 1
        self.slowest[kind] = max(self.slowest.get(kind, 0.0), result.seconds)
        self.largest[kind] = max(self.largest.get(kind, 0), result.memory)
        if result.fault:
            self.faults.append(f"seed {seed} number {result.number} {kind}: {result.fault}")

    def __str__(self) -> str:
        lines = [f"{'':12} {'files':>7} {'read':>7} {'refused':>7} {'slowest s':>9} {'most MB':>8}"]
        for kind in KINDS:
            read, refused = (self.outcomes[kind, o] for o in ("read", "refused"))
            files = sum(n for (k, _), n in self.outcomes.items() if k == kind)
            slowest, largest = self.slowest.get(kind, 0.0), self.largest.get(kind, 0) / MB
            lines.append(f"{kind:12} {files:7} {read:7} {refused:7} {slowest:9.2f} {largest:8.1f}")
        return "\n".join([*lines, f"{len(self.faults)} faults", *self.faults])


def kind_of(number: int) -> str:
    return KINDS[number % len(KINDS)]


def write(sources: Sources, seed: int, number: int, folder: Path) -> Path:
    """Make the file of this seed and number; returns what to open."""
    rng = random.Random(f"{seed}-{number}")
    name, files = sources.damaged(kind_of(number), rng)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder / name


def read(path: Path, number: int) -> Result:
    """Read one file and measure it."""
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    result = Result(number, kind_of(number), size=size)
    CLEAR.write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    start = time.perf_counter()
    try:
        read_checkpoint(path)
        result.outcome = "read"
    except CheckpointError as error:
        result.outcome = "refused"
        told = str(error)
        if str(path.parent) in told or len(told) > LONGEST_MESSAGE or not told.isprintable():
            result.fault = f"is refused with a message that tells too much: {told[:300]!a}"
    except BaseException as error:
        result.outcome, result.fault = "raised", f"{type(error).__name__}: {str(error)[:200]!a}"
    result.seconds = time.perf_counter() - start
    result.memory = resident("VmHWM") - before
    if result.seconds > SECONDS:
        result.fault += f" took {result.seconds:.1f} s"
    if result.memory > ROOM + TIMES * size:
        result.fault += f" took {result.memory / MB:.0f} MB for a file of {size} bytes"
    return result


def resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1])


def work(connection, seed: int, numbers: range, folder: Path) -> None:
    """The child process."""
    import resource

    torch.set_num_threads(1)
    sources = Sources()
    used = 1024 * int(re.search(r"VmSize:\s+(\d+) kB", STATUS.read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)
    connection.send(None)
    for number in numbers:
        for file in folder.iterdir():
            file.unlink()
        connection.send(read(write(sources, seed, number, folder), number))


def results(seed: int, numbers: range, folder: Path) -> Iterator[Result]:
    """What becomes of the files of these numbers; a child that hangs or dies is replaced."""
    context = multiprocessing.get_context("spawn")
    while numbers:
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(theirs, seed, numbers, folder))
        child.start()
        theirs.close()
        ours.recv()
        fault = ""
        while numbers and not fault:
            try:
                fault = "" if ours.poll(2 * SECONDS) else "hangs"
                result = Result(numbers[0], kind_of(numbers[0]), fault=fault)
                yield result if fault else ours.recv()
            except EOFError:
                fault = "ends the process"
                yield Result(numbers[0], kind_of(numbers[0]), fault=fault)
            numbers = numbers[1:]
        child.kill()
        child.join()


def fuzz(seeds: list[int], first: int, count: int, keep: Path | None = None) -> Report:
    """Read `count` files of each seed, from number `first` on."""
    report = Report()
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as temp:
        for seed in seeds:
            for result in results(seed, range(first, first + count), Path(temp)):
                report.add(seed, result)
                if result.fault and keep:
                    kept = keep / f"{seed}-{result.number}"
                    kept.mkdir(parents=True, exist_ok=True)
                    write(Sources(), seed, result.number, kept)
    return report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--count", type=int, default=25_000, help="files of each seed")
    parser.add_argument("--first", type=int, default=0, help="the first file's number")
    parser.add_argument("--keep", type=Path, help="folder for the files that fail")
    args = parser.parse_args()
    start = time.perf_counter()
    report = fuzz(args.seeds, args.first, args.count, args.keep)
    sys.stdout.write(f"{report}\n{time.perf_counter() - start:.0f} s\n")
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
