"""Every Triton kernel compiles for every card, fits its shared memory and spills nothing."""

import ast

import ahead_of_time
import pytest

JOBS = {job.name: job for job in ahead_of_time.jobs()}


@pytest.fixture(scope="module")
def compiled():
    return ahead_of_time.compile_all()


def test_names_tell_the_jobs_apart(compiled):
    assert len(JOBS) == len(ahead_of_time.jobs()) == len(compiled)


def _kernels_in(path) -> set[str]:
    """Names of the file's functions called `*_kernel` that Triton compiles."""
    functions = [f for f in ast.walk(ast.parse(path.read_text())) if isinstance(f, ast.FunctionDef)]
    return {
        f.name
        for f in functions
        if f.name.endswith("_kernel")
        and any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)
    }


def test_every_kernel_is_compiled():
    files = (ahead_of_time.ROOT / "kernels").rglob("*.py")
    written = set().union(*map(_kernels_in, files))
    assert written
    assert written == {job.variant.kernel.__name__ for job in JOBS.values()}


@pytest.mark.parametrize("name", JOBS)
def test_fits_shared_memory(name, compiled):
    limit = ahead_of_time.SHARED_LIMIT[JOBS[name].capability]
    assert compiled[name]["shared"] <= limit


@pytest.mark.parametrize("name", JOBS)
def test_spills_nothing_unmeasured(name, compiled):
    assert compiled[name]["stack"] + compiled[name]["local"] <= JOBS[name].variant.spills


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith("linear_")])
def test_int8_products_run_on_tensor_cores(name, compiled):
    int8 = (".s8.s8", "kind::i8")
    assert any(kind in instruction for instruction in compiled[name]["matrix"] for kind in int8)
