"""The door to matplotlib: pictures are checked before the work that they show, and drawn without a screen."""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxsvd.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = (".png", ".pdf", ".svg")


def check(path: Path) -> None:
    """Raises UsageError where no picture can be written there, or matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError("drawing needs the package matplotlib: pip install 'jaxsvd[plot]'") from None
    if path.suffix.lower() not in _KINDS or path.is_dir():
        raise UsageError(f"{path} is no picture: expected a name that ends in {', '.join(_KINDS)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path} can't be written: there is no folder {path.parent}")


def figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches; its `savefig` writes it."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a screen

    return Figure(figsize=(width, height), dpi=150, layout="constrained")
