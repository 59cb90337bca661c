"""What holds for all tests."""

from __future__ import annotations

import signal

# Programs inherit what we ignore, as in a job that a shell started in the background: Ctrl-C has to work for them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
