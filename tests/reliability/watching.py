"""Notes what the rounds of this process do to the world, in `watched_<rank>.json`: to be called before torch is loaded.

Python's audit hooks tell of it; only what has a frame of verl_valgen's on its stack counts, other than those that are
there while verl itself trains.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import verl_valgen

_PACKAGE = str(Path(verl_valgen.__file__).parent)
_AROUND_TRAINING = (f"{_PACKAGE}/activation.py", f"{_PACKAGE}/mixin.py", f"{_PACKAGE}/hosts/")
_STARTED = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(marker: str) -> None:
    """
    Args:
        marker: No source code that has it in it should be compiled, by whomever.
    """
    notes: dict[str, list[Any]] = {name: [] for name in ("started", "connected", "written", "unpickled", "compiled")}

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "compile":
            source = arguments[0]
            if isinstance(source, str | bytes) and marker in (source if isinstance(source, str) else source.decode()):
                notes["compiled"].append(str(arguments[1]))
        elif event == "open":
            if arguments[2] & _WRITING and not isinstance(arguments[0], int) and _is_of_a_round():
                notes["written"].append(os.path.abspath(os.fsdecode(arguments[0])))
        elif event == "socket.connect":
            if _is_of_a_round():
                notes["connected"].append(arguments[1])
        elif event == "pickle.find_class":
            if _is_of_a_round():
                notes["unpickled"].append(".".join(map(str, arguments)))
        elif event in _STARTED and _is_of_a_round():
            notes["started"].append(list(map(str, arguments[1])) if event == "subprocess.Popen" else event)

    def loaded(function: Callable[..., Any]) -> Callable[..., Any]:
        def load(*args: Any, **kwargs: Any) -> Any:
            if _is_of_a_round():
                notes["unpickled"].append("data")
            return function(*args, **kwargs)

        return load

    class Unpickler(pickle.Unpickler):
        load = loaded(pickle.Unpickler.load)

    # Data without classes is unpickled without an event.
    pickle.load, pickle.loads, pickle.Unpickler = loaded(pickle.load), loaded(pickle.loads), Unpickler
    sys.addaudithook(hear)
    rank = os.environ.get("RANK", "0")
    atexit.register(lambda: Path(f"watched_{rank}.json").write_text(json.dumps(notes, default=str)))


def _is_of_a_round() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE) and not path.startswith(_AROUND_TRAINING):
            return True
        frame = frame.f_back
    return False
