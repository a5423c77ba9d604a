"""Folders of a page out of made-up samples, as `verl_valgen.viewing` writes them: for the tests in the browser."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from verl_valgen.viewing.page import render

Payload = dict[str, Any]


def answer(prompt: int, generation: str, **changes: Any) -> Payload:
    return {
        "prompt": prompt,
        "strategy": "greedy",
        "completion": 0,
        "generation": generation,
        "generation_raw": None,
        "finish_reason": "eos",
        "num_new_tokens": len(generation.split()) + 1,
        "num_prompt_tokens": 12,
        "scores": {},
        "score_texts": {},
        "verified": True,
        "params": {"do_sample": False},
        "seed": 0,
        **changes,
    }


def prompt(index: int, text: str, reference: str | None = None, **changes: Any) -> Payload:
    return {
        "key": f"key {index}",
        "index": index,
        "row": index,
        "file": None,
        "origin": f"row {index}",
        "data_source": None,
        "prompt_text": text,
        "prompt": f"<|user|>{text}<|assistant|>",
        "reference": reference,
        "reference_raw": None,
        "reference_text": None,
        "ground_truth": None,
        **changes,
    }


def step(
    number: int, prompts: list[Payload], answers: list[Payload], numbers: Mapping[str, float] = {}, run: int = 0
) -> Payload:
    return {
        "format": 1,
        "run": run,
        "step": number,
        "numbers": {"num_samples": len(answers), **numbers},
        "prompts": prompts,
        "answers": answers,
    }


def index_of(steps: Iterable[Payload], names: tuple[str, ...] = ("demo",), **best: Any) -> Payload:
    """The index that names these steps; `best`: fields of the first run's."""
    runs = [
        {
            "name": name,
            "folder": f"/runs/{name}",
            "steps": sorted(one["step"] for one in steps if one["run"] == number),
            "best_metric": None,
            "best_mode": "max",
            "best": None,
            **(best if number == 0 else {}),
        }
        for number, name in enumerate(names)
    ]
    return {"format": 1, "runs": runs}


def script(function: str, payload: Payload) -> str:
    """The classic script that hands `payload` to the page."""
    text = json.dumps(payload, ensure_ascii=False).replace("<", "\\u003c")
    return f"valgen.{function}({text});\n"


def write_folder(folder: Path, index: Payload, steps: Iterable[Payload]) -> Path:
    """The page with its data beside it; returns the page's path."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "steps.js").write_text(script("index", index), encoding="utf-8", errors="surrogatepass")
    for one in steps:
        place = folder / "data" if one["run"] == 0 else folder / "data" / f"run{one['run']}"
        place.mkdir(exist_ok=True)
        text = script("step", one).encode("utf-8", "backslashreplace")  # a lone surrogate is `\udc80` in JSON, too
        (place / f"step_{one['step']:08d}.js").write_bytes(text)
    page = folder / "index.html"
    page.write_text(render(), encoding="utf-8")
    return page


def write_one_file(path: Path, index: Payload, steps: Iterable[Payload]) -> Path:
    content = json.dumps({"index": index, "steps": list(steps)}).encode()
    path.write_text(render(base64.b64encode(gzip.compress(content, 1)).decode()), encoding="utf-8")
    return path
