"""The documentation and the notebooks: complete, of one piece with the sources, without dead links.

Building the site is `make docs`, executing all notebooks `make notebooks`. Not here: docstrings
(test_public_names.py).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import intlass_ops

ROOT = Path(__file__).parent.parent
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]*.py"))
# Raised where nobody but the package sees them: the lowering's reasons to decline a linear.
INTERNAL = ("NotAffine", "NotASlice", "NotConverted", "NotGrouped")
ERRORS = re.compile(r"(Error|fail)$")


def messages() -> Iterator[tuple[str, str]]:
    """(where, text) of each message that is raised; values are written as an ellipsis."""
    for path in sorted((ROOT / "intlass_ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            name = ast.unparse(node.exc.func)
            text = template(node.exc.args[0]) if node.exc.args else ""
            only_values = not re.search(r"[A-Za-z]{3}", text)
            if name not in INTERNAL and ERRORS.search(name) and not only_values:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(each) for each in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def test_every_message_is_in_the_troubleshooting_page() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    pieces = [piece for row in rows for piece in re.findall(r"`([^`]+)`", row)]
    patterns = [
        re.compile(".*".join(re.escape(part) for part in piece.split("…")), re.DOTALL)
        for piece in pieces
    ]
    missing = [
        f"{where}: {text}"
        for where, text in messages()
        if not text.startswith("quantize_: …: …")  # one of the others, with the layer's name
        and not any(pattern.search(text) for pattern in patterns)
    ]
    assert not missing, "\n".join(missing)


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(r"^::: intlass_ops\.([\w.]+)", (DOCS / "reference.md").read_text(), re.M)
    assert len(set(listed)) == len(listed)
    assert set(intlass_ops.__all__) - {"ops"} == {name.split(".")[0] for name in listed}


def test_tables_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("plots", ROOT / "benchmarks" / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        assert plots.filled(text) == text, f"{page.name}: run python benchmarks/plots.py"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        path = page.parent / target
        if path.parent == DOCS / "examples":  # made from the notebook when the site is built
            path = EXAMPLES / f"{path.stem}.ipynb"
        assert path.exists(), target


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_executed(script: Path) -> None:
    text = script.read_text()
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    assert len(cells) == len(re.findall(r"^# %%", text, re.MULTILINE))
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = "\n".join(f"# {line}".rstrip() for line in source.splitlines())
        else:
            assert all(output["output_type"] != "error" for output in cell["outputs"])
            assert cell["execution_count"]
        assert source in text, f"run: python examples/run.py {script.stem[:2]}"


@pytest.mark.parametrize("name", ["01_direct_ops", "06_your_own"])
def test_the_quick_notebooks_run(name: str) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    pyplot.close("all")
