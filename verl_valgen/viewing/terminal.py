"""`show`: how the answers to each prompt changed, step by step, in a terminal.

A terminal gets columns, and words that are new are bold and underlined; what is no terminal gets a line for each
answer, however long, and `{+new words+}`. A model's text is made printable, and rich looks for no markup in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from verl_valgen.records import DEFAULT_STRATEGY
from verl_valgen.text import printable
from verl_valgen.viewing.data import Payload
from verl_valgen.viewing.folder import Folder, NoSamples
from verl_valgen.viewing.wording import ENDINGS, number
from verl_valgen.viewing.words import marked_words
from verl_valgen.viewing.writing import step_of

_NEW = "bold underline"
_MAX_NOTES_SHARE = 3
"""The scores take a third of the width at most."""


@dataclass
class Answers:
    """What was answered to one prompt, by strategy and by number among the completions."""

    prompt: Payload
    """As it was last asked."""
    series: dict[tuple[str, int], list[tuple[int, Payload]]] = field(default_factory=dict)
    """(strategy, completion) -> the answers with their steps, ascending."""


def show(
    folder: Folder,
    *,
    prompt: int | None = None,
    strategy: str | None = None,
    step: int | None = None,
    console: Console | None = None,
) -> None:
    """Prints prompts, expected answers, and a line for each answer. Raises `NoSamples` where there is no such thing.

    Args:
        prompt: The number of a prompt, from 1; all by default.
        strategy: All by default.
        step: All by default.
    """
    console = console or Console(highlight=False)
    by_prompt = _collect(folder, _steps_to_read(folder, step))
    chosen = _chosen(by_prompt, prompt, strategy)
    new = "underlined" if console.is_terminal else "in {+ +}"
    _print(console, Text(f"Words that are new against the step before are {new}.", style="dim"))
    for answers in chosen:
        lines = list(_lines(answers, strategy, step))
        if lines:
            _print(console, Text())
            _print_heading(console, answers.prompt)
            _print_lines(console, lines)


def _steps_to_read(folder: Folder, step: int | None) -> list[int]:
    """A step's own answers are marked against those of the step before."""
    steps = folder.steps()
    if step is None:
        return steps
    if step not in steps:
        raise NoSamples(f"no samples of step {step}; there are steps {_listed(steps)}")
    position = steps.index(step)
    return steps[max(0, position - 1) : position + 1]


def _collect(folder: Folder, steps: Iterable[int]) -> dict[str, Answers]:
    """All answers, by the prompts' keys; in memory at once."""
    found: dict[str, Answers] = {}
    for payload in filter(None, (step_of(folder, step) for step in steps)):
        prompts = payload["prompts"]
        for prompt in prompts:
            found.setdefault(prompt["key"], Answers(prompt)).prompt = prompt
        for answer in payload["answers"]:
            series = found[prompts[answer["prompt"]]["key"]].series
            series.setdefault((answer["strategy"], answer["completion"]), []).append((payload["step"], answer))
    return found


def _chosen(by_prompt: Mapping[str, Answers], number: int | None, strategy: str | None) -> list[Answers]:
    answers = sorted(by_prompt.values(), key=lambda one: one.prompt["index"])
    numbers = sorted({_number(one.prompt) for one in answers})
    if number is not None:
        answers = [one for one in answers if _number(one.prompt) == number]
        if not answers:
            raise NoSamples(f"no prompt {number}; there are prompts {_listed(numbers)}")
    strategies = dict.fromkeys(name for one in answers for name, _ in one.series)
    if strategy is not None and strategy not in strategies:
        raise NoSamples(f"no strategy {strategy}; there are {', '.join(strategies)}")
    return answers


def _number(prompt: Payload) -> int:
    """A prompt's number for people, from 1."""
    return prompt["index"] + 1


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) > 12:
        return f"{', '.join(map(str, numbers[:5]))}, ..., {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _print_heading(console: Console, prompt: Payload) -> None:
    row = "" if prompt["row"] is None else f"row {prompt['row']}"
    source = ", ".join(filter(None, (prompt["origin"] or row, prompt["data_source"])))
    heading = Text(f"Prompt {_number(prompt)}{f' ({printable(source)})' if source else ''}: ", style="bold")
    _print(console, heading.append(printable(prompt["prompt_text"]), style="not bold"))
    if prompt["reference"] is not None:
        _print(console, Text("Expected: ").append(printable(prompt["reference"])))


class Line(NamedTuple):
    """An answer: where it is from, its words and whether they are new, and what is to be said of it."""

    label: str
    words: Sequence[tuple[str, bool]]
    notes: str


def _lines(answers: Answers, strategy: str | None, step: int | None) -> Iterator[Line]:
    has_strategies = any(name != DEFAULT_STRATEGY for name, _ in answers.series)
    has_numbers = any(completion > 0 for _, completion in answers.series)
    for (name, completion), series in answers.series.items():
        if strategy not in (None, name):
            continue
        before = None
        for at, answer in series:
            if step in (None, at):
                parts = [name] * has_strategies + [f"#{completion + 1}"] * has_numbers + [str(at)]
                text = answer["generation"]
                words = marked_words(text, text if before is None or _is_withheld(answer) else before)
                yield Line(printable(" ".join(parts)), words, _notes(answer))
            before = None if _is_withheld(answer) else answer["generation"]


def _is_withheld(answer: Payload) -> bool:
    return answer["verified"] is False


def _notes(answer: Payload) -> str:
    """Scores and, unless it ended as it should, why the answer ended."""
    notes = [", ".join(f"{name} {number(score)}" for name, score in answer["scores"].items())]
    reason = answer["finish_reason"]
    if reason not in (None, "eos"):
        notes.append(ENDINGS.get(reason) or str(reason))
    if not answer["generation"].strip():
        notes.append("empty")
    return printable("; ".join(filter(None, notes)))


def _print_lines(console: Console, lines: Sequence[Line]) -> None:
    if not console.is_terminal:
        width = max(len(line.label) for line in lines)
        for line in lines:
            text = "".join(f"{{+{printable(word)}+}}" if is_new else printable(word) for word, is_new in line.words)
            _print(console, Text(f"  {line.label:>{width}}  {text}{f'  [{line.notes}]' if line.notes else ''}"))
        return
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(max_width=console.width // _MAX_NOTES_SHARE, overflow="fold")
    for line in lines:
        words = Text.assemble(*((printable(word), _NEW if is_new else "") for word, is_new in line.words))
        table.add_row(Text(line.label, style="cyan"), words, Text(line.notes, style="dim"))
    console.print(Padding(table, (0, 0, 0, 2)))


def _print(console: Console, text: Text) -> None:
    """Without a terminal a line stays one."""
    console.print(text, soft_wrap=not console.is_terminal)
