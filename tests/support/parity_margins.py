"""How much room the bounds on errors leave: every test's error beside its bound, and its mutants'.

    python tests/prepare.py tests/support/parity_margins.py [-k NAME] [FILE...]

What is measured are the tests themselves: all comparisons of an error by goldens.relative_error or
attention.misplaced with a bound. They run again as on a CPU without AVX, with AVX2 and with AVX-512
(as far as this one has it), in 1, 2 and 4 threads each, then with golden inputs moved by 1e-7,
20 times. Printed is the worst of all runs; -k and files narrow down what is run. Exit status 1
where a test failed or a bound leaves less room than 1.3.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent.parent
SUPPORT = TESTS / "support"
ROOM = 1.3
NUDGE = 1e-7
THREADS = (1, 2, 4)
# For torch, for MKL and for oneDNN, which all choose for themselves.
CAPABILITIES = {
    "default": ("default", "SSE4_2", "SSE41"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512", "AVX512_CORE"),
}


class Comparison(NamedTuple):
    """An error that a test held against a bound; `kept` where it was to stay within it."""

    test: str
    line: int
    kept: bool
    error: float
    bound: float
    setting: str

    @property
    def room(self) -> float:
        """How much further the error could have moved: above 1 where the test held."""
        small, large = (self.error, self.bound) if self.kept else (self.bound, self.error)
        return large / small if small else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=files_with_errors())
    parser.add_argument("-k", default="", help="only tests of this name, as pytest has it")
    parser.add_argument("--nudges", type=int, default=20, help="how often inputs are moved")
    arguments = parser.parse_args()
    comparisons, failed = [], False
    for setting, variables in settings(arguments.nudges):
        tests = {c.test for c in comparisons if c.kept or "NUDGE" not in variables}
        found, code = measure(arguments, setting, variables, tests)
        comparisons += found
        failed |= code != 0
        sys.stderr.write(f"{setting}: {len(found)} comparisons{', tests failed' * (code != 0)}\n")
    worst = worst_of_functions(comparisons)
    for comparison in worst:
        sys.stdout.write(line(comparison))
    return failed or any(c.kept and c.room < ROOM for c in worst)


def files_with_errors() -> list[Path]:
    files = sorted(TESTS.rglob("test_*.py"))
    words = ("goldens", "misplaced")
    return [f for f in files if any(word in f.read_text(encoding="utf-8") for word in words)]


def settings(nudges: int):
    """What each run is called, and its environment variables."""
    here = cpu_capabilities()
    for capability, threads in itertools.product(here, THREADS):
        torch, mkl, onednn = CAPABILITIES[capability]
        yield (
            f"{capability}, {threads} threads",
            {
                "ATEN_CPU_CAPABILITY": torch,
                "MKL_ENABLE_INSTRUCTIONS": mkl,
                "ONEDNN_MAX_CPU_ISA": onednn,
                "OMP_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "PASSIVE",  # more threads than cores would spin for nothing
            },
        )
    for seed in range(nudges):
        yield f"inputs moved, seed {seed}", {"NUDGE": str(seed), "OMP_NUM_THREADS": "1"}


def cpu_capabilities() -> list[str]:
    import torch

    best = torch.backends.cpu.get_cpu_capability().lower()
    names = list(CAPABILITIES)
    return names[: names.index(best) + 1] if best in names else names[:1]


def measure(
    arguments: argparse.Namespace, setting: str, variables: dict[str, str], tests: set[str]
) -> tuple[list[Comparison], int]:
    """One run of pytest, of `tests` only if there are any; its comparisons and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        result, chosen = Path(folder, "comparisons.json"), Path(folder, "tests.json")
        chosen.write_text(json.dumps(sorted(tests)), encoding="utf-8")
        pytest = [sys.executable, "-m", "pytest", "-c", str(TESTS / "pytest.ini"), "-q"]
        pytest += ["-p", "parity_margins", "-k", arguments.k, *map(str, arguments.files)]
        search = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        variables = variables | {"MARGINS": str(result), "CHOSEN": str(chosen)}
        environment = os.environ | {"PYTHONPATH": search} | variables
        process = subprocess.run(
            [*pytest, "-p", "no:cacheprovider"], env=environment, stdout=subprocess.PIPE, text=True
        )
        if process.returncode:
            sys.stderr.write(process.stdout[-4000:])
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else []
    return [Comparison(*comparison, setting) for comparison in found], process.returncode


def worst_of_functions(comparisons: list[Comparison]) -> list[Comparison]:
    """Of every comparison in the tests' text the one with the least room, in the text's order."""
    worst = {}
    for comparison in comparisons:
        place = comparison.test.split("[")[0], comparison.line
        if place not in worst or comparison.room < worst[place].room:
            worst[place] = comparison
    return list(worst.values())


def line(comparison: Comparison) -> str:
    test, _, error, bound = (comparison.test, *comparison[2:5])
    sign = "<=" if comparison.kept else "> "
    tight = "  TIGHT" if comparison.kept and comparison.room < ROOM else ""
    figures = f"{error:.2e} {sign} {bound:.2e}  room {comparison.room:6.2f}{tight}"
    return f"{figures}  {test}  ({comparison.setting})\n"


# In the process that runs the tests this is a plugin of pytest's.


class Measured(float):
    """An error that notes the bounds it is held against."""

    def __lt__(self, bound):
        return note(self, bound, True, float(self) < bound)

    def __le__(self, bound):
        return note(self, bound, True, float(self) <= bound)

    def __gt__(self, bound):
        return note(self, bound, False, float(self) > bound)

    def __ge__(self, bound):
        return note(self, bound, False, float(self) >= bound)


noted: list[tuple] = []


def note(error: float, bound: float, kept: bool, outcome: bool) -> bool:
    if not isinstance(bound, Measured):  # which would be no bound but another error
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        line_number = sys._getframe(2).f_lineno
        noted.append((test, line_number, kept, float(error), float(bound)))
    return outcome


def measured(function):
    return functools.wraps(function)(lambda *a, **k: Measured(function(*a, **k)))


def pytest_configure():
    import attention
    import goldens

    goldens.relative_error = measured(goldens.relative_error)
    attention.misplaced = measured(attention.misplaced)
    if "NUDGE" in os.environ:
        goldens.load = functools.cache(functools.partial(nudged, goldens.load))


def nudged(load, name: str) -> dict:
    """The goldens `name`, all floating-point tensors as float32 and moved by NUDGE."""
    import torch

    generator = torch.Generator().manual_seed(int(os.environ["NUDGE"]))
    moved = {}
    for key, tensor in load(name).items():
        if tensor.is_floating_point():
            by = 1 + NUDGE * torch.randn(tensor.shape, generator=generator)
            tensor = tensor.float() * by
        moved[key] = tensor
    return moved


def pytest_collection_modifyitems(config, items):
    chosen = json.loads(Path(os.environ["CHOSEN"]).read_text(encoding="utf-8"))
    if chosen:
        left_out = [item for item in items if item.nodeid not in chosen]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid in chosen]


def pytest_sessionfinish():
    Path(os.environ["MARGINS"]).write_text(json.dumps(noted), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
