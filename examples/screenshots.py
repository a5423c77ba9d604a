"""Takes the pictures of the page in `docs/` from the demonstration's run.

    make demo
    .venv-engine/bin/python examples/screenshots.py                # the page of demo/checkpoints/generations
    .venv-engine/bin/python examples/screenshots.py PAGE --step 90 # another one, at another step

Needs Debian's chromium, or another that is called `chromium-browser` or `google-chrome`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE = ROOT / "demo" / "checkpoints" / "generations" / "index.html"
WIDTH, HEIGHT, SCALE = 980, 640, 1.4  # CSS pixels, and how many of the picture make one
IS_LOADED = "({ all, loaded }) => all > 0 && loaded === all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, nargs="?", default=PAGE)
    parser.add_argument("--step", type=int, default=120, help="where the demonstration's answers change most")
    args = parser.parse_args()
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None or not args.page.exists():
        sys.exit("no browser is there" if executable is None else f"{args.page} is not there: run `make demo` first")
    pictures = {
        "page-one-prompt.png": {"step": args.step},
        "page-one-step.png": {"view": "step", "step": args.step},
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme="light"
        )
        for name, shown in pictures.items():
            page.goto("about:blank")
            page.goto(f"{args.page.resolve().as_uri()}#{urlencode(shown)}")
            page.locator("main .pane .sample, main .pane .u-over").first.wait_for()
            while not page.evaluate(f"({IS_LOADED})(valgen.loading.progress())"):
                page.wait_for_timeout(50)
            page.screenshot(path=DOCS / name)
            print(f"{DOCS / name}: {(DOCS / name).stat().st_size // 1024} KiB")
        browser.close()


if __name__ == "__main__":
    main()
