"""`python -m verl_valgen`: on folders that a run wrote, in terminals of two widths and without one."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from viewing.rounds import data_files, described_run, index, inlined, write_rounds

import verl_valgen
from verl_valgen.__main__ import main
from verl_valgen.viewing.folder import Folder
from verl_valgen.viewing.terminal import show
from verl_valgen.viewing.words import marked_words

ANSWERS = {
    30: ("Rome is the capital of Italy.", "[bold]four[/bold] :smile: \x1b[31mred"),
    60: ("Paris is the capital of Italy.", ""),
    90: ("Paris is the capital of France.\nYes", "日本" * 30),
}


@pytest.fixture(scope="module")
def generations(tmp_path_factory) -> Path:
    """Two prompts, a row and one of one's own, by two strategies, at three steps; one of these is put aside."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints" / "generations"
    rounds = {
        step: [
            {
                "index": i, "strategy": strategy, "generation": text, "prompt_text": ("France?", "2+2?")[i],
                "reference": ("Paris", None)[i], "row": (6, None)[i], "data_source": ("capitals", None)[i],
                "scores": {"exact_match": 0.5} if i == 0 else {}, "finish_reason": "length" if i else "eos",
            }
            for i, text in enumerate(texts)
            for strategy in ("greedy", "nucleus")
        ]
        for step, texts in ANSWERS.items()
    }  # fmt: skip
    write_rounds(described_run(directory), rounds)
    return directory


@pytest.fixture
def folder(generations, tmp_path) -> Path:
    """A copy to write to."""
    return shutil.copytree(generations.parent, tmp_path / "checkpoints") / "generations"


def shown(capsys, *arguments) -> list[str]:
    assert main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def recorded(directory: Path, width: int, **chosen) -> tuple[str, str]:
    """What a terminal of a width shows: as text, and with its styles."""
    console = Console(
        file=io.StringIO(), record=True, width=width, force_terminal=True, color_system="standard", highlight=False
    )
    show(Folder(directory), console=console, **chosen)
    return console.export_text(clear=False), console.export_text(styles=True)


def test_without_a_terminal_every_answer_is_a_line(generations, capsys):
    lines = shown(capsys, generations, "--strategy", "greedy")
    assert lines == [
        "Words that are new against the step before are in {+ +}.",
        "",
        "Prompt 1 (row 6, capitals): France?",
        "Expected: Paris",
        "  greedy 30  Rome is the capital of Italy.  [exact_match 0.5]",
        "  greedy 60  {+Paris+} is the capital of Italy.  [exact_match 0.5]",
        "  greedy 90  Paris is the capital of {+France+}.{+\\nYes+}  [exact_match 0.5]",
        "",
        "Prompt 2: 2+2?",
        r"  greedy 30  [bold]four[/bold] :smile: \x1b[31mred  [cut off]",
        "  greedy 60    [cut off; empty]",
        f"  greedy 90  {{+{'日本' * 30}+}}  [cut off]",
    ]


def test_what_is_shown_can_be_chosen(generations, capsys):
    lines = shown(capsys, generations, "--prompt", 2)[3:]
    assert [tuple(line.split()[:2]) for line in lines] == [
        (strategy, str(step)) for strategy in ("greedy", "nucleus") for step in ANSWERS
    ]
    lines = shown(capsys, generations.parent, "--step", 60, "--strategy", "nucleus")
    assert [line for line in lines if line.startswith("  ")] == [
        "  nucleus 60  {+Paris+} is the capital of Italy.  [exact_match 0.5]",  # marked against 30
        "  nucleus 60    [cut off; empty]",
    ]


def test_what_was_withheld_is_compared_with_nothing(tmp_path, capsys):
    samples = {10: ("good text", True), 20: ("secret", False), 30: ("other text", True)}
    rounds = {step: [{"generation": text, "verified": passed}] for step, (text, passed) in samples.items()}
    write_rounds(described_run(tmp_path), rounds)
    lines = "\n".join(shown(capsys, tmp_path)[1:])
    assert "withheld" in lines
    assert "{+" not in lines
    assert "secret" not in lines


def test_large_scores_are_shown_as_on_the_console(tmp_path, capsys):
    write_rounds(described_run(tmp_path), {10: [{"scores": {"length": 999.7, "chars": 12345.0}}]})
    assert shown(capsys, tmp_path)[-1] == "  10  answer 0 at 10  [length 1000, chars 12345]"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_columns_of_its_width(generations, width):
    text, styled = recorded(generations, width, strategy="greedy")
    lines = text.splitlines()
    assert max(map(cells, lines)) <= width
    assert "Prompt 1 (row 6, capitals): France?" in lines
    (line,) = [line for line in lines if "greedy 60  Paris is the capital of Italy." in line]
    assert line.rstrip().endswith("exact_match 0.5")
    assert "\x1b[1;4mParis\x1b[0m is the capital of Italy." in styled  # bold and underlined, whatever the colours
    assert r"[bold]four[/bold] :smile: \x1b[31mred" in text
    assert "\x1b[31m" not in styled
    assert text.replace("\n", "").replace(" ", "").count("日") == 30  # a long answer goes on in the next line


def cells(line: str) -> int:
    from rich.cells import cell_len

    return cell_len(line)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", "3"], "no prompt 3; there are prompts 1, 2"),
        (["--strategy", "beam"], "no strategy beam; there are greedy, nucleus"),
        (["--step", "31"], "no samples of step 31; there are steps 30, 60, 90"),
    ],
)
def test_what_there_is_not_is_told_in_a_line(generations, capsys, arguments, reason):
    assert main(["show", str(generations), *arguments]) == 2
    assert capsys.readouterr().err == f"verl_valgen: {reason}\n"


@pytest.mark.parametrize("command", ["show", "page"])
def test_a_folder_without_samples_is_told_in_a_line(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"verl_valgen: no samples in {tmp_path}: ")
    assert list(tmp_path.iterdir()) == []


def test_page_makes_the_page_and_prints_where_it_is(folder, capsys):
    live = data_files(folder)
    shutil.rmtree(folder / "data")
    (folder / "index.html").unlink()
    assert main(["page", str(folder.parent)]) == 0
    assert capsys.readouterr().out == f"{folder / 'index.html'}\n"
    assert data_files(folder) == live
    assert (folder / "index.html").exists()


def test_page_leaves_alone_what_is_right(folder, monkeypatch):
    def must_not(path, content):
        raise AssertionError(path)

    monkeypatch.setattr("verl_valgen.viewing.page_files.replace_file", must_not)
    assert main(["page", str(folder)]) == 0


def test_page_of_an_earlier_run(folder):
    (folder / "old-1").mkdir()
    (folder / "step_00000090.jsonl").rename(folder / "old-1" / "step_00000090.jsonl")
    assert main(["page", str(folder / "old-1")]) == 0
    assert index(folder / "old-1")["steps"] == [90]
    assert main(["page", str(folder)]) == 0
    assert index(folder)["steps"] == [30, 60]
    assert "step_00000090.js" not in data_files(folder)


def test_one_file_and_two_runs(folder, generations, tmp_path, capsys):
    before = data_files(folder)
    assert main(["page", str(folder), "--one-file", str(tmp_path / "out.html")]) == 0
    assert main(["page", str(folder), "--compare", str(generations)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out.html"), str(folder / "compare.html")]
    assert len(inlined(tmp_path / "out.html")["steps"]) == len(ANSWERS)
    both = inlined(folder / "compare.html")
    assert [(step["run"], step["step"]) for step in both["steps"]] == [
        (run, step) for run in (0, 1) for step in ANSWERS
    ]
    assert data_files(folder) == before  # a live run is not disturbed


def test_a_place_that_cannot_be_written_is_told_in_a_line(generations, tmp_path, capsys):
    assert main(["page", str(generations), "--one-file", str(tmp_path / "missing" / "out.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_broken_line_is_told_and_costs_nothing_else(folder, capsys):
    with open(folder / "step_00000060.jsonl", "ab") as file:
        file.write(b'{"step": 60, "ind')
    assert main(["page", str(folder)]) == 0
    assert capsys.readouterr().err == "step_00000060.jsonl, line 5: left out, as it is not a sample\n"
    assert index(folder)["steps"] == [30, 60, 90]


def test_the_commands_load_nothing_heavy(folder):
    program = """
import json, sys
from verl_valgen.__main__ import main
statuses = [main(["page", sys.argv[1]]), main(["show", sys.argv[1], "--step", "60"])]
heavy = "torch transformers verl hydra omegaconf pandas numpy tqdm".split()
print(json.dumps([statuses, [name for name in heavy if name in sys.modules]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=Path(verl_valgen.__file__).parents[1],
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0], []]


@pytest.mark.parametrize(
    ("before", "text", "new"),
    [
        ("a b c", "a x c", ["x"]),
        ("a b c", "a c", []),
        ("", "a b", ["a b"]),
        ("a", "", []),
        ("日本語", "日木語", ["木"]),
        ("x " * 5000, "y " * 5000, ["y " * 5000]),  # not compared word by word
        ("the cat", "the  cat", []),
    ],
)
def test_words_that_are_new(before, text, new):
    pieces = marked_words(text, before)
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, is_new in pieces if is_new] == new
