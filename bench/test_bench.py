"""Our forward and backward under pytest-benchmark: `pytest bench`. The comparison with peers is `python -m bench`."""

import pytest

from bench import cases, workload

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def setting():
    return cases.Setting(workload.load().first(8), 24, 1.0)


@pytest.mark.parametrize("density", ["molgrid", "gaussian", "wave"])
@pytest.mark.parametrize("make", [cases.forward, cases.backward])
def test_ours(benchmark, setting, make, density):
    options = {"molgrid": cases.MOLGRID, "gaussian": cases.GAUSSIAN, "wave": cases.WAVE}[density]
    arguments = (setting.empty(),) if make is cases.forward else ()
    contender = make(density, setting, *arguments, **options)
    assert contender.error(benchmark(contender.run)) <= cases.WAVE_TOLERANCE
