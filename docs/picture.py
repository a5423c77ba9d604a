"""Draws the console of a real run into `docs/console.svg`: the first and the last round of the demonstration.

    .venv-engine/bin/python docs/picture.py             # runs examples/demo.py: some minutes
    .venv-engine/bin/python docs/picture.py demo.log    # or takes the output of an earlier `make demo > demo.log`

Needs `rich`. The picture names no web font, so that it looks the same without a network.
"""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "console.svg"
NUM_PROMPTS = 2
WIDTH = 100
FONTS = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
RULE = re.compile(r"-{20,}")
NUMBERS = re.compile(r"\|.*\||\S+: best .*")

CODE_FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
  <title>The console of a run</title>
  <style>
    .{unique_id}-matrix {{ font-family: FONTS; font-size: {char_height}px; line-height: {line_height}px }}
    .{unique_id}-title {{ font-size: 18px; font-family: FONTS }}
    {styles}
  </style>
  <defs>
    <clipPath id="{unique_id}-clip-terminal">
      <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
    </clipPath>
    {lines}
  </defs>
  {chrome}
  <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">
    {matrix}
    </g>
  </g>
</svg>
""".replace("FONTS", FONTS)


def main() -> None:
    log = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else run_demo()
    rounds = read_rounds(log)
    lines = ["$ make demo", "...", *rounds[0], "...", *rounds[-1]]
    PICTURE.write_text(draw(lines), encoding="utf-8")
    print(f"{PICTURE}: {len(rounds)} rounds in the log, the first and the last drawn")


def run_demo() -> str:
    """Runs the demonstration and returns its standard output; the progress bar goes to standard error."""
    command = [sys.executable, ROOT / "examples" / "demo.py"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout


def read_rounds(log: str) -> list[list[str]]:
    """Returns the lines of each round: its title, its first prompts, and the lines that sum it up."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log)]
    rounds = []
    for first, title in enumerate(lines):
        if not (match := re.fullmatch(r"=== Validation Samples \(Step (\d+)\) ===", title)):
            continue
        summary = next(i for i in range(first, len(lines)) if lines[i].startswith(f"Step {match[1]}: "))
        rules = [i for i in range(first, summary) if RULE.fullmatch(lines[i])]
        cut = rules[min(NUM_PROMPTS, len(rules)) - 1] + 1
        numbers = itertools.takewhile(NUMBERS.fullmatch, lines[summary + 1 :])
        rounds.append([*lines[first:cut], *(["..."] if len(rules) > NUM_PROMPTS else []), lines[summary], *numbers])
    return rounds


def draw(lines: list[str]) -> str:
    """Returns the lines as a terminal's picture. Text is escaped by rich, and never read as markup."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(styled(line))
    return console.export_svg(title="make demo", code_format=CODE_FORMAT, unique_id="console")


def styled(line: str) -> Text:
    """Returns the line with what changes from round to round in colour."""
    text = Text(line, no_wrap=True, overflow="ellipsis")
    if line.startswith(("$", "===")):
        text.stylize("bold")
    elif RULE.fullmatch(line) or line == "...":
        text.stylize("bright_black")
    elif match := re.match(r"(Generation \d+.*?: )", line):
        text.stylize("bold green", match.end())
    return text


if __name__ == "__main__":
    main()
