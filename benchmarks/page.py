"""Measures how long the page of 10,000 samples takes to open, to search and to scroll, in Debian's chromium.

    python benchmarks/page.py [--samples 10000] [--steps 20] [--repetitions 5]

Samples are made up, 600 characters an answer. Both forms are opened: the page with its data beside it, and all in one
file; with the samples spread over steps, and all of one step. "seen" is the time from the start of the navigation until
samples can be read, "all" until every step is loaded; "search" from a key until its result is drawn; "frame" is the
longest time between two frames while the list is scrolled from top to bottom. Medians, in ms.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "viewing"))

import folders
from playwright.sync_api import sync_playwright

WORDS = "the model says that a longer answer has many words of which some change from step to step"
ANSWER_CHARS = 600

# Not `wait_for_function`, whose `eval` the page's policy refuses.
SEEN_AND_ALL = """async () => {
    const frame = () => new Promise(requestAnimationFrame);
    while (document.querySelector('.pane .sample .answer') === null) await frame();
    const seen = performance.now();
    const isLoading = ({ all, loaded }) => all === 0 || loaded < all;
    while (isLoading(valgen.loading.progress())) await frame();
    return { seen, all: performance.now() };
}"""
SEARCH = """async () => {
    const input = document.querySelector('input[name=q]');
    const start = performance.now();
    input.value = 'answer 77';
    input.dispatchEvent(new Event('input'));
    while (!document.querySelector('.summary').textContent.includes(' of ')) await new Promise(requestAnimationFrame);
    const took = performance.now() - start;
    valgen.state.set({ q: '' });
    return took;
}"""
SCROLL = """async () => {
    const pane = document.querySelector('.pane');
    let longest = 0, before = performance.now();
    for (let at = 0; at <= 120; at++) {
        pane.scrollTop = pane.scrollHeight * at / 120;
        await new Promise(requestAnimationFrame);
        const now = performance.now();
        if (at > 0) longest = Math.max(longest, now - before);
        before = now;
    }
    return longest;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        print(f"chromium {browser.version}, {args.samples} samples, medians of {args.repetitions}, ms")
        for num_steps in (args.steps, 1):
            steps = make_steps(args.samples // num_steps, num_steps)
            index = folders.index_of(steps)
            pages = {
                "data beside it": folders.write_folder(Path(name, str(num_steps)), index, steps),
                "one file": folders.write_one_file(Path(name, f"{num_steps}.html"), index, steps),
            }
            for form, page in pages.items():
                taken = [measure(browser, page.as_uri()) for _ in range(args.repetitions)]
                medians = {key: round(statistics.median(one[key] for one in taken)) for key in taken[0]}
                print(
                    f"{num_steps:3} steps, {form:14}", "  ".join(f"{key} {value:5}" for key, value in medians.items())
                )
        browser.close()


def make_steps(num_prompts: int, num_steps: int) -> list[folders.Payload]:
    choose = random.Random(0)
    prompts = [
        folders.prompt(at, f"Question {at}: {text_of(choose, 120)}?", f"Answer {at}") for at in range(num_prompts)
    ]
    return [
        folders.step(
            10 * number,
            prompts,
            [
                folders.answer(at, f"Answer {at} {text_of(choose, ANSWER_CHARS)}", scores={"exact_match": at % 2})
                for at in range(num_prompts)
            ],
            {"exact_match": number / num_steps},
        )
        for number in range(1, num_steps + 1)
    ]


def text_of(choose: random.Random, num_chars: int) -> str:
    return " ".join(choose.choices(WORDS.split(), k=num_chars // 5))


def measure(browser: Any, address: str) -> dict[str, float]:
    page = browser.new_page()
    page.goto(f"{address}#view=step", wait_until="domcontentloaded")
    taken = page.evaluate(SEEN_AND_ALL)
    taken["search"] = page.evaluate(SEARCH)
    taken["frame"] = page.evaluate(SCROLL)
    page.close()
    return taken


if __name__ == "__main__":
    main()
