"""Loading without the libraries' own bars and notes, which say nothing that a user can act on."""

import logging as standard_logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from politune.models import hub_code


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences bars, warnings and log lines below errors of transformers, PEFT and bitsandbytes in the block."""
    hub_code.refuse()
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    bitsandbytes = standard_logging.getLogger("bitsandbytes")
    bitsandbytes_level = bitsandbytes.level
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    bitsandbytes.setLevel(standard_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bitsandbytes.setLevel(bitsandbytes_level)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
