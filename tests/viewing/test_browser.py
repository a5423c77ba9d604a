"""The page in a real browser, opened from the file system. Without one, these tests are skipped."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from viewing import folders

from verl_valgen.viewing.script import call

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the page is not tested: none of chromium, chromium-browser, google-chrome is there"
)

STEPS = (10, 20, 30, 40)
WAIT_MS = 5_000
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'>",
    '"><svg/onload=window.hacked=4>',
    "<!--<script>window.hacked = 5</script>-->",
    "javascript:window.hacked=6",
    "</style><script>window.hacked = 7</script>",
    "\u202eevil\u2066 \x1b[31mred\x00\u2028\u200b end",
    "\udc80 lone",
    "__proto__",
    "constructor",
]


@pytest.fixture(scope="module")  # playwright's event loop must not be there for the tests of other modules
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """An open page, what it asked for, and what went wrong in it."""

    def __init__(self, page: Any) -> None:
        page.set_default_timeout(WAIT_MS)
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))

    def open(self, path: Path, **shown: Any) -> Page:
        self.page.goto(path.as_uri() + "#" + urlencode(shown))
        self.page.locator("main .pane .sample").first.wait_for()
        return self

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def wait(self, expression: str) -> None:
        # Not `wait_for_function`, whose `eval` the page's policy refuses.
        self.page.evaluate(
            f"""async () => {{
                const end = performance.now() + {WAIT_MS};
                while (!({expression})) {{
                    if (performance.now() > end) throw new Error('has not come');
                    await new Promise(requestAnimationFrame);
                }}
            }}"""
        )

    def shown(self) -> dict[str, str]:
        return self.page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def wait_for_steps(self, num: int = len(STEPS)) -> None:
        self.wait(f"valgen.loading.progress().loaded === {num}")

    def wait_for_text(self, selector: str, text: str) -> None:
        self.page.locator(selector).filter(has_text=text).first.wait_for()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened = Page(context.new_page())
    yield opened
    assert opened.errors == []
    assert {url.split(":")[0] for url in opened.requests} <= {"file"}, "nothing leaves the machine"
    context.close()


# What the model answered, step by step.
ANSWERS = {
    0: ["The capital is Rome", "The capital is Paris", "The capital is Paris", "It is Paris"],
    1: ["blue", "blue", "green", "green"],
    2: ["one", "two", "three", "four"],
}
SAMPLED = {0: "Paris, of course", 1: "green", 2: "many"}


def payloads(run: int = 0, shift: int = 0) -> list[folders.Payload]:
    prompts = [
        folders.prompt(0, "What is the capital of France?", "It is Paris", data_source="capitals"),
        folders.prompt(1, "What colour is grass?", "green", data_source="colours"),
        folders.prompt(2, "Count!", None, data_source="colours"),
    ]
    found = []
    for place, number in enumerate(STEPS):
        answers = []
        for at, texts in ANSWERS.items():
            text = texts[min(place + shift, len(texts) - 1)]
            score = float(text == prompts[at]["reference"])
            answers.append(
                folders.answer(at, text, scores={"exact_match": score}, finish_reason="length" if at == 2 else "eos")
            )
            answers.append(
                folders.answer(
                    at, SAMPLED[at], strategy="nucleus", scores={"exact_match": 0.5}, score_texts={"got": "x"}
                )
            )
        means = {"greedy/exact_match": place / 4, "nucleus/exact_match": 0.5, "seconds": 1.0 + place}
        found.append(folders.step(number, prompts, answers, means, run))
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run, with its data beside it."""
    steps = payloads()
    best = {"best_metric": "greedy/exact_match", "best": {"value": 0.75, "step": 40}}
    return folders.write_folder(tmp_path_factory.mktemp("page"), folders.index_of(steps, **best), steps)


@pytest.fixture(scope="session")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps = payloads()
    return folders.write_one_file(tmp_path_factory.mktemp("page") / "one.html", folders.index_of(steps), steps)


@pytest.fixture(params=["folder", "one_file"])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_the_slider_moves_and_the_text_follows(page, either):
    page.open(either)
    assert page.text(".step-name") == "Step 40", "the newest comes first"
    slider = page.page.locator("main input[type=range]")
    for value, expected in (("0", "The capital is Rome"), ("1", "The capital is Paris"), ("3", "It is Paris")):
        slider.fill(value)
        page.wait_for_steps()
        page.page.locator("select[name=against]").select_option("none")
        page.wait_for_text(".current-answer .answer", expected)
        assert page.text(".current-answer .answer") == expected
        assert page.text(".step-name") == f"Step {STEPS[int(value)]}"
    data = {"steps.js", *(f"step_{step:08d}.js" for step in STEPS)} if either.name == "index.html" else set()
    assert {Path(url).name.partition("#")[0] for url in page.requests} == {either.name} | data


def test_what_changed_is_marked(page, folder):
    page.open(folder, step=20)
    page.wait_for_steps()
    answer = ".current-answer .answer"
    page.wait_for_text(f"{answer} ins", "Paris")
    assert (page.texts(f"{answer} del"), page.texts(f"{answer} ins")) == (["Rome"], ["Paris"])
    page.page.locator("select[name=against]").select_option("reference")
    assert (page.texts(f"{answer} del"), page.texts(f"{answer} ins")) == (["It"], ["The capital"])
    page.page.locator("select[name=against]").select_option("first")
    page.page.locator("main input[type=range]").fill("3")
    assert (page.texts(f"{answer} del"), page.texts(f"{answer} ins")) == (["The capital", "Rome"], ["It", "Paris"])
    styles = page.page.locator(f"{answer} ins").first.evaluate("e => getComputedStyle(e).textDecorationLine")
    assert styles == "underline", "legible without colour"
    # Every step has its own marks, and says how it was judged.
    rows = page.page.locator(".step-row")
    assert rows.count() == len(STEPS)
    assert "exact_match ✓ 1" in rows.nth(3).inner_text()
    assert "ended" in rows.nth(3).inner_text()


def test_words_are_marked_whole_in_every_script(page, folder):
    page.open(folder)
    cases = [
        ("It costs 3.14 euros", "It costs 3.15 euros", ["3.14"], ["3.15"]),
        ("Столица Москва", "Столица Мадрид", ["Москва"], ["Мадрид"]),
        ("العاصمة القاهرة", "العاصمة الرياض", ["القاهرة"], ["الرياض"]),
        ("我喜欢北京。", "我喜欢上海。", ["北京"], ["上海"]),
        ("one two  three", "one two three", [" "], []),
        ("a quick fox", "a lazy dog", ["quick fox"], ["lazy dog"]),
        ("don't", "don\u2019t stop", ["don't"], ["don\u2019t stop"]),
        ("", "new", [], ["new"]),
        ("__proto__ x", "constructor x", ["__proto__"], ["constructor"]),
    ]
    for old, text, gone, come in cases:
        pieces = page.page.evaluate("([old, text]) => valgen.diff.pieces(old, text)", [old, text])
        marked = {kind: [piece["value"] for piece in pieces if piece["kind"] == kind] for kind in ("del", "ins")}
        assert marked == {"del": gone, "ins": come}, (old, text)
        assert "".join(piece["value"] for piece in pieces if piece["kind"] != "del") == text
        assert "".join(piece["value"] for piece in pieces if piece["kind"] != "ins") == old


def test_what_is_read_is_left_alone_as_other_steps_come_in(page, folder):
    page.open(folder, step=20)
    page.wait_for_steps()
    page.page.evaluate("document.querySelector('.current-answer .answer').id = 'read'")
    page.page.evaluate("valgen.data.changed(); new Promise(requestAnimationFrame)")
    assert page.page.locator("#read").count() == 1
    page.press("ArrowRight")
    page.wait_for_text(".step-name", "Step 30")
    assert page.page.locator("#read").count() == 0


def test_strategies_can_be_chosen(page, folder):
    page.open(folder, prompt="key 2")
    page.wait_for_text(".current-answer", "cut off")
    page.page.locator(".pane select[name=strategy]").select_option("nucleus")
    assert page.text(".current-answer .answer") == "many"
    assert "got x" in page.text(".current-answer .facts")


def test_keys_alone_suffice(page, folder):
    page.open(folder)
    page.wait_for_steps()
    page.press("ArrowLeft")
    assert page.text(".step-name") == "Step 30"
    page.press("Home")
    assert page.text(".step-name") == "Step 10"
    page.press("b")
    assert page.text(".step-name") == "Step 40"
    page.press("j", "j", "k")
    assert "Prompt 2" in page.text("main h2")
    page.press("s")
    assert page.shown()["strategy"] == "nucleus"
    page.press("d")
    assert page.shown()["against"] == "reference"
    page.press("?")
    assert page.page.locator("dialog").is_visible()
    page.press("Escape")
    assert not page.page.locator("dialog").is_visible()
    page.press("/")
    page.page.keyboard.type("grass jk")
    assert page.shown()["view"] == "step", "letters in a field are text, not keys"
    page.page.locator("input[name=q]").fill("grass")
    page.wait_for_text(".summary", "2 of 6 samples")
    page.press("Escape", "ArrowLeft")
    assert page.text(".step-name") == "Step 30"
    page.press("Tab")
    focused = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.page.evaluate(focused) != "none", "one sees where one is"
    page.press("Escape", "1")
    page.page.locator(".prompt-row").nth(2).focus()
    page.press("Enter")
    page.wait_for_text("main h2", "Prompt 3")


def test_the_focus_stays_on_its_item(page, folder):
    page.open(folder)
    page.wait_for_steps()
    focused = "document.activeElement.innerText.replace(/\\s+/g, ' ').trim()"
    page.page.locator(".prompt-row").nth(1).focus()
    page.press("Enter")
    page.wait_for_text("main h2", "Prompt 2")
    assert page.page.evaluate(focused).startswith("2 What colour is grass?")
    page.press("Tab", "Enter")
    page.wait_for_text("main h2", "Prompt 3")
    page.page.locator(".step-row").nth(1).focus()
    page.press("Enter")
    page.wait_for_text(".step-name", "Step 20")
    assert page.page.evaluate(focused).startswith("20 ")
    page.press("Tab", "Enter")
    page.wait_for_text(".step-name", "Step 30")
    assert page.page.evaluate(focused).startswith("30 ")
    page.page.evaluate("valgen.data.changed(); new Promise(requestAnimationFrame)")
    assert page.page.evaluate(focused).startswith("30 ")
    for view in ("step", "compare"):
        page.page.evaluate("view => valgen.state.set({ view, step: 30, every: '' })", view)
        page.page.locator("main .sample .head a").last.focus()
        page.press("ArrowLeft")
        page.wait_for_text(".step-name", "Step 20")
        assert page.page.evaluate(focused) == "Prompt 3 · row 2 · colours", view
    # Another place in the list, the same item; and where it is gone, the list.
    page.page.evaluate("valgen.state.set({ view: 'step' })")
    page.page.locator("main .sample .head a").last.focus()
    page.page.evaluate("valgen.state.set({ every: 'nucleus' })")
    assert page.page.locator(".step-sample").count() == 3
    assert page.page.evaluate(focused) == "Prompt 3 · row 2 · colours"
    page.page.evaluate("valgen.state.set({ every: 'greedy' })")
    assert page.page.evaluate("document.activeElement.getAttribute('aria-label')") == "All prompts of one step"


def test_a_link_restores_what_is_shown(page, browser, either):
    page.open(either, view="step")
    page.page.locator("select[name=every]").select_option("nucleus")
    page.page.locator("main input[type=range]").fill("1")
    page.page.locator("input[name=q]").fill("capital")
    page.wait_for_text(".summary", "1 of 6 samples")
    address = page.page.url
    again = page.page.context.new_page()
    again.goto(address)
    again.locator(".summary", has_text="1 of 6 samples").wait_for()
    assert again.locator(".step-name").first.inner_text() == "Step 20"
    assert again.locator("select[name=every]").input_value() == "nucleus"
    assert again.locator("input[name=q]").input_value() == "capital"
    again.go_back()
    page.page.locator(".step-sample .head a").click()
    page.wait_for_text("main h2", "Prompt 1")
    page.page.go_back()
    page.wait_for_text(".summary", "1 of 6 samples")


def test_filters(page, folder):
    page.open(folder, view="step")
    page.wait_for_steps()
    controls = ("every", "source", "finish", "q", "min", "max", "changed")
    cases = [
        ({"every": "greedy"}, 3),
        ({"source": "colours"}, 4),
        ({"finish": "length"}, 1),
        ({"min": "0.5", "score": "exact_match"}, 5),
        ({"min": "0.1", "max": "0.9"}, 3),
        ({"changed": "1"}, 2),
        ({"q": "PARIS course"}, 1),
        ({"q": "grass", "every": "greedy"}, 1),
        ({"q": "nowhere to be found"}, 0),
    ]
    for shown, num in cases:
        page.page.evaluate("changes => valgen.state.set(changes)", {**dict.fromkeys(controls, ""), **shown})
        assert page.text(".summary") == f"{num} of 6 samples", shown
        assert page.page.locator(".step-sample").count() == num
    page.page.get_by_role("button", name="Clear").click()
    assert page.text(".summary") == "6 samples"
    page.page.locator("select[name=finish]").select_option("length")
    page.page.locator("input[name=changed]").check()
    page.page.locator("input[name=min]").fill("0")
    assert page.shown() == {"view": "step", "finish": "length", "changed": "1", "min": "0"}
    assert page.text(".summary") == "1 of 6 samples"


def test_a_filter_that_finds_nothing_at_a_step_is_shown(page, tmp_path):
    steps = payloads()
    for answer in steps[0]["answers"]:
        answer["finish_reason"] = "eos"
    steps[0]["prompts"] = [{**prompt, "data_source": "colours"} for prompt in steps[0]["prompts"]]
    page.open(folders.write_folder(tmp_path, folders.index_of(steps), steps), view="step", step=40)
    page.wait_for_steps()
    chosen = "select => select.selectedOptions[0]?.label"
    filters = {"finish": ("length", "cut off"), "source": ("capitals", "capitals")}
    for name, (value, label) in filters.items():
        control = page.page.locator(f"main .filters select[name={name}]")
        control.select_option(value)
        assert control.evaluate(chosen) == label
        page.press("Home")
        page.wait_for_text(".summary", "0 of 6 samples")
        assert control.is_visible()
        assert control.evaluate(chosen) == f"{label} (0)"
        page.page.get_by_role("button", name="Clear").click()
        assert page.text(".summary") == "6 samples"
        assert control.locator("option", has_text="(0)").count() == 0
        page.press("End")
    for name in ("every", "score"):
        control = page.page.locator(f"main .filters select[name={name}]")
        page.page.evaluate("changes => valgen.state.set(changes)", {name: "gone", "min": "0"})
        assert page.text(".summary") == "0 of 6 samples"
        assert control.evaluate(chosen) == "gone (0)"
        page.page.get_by_role("button", name="Clear").click()


def test_a_curve_leads_to_its_step(page, folder):
    page.page.goto(folder.as_uri() + "#view=curves")
    page.wait_for_steps()
    charts = page.page.locator(".chart")
    page.page.locator(".chart .u-over").first.wait_for()
    assert charts.count() == 3
    assert page.text(".best-line") == "★ greedy/exact_match: best 0.75 at step 40"
    first = charts.nth(0)
    assert first.locator("figcaption").inner_text().startswith("exact_match"), "what is watched comes first"
    assert [text for text in first.locator(".u-legend th").all_inner_texts() if text != "step"] == ["greedy", "nucleus"]
    over = first.locator(".u-over")
    box = over.bounding_box()
    over.click(position={"x": box["width"] / 3, "y": box["height"] / 2})
    page.wait_for_text(".step-name", "Step 20")
    assert page.shown()["view"] == "step"


def test_strategies_stand_side_by_side(page, folder):
    page.open(folder, view="compare")
    assert page.texts(".heads .label") == ["greedy · step 40", "nucleus · step 40"]
    page.wait_for_text(".summary", "2 of 3 differ")
    first = page.page.locator(".compare-sample").first
    assert first.locator(".side").nth(0).locator("del").all_inner_texts() == ["It is Paris"]
    assert first.locator(".side").nth(1).locator("ins").all_inner_texts() == ["Paris, of course"]
    assert first.locator(".side").nth(0).locator("ins").count() == 0
    assert first.locator(".side").nth(1).locator("del").count() == 0
    page.page.locator("input[name=differ]").check()
    assert page.page.locator(".compare-sample").count() == 2


@pytest.mark.parametrize("is_one_file", [False, True])
def test_runs_stand_side_by_side(page, tmp_path, is_one_file):
    steps = [*payloads(), *payloads(run=1, shift=2)[:3]]  # the second run ended earlier
    index = folders.index_of(steps, names=("one", "two"))
    write = folders.write_one_file if is_one_file else folders.write_folder
    page.open(write(tmp_path / "page.html" if is_one_file else tmp_path, index, steps), view="compare", step=20)
    page.wait_for_text(".summary", "3 of 3 differ")
    assert page.texts(".heads .label") == ["one · greedy · step 20", "two · greedy · step 20"]
    page.page.locator("main input[type=range]").fill("2")
    page.wait_for_text(".heads", "two · greedy · step 30")
    page.wait_for_text(".summary", "2 of 3 differ")
    page.page.goto(page.page.url.partition("#")[0] + "#view=curves")
    page.wait_for_text(".chart .u-legend", "two · greedy")


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_step_that_one_run_lacks_is_reached_side_by_side(page, tmp_path, lacking):
    steps = [step for run in (0, 1) for step in payloads(run) if run != lacking or step["step"] not in (30, 40)]
    index = folders.index_of(steps, names=("one", "two"))
    page.open(folders.write_folder(tmp_path, index, steps), view="compare")
    assert page.text(".step-name") == "Step 20", "the newest that both have"
    page.wait_for_text(".summary", "0 of 3 differ")
    page.press("ArrowRight")
    assert page.text(".step-name") == "Step 30"
    page.wait_for_text(".side", "no answer at step 30")
    sides = page.page.locator(".compare-sample").first.locator(".side .answer")
    assert sides.nth(lacking).inner_text() == "no answer at step 30"
    assert sides.nth(1 - lacking).inner_text() == "The capital is Paris"
    page.press("End")
    assert page.text(".step-name") == "Step 40"
    assert page.text(".problems") == "", "a file that cannot be there is not asked for"


def test_a_prompt_of_one_run_alone_leads_to_that_run(page, tmp_path):
    steps = [*payloads(), *payloads(run=1)]
    for step in steps[len(STEPS) :]:
        step["prompts"][2]["key"] = "of the second run"
    path = folders.write_one_file(tmp_path / "page.html", folders.index_of(steps, names=("one", "two")), steps)
    page.open(path, view="compare", step=20)
    page.page.locator(".compare-sample .head a").last.click()
    page.wait_for_text(".current-answer .answer", "two")
    assert page.shown()["run"] == "1"
    assert page.text(".problems") == ""


@pytest.mark.parametrize("is_one_file", [False, True])
def test_no_text_becomes_markup_or_script(page, tmp_path, is_one_file):
    steps = []
    for number in (1, 2):
        prompts = [
            folders.prompt(
                at,
                text,
                text,
                key=text,
                origin=text,
                data_source=text,
                ground_truth=text,
                reference_raw=text,
                file=text,
            )
            for at, text in enumerate(HOSTILE)
        ]
        answers = [
            folders.answer(
                at, text + str(number), strategy=text, generation_raw=text, scores={text: 1.0}, score_texts={text: text}
            )
            for at, text in enumerate(HOSTILE)
        ]
        steps.append(folders.step(number, prompts, answers, {f"{text}/exact": 1.0 for text in HOSTILE}))
    index = folders.index_of(steps, names=(HOSTILE[1],), best_metric=HOSTILE[0], best={"value": 1, "step": 2})
    index["runs"][0]["folder"] = HOSTILE[1]
    write = folders.write_one_file if is_one_file else folders.write_folder
    page.open(write(tmp_path / "page.html" if is_one_file else tmp_path, index, steps))
    page.wait_for_steps(2)
    for at, text in enumerate(HOSTILE):
        name = text.replace("\udc80", "\ufffd")  # half a character cannot stand in a link
        page.page.evaluate("changes => valgen.state.set(changes)", {"prompt": name, "strategy": name})
        page.wait_for_text("main h2", f"Prompt {at + 1}")
        page.page.locator(".rest summary").click()
    assert "</script><script>window.hacked = 2</script>" in page.page.locator(".prompt-row").nth(1).inner_text()
    for view in ("step", "curves", "compare"):
        page.page.evaluate("view => valgen.state.set({ view })", view)
        page.page.locator({"curves": ".chart .u-over"}.get(view, "main .sample")).first.wait_for()
        if view == "step":
            assert HOSTILE[0] in page.page.locator(".step-sample").first.inner_text()
            assert "\\u202eevil\\u2066 \\x1b[31mred\\x00\\u2028\\u200b end" in page.page.locator("main").inner_text()
    assert page.page.evaluate("window.hacked") is None
    assert page.page.evaluate("document.querySelectorAll('main script, main img, main svg, main style').length") == 0


def test_what_is_named_like_a_part_of_every_object_is_kept(page, tmp_path):
    names = ("__proto__", "constructor", '{"__proto__":', ',["__proto__"]:')
    prompts = [folders.prompt(0, '{"__proto__":1}'), folders.prompt(1, ',["__proto__"]:')]
    scores = dict.fromkeys(names, 0.25)
    answers = [folders.answer(0, "a", scores=scores, score_texts=dict.fromkeys(names, "x")), folders.answer(1, "b")]
    steps = [folders.step(1, prompts, answers, dict.fromkeys(names, 0.5))]
    path = folders.write_folder(tmp_path, folders.index_of(steps), steps)
    (tmp_path / "data" / "step_00000001.js").write_bytes(call("valgen.step", steps[0]))
    page.open(path, view="step")
    page.wait_for_steps(1)
    assert page.texts(".step-sample .prompt-text") == ['{"__proto__":1}', ',["__proto__"]:']
    facts = page.page.locator(".step-sample").first.locator(".facts")
    assert [f"{name} 0.25" for name in names] == facts.locator(".chip:has(.name)").all_inner_texts()[:4]
    assert [f"{name} x" for name in names] == facts.locator(".chip:has(.name)").all_inner_texts()[4:]
    for name in names:
        page.page.evaluate("name => valgen.state.set({ score: name, min: '0.1' })", name)
        assert page.text(".summary") == "1 of 2 samples", "the other has no such score"
    page.page.evaluate("valgen.state.set({ view: 'curves' })")
    page.page.locator(".chart .u-over").first.wait_for()
    page.page.locator("main details summary").click()
    page.page.locator("main th[scope=col]").first.wait_for()
    assert page.texts("main th[scope=col]") == ["step", "num_samples", *names]
    assert page.texts("main td") == ["2", *["0.5"] * len(names)]


def test_the_policy_holds_where_markup_gets_in(browser, folder):
    """The last line of defence: even an element made of text by a fault of ours would run nothing and load nothing."""
    page = Page(browser.new_page()).open(folder)
    refusals = []
    page.page.on("requestfailed", lambda request: refusals.append((request.url, request.failure)))
    page.page.evaluate(
        """() => {
            const holder = document.createElement('div');
            holder.innerHTML = '<img src="https://example.invalid/x.png" onerror="window.hacked = 1">';
            document.body.append(holder);
            const script = document.createElement('script');
            script.textContent = 'window.hacked = 2';
            document.body.append(script);
        }"""
    )
    refused = "fetch('https://example.invalid/').then(() => 'sent', () => 'refused')"
    assert page.page.evaluate(refused) == "refused"
    assert page.page.evaluate("window.hacked") is None
    assert {reason for url, reason in refusals if url.startswith("https")} == {"csp"}
    assert len(refusals) == len([url for url in page.requests if url.startswith("https")]), "none was sent"
    page.page.close()


def test_of_ten_thousand_samples_only_what_is_visible_is_in_the_document(page, tmp_path):
    num = 10_000
    prompts = [folders.prompt(at, f"Question {at}?", f"Answer {at}") for at in range(num)]
    answers = [folders.answer(at, f"Answer {at}\n" * (1 + at % 4)) for at in range(num)]
    steps = [folders.step(5, prompts, answers)]
    page.open(folders.write_one_file(tmp_path / "page.html", folders.index_of(steps), steps), view="step")
    most = page.page.evaluate(
        """async () => {
            let most = 0;
            const frame = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
            const pane = document.querySelector('.pane');
            for (let at = 0; at <= 30; at++) {
                pane.scrollTop = pane.scrollHeight * at / 30;
                await frame();
                most = Math.max(most, document.querySelectorAll('.sample').length);
            }
            return most;
        }"""
    )
    assert 5 <= most <= 200
    page.wait_for_text(".step-sample", f"Question {num - 1}?")
    page.page.locator("input[name=q]").fill("question 4711?")
    page.wait_for_text(".summary", "1 of 10000 samples")
    page.page.locator(".step-sample .head a").click()
    page.wait_for_text("main h2", "Prompt 4712")
    page.wait_for_text(".prompt-row.current", "4712")
    assert page.page.locator(".sample").count() <= 200


def test_of_a_very_long_text_the_beginning_is_shown_until_all_is_asked_for(page, tmp_path):
    size = 200_000
    texts = ["😀 " + f"{letter} " * (size // 2 - 3) + "end" for letter in "ab"]  # never half of it
    prompts = [folders.prompt(0, "p " * (size // 2), "r " * (size // 2))]
    steps = [
        folders.step(number, prompts, [folders.answer(0, text, generation_raw="g " * 500_000)])
        for number, text in enumerate([*texts, "x" * 19_999 + "😀" + "y " * 39_999 + "z"])
    ]
    page.open(folders.write_folder(tmp_path, folders.index_of(steps), steps), step=1)
    page.wait_for_steps(3)
    page.page.locator(".rest summary").click()
    size_of = "document.querySelector('main').textContent.length"
    page.wait_for_text(".rest", "show all (1,000,000 characters)")
    assert page.page.evaluate(size_of) < 150_000
    page.wait_for_text(".current-answer .note", "too long to mark changes")
    assert page.page.locator(".current-answer ins, .current-answer del").count() == 0
    answer = page.page.locator(".current-answer .answer")
    answer.get_by_role("button", name="show all (200,000 characters)").click()
    assert answer.evaluate("e => e.textContent") == texts[1]
    page.page.locator(".prompt-card .more").first.click()
    page.page.locator(".rest .more").last.click()
    page.page.evaluate("valgen.data.changed(); new Promise(requestAnimationFrame)")
    assert page.page.evaluate(size_of) > 1_400_000, "left alone as other steps come in"
    page.press("ArrowRight")
    page.wait_for_text(".current-answer", "show all (100,000 characters)")
    assert answer.locator(".escape").count() == 0
    answer.locator(".more").click()
    assert answer.evaluate("e => e.textContent") == steps[2]["answers"][0]["generation"]
    assert answer.locator(".escape").count() == 0


def test_the_memory_of_changes_has_an_end(page, folder):
    page.open(folder)
    most = page.page.evaluate(
        """() => {
            let most = 0;
            const long = 'w'.repeat(19000);
            for (let at = 0; at < 300; at++) {
                valgen.diff.pieces(long + at, long + ' ' + at);
                most = Math.max(most, valgen.diff.numRemembered());
            }
            return most;
        }"""
    )
    assert 1_000_000 < most <= 4_000_000
    assert page.page.evaluate("valgen.diff.pieces('a', 'b') === valgen.diff.pieces('a', 'b')")


def test_missing_and_broken_data_is_told_and_the_rest_works(page, tmp_path):
    steps = payloads()
    path = folders.write_folder(tmp_path, folders.index_of(steps), steps)
    (tmp_path / "data" / "step_00000010.js").unlink()
    (tmp_path / "data" / "step_00000020.js").write_text("valgen.step({", encoding="utf-8")
    (tmp_path / "data" / "step_00000030.js").write_text('valgen.step({"format": 2, "step": 30});', encoding="utf-8")
    page.open(path)
    page.wait("document.querySelectorAll('.problems p').length === 3")
    told = page.text(".problems")
    assert "step_00000010.js is missing" in told
    assert "step_00000020.js is broken" in told
    assert "format 2" in told
    assert page.text(".current-answer .answer") == "It is Paris"
    page.press("ArrowLeft")
    page.wait_for_text(".current-answer", "step_00000030.js is broken")
    page.errors.clear()  # the broken script's own error


def test_without_any_data_the_page_says_what_it_needs(page, tmp_path):
    from verl_valgen.viewing.page import render

    (tmp_path / "index.html").write_text(render(), encoding="utf-8")
    page.page.goto((tmp_path / "index.html").as_uri())
    page.wait_for_text(".problems", "data/steps.js is missing")
    (tmp_path / "broken.html").write_text(render("bm90IGd6aXA="), encoding="utf-8")
    page.page.goto((tmp_path / "broken.html").as_uri())
    page.wait_for_text(".problems", "cannot be read")


def test_newer_rounds_come_without_opening_the_page_again(page, tmp_path):
    steps = payloads()
    path = folders.write_folder(tmp_path, folders.index_of(steps[:3]), steps)
    page.open(path)
    page.wait_for_steps(3)
    assert page.text(".step-name") == "Step 30"
    (tmp_path / "data" / "steps.js").write_text(folders.script("index", folders.index_of(steps)), encoding="utf-8")
    page.press("r")
    page.wait_for_text(".step-name", "Step 40")
    page.wait_for_text(".current-answer .answer", "It is Paris")


def test_a_look_at_newer_rounds_shows_nothing_of_an_earlier_run(page, tmp_path):
    path = folders.write_folder(tmp_path / "page", folders.index_of(payloads()), payloads()[1:])
    page.open(path, step=20)
    page.wait_for_text(".problems", "step_00000010.js is missing")
    page.wait_for_steps(3)
    steps = payloads(shift=2)[:2]  # another run begins in the same folder
    again = folders.write_folder(tmp_path / "again", folders.index_of(steps), steps)
    shutil.copytree(again.parent, path.parent, dirs_exist_ok=True)
    page.press("r")
    page.wait_for_text(".current-answer .answer", "It is Paris")
    page.wait_for_steps(2)
    assert page.text(".problems") == ""


def test_it_can_be_served_too(browser, folder):
    handler = functools.partial(QuietHandler, directory=folder.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page = Page(browser.new_page())
        page.page.goto(f"http://127.0.0.1:{server.server_port}/{folder.name}")
        page.wait_for_steps()
        page.wait_for_text(".current-answer .answer", "It is Paris")
        page.page.close()
        server.shutdown()
        thread.join()
    assert page.errors == []


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def test_what_failed_the_check_is_withheld(page, tmp_path):
    steps = payloads()
    withheld = "(withheld: failed the check against the trainer's model)"
    steps[-1]["answers"][0] |= {"verified": False, "generation": withheld, "scores": {}}
    page.open(folders.write_folder(tmp_path, folders.index_of(steps), steps))
    page.wait_for_steps()
    assert page.text(".current-answer .answer") == withheld
    assert page.page.locator(".current-answer ins").count() == 0
    assert "withheld" in page.text(".current-answer .facts")


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_what_is_shown_can_be_copied(page, folder, has_clipboard):
    if not has_clipboard:
        page.page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.page.add_init_script("document.addEventListener('copy', () => { window.copied = String(getSelection()); })")
    page.open(folder, prompt="key 1")
    if has_clipboard:
        page.page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.page.get_by_role("button", name="Copy as JSON").click()
    page.page.get_by_role("button", name="Copied").wait_for()
    record = json.loads(page.page.evaluate("window.copied"))
    assert (record["step"], record["row"], record["generation"], record["strategy"]) == (40, 1, "green", "greedy")
    assert record["prompt"] == "<|user|>What colour is grass?<|assistant|>"


def test_it_is_legible_on_a_phone_and_in_the_dark(browser, folder):
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = Page(context.new_page()).open(folder)
    assert page.page.evaluate(luminance) < 200
    for view in ("prompt", "step", "curves", "compare"):
        page.page.evaluate("view => valgen.state.set({ view })", view)
        page.page.locator("main .pane").wait_for()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390, view
        assert page.page.evaluate("document.querySelector('main .pane').scrollWidth") <= 390, view
    assert page.texts(".heads .label:visible") == ["greedy · step 40", "nucleus · step 40"]
    page.press("t")
    assert page.page.evaluate(luminance) > 600
    page.press("t")
    assert page.page.evaluate(luminance) < 200
    context.close()
