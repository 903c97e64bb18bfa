"""What the package promises: its names, their documentation, and the examples in it."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import intlass_ops

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
# Run by a command, or on machines with more than the package's own dependencies.
APART = ("__main__", "demo", "integrations", "triton")


def modules_with_examples() -> list[str]:
    """From the sources, so that collecting tests imports none of them."""
    root = Path(intlass_ops.__file__).parent
    return [
        ".".join(("intlass_ops", *path.relative_to(root).with_suffix("").parts))
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0].removesuffix(".py") not in APART
        and re.search(r"^ *>>> (?!.*SKIP)", path.read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize("name", intlass_ops.__all__)
def test_public_name_is_there_and_documented(name: str) -> None:
    public = getattr(intlass_ops, name)
    assert name in dir(intlass_ops)
    text = inspect.getdoc(public)
    assert text, name
    # Not one that a dataclass or a base class made up.
    assert not text.startswith(f"{name}("), name
    if inspect.isclass(public):
        assert "__doc__" in vars(public)


@pytest.mark.parametrize("name", intlass_ops.__all__)
def test_public_name_has_an_example(name: str) -> None:
    public = getattr(intlass_ops, name)
    if inspect.ismodule(public) or (inspect.isclass(public) and issubclass(public, Exception)):
        return
    assert ">>> " in (inspect.getdoc(public) or ""), name


def test_names_are_listed_once() -> None:
    assert len(set(intlass_ops.__all__)) == len(intlass_ops.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = intlass_ops.quantise


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=OPTIONS)
    assert results.attempted
    assert not results.failed, "see the captured output"


def test_importing_the_package_is_quick_and_brings_no_compiler() -> None:
    compilers = "triton", "torch._inductor.compile_fx", "torch._dynamo"
    heavy = {*compilers, "cupy", "transformers", "scipy.linalg", "sympy"}
    code = "import sys, torch; of_torch = {*sys.modules}; import intlass_ops; "
    code += f"print(sorted({heavy} & {{*sys.modules}} - of_torch))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
