"""What is peculiar to TensorBoard: Markdown, and a writer that is verl's."""

from __future__ import annotations

import random
import threading

import pytest
from destinations import make_round, make_run, make_sample
from readback import _shown_by_tensorboard, visible

from verl_valgen.trackers.tensorboard import TensorboardTracker, escaped


@pytest.fixture
def tensorboard_run(open_destination):
    return open_destination("tensorboard")


MARKDOWN = [
    "# heading", "- item", "1. item", "2) item", "1\u0662. item", "    code", "> quotation", "a  \nb", "[x]: http://a.b\n[x]",
    "setext\n===",
    "![image](https://a.b/pixel.png)", "[link](javascript:alert(1))", "<https://a.b>", "https://a.b", "&amp; &#65;",
    "a|b\n-|-\nc|d", "---", "* * *", "```python\nx = 1\n```", "~~~\nx\n~~~", "**bold** __bold__ *it* _it_ ~~no~~",
    "\n\n\nx\n\n    y\n", " both ends ", "\t tab \t", "\\* \\_ \\", "<br>", "<img src=x onerror=alert(1)>",
    "<!-- x -->",
    "\x02wzxhzdk:0\x03", "*[HTML]: x\nHTML", "[^1]: note\nx[^1]", "{: #id}", "\xa0x\u3000", "a\x85b\x1cc",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown_is_shown_and_not_rendered(text):
    assert _shown_by_tensorboard(escaped(text).encode()) == visible(text)


def test_any_text_is_shown_as_it_is():
    alphabet = "ab1 \n\t#*_-+=.>[]()!`~|\\<&;:'\"\r\x1b\x85é日😀 "
    draw = random.Random(0)
    for _ in range(1000):
        text = "".join(draw.choices(alphabet, k=draw.randrange(15)))
        assert _shown_by_tensorboard(escaped(text).encode()) == visible(text), repr(text)


def test_many_samples_are_several_tables(tensorboard_run):
    tensorboard_run.tracker.log(make_round([make_sample(index=i) for i in range(70)], 1))
    found = tensorboard_run.read()[1]
    tables = [found.values[f"val/samples/{number}"] for number in (2, 3)]
    column = tables[0]["columns"].index("generation")
    generations = [[row[column] for row in table["data"]] for table in tables]
    generations.insert(0, [row["generation"] for row in found.rows])
    assert [len(part) for part in generations] == [32, 32, 6]
    assert [text for part in generations for text in part] == [f"answer {i} at 1" for i in range(70)]


def test_what_verl_logs_is_kept_and_all_is_in_one_file(tensorboard_run):
    """Of several files that grow in a folder, TensorBoard's reader follows the last one."""
    for step in (1, 2):
        tensorboard_run.writer.add_scalar("train/loss", 1.0, step)
        tensorboard_run.tracker.log(make_round([make_sample(step)], step, scores={"exact": 0.5}))
        tensorboard_run.writer.add_scalar("val/loss", 2.0, step)
    tensorboard_run.writer.flush()
    rounds = tensorboard_run.read()
    for step in (1, 2):
        values = rounds[step].values
        assert (values["train/loss"], values["val/gen/exact"], values["val/loss"]) == (1.0, 0.5, 2.0)
    assert len(list(tensorboard_run.directory.iterdir())) == 1


def test_a_round_is_on_the_disk_when_it_is_recorded(tensorboard_run):
    tensorboard_run.tracker.log(make_round([make_sample()], 1, scores={"exact": 0.5}))
    assert tensorboard_run.read()[1].values["val/gen/exact"] == 0.5  # nobody has closed the writer


def test_a_round_that_verls_end_overtakes_is_recorded(tensorboard_run):
    """verl closes its writer at the end of training, behind which the last round may still be written."""
    stop = threading.Event()

    def close_again_and_again():
        while not stop.is_set():
            tensorboard_run.writer.close()

    thread = threading.Thread(target=close_again_and_again)
    thread.start()
    try:
        tensorboard_run.tracker.log(make_round([make_sample(index=i) for i in range(5)], 1, scores={"exact": 0.5}))
    finally:
        stop.set()
        thread.join()
    tensorboard_run.writer.close()
    found = tensorboard_run.read()[1]
    assert [row["generation"] for row in found.rows] == [f"answer {i} at 1" for i in range(5)]
    assert found.values["val/sample_5_generation"] == "answer 4 at 1"
    assert found.values["val/gen/exact"] == 0.5


def test_without_verls_writer_there_is_no_tracker():
    assert not TensorboardTracker.is_live(make_run())
    with pytest.raises(RuntimeError, match="no tensorboard writer"):
        TensorboardTracker(make_run())
