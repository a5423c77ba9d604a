"""Reads a user's own prompts out of a file (`generation.prompts`), and tokenizes them.

`.jsonl`: each line holds a text, a list of messages, or a mapping with `prompt` (either of the two) or `messages`, and,
if it has them, `reference`, `tools`, `enable_thinking`, and the columns of `columns.py`. `.parquet`: rows with such
columns. `.txt`: a prompt in each line. Reading checks everything that needs no tokenizer, before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_valgen.prompts.columns import cell_value, row_data, without_arrays, without_made_up_keys
from verl_valgen.prompts.conversations import ChatTemplate, NoChatTemplate, answered_turns, prompt_for_turn
from verl_valgen.prompts.own_rows import messages_of, reference_of, tools_of
from verl_valgen.records import Prompt, RowData
from verl_valgen.settings.checks import ConfigError, Mistakes, quoted
from verl_valgen.settings.checks import plain as shown

_MAX_PROMPTS = 10_000
_MAX_BYTES = 256 << 20

_FIRST_STREAM = 1 << 31
"""The `stream` of a file's first prompt, behind all rows of a data set: no two prompts are sampled alike."""


@dataclass(frozen=True)
class OwnPrompt:
    """One row of a user's file of prompts, checked."""

    messages: list[dict[str, Any]]
    """Not empty; each with a role, and of text alone."""
    reference: str | None
    template_kwargs: Mapping[str, Any]
    """Arguments for the chat template that the row itself has: `tools`, `enable_thinking`."""
    data: RowData
    position: str = ""
    """Key, file and line, for errors."""
    place: str | None = None
    """File and line, for people: `prompts.jsonl line 3`."""


def read_own_prompts(path: str, params_key: str) -> list[OwnPrompt]:
    """The prompts of the file `path`, checked, in order.

    Args:
        params_key: The column that holds a row's own generation parameters.

    Raises:
        ConfigError: The file is missing, empty or huge, or a line of it (in parquet a row) holds something else.
    """
    source = f"generation.prompts: {shown(path, 200)}"
    try:
        prompts = _read(Path(path), source, params_key)
    except ConfigError:
        raise
    except Exception as e:  # of the file system, of pyarrow, of the decoder
        raise ConfigError(f"{source} cannot be read: {shown(str(e), 200)}") from None
    if not prompts:
        raise ConfigError(f"{source} holds no prompts")
    return prompts


def tokenized(
    prompts: Sequence[OwnPrompt],
    tokenizer: Any,
    template_kwargs: Mapping[str, Any],
    turn: str,
    mistakes: Mistakes | None = None,
    end_ids: Collection[int] = (),
) -> list[Prompt]:
    """The prompts of a file as the model is given them: by the chat template, or as they are where there is none.

    Args:
        template_kwargs: For the chat template, as verl's data sets pass them; a row's own go before.
        turn: `generation.turn`, for conversations that end in an assistant's turn.
        mistakes: Notes, with file and line, the prompts that cannot be rendered; these are left out.
        end_ids: The tokens that end an answer.

    Raises whatever tokenizer and chat template raise, where no `mistakes` are given: `ValueError` for a conversation
    without a chat template.
    """
    template_class = NoChatTemplate if getattr(tokenizer, "chat_template", None) is None else ChatTemplate
    result: list[Prompt] = []
    for stream, own in enumerate(prompts, start=_FIRST_STREAM):
        template = template_class(tokenizer, {**template_kwargs, **own.template_kwargs}, end_ids=end_ids)
        try:
            asked = _prompts_of(own, template, turn)
            result += [replace(prompt, data=own.data, stream=stream, own_place=own.place) for prompt in asked]
        except Exception as e:  # a template raises what it likes
            if mistakes is None:
                raise
            with mistakes.noted():
                raise ConfigError(f"{own.position}: it cannot be rendered ({shown(_in_words(e), 300)})") from None
    return result


def _prompts_of(own: OwnPrompt, template: ChatTemplate, turn: str) -> list[Prompt]:
    # Whoever ends a conversation of their own in a question wants that one to be answered.
    ends_in_answer = own.messages[-1]["role"] == "assistant"
    turns = answered_turns(own.messages, turn) if ends_in_answer else [len(own.messages)]
    return [prompt_for_turn(own.messages, i, template, reference=own.reference) for i in turns]


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# Files


def _read(file: Path, source: str, params_key: str) -> list[OwnPrompt]:
    if not file.is_file():
        raise ConfigError(f"{source}: there is no such file")
    if (num_bytes := file.stat().st_size) > _MAX_BYTES:
        raise ConfigError(f"{source} must have at most {_MAX_BYTES >> 20} MiB, got {num_bytes >> 20}")
    if file.suffix not in _FORMATS:
        raise ConfigError(f"{source} must end in {', '.join(_FORMATS)}")
    rows, parse = _FORMATS[file.suffix]
    prompts: list[OwnPrompt] = []
    for position, row in rows(file):
        if len(prompts) == _MAX_PROMPTS:
            raise ConfigError(f"{source} must have at most {_MAX_PROMPTS} prompts")
        try:
            own = _own_prompt(parse(row), params_key)
        except ValueError as e:
            raise ConfigError(f"{source}, {position}: {shown(str(e), 200)}") from None
        place = f"{file.name} {position.partition(' (')[0]}"
        prompts.append(replace(own, position=f"{source}, {position}", place=place))
    return prompts


def _lines(file: Path) -> Iterable[tuple[str, str]]:
    """The lines that are not empty, each after its position in the file, from 1."""
    # Not `splitlines`, which ends a line at a form feed too.
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return [(f"line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def _table_rows(file: Path) -> Iterable[tuple[str, Any]]:
    """The rows of a parquet file, each after its position, from 0 as pandas and a record's `row` count."""
    import pyarrow.parquet as pq  # verl's own dependency

    # pandas makes floating-point numbers of integers where a cell is empty.
    return [(f"row {number} (from 0)", row) for number, row in enumerate(pq.read_table(file).to_pylist())]


def _from_json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as e:  # whose own message calls every line "line 1"
        reason = f"{e.msg}: column {e.colno}"
    except (ValueError, RecursionError) as e:  # an integer of more than 4300 digits, too deep a nesting
        reason = str(e)
    raise ValueError(f"it is no JSON ({reason})")


def _from_table(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: without_made_up_keys(value) if name in _NESTED else value for name, value in row.items()}


_NESTED = ("prompt", "messages", "tools", "extra_info", "reward_model", "ground_truth")
"""Columns whose mappings Arrow fills with the keys of all other rows."""

_FORMATS: dict[str, tuple[Callable[[Path], Iterable[tuple[str, Any]]], Callable[[Any], Any]]] = {
    ".jsonl": (_lines, _from_json),
    ".parquet": (_table_rows, _from_table),
    ".txt": (_lines, str),
}
"""File suffix to the function that yields rows with their positions, and to the one that parses a row."""


def _own_prompt(row: Any, params_key: str) -> OwnPrompt:
    """A row that a file holds, checked; raises ValueError that says what is wrong with it."""
    row = without_arrays(row)
    if isinstance(row, str | list):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"it must be a text, a list of messages or a mapping, got {quoted(row)}")
    row = {name: cell_value(value) for name, value in row.items()}
    messages, reference, tools = messages_of(row), reference_of(row), tools_of(row)
    # No tokenizer takes a lone surrogate, which JSON can spell; this raises UnicodeEncodeError.
    json.dumps([messages, tools], default=str, ensure_ascii=False).encode()
    template_kwargs = {name: row[name] for name in ("tools", "enable_thinking") if row.get(name) is not None}
    return OwnPrompt(messages, reference, template_kwargs, row_data(row, params_key))
