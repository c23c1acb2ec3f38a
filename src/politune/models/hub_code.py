"""Native code from the Hub, which politune takes none of."""

import sys


def refuse() -> None:
    """Makes `kernels`, where somebody installed it, a library that is not there.

    transformers hands it the name in `attn_implementation` of a model's config, and bitsandbytes a name of its own while it is
    imported: either way compiled code of somebody's repository would be fetched and run, at no commit that anybody pinned.
    To be called before transformers or PEFT is imported; later it has no effect.
    """
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # None: what importing it finds is an ImportError
