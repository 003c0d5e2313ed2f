"""Two processes write one file at the same time, again and again: it is always the whole of one.

    python tests/race_writers.py [--races 1000] [--threads] [--folder FOLDER]

In every other race both may overwrite, and both must succeed. In the others exactly one must, and
the other be told that the file exists. Both processes believe to be number 1, as they may in two
containers; `--threads` makes them two threads of one. After each race the file must be one
writer's, bit for bit, and the only one in the folder.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "support"))

import pack  # noqa: F401
import torch
from turbodiffusion_pack.turbo_core.checkpoint.file import read_tensors
from turbodiffusion_pack.turbo_core.checkpoint.write import write_pth, write_safetensors

TENSORS, SIZE = 24, 2**14
LONGEST_HEAD_START = 0.002  # seconds
WRITERS = (1, 2)


def contents(writer: int) -> dict[str, torch.Tensor]:
    return {f"blocks.{n}.x": torch.full((SIZE,), float(writer)) for n in range(TENSORS)}


def work(connection, writer: int, start) -> None:
    """One writer: takes (path, overwrite) and answers with what came of it."""
    tensors = contents(writer)
    rng = random.Random(writer)
    connection.send("ready")
    while request := connection.recv():
        path, overwrite = request
        write = write_pth if path.suffix == ".pth" else write_safetensors
        start.wait()
        time.sleep(rng.random() * LONGEST_HEAD_START)
        try:
            write(path, tensors, overwrite=overwrite)
            connection.send("written")
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


def fault_of(answers: list[str], path: Path, overwrite: bool) -> str:
    """What is wrong after a race, empty if nothing."""
    told = [answer for answer in answers if answer != "written"]
    if len(told) != (0 if overwrite else 1) or not all("exists" in answer for answer in told):
        return f"the writers said {answers}"
    if [file.name for file in path.parent.iterdir()] != [path.name]:
        return f"left {sorted(file.name for file in path.parent.iterdir())}"
    values = {value for tensor in read_tensors(path).values() for value in tensor.unique().tolist()}
    if len(values) != 1 or (told and values != {float(answers.index("written") + 1)}):
        return f"the file has the values {values} after {answers}"
    return ""


def work_as_process_1(*args) -> None:
    os.getpid = lambda: 1
    torch.set_num_threads(1)
    work(*args)


def race(races: int, folder: Path, threads: bool = False) -> tuple[list[str], Counter]:
    """What was wrong in each race where something was, and how often each writer's file stayed."""
    context = multiprocessing.get_context("spawn")
    start = threading.Barrier(2) if threads else context.Barrier(2)
    pipes = [context.Pipe() for _ in WRITERS]
    make, target = (threading.Thread, work) if threads else (context.Process, work_as_process_1)
    children = [
        make(target=target, args=(theirs, writer, start))
        for writer, (_, theirs) in zip(WRITERS, pipes, strict=True)
    ]
    for child in children:
        child.start()
    ours = [pipe for pipe, _ in pipes]
    for pipe in ours:
        pipe.recv()
    faults, stayed = [], Counter()
    for number in range(races):
        overwrite, suffix = number % 2 == 0, (".safetensors", ".pth")[number // 2 % 2]
        path = folder / f"model{suffix}"
        for pipe in ours:
            pipe.send((path, overwrite))
        answers = [pipe.recv() for pipe in ours]
        if fault := fault_of(answers, path, overwrite):
            faults.append(f"race {number}: {fault}")
        else:
            stayed[int(read_tensors(path)["blocks.0.x"][0])] += 1
        for file in folder.iterdir():
            file.unlink()
    for pipe, child in zip(ours, children, strict=True):
        pipe.send(None)
        child.join()
    return faults, stayed


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--races", type=int, default=1000)
    parser.add_argument("--threads", action="store_true", help="of one process")
    parser.add_argument("--folder", type=Path, help="on the file system to try, the system's own")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        start = time.perf_counter()
        faults, stayed = race(args.races, Path(folder), args.threads)
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{args.races} races, {len(faults)} faults, {seconds:.0f} s; the file was ")
    sys.stdout.write(f"the first writer's {stayed[1]} times, the second's {stayed[2]} times\n")
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
