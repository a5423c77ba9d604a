"""Prompts of a user's own, out of a file (`generation.prompts`).

`.jsonl`: in each line a text, a list of messages, or a mapping with `prompt` (either of the two) or `messages`, and, if
it has them, `reference`, `tools`, `enable_thinking`, and the columns of `row_data.py`. `.parquet`: rows with such
columns. `.txt`: a prompt in each line. Reading checks all of it; nothing is tokenized before there is a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
"""In sampling, own prompts stand behind all rows of a data set."""


@dataclass(frozen=True)
class OwnPrompt:
    """One row of the file, checked."""

    messages: list[dict[str, Any]]
    """Not empty; each with a role, and of text alone."""
    reference: str | None
    template_kwargs: Mapping[str, Any]
    data: RowData


def read_own_prompts(path: str, params_key: str, source: str = "generation.prompts") -> list[OwnPrompt]:
    """
    Raises:
        ConfigError: The file is missing, empty, huge, or holds something else; with the row.
    """
    named, file = f"{source}: {shown(path, 200)}", Path(path)
    try:
        if not file.is_file():
            raise ConfigError(f"{named}: there is no such file")
        if (num_bytes := file.stat().st_size) > _MAX_BYTES:
            raise ConfigError(f"{named} must have at most {_MAX_BYTES >> 20} MiB, got {num_bytes >> 20}")
        rows = _reader(file, named)(file)
        prompts = []
        for number, row in enumerate(rows, start=1):
            if number > _MAX_PROMPTS:
                raise ConfigError(f"{named} must have at most {_MAX_PROMPTS} prompts")
            try:
                prompts.append(_own_prompt(row, params_key))
            except ValueError as e:
                raise ConfigError(f"{named}: prompt {number}: {shown(str(e), 200)}") from None
    except ConfigError:
        raise
    except Exception as e:  # of the file system, of pandas, of the decoder
        raise ConfigError(f"{named} cannot be read: {shown(str(e), 200)}") from None
    if not prompts:
        raise ConfigError(f"{named} holds no prompts")
    return prompts


def tokenized(
    prompts: Sequence[OwnPrompt], tokenizer: Any, template_kwargs: Mapping[str, Any], turn: str
) -> list[Prompt]:
    """The prompts of a file as the model is given them: by the chat template, or as they are where there is none.

    Args:
        template_kwargs: For the chat template, as verl's data sets pass them; a row's own go before.
        turn: `generation.turn`, for conversations that end in an assistant's turn.

    Raises:
        ValueError: There are conversations, and the tokenizer has no chat template.
    """
    template_class = NoChatTemplate if getattr(tokenizer, "chat_template", None) is None else ChatTemplate
    result: list[Prompt] = []
    for stream, own in enumerate(prompts, start=_FIRST_STREAM):
        template = template_class(tokenizer, {**template_kwargs, **own.template_kwargs})
        # Whoever ends a conversation of their own in a question wants that one to be answered.
        ends_in_answer = own.messages[-1]["role"] == "assistant"
        for i in answered_turns(own.messages, turn) if ends_in_answer else [len(own.messages)]:
            prompt = prompt_for_turn(own.messages, i, template, reference=own.reference)
            result.append(replace(prompt, data=own.data, stream=stream))
    return result


def _own_prompt(row: Any, params_key: str) -> OwnPrompt:
    row = without_arrays(row)
    if isinstance(row, str | list):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"it must be a text, a list of messages or a mapping, got {quoted(row)}")
    row = {name: cell_value(value) for name, value in row.items()}
    prompt = row.get("messages") if row.get("prompt") is None else row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt.strip() else prompt
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"`prompt` or `messages` must be a text or a list of messages of text, got {quoted(prompt)}")
    reference = row.get("reference")
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        reference = str(reference)
    if reference is not None and not isinstance(reference, str):
        raise ValueError(f"`reference` must be a text or a number, got {quoted(reference)}")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"`tools` must be a list of mappings, got {quoted(tools)}")
    # No tokenizer takes a lone surrogate, which JSON can spell; this raises UnicodeEncodeError.
    json.dumps([messages, tools], default=str, ensure_ascii=False).encode()
    kwargs = {name: row[name] for name in ("tools", "enable_thinking") if row.get(name) is not None}
    return OwnPrompt(messages, None if reference is None else reference.strip(), kwargs, row_data(row, params_key))


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _reader(file: Path, named: str) -> Callable[[Path], Iterable[Any]]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".txt": _read_lines}
    if file.suffix not in readers:
        raise ConfigError(f"{named} must end in {', '.join(readers)}")
    return readers[file.suffix]


def _lines(file: Path) -> Iterable[tuple[int, str]]:
    """Those that are not empty, with their numbers from 1."""
    # Not `splitlines`, which ends a line at a form feed too.
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_lines(file: Path) -> Iterable[str]:
    return [line for _, line in _lines(file)]


def _read_jsonl(file: Path) -> Iterable[Any]:
    for number, line in _lines(file):
        try:
            yield json.loads(line)
        except ValueError as e:
            raise ValueError(f"line {number}: {e}") from None


def _read_parquet(file: Path) -> Iterable[Any]:
    import pyarrow.parquet as pq  # verl's own dependency

    # pandas makes floating-point numbers of integers where a cell is empty.
    return pq.read_table(file).to_pylist()
