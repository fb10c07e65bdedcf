"""Progress bars on stderr, with the time left."""

import sys
from typing import Any

from tqdm import tqdm


def bar(what: str, total: int, unit: str, show: bool | None, **options: Any) -> tqdm:
    """A bar of `total` units; `show` None shows it where stderr is a terminal. `options` are tqdm's."""
    return tqdm(
        desc=what, total=total, unit=unit, file=sys.stderr, disable=None if show is None else not show, **options
    )
