"""Execute the notebooks of this folder: NN_name.py (jupytext, py:percent) into NN_name.ipynb.

    python examples/run.py             run all and write the notebooks with their outputs
    python examples/run.py 01 04       only these
    python examples/run.py --check     run all, write nothing

Exit code 1 if a cell fails. The scripts are the sources: edit them, then run this.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of names (all)")
    parser.add_argument("--check", action="store_true", help="run, but write nothing")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failed = 0
    for script in sorted(HERE.glob("[0-9][0-9]_*.py")):
        if options.names and not script.name.startswith(tuple(options.names)):
            continue
        begin = time.perf_counter()
        notebook = notebook_of(script)
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": HERE}},
        )
        try:
            client.execute()
        except nbclient.exceptions.CellExecutionError as error:
            failed += 1
            print(f"{script.name}: {error}", file=sys.stderr)
            continue
        if not options.check:
            write(notebook, script.with_suffix(".ipynb"))
        print(f"{script.stem}: {time.perf_counter() - begin:.0f} s")
    return 1 if failed else 0


def notebook_of(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, without outputs and with ids that stay the same."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{script.stem[:2]}-{number}"
        cell.metadata.clear()
    return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Without times of execution, and without warnings, which name paths of the machine."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    sys.exit(main())
