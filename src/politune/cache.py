"""Where politune keeps what it can make again: the demo model, the speed of earlier runs, token ids."""

import os
from pathlib import Path


def user_cache() -> Path | None:
    """`$POLITUNE_CACHE`, else `politune` in `$XDG_CACHE_HOME`, else `~/.cache/politune`; need not exist.

    None for a user without a home directory, where neither variable is set.
    """
    try:
        if own := os.environ.get("POLITUNE_CACHE"):
            return Path(own).expanduser().absolute()
        if shared := os.environ.get("XDG_CACHE_HOME"):
            return Path(shared).expanduser().absolute() / "politune"
        return Path.home() / ".cache" / "politune"
    except RuntimeError:
        return None
