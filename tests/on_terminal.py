"""`python on_terminal.py FILE COLUMNS ...overrides`: the command on a terminal of its own; FILE gets what it sends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

file, columns = sys.argv.pop(1), int(sys.argv.pop(1))
child, terminal = pty.fork()
if child == 0:
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    os.environ.pop("NO_COLOR", None)
    os.environ["TERM"] = "xterm-256color"
    sys.stdout.reconfigure(line_buffering=True)  # it was opened for a file
    sys.stderr.reconfigure(line_buffering=True)
    from morphtrain import run

    try:
        run.main()
        code = 0
    except SystemExit as end:
        print(end.code, file=sys.stderr)
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
with open(file, "wb") as sent, contextlib.suppress(OSError):  # which says that the child has closed its side
    while data := os.read(terminal, 65536):
        sent.write(data)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
