"""Docstrings as Markdown: examples become code blocks, roles plain code.

A griffe extension. The docstrings are prose with indented formulas and doctests, written for
help() first.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )\S.*\n?|^ .*\n?)*)+", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when it has been read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The docstring with fenced examples and without roles."""
    text = _ROLE.sub(r"`\1`", text)
    text = text.replace("][,", r"]\[,")  # an optional result, not a link
    return _EXAMPLE.sub(lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", text)
