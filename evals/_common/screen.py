"""Output of an eval: progress on stderr, tables on stdout."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Advance(Protocol):
    """Callback that marks one piece of work as done and names the next."""

    def __call__(self, doing: str) -> None: ...


@contextmanager
def progress(total: int) -> Iterator[Advance]:
    """Show a bar of `total` pieces, drawn only at `advance`: a refresh thread would disturb timing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def advance(doing: str) -> None:
            bar.update(task, advance=1, description=doing, refresh=True)

        yield advance


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; the first column is text, the others are right-aligned."""
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console()
    # Not a terminal: a log or a pipe, where folded cells would be lost.
    (console if console.is_terminal else Console(width=140)).print(table)


def megabytes(size: int) -> str:
    """Format bytes as MiB."""
    return f"{size / 2**20:.1f} MiB"
