"""A process that ends with its parent, however that ends: by a pipe that only the parent holds."""

import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """End this process, as SIGTERM does, once its standard input is at its end.

    The parent keeps the other end of that pipe open; the system closes it when the parent dies.
    """

    def wait() -> None:
        # Read from the descriptor itself: a buffered reader would hold a lock at the end.
        while os.read(sys.stdin.fileno(), 1 << 12):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
