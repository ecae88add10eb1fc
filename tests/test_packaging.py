import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fastnuggets
from fastnuggets._build import check_build

ROOT = Path(__file__).parent.parent
TORCH_SERIES = ".".join(torch.__version__.split(".")[:2])
NO_TORCH = "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"


@pytest.fixture
def record(tmp_path):
    def write(**changes):
        path = tmp_path / "_build.json"
        path.write_text(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, **changes}))
        return path

    return write


@pytest.fixture
def source(tmp_path):
    """A copy of what setup.py reads, so that nothing is written into the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc", "fastnuggets"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def run(source, code_or_file, *args, **environment):
    return subprocess.run(
        [sys.executable, *code_or_file, *args],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_info_is_of_this_build():
    info = fastnuggets.build_info()
    assert str(info["torch"]).startswith(TORCH_SERIES)
    assert str(info["version"]).startswith(fastnuggets.__version__ + "+pt" + TORCH_SERIES.replace(".", ""))
    assert info["cpp"] >= 202002


def test_build_fits_a_patch_release(record):
    assert check_build(record(torch=TORCH_SERIES + ".99"))["torch"] == TORCH_SERIES + ".99"


def test_cpu_build_fits_any_torch_of_the_series(record):
    assert check_build(record(cuda=None))["cuda"] is None


def test_build_for_another_torch_is_one_sentence(record):
    with pytest.raises(ImportError, match=r"built for torch 1\.13\.1 .* but torch .* is installed") as error:
        check_build(record(torch="1.13.1"))
    assert "\n" not in str(error.value)


def test_build_for_another_cuda_is_refused(record):
    with pytest.raises(ImportError, match=r"\(CUDA 99\.0\) but torch .* is installed"):
        check_build(record(cuda="99.0"))


def test_missing_build_says_how_to_make_it(tmp_path):
    with pytest.raises(ImportError, match="build_ext --inplace"):
        check_build(tmp_path / "_build.json")


def test_stub_lists_what_the_compiled_module_has():
    stub = ast.parse((ROOT / "fastnuggets" / "_C.pyi").read_text())
    names = {node.name: node for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert set(names) == {name for name in vars(fastnuggets._C) if not name.startswith("_")}
    for name, node in names.items():
        if isinstance(node, ast.ClassDef):
            methods = {method.name for method in node.body} - {"__init__"}
            assert methods == {m for m in vars(getattr(fastnuggets._C, name)) if not m.startswith("_")}


def test_metadata_and_sdist_need_no_torch(source):
    result = run(source, ["-c", NO_TORCH], "sdist")
    assert result.returncode == 0, result.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    assert sdist.name == f"fastnuggets-{fastnuggets.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    ours = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert ours <= packed


def test_build_without_torch_says_what_to_run(source):
    result = run(source, ["-c", NO_TORCH], "build_ext")
    assert result.returncode != 0
    assert f"{sys.executable} -m pip install --no-build-isolation {source}" in result.stderr
    assert "Traceback" not in result.stderr


def test_version_names_torch_and_device(source):
    result = run(source, ["setup.py"], "--version", FORCE_CPU="1")
    version = f"{fastnuggets.__version__}+pt{TORCH_SERIES.replace('.', '')}cpu"
    assert result.stdout.split()[-1] == version, result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_forced_cuda_build_needs_a_cuda_torch(source):
    result = run(source, ["setup.py"], "build_ext", FORCE_CUDA="1")
    assert result.returncode != 0
    assert "FORCE_CUDA=1 needs a CUDA build of torch" in result.stderr
    assert "Traceback" not in result.stderr
