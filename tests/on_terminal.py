"""`python on_terminal.py COLUMNS ...overrides`: the command on a terminal of its own; what it sends comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios

columns = int(sys.argv.pop(1))
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
while True:
    try:
        data = os.read(terminal, 65536)
    except OSError:  # the child has closed its side
        break
    if not data:
        break
    os.write(1, data)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
