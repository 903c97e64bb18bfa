"""The built wheel, installed into an environment of its own, works outside the source tree."""

from __future__ import annotations

import importlib.metadata
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE_IT = """
import importlib.metadata, pathlib, sys
import torch
import intlass_ops

package = pathlib.Path(intlass_ops.__file__).parent
assert package.is_relative_to(sys.prefix), package
(entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="intlass")
assert callable(entry.load())
assert "intlass" in torch._dynamo.list_backends()

q = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
packed = intlass_ops.pack_int4(q)
assert torch.equal(intlass_ops.unpack_int4(packed), q)
x = torch.randint(-4, 5, (3, 64)).to(torch.bfloat16)
scales = torch.ones(32, 1)
y = intlass_ops.matmul_int4_bf16_tn(x, packed, scales, out_dtype=torch.float32)
assert torch.equal(y, x.float() @ q.float().T)
print("ran from", package)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in, or taken from, the source tree."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT / "intlass_ops", source / "intlass_ops", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", source / "dist", source, cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_carries_every_source_file(wheel: Path) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "intlass_ops").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert sources <= packed, f"missing from the wheel: {sorted(sources - packed)}"
    assert not {name.split("/")[0] for name in packed} - {"intlass_ops", wheel_info(wheel)}


def wheel_info(wheel: Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return f"{name}-{version}.dist-info"


def test_wheel_runs_outside_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    # Our pip runs in that one too: to set up another takes 5 s. (Imported here, it would change
    # what `import distutils` finds.)
    our_pip = importlib.metadata.distribution("pip").locate_file("pip")
    run(python, our_pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies come from this environment. A path listed in a .pth file does not have its
    # own .pth files read, so an editable install of the source tree stays out of sight.
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")

    assert "ran from" in run(python, "-c", USE_IT, cwd=tmp_path)
    assert "demo" in run(tmp_path / "venv" / "bin" / "intlass", "--help", cwd=tmp_path)
