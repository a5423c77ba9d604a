"""Runs one smoke per verl release, trainer and kind of sharding, and writes docs/compatibility.md: `make compat`.

Every release has an environment of its own under `.venv-compat`, which is made once; while smokes run, the next one is
installed. The results are kept in docs/compatibility.json: a run with some of the releases replaces their rows alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from reasons import last_exception, pip_error, tidy

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".venv-compat"
RESULTS = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- results: `make compat` writes them -->", "<!-- end of results -->"

PYTHON = platform.python_version()
SMOKE_TIMEOUT_S = 570  # less than the smoke itself gives the trainer: here all its processes are ended

FSDP_SFT, ENGINE, RAY = "fsdp_sft_trainer", "sft_trainer", "sft_trainer_ray"
TORCH = "2.13.0"
WEB_SERVER = ("fastapi==0.165.0", "uvicorn==0.54.0")


@dataclass(frozen=True)
class Release:
    """A release of verl and what it runs with."""

    verl: str
    trainers: tuple[str, ...]
    transformers: str
    numpy: str
    tensordict: str = "0.10.0"
    stub: str | None = None
    """A module that the trainer imports and that cannot be had beside this torch: `stubs/` has one."""
    undeclared: tuple[str, ...] = ()
    """Packages that the trainer imports and verl does not require."""

    @property
    def requirements(self) -> list[str]:
        """Installed by one command, so that torch comes from where a CPU build is offered."""
        return [
            f"verl=={self.verl}",
            f"torch=={TORCH}",
            f"transformers=={self.transformers}",
            f"tensordict=={self.tensordict}",
            f"numpy{self.numpy}",
            "pyarrow==25.0.1",  # 26.0.1 needs numpy 2, and pip does not know it
            "torchdata==0.11.0",
            "accelerate==1.15.0",
            "peft==0.21.2",
            "ray[default]==2.60.0",
            "hydra-core==1.3.8",
            *self.undeclared,
        ]

    @property
    def note(self) -> str | None:
        if self.stub:
            return f"with a stub in place of `{self.stub}`"
        if self.undeclared:
            return f"with {', '.join(f'`{name}`' for name in self.undeclared)}, which it imports and does not require"
        return None

    @property
    def python(self) -> Path:
        return WORK / self.verl / "venv" / "bin" / "python"


# numpy, tensordict and transformers as each release asks for; one that admits any transformers was written for 4.
RELEASES = {
    release.verl: release
    for release in (
        Release("0.5.0", (FSDP_SFT,), transformers="4.57.6", numpy="<2", tensordict="0.9.1"),
        Release("0.6.0", (FSDP_SFT, ENGINE), transformers="4.57.6", numpy="<2"),
        Release("0.6.1", (FSDP_SFT, ENGINE), transformers="4.57.6", numpy="<2"),
        Release("0.7.0", (FSDP_SFT, ENGINE, RAY), transformers="4.57.6", numpy="<2", stub="qwen_vl_utils"),
        Release("0.7.1", (ENGINE, RAY), transformers="4.57.6", numpy="<2"),
        Release("0.8.0", (ENGINE, RAY), transformers="4.57.6", numpy="<2", undeclared=WEB_SERVER),
        Release("0.9.0", (ENGINE, RAY), transformers="5.10.4", numpy=">=2", undeclared=WEB_SERVER),
        Release("0.9.1", (ENGINE, RAY), transformers="5.10.4", numpy=">=2", undeclared=WEB_SERVER),
    )
}


def install(release: Release) -> str | None:
    """Make the release's environment unless it is there; the reason for which it cannot be had, None where it can."""
    stamp = WORK / release.verl / "installed.txt"
    wanted = "\n".join([f"Python {PYTHON}", *release.requirements])
    if stamp.exists() and stamp.read_text() == wanted:
        return None
    stamp.unlink(missing_ok=True)
    pip = [release.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", release.python.parent.parent],
        [*pip, *release.requirements, "--editable", ROOT],
    ):
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            return f"install fails: {pip_error(process.stderr) or f'exit status {process.returncode}'}"
    stamp.write_text(wanted)
    return None


def smoke(release: Release, trainer: str, strategy: str, lora: bool = False) -> str:
    """What the cell says: ok, or "fails: " and the reason."""
    directory = WORK / release.verl / f"{trainer}-{strategy}{'-lora' if lora else ''}"
    command = [release.python, ROOT / "compatibility" / "smoke.py", directory, strategy]
    command += ["--lora"] if lora else []
    command += ["--stubs", ROOT / "compatibility" / "stubs"] if release.stub else []
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "examples")]),
        "VALGEN_TEST_TRAINER": f"verl.trainer.{trainer}",
    }
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=SMOKE_TIMEOUT_S)
    except BaseException as e:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun is in the group, and ends its workers
        if isinstance(e, subprocess.TimeoutExpired):
            return f"fails: not done after {SMOKE_TIMEOUT_S} s"
        raise
    if process.returncode != 0:
        return f"fails: {last_exception(stderr) or f'exit status {process.returncode}'}"
    reason = json.loads(stdout.splitlines()[-1])
    return f"fails: {reason}" if reason else "ok"


def measure(release: Release, failed_install: str | None) -> list[dict[str, Any]]:
    """The release's rows, one per trainer."""
    rows = []
    for trainer in release.trainers:
        cells = dict.fromkeys(("FSDP1", "FSDP2", "LoRA"), failed_install)
        if failed_install is None:
            cells["FSDP1"] = report(release, trainer, "fsdp")
            cells["FSDP2"] = report(release, trainer, "fsdp2")
            only_fsdp1 = cells["FSDP1"] == "ok" != cells["FSDP2"]
            cells["LoRA"] = report(release, trainer, "fsdp" if only_fsdp1 else "fsdp2", lora=True)
            if only_fsdp1 and cells["LoRA"] == "ok":
                cells["LoRA"] = "ok (FSDP1)"
        rows.append(
            {
                "verl": release.verl,
                "trainer": trainer,
                "transformers": release.transformers,
                "torch": TORCH,
                "note": release.note,
                "python": PYTHON,
                "measured": date.today().isoformat(),
                "cells": {name: tidy(cell, str(ROOT)) for name, cell in cells.items()},
            }
        )
    return rows


def report(release: Release, trainer: str, strategy: str, lora: bool = False) -> str:
    """One smoke, with a line about it."""
    start = time.monotonic()
    cell = smoke(release, trainer, strategy, lora)
    name = f"verl {release.verl}, {trainer}, {strategy}{', LoRA' if lora else ''}"
    print(f"{name}: {cell} ({time.monotonic() - start:.0f} s)", flush=True)
    return cell


def keep(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put rows in the place of their releases' former ones; all there are, sorted."""
    releases = {row["verl"] for row in rows}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [row for row in before if row["verl"] not in releases] + rows
    rows.sort(key=lambda row: ([int(part) for part in row["verl"].split(".")], row["trainer"]))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The table, and below it what it has no room for."""
    lines = [
        "| verl | transformers | torch | Python | trainer | FSDP1 | FSDP2 | LoRA | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = list(dict.fromkeys(f"- verl {row['verl']}: {row['note']}" for row in rows if row["note"]))
    for row in rows:
        marks, names_by_reason = [], {}
        for name, cell in row["cells"].items():
            mark, _, reason = cell.partition(": ")
            marks.append("-" if mark == "install fails" else mark)
            if reason:
                names_by_reason.setdefault(cell if mark == "install fails" else reason, []).append(name)
        versions = [row["verl"], row["transformers"], row["torch"], row["python"]]
        cells = [*versions, f"`{row['trainer']}`", *marks, row["measured"]]
        lines.append(f"| {' | '.join(cells)} |")
        which = f"verl {row['verl']}, `{row['trainer']}`"
        notes += [f"- {which}, {', '.join(names)}: `{reason}`" for reason, names in names_by_reason.items()]
    return "\n".join([*lines, "", *notes]).rstrip()


def write_page(rows: list[dict[str, Any]]) -> None:
    """Replace what stands between the two markers."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{render(rows)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", help=f"of verl; all unless given: {', '.join(RELEASES)}")
    versions = parser.parse_args().versions or list(RELEASES)
    if unknown := set(versions) - set(RELEASES):
        parser.error(f"versions must be of {', '.join(RELEASES)}, got {', '.join(sorted(unknown))}")
    installer = ThreadPoolExecutor(max_workers=1)
    try:
        installs = {version: installer.submit(install, RELEASES[version]) for version in versions}
        for version, installing in installs.items():
            write_page(keep(measure(RELEASES[version], installing.result())))
    finally:
        installer.shutdown(cancel_futures=True)
