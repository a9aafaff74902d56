"""Where building a world prints."""

from rich.console import Console

console = Console()
