"""Lines beside progress bars: between them on a terminal, whole in a file, and each log record once."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from pseudo_terminal import environment, on_a_terminal
from tqdm import tqdm

from verl_valgen.viewing import beside_bars as module
from verl_valgen.viewing.beside_bars import WIDTH_OF_FILES, beside_bars, log_beside_bars, width, write_lines

PROGRAM = """
import logging, sys
from tqdm import tqdm
from verl_valgen.records import GroupNumbers, Round, RoundNumbers
from verl_valgen.activation import set_up_logging
from verl_valgen.viewing.beside_bars import write_lines

logging.basicConfig(stream=sys.stdout, format="%(message)s")
set_up_logging()
with tqdm(total=3, desc="Epoch 1/1", mininterval=0) as bar:
    for step in range(3):
        bar.update()
        write_lines(f"=== Validation Samples (Step {step}) ===\\nPrompt 1: x")
        logging.getLogger("verl_valgen.rounds").info(f"a line of step {step}")
        logging.getLogger("verl_valgen.rounds").info("and another")
print("done")
"""


def test_a_file_that_takes_a_bar_too_has_whole_lines(tmp_path):
    """As in `python -m verl.trainer... > log 2>&1`."""
    with open(tmp_path / "log", "wb") as log:
        subprocess.run([sys.executable, "-c", PROGRAM], stdout=log, stderr=log, check=True, env=environment())
    text = (tmp_path / "log").read_bytes().decode()
    lines = text.split("\n")  # as grep does, for which "\r" ends none
    for step in range(3):
        at = lines.index(f"=== Validation Samples (Step {step}) ===")
        assert lines[at : at + 4] == [lines[at], "Prompt 1: x", f"a line of step {step}", "and another"]
    assert "done" in lines
    assert "" not in lines[:-1]
    assert "Epoch 1/1: 100%" in text


def test_a_pipe_that_takes_a_bar_too_has_whole_lines():
    """As in `2>&1 | tee log`, whose length tells nothing: the bar knows when it was drawn."""
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, env=environment())
    lines = result.stdout.decode().split("\n")
    for step in range(3):
        at = lines.index(f"=== Validation Samples (Step {step}) ===")
        assert lines[at : at + 4] == [lines[at], "Prompt 1: x", f"a line of step {step}", "and another"]
    assert "" not in lines[:-1]


@pytest.mark.parametrize("to", ["file", "terminal"])
def test_a_file_beside_a_bar_elsewhere_has_the_lines_alone(tmp_path, to):
    controller, terminal_fd = pty.openpty()
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        stderr = err if to == "file" else terminal_fd
        subprocess.run([sys.executable, "-c", PROGRAM], stdout=out, stderr=stderr, check=True, env=environment())
    os.close(terminal_fd)
    os.close(controller)
    block = "=== Validation Samples (Step {0}) ===\nPrompt 1: x\na line of step {0}\nand another\n"
    assert (tmp_path / "out").read_text() == "".join(map(block.format, range(3))) + "done\n"


def test_on_a_terminal_lines_stand_between_those_of_the_bar():
    *lines, bar, last = [line for line in on_a_terminal([sys.executable, "-c", PROGRAM]) if line]
    blocks = [
        [f"=== Validation Samples (Step {step}) ===", "Prompt 1: x", f"a line of step {step}", "and another"]
        for step in range(3)
    ]
    assert lines == [line for block in blocks for line in block]
    assert bar.startswith("Epoch 1/1: 100%")
    assert last == "done"


def test_without_a_terminal_the_width_is_always_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert width(io.StringIO()) == WIDTH_OF_FILES
    assert width(Terminal()) == 40
    assert width(None) == WIDTH_OF_FILES


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(Terminal):
    """A terminal that has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_bar_whose_terminal_has_gone_costs_no_line(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    bar = tqdm(total=2, file=Terminal())
    bar.sp = lambda text: (_ for _ in ()).throw(BrokenPipeError())
    bar.fp = Broken()
    write_lines("a line")
    assert sys.stdout.getvalue() == "a line\n"
    bar.disable = True


def test_the_lock_is_free_behind_lines_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    with tqdm(total=2, file=Terminal()) as bar:
        with pytest.raises(BrokenPipeError):
            write_lines("a line")
        with ThreadPoolExecutor() as pool:
            assert pool.submit(bar.refresh).result(timeout=60)  # which takes the lock
        assert bar.fp.getvalue().count("0/2") == 3  # drawn, drawn again behind the lines, and refreshed


def test_a_bar_elsewhere_does_not_wait_for_lines_that_nobody_reads():
    with ThreadPoolExecutor() as pool, tqdm(total=2, file=io.StringIO()) as bar, beside_bars(io.StringIO()):
        assert pool.submit(bar.refresh).result(timeout=5)  # which takes the lock


def test_a_bar_whose_file_was_closed_behind_its_back_costs_no_line(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        bar = tqdm(total=2, file=err)
        descriptor = os.dup(err.fileno())
        os.close(err.fileno())
        try:
            write_lines("a line")
        finally:
            os.dup2(descriptor, err.fileno())
            os.close(descriptor)
            bar.close()
    assert (tmp_path / "out").read_text() == "a line\n"


# Log records


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """One of the package's, with handlers and level put back."""
    made = logging.getLogger("verl_valgen.test_terminal")
    made.setLevel(logging.INFO)
    yield made
    made.handlers.clear()
    made.propagate = True
    made.setLevel(logging.NOTSET)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a handler of the root logger writes, on a terminal."""
    root, stream = logging.getLogger(), Terminal()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)


def test_a_record_takes_the_bar_away_and_is_written_once_in_the_handlers_format(logger, written, caplog):
    log_beside_bars(logger)
    log_beside_bars(logger)
    child = logger.getChild("child")
    with tqdm(total=2, file=written, desc="training"):
        child.info("one")
        child.debug("too low")
    before, line, after = written.getvalue().partition("[verl_valgen.test_terminal.child] one\n")
    assert before.endswith("\r")
    assert line
    assert "training: " in after
    assert written.getvalue().count("one") == 1
    assert "too low" not in written.getvalue()
    assert [record.getMessage() for record in caplog.records] == ["one"]


def test_handlers_keep_their_levels(logger, written):
    (handler,) = [handler for handler in logging.getLogger().handlers if getattr(handler, "stream", None) is written]
    handler.setLevel(logging.WARNING)
    log_beside_bars(logger)
    logger.info("low")
    logger.warning("high")
    assert written.getvalue() == "[verl_valgen.test_terminal] high\n"


@pytest.mark.parametrize("comes", ["before", "after"])
def test_a_users_own_handler_gets_a_record_once_and_so_does_the_roots(logger, written, comes):
    own = logging.StreamHandler(io.StringIO())
    if comes == "before":
        logger.addHandler(own)
    log_beside_bars(logger)
    if comes == "after":
        logger.addHandler(own)
    logger.info("x")
    assert own.stream.getvalue() == "x\n"
    assert written.getvalue() == "[verl_valgen.test_terminal] x\n"


def test_a_logger_that_a_user_has_cut_off_stays_so(logger, written):
    logger.propagate = False
    log_beside_bars(logger)
    logger.info("x")
    assert (written.getvalue(), logger.handlers) == ("", [])


def test_propagation_that_is_switched_on_again_doubles_nothing(logger, written):
    log_beside_bars(logger)
    logger.propagate = True
    logger.info("x")
    assert written.getvalue() == "[verl_valgen.test_terminal] x\n"


def test_a_handler_that_writes_beside_bars_itself_cannot_block_ours(logger):
    """Its lock is taken before that of the bars, by us as well."""
    entered, stream = [], Terminal()

    class Own(logging.StreamHandler):
        def acquire(self) -> None:
            entered.append("handler")
            super().acquire()

    handler = Own(stream)
    logging.getLogger().addHandler(handler)
    locked = module._locked
    try:
        log_beside_bars(logger)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_locked", lambda stream: (entered.append("bars"), locked(stream))[1])
            logger.info("x")
    finally:
        logging.getLogger().removeHandler(handler)
    assert entered[:2] == ["handler", "bars"]
    assert stream.getvalue() == "x\n"


def test_a_bar_whose_stream_writes_into_the_log_cannot_block_ours(logger, written):
    """It has the bars' lock, and waits for the handler that we have."""
    (handler,) = [handler for handler in logging.getLogger().handlers if getattr(handler, "stream", None) is written]
    log_beside_bars(logger)
    with ThreadPoolExecutor() as pool, tqdm(total=2, file=io.StringIO()), tqdm.get_lock():
        pool.submit(logger.info, "x").result(timeout=5)
    assert handler.stream.getvalue() == "[verl_valgen.test_terminal] x\n"


def test_where_no_bar_was_ever_made_tqdm_is_not_loaded():
    code = (
        "import sys; from verl_valgen.viewing.beside_bars import write_lines; write_lines(str('tqdm' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_lines_within_lines_do_not_block(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    with tqdm(total=1, file=sys.stdout), beside_bars(sys.stdout):
        write_lines("x")
    assert "x\n" in sys.stdout.getvalue()
