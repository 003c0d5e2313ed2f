"""Every Triton kernel compiles for every card, fits its shared memory and spills nothing."""

import ahead_of_time
import pytest

JOBS = {job.name: job for job in ahead_of_time.jobs()}


@pytest.fixture(scope="module")
def compiled():
    return ahead_of_time.compile_all()


def test_names_tell_the_jobs_apart(compiled):
    assert len(JOBS) == len(ahead_of_time.jobs()) == len(compiled)


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
