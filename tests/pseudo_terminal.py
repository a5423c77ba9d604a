"""A terminal for tests: what a command leaves on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

COLUMNS = 80


def environment() -> dict[str, str]:
    return {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS)}


def on_a_terminal(command: list[str]) -> list[str]:
    """What is left on a terminal's screen when a command has ended.

    Understood are returns, line feeds and a step up, which is what bars are drawn with.
    """
    controller, terminal_fd = pty.openpty()
    fcntl.ioctl(terminal_fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    output = b""
    with subprocess.Popen(command, stdout=terminal_fd, stderr=terminal_fd, env=environment()) as process:
        os.close(terminal_fd)
        with contextlib.suppress(OSError):  # Linux: the other end is closed
            while read := os.read(controller, 65536):
                output += read
    os.close(controller)
    text = output.decode()
    assert process.returncode == 0, text
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[A|.", text, re.DOTALL):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\r":
            column = 0
        elif piece == "\x1b[A":
            row -= 1
        else:
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
