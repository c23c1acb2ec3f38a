"""Ctrl-C in what a shell starts in the background."""

import signal
import threading


def heed_ctrl_c() -> None:
    """Such a shell has SIGINT ignored (`make faults &`), and so has all that is started from there, unless somebody ends it."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
