"""Reads a user's own prompts out of a file (`generation.prompts`), and tokenizes them.

`.jsonl`: each line holds a text, a list of messages, or a mapping with `prompt` (either of the two) or `messages`, and,
if it has them, `reference`, `tools`, `enable_thinking`, and the columns of `columns.py`. `.parquet`: rows with such
columns. `.txt`: a prompt in each line. Reading checks everything that needs no tokenizer, before a model is loaded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_valgen.prompts.columns import cell_value, row_data, without_arrays
from verl_valgen.prompts.conversations import ChatTemplate, NoChatTemplate, answered_turns, prompt_for_turn
from verl_valgen.records import Prompt, RowData
from verl_valgen.settings.checks import ConfigError, quoted
from verl_valgen.settings.checks import plain as shown

_MAX_PROMPTS = 10_000
_MAX_BYTES = 256 << 20

_FIRST_STREAM = 1 << 31
"""The `stream` of a file's first prompt, behind all rows of a data set: no two prompts are sampled alike."""

_NAMES_OF_PROMPTS = ("prompt", "messages")


@dataclass(frozen=True)
class OwnPrompt:
    """One row of a user's file of prompts, checked."""

    messages: list[dict[str, Any]]
    """Not empty; each with a role, and of text alone."""
    reference: str | None
    template_kwargs: Mapping[str, Any]
    """Arguments for the chat template that the row itself has: `tools`, `enable_thinking`."""
    data: RowData


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
    end_ids: Collection[int] = (),
) -> list[Prompt]:
    """The prompts of a file as the model is given them: by the chat template, or as they are where there is none.

    Args:
        template_kwargs: For the chat template, as verl's data sets pass them; a row's own go before.
        turn: `generation.turn`, for conversations that end in an assistant's turn.
        end_ids: The tokens that end an answer.

    Raises:
        ValueError: There are conversations, and the tokenizer has no chat template.
    """
    template_class = NoChatTemplate if getattr(tokenizer, "chat_template", None) is None else ChatTemplate
    result: list[Prompt] = []
    for stream, own in enumerate(prompts, start=_FIRST_STREAM):
        template = template_class(tokenizer, {**template_kwargs, **own.template_kwargs}, end_ids=end_ids)
        # Whoever ends a conversation of their own in a question wants that one to be answered.
        ends_in_answer = own.messages[-1]["role"] == "assistant"
        for i in answered_turns(own.messages, turn) if ends_in_answer else [len(own.messages)]:
            prompt = prompt_for_turn(own.messages, i, template, reference=own.reference)
            result.append(replace(prompt, data=own.data, stream=stream))
    return result


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
            prompts.append(_own_prompt(parse(row), params_key))
        except ValueError as e:
            raise ConfigError(f"{source}, {position}: {shown(str(e), 200)}") from None
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


_FORMATS: dict[str, tuple[Callable[[Path], Iterable[tuple[str, Any]]], Callable[[Any], Any]]] = {
    ".jsonl": (_lines, _from_json),
    ".parquet": (_table_rows, dict),
    ".txt": (_lines, str),
}
"""File suffix to the function that yields rows with their positions, and to the one that parses a row."""


# Rows


def _own_prompt(row: Any, params_key: str) -> OwnPrompt:
    """A row that a file holds, checked; raises ValueError that says what is wrong with it."""
    row = without_arrays(row)
    if isinstance(row, str | list):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"it must be a text, a list of messages or a mapping, got {quoted(row)}")
    row = {name: cell_value(value) for name, value in row.items()}
    messages, reference, tools = _messages(row), _reference(row), _tools(row)
    # No tokenizer takes a lone surrogate, which JSON can spell; this raises UnicodeEncodeError.
    json.dumps([messages, tools], default=str, ensure_ascii=False).encode()
    template_kwargs = {name: row[name] for name in ("tools", "enable_thinking") if row.get(name) is not None}
    return OwnPrompt(messages, reference, template_kwargs, row_data(row, params_key))


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not any(name in row for name in _NAMES_OF_PROMPTS):
        _refuse_misspelt(list(row))
    prompt = row.get("messages") if row.get("prompt") is None else row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt.strip() else prompt
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"`prompt` or `messages` must be a text or a list of messages of text, got {quoted(prompt)}")
    return messages


def _refuse_misspelt(names: Sequence[str]) -> None:
    """Raises ValueError for the name that is closest to `prompt` or `messages`, if one is close."""
    by_spelling = {str(name)[:60].lower(): str(name)[:60] for name in names}
    for wanted in _NAMES_OF_PROMPTS:
        for close in difflib.get_close_matches(wanted, by_spelling, n=1, cutoff=0.7):
            raise ValueError(f"`{by_spelling[close]}` is unknown (did you mean `{wanted}`?)")


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _reference(row: Mapping[str, Any]) -> str | None:
    reference = row.get("reference")
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        reference = str(reference)
    if reference is not None and not isinstance(reference, str):
        raise ValueError(f"`reference` must be a text or a number, got {quoted(reference)}")
    return None if reference is None else reference.strip()


def _tools(row: Mapping[str, Any]) -> list[Any]:
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"`tools` must be a list of mappings, got {quoted(tools)}")
    return tools
