"""What mkdocs does not do by itself: a page for each executed notebook of examples/, all notes.

Code, text and stored outputs are shown as they are; building runs no notebook (examples/run.py
does). Standard library only, besides mkdocs.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).parent.parent / "examples"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every file of docs/notes is in the navigation, under its own heading."""
    notes = [
        f"notes/{path.name}" for path in sorted((Path(config.docs_dir) / "notes").glob("*.md"))
    ]
    config.nav = [*(config.nav or ()), {"Notes of the developers": notes}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs when it has found the pages."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        pictures: dict[str, bytes] = {}
        text = page(path, pictures)
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    return files


def page(path: Path, pictures: dict[str, bytes]) -> str:
    """The Markdown of a notebook; its figures are added to ``pictures`` by file name."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source.strip():
            parts.append(_fenced(source, "python"))
            for output in cell["outputs"]:
                parts.append(_shown(output, path.stem, pictures))
    title, *rest = parts
    where = f"\n\nThis page is the notebook `examples/{path.name}`, with its outputs of a CPU."
    return "\n\n".join([title + where, *filter(None, rest)])


def _shown(output: Any, stem: str, pictures: dict[str, bytes]) -> str:
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]), "text")
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}-{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![The figure that the code above draws]({name})"
    return _fenced("".join(data["text/plain"]), "text") if "text/plain" in data else ""


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"
