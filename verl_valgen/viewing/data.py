"""What the page is given: records of samples as payloads of a step and of the index.

A payload is the same whether it is made while the run goes on or from the files: what a record lacks and what the first
file of a folder spells in another way (see `trackers/first_file.py`) come to the same. Answers that failed the check
are withheld.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl_valgen.records import DEFAULT_STRATEGY, WITHHELD
from verl_valgen.viewing.folder import is_number
from verl_valgen.viewing.script import encoded

FORMAT = 1

Payload = dict[str, Any]

_PROMPT_TEXTS = ("file", "origin", "data_source", "reference", "reference_raw", "reference_text", "ground_truth")
_ANSWER_COUNTS = ("completion", "num_new_tokens", "num_prompt_tokens")

_MAX_SAFE_INTEGER = 2**53
"""Beyond it JavaScript has no whole numbers, nor has a float."""


def step_payload(step: int, records: Iterable[Mapping[str, Any]], numbers: Mapping[str, Any], run: int = 0) -> Payload:
    """A round: each prompt once, and the answers.

    Args:
        records: Recorded samples, with `index` and `generation` at least.
        numbers: Under the trackers' keys without `val/gen/`.
        run: The number of the run among those that the page shows.
    """
    prompts: list[Payload] = []
    positions: dict[int, int] = {}
    answers = []
    for record in records:
        position = positions.setdefault(record["index"], len(prompts))
        if position == len(prompts):
            prompts.append(_prompt(record))
        answers.append({"prompt": position, **_answer(record)})
    _tell_apart(prompts)
    return {
        "format": FORMAT,
        "run": run,
        "step": step,
        "numbers": {name: _number(value) for name, value in numbers.items() if is_number(value)},
        "prompts": prompts,
        "answers": answers,
    }


def run_entry(
    name: str, folder: str, steps: Sequence[int], metric: str | None, mode: str, best: tuple[float, int] | None
) -> Payload:
    """A run in the index. `best`: the best value of `metric`, and its step."""
    value = None if not metric or best is None else {"value": _number(best[0]), "step": best[1]}
    return {
        "name": name,
        "folder": folder,
        "steps": sorted(steps),
        "best_metric": metric or None,
        "best_mode": mode,
        "best": value,
    }


def index_payload(runs: Sequence[Payload]) -> Payload:
    return {"format": FORMAT, "runs": list(runs)}


def prompt_key(record: Mapping[str, Any]) -> str:
    """Tells the same prompt at other steps and in other runs: its text, and its place: row and file, or an own one's.

    A place alone does not: other data may have another prompt there, and several turns of a row are several prompts.
    Nor does a text: what a person reads of a prompt is its last message.
    """
    row, file = record.get("row"), _text(record.get("file"))
    text = _text(record.get("prompt_text")) or _text(record.get("prompt")) or ""
    key = f"text {hashlib.sha256(encoded(text)).hexdigest()[:16]}"
    if isinstance(row, int):
        return f"{key}, row {row}" if file is None else f"{key}, row {row} of {file}"
    origin = _text(record.get("origin"))
    return key if origin is None else f"{key}, {origin}"


def _prompt(record: Mapping[str, Any]) -> Payload:
    row = record.get("row")
    prompt = _text(record.get("prompt")) or ""
    return {
        "key": prompt_key(record),
        "index": record["index"],
        "row": row if isinstance(row, int) else None,
        "prompt_text": _text(record.get("prompt_text")) or prompt,
        "prompt": prompt,
        **{name: _text(record.get(name)) for name in _PROMPT_TEXTS},
    }


def _tell_apart(prompts: Sequence[Payload]) -> None:
    """A prompt that is asked twice in a round is two, by their order."""
    seen: Counter[str] = Counter()
    for prompt in prompts:
        key = prompt["key"]
        seen[key] += 1
        if seen[key] > 1:
            prompt["key"] = f"{key} #{seen[key]}"


def _answer(record: Mapping[str, Any]) -> Payload:
    verified = record.get("verified")
    is_withheld = verified is False
    scores = {} if is_withheld else _mapping(record.get("scores"))
    texts = {} if is_withheld else _mapping(record.get("score_texts"))
    return {
        "strategy": _text(record.get("strategy")) or DEFAULT_STRATEGY,
        "generation": WITHHELD if is_withheld else record["generation"],
        "generation_raw": None if is_withheld else _text(record.get("generation_raw")),
        "finish_reason": _text(record.get("finish_reason")),
        **{name: record[name] if isinstance(record.get(name), int) else 0 for name in _ANSWER_COUNTS},
        "scores": {name: _number(score) for name, score in scores.items() if is_number(score)},
        "score_texts": {name: text for name, value in texts.items() if (text := _text(value)) is not None},
        "verified": verified if isinstance(verified, bool) else None,
        "params": _plain(_mapping(record.get("params"))),
        "seed": record["seed"] if isinstance(record.get("seed"), int) else None,
    }


def _text(value: Any) -> str | None:
    """A text; None for what is empty, which a folder's first file may have in the place of null."""
    if value is None or value == "" or isinstance(value, str):
        return value or None
    return json.dumps(_plain(value), ensure_ascii=False)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: float) -> float:
    """A finite number; a whole one is an integer, which is the same in JavaScript."""
    return int(value) if value == int(value) and abs(value) < _MAX_SAFE_INTEGER else value


def _plain(value: Any) -> Any:
    """A value for JSON, without what stands for nothing in mappings."""
    if isinstance(value, Mapping):
        items = {str(key): _plain(item) for key, item in value.items() if key != ""}
        return {key: item for key, item in items.items() if item not in (None, "", {})}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value) if is_number(value) else None
    return value
