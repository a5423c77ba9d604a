"""Plants faults in a copy of the package, one after the other, each of which `make test` must catch.

    python tests/mutants.py [--narrow] [NUMBER ...]

The tests run as `make test` runs them, one environment after the other, up to the first failure; with `--narrow` only
those that should catch the fault. That they pass without it has to be seen to first: `make mutants` runs them. The
table in docs/reliability.md says what caught each. A fault that survives ends the program with status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- mutants: from here on written by `make mutants` -->", "<!-- mutants: to here -->"
ENVIRONMENTS = ("fsdp-sft", "engine")
MAX_S = 3600.0
"""For the tests of one environment. Longer, they have caught nothing."""


@dataclass(frozen=True)
class Mutant:
    fault: str
    path: str
    """Of the file, in `verl_valgen/`."""
    before: str
    """Stands there exactly once."""
    after: str
    narrow: str
    """Tests that should catch it."""


TOUR = "tests/end_to_end/test_tour.py"
MUTANTS = [
    Mutant(
        "training differs by one bit",
        "weights/dtensors.py",
        "shard = one.parameter.to_local()  # type",
        "shard = one.parameter.to_local(); shard.view(-1)[:1].view(torch.int32).bitwise_xor_(1)  # type",
        TOUR,
    ),
    Mutant(
        "the prompt is one token short",
        "rounds/queries.py",
        "Request(query.prompt.input_ids, ",
        "Request(query.prompt.input_ids[:-1], ",
        TOUR,
    ),
    Mutant(
        "one parameter of the copy is wrong",
        "weights/gather.py",
        "filling.receive(name, parameter)",
        'filling.receive(name, parameter * (2 if ".0." in name and "o_proj" in name else 1))',
        f"{TOUR} tests/distributed/test_gather.py",
    ),
    Mutant(
        "a rank is left waiting",
        "collectives.py",
        "if not agree(error is None, device):",
        "if error is not None or not agree(True, device):",
        "tests/distributed/test_gather.py",
    ),
    Mutant(
        "a control character reaches the terminal",
        "text.py",
        "if unicodedata.category(char) in _INVISIBLE_CATEGORIES:",
        'if char != "\\x9b" and unicodedata.category(char) in _INVISIBLE_CATEGORIES:',
        "tests/unit/test_text.py",
    ),
    Mutant(
        "a source's mean mixes greedy answers with sampled ones",
        "scores/aggregates.py",
        "for sample in by_strategy[strategies[0]] if strategies else begun:",
        "for sample in begun:",
        "tests/unit/scores",
    ),
    Mutant(
        "pass@n is of the answers that came in time",
        "scores/aggregates.py",
        "for k in _powers_of_two_and(n):",
        "for k in _powers_of_two_and(max(map(len, scores))):",
        "tests/unit/scores",
    ),
    Mutant(
        "an expected answer reaches the terminal as it is",
        "trackers/console.py",
        'f"Expected {i}: {printable(first.reference, max_chars)}"',
        'f"Expected {i}: {first.reference}"',
        "tests/trackers/test_console.py",
    ),
    Mutant(
        "a log line lies on the progress bar",
        "viewing/beside_bars.py",
        "        logger.propagate = False\n",
        "",
        "tests/viewing/test_beside_bars.py",
    ),
    Mutant(
        "a tracker loses a row",
        "trackers/table.py",
        "        for sample in samples\n    ]",
        "        for sample in samples[:-1] or samples\n    ]",
        "tests/trackers tests/end_to_end/test_tour_samples.py",
    ),
    Mutant(
        "TensorBoard renders a heading that a model said",
        "trackers/tensorboard.py",
        "return _as_entities(beginning) + middle",
        "return beginning + middle",
        "tests/trackers/test_tensorboard.py",
    ),
    Mutant(
        "the rounds do not see verl's loggers",
        "hosts/trainer_host.py",
        "self.verl_loggers.clear()",
        "self.verl_loggers = {}",
        "tests/end_to_end/test_tour_samples.py",
    ),
    Mutant(
        "a variable goes before the command line",
        "settings/load.py",
        "**{key: key for key in in_config if key in on_command_line},",
        "**{key: key for key in in_config if key in on_command_line and key not in in_environment},",
        "tests/unit/settings",
    ),
    Mutant(
        "generation switched off loads torch",
        "activation.py",
        "from verl_valgen.patching import patched\n",
        "import torch\n\nfrom verl_valgen.patching import patched\n",
        "tests/end_to_end/test_ways_in.py tests/unit/settings",
    ),
    Mutant(
        "generation switched off wraps verl's class",
        "activation.py",
        "if settings.enabled or generates_by_hand:",
        "if True:",
        f"tests/end_to_end/test_wrong_configuration.py {TOUR}",
    ),
    Mutant(
        "a sampled text depends on the batch",
        "backends/sampling.py",
        "torch.tensor(list(keys), dtype=torch.int64)",
        "torch.tensor([(place, 0) for place, _ in enumerate(keys)], dtype=torch.int64)",
        "tests/unit/backends",
    ),
    Mutant(
        "a row sees a token of the answer before its own",
        "backends/fast/step.py",
        "> slots[:, None]",
        "> slots[:, None] + 1",
        "tests/unit/backends/test_refilled_rows.py",
    ),
    Mutant(
        "NaN stays in a row for the next answer",
        "backends/fast/cache.py",
        "    cache[:, :, size:].index_fill_(0, rows, 0)",
        "    pass",
        "tests/unit/backends/test_refilled_rows.py",
    ),
    Mutant(
        "a row answers without having read the prompt",
        "backends/fast/rows.py",
        "return Admission(row, request, source)",
        "return Admission(row, request, row)",
        "tests/unit/backends/test_refilling.py",
    ),
    Mutant(
        "a stop string between two looks of the host is not seen",
        "backends/fast/stops.py",
        "torch.arange(1 - num_steps, 1,",
        "torch.zeros(num_steps, dtype=torch.int64,",
        "tests/unit/backends/test_refilled_rows.py",
    ),
    Mutant(
        "the process does not end",
        "mixin.py",
        "            return super().fit()",
        '            __import__("threading").Thread(target=__import__("time").sleep, args=(1e6,)).start()\n'
        "            return super().fit()",
        TOUR,
    ),
    Mutant(
        "an objection to the answers is not heard",
        "rounds/reading.py",
        "return Finding(False, found[0])",
        "return Finding(True)",
        "tests/distributed/test_proven.py",
    ),
    Mutant(
        "training is held by answers that it need not wait for",
        "rounds/rounds.py",
        "may_go_on = self.answerer.may_go_on(",
        "may_go_on = not self.answerer.may_go_on(",
        "tests/distributed/test_rounds_beside_training.py",
    ),
    Mutant(
        "training goes on without workers",
        "rounds/rounds.py",
        "        except self.host.fatal_errors:\n            raise\n        except BaseException",
        "        except BaseException",
        "tests/unit/rounds/test_remote.py",
    ),
    Mutant(
        "what fails in a worker is raised there, while others wait for it",
        "hosts/workers.py",
        "value, error = attempt(function)",
        "value, error = function(), None",
        "tests/unit/hosts/test_workers.py",
    ),
    Mutant(
        "workers are asked at the end of a run that failed in the middle of a step",
        "rounds/remote.py",
        "return self._thread is not None and self._thread.wait(timeout_s)",
        "return self._workers.call('result') is not None",
        "tests/unit/rounds/test_remote.py",
    ),
    Mutant(
        "answers beside training that are wrong count as right",
        "rounds/proven.py",
        "finding = min(finding, second,",
        "finding = max(finding, second,",
        "tests/distributed/test_rounds_beside_training.py",
    ),
    Mutant(
        "an answer that failed the check is shown",
        "trackers/composite.py",
        "round if tracker.takes_unverified else shown",
        "round",
        "tests/distributed/test_proven.py tests/trackers/test_composite.py",
    ),
    Mutant(
        "an answer that failed the check is on the page, where that is made from the files",
        "viewing/data.py",
        "is_withheld = verified is False",
        "is_withheld = False",
        "tests/viewing/test_data.py tests/viewing/test_page_tracker.py",
    ),
    Mutant(
        "a text ends the page's script",
        "viewing/script.py",
        r"""("<", "\\u003c"), """,
        "",
        "tests/viewing/test_data.py",
    ),
    Mutant(
        "the page shows rounds that were put aside",
        "trackers/jsonl.py",
        "drop_data(directory, lambda step: step > start_step)",
        "pass",
        "tests/viewing/test_page_tracker.py",
    ),
    Mutant(
        "the page keeps what a round said before it was made again",
        "viewing/writing.py",
        "return is_ours and path.stat().st_mtime + _MAX_DELAY_S >=",
        "return is_ours or path.stat().st_mtime + _MAX_DELAY_S >=",
        "tests/viewing/test_page_tracker.py",
    ),
    Mutant(
        "a text becomes markup in the page",
        "viewing/app/dom.js",
        "if (from < text.length) parent.append(text.slice(from));",
        "if (from < text.length) parent['inner' + 'HTML'] = text.slice(from);",
        "tests/viewing/test_browser.py",
    ),
    Mutant(
        "the page lets everything load",
        "viewing/page.py",
        "\"default-src 'none'\",",
        '"default-src *",',
        "tests/viewing",
    ),
    Mutant(
        "the page keeps everything in the document that was seen",
        "viewing/app/virtual.js",
        "if (index < first || index > last) drop(index);",
        "if (index > count) drop(index);",
        "tests/viewing/test_browser.py",
    ),
    Mutant(
        "an expert stands in another's place",
        "weights/exported.py",
        "rows.tensor[row].copy_(",
        "rows.tensor[row - 1].copy_(",
        "tests/unit/weights/test_exported.py",
    ),
]


def copy_tree(directory: Path) -> None:
    """What git knows of, and links to the environments."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # else it was removed
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    for name in ENVIRONMENTS:
        (directory / f".venv-{name}").symlink_to((ROOT / f".venv-{name}").resolve())


def plant(mutant: Mutant, directory: Path) -> None:
    path = directory / "verl_valgen" / mutant.path
    source = path.read_text()
    if source.count(mutant.before) != 1:
        sys.exit(
            f"{mutant.fault}: {mutant.path} must have {mutant.before!r} once, has it {source.count(mutant.before)}x"
        )
    planted = source.replace(mutant.before, mutant.after)
    if path.suffix == ".py":
        compile(planted, str(path), "exec")
    path.write_text(planted)


def first_failure(directory: Path, environment: str, narrow: str) -> str | None:
    """The test that failed, None if all passed.

    Raises:
        SystemExit: The tests could not be run, or did not end.
    """
    made = [f"--old-file=.venv-{name}/.installed" for name in ENVIRONMENTS]  # whatever the copy's dates say
    process = subprocess.Popen(
        ["make", *made, f"test-{environment}", f"PYTEST_ARGS=-x {narrow}"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=MAX_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        sys.exit(f"the tests did not end within {MAX_S:.0f} s")
    failed = re.findall(r"\| (?:FAILED|ERROR) (tests/\S+)", output)
    if process.returncode and not failed:
        sys.exit(f"the tests could not be run:\n{output[-3000:]}")
    return failed[0] if failed else None


def try_mutant(mutant: Mutant, is_narrow: bool) -> tuple[str | None, float]:
    """What caught it, with the environment, and seconds from the start of the tests."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        directory = Path(name)
        copy_tree(directory)
        plant(mutant, directory)
        start = time.monotonic()
        for environment in ENVIRONMENTS:
            if failed := first_failure(directory, environment, mutant.narrow if is_narrow else ""):
                return f"`{failed.removeprefix('tests/')}` ({environment})", time.monotonic() - start
        return None, time.monotonic() - start


def write_table(rows: dict[str, str]) -> None:
    """Puts the rows, by fault, in place of those in docs/reliability.md; others stay."""
    text = TABLE.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    old = {line.split(" | ")[0].removeprefix("| "): line for line in text[start:end].splitlines() if "`" in line}
    lines = ["| fault | planted in | first test that failed | seconds |", "|---|---|---|---|"]
    lines += [row for mutant in MUTANTS if (row := (old | rows).get(mutant.fault))]
    TABLE.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="from 1; none are all")
    parser.add_argument("--narrow", action="store_true", help="run only the tests that should catch the fault")
    arguments = parser.parse_args()
    survived = []
    for number in arguments.numbers or range(1, len(MUTANTS) + 1):
        mutant = MUTANTS[number - 1]
        caught_by, seconds = try_mutant(mutant, arguments.narrow)
        print(f"{number}. {mutant.fault}: {caught_by or 'SURVIVED'}, {seconds:.0f} s", flush=True)
        if caught_by is None:
            survived.append(mutant.fault)
        if not arguments.narrow:
            result = caught_by or "none: `make test` passed"
            write_table({mutant.fault: f"| {mutant.fault} | `{mutant.path}` | {result} | {seconds:.0f} |"})
    if survived:
        sys.exit(f"not caught: {', '.join(survived)}")


if __name__ == "__main__":
    main()
