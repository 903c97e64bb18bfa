"""What the demo prints: progress, the streamed answer, the table. Plain lines where piped.

Not here: what happens (__init__.py) and what is measured (figures.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 100
Advance = Callable[[int, int], None]


class Check(NamedTuple):
    """What has to hold for the demo to succeed; ``holds`` None: only worth knowing."""

    holds: bool | None
    what: str


class Show:
    """Everything the demo says. ``terminal``: colours and moving bars, else lines of text."""

    def __init__(self, stream: Any = None) -> None:
        self.console = Console(file=stream or sys.stdout, highlight=False)
        self.terminal = self.console.is_terminal
        if not self.terminal:
            self.console = Console(file=stream or sys.stdout, highlight=False, width=_PLAIN_WIDTH)

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def title(self, model: str, detail: str) -> None:
        if self.terminal:
            self.console.print(Panel(Text(detail, "dim"), title=model, title_align="left"))
        else:
            self.say(f"{model}\n{detail}\n")

    def problem(self, text: str) -> None:
        self.say(text, "red")

    @contextmanager
    def bar(self, what: str) -> Iterator[Advance]:
        """A progress bar; the body calls what it gets with (done, total)."""
        if not self.terminal:
            self.say(f"{what} ...")
            yield lambda done, total: None
            return
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield advance

    def question(self, prompt: str) -> None:
        self.console.print()
        self.say(f"> {prompt}", "bold cyan")

    def answer(self, tokens: Iterator[Any], tokenizer: Any) -> list[Any]:
        """Print generated tokens as they come; returns them all."""
        seen: list[Any] = []
        printed = 0
        for chosen in tokens:
            seen.append(chosen)
            text = tokenizer.decode([c.token for c in seen], skip_special_tokens=True)
            # A character may take several tokens: wait for its last.
            if not text.endswith("\ufffd"):
                self.console.print(
                    text[printed:], end="", soft_wrap=True, markup=False, style="green"
                )
                printed = len(text)
                self.console.file.flush()
        self.console.print("\n")
        return seen

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(box=box.ROUNDED if self.terminal else box.MARKDOWN, header_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def checks(self, results: list[Check]) -> None:
        marks = {True: ("✓ ", "bold green"), False: ("✗ ", "bold red"), None: ("· ", "dim")}
        for each in results:
            mark = Text(*marks[each.holds])
            self.console.print(mark + Text(each.what), soft_wrap=True)
