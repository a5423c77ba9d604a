// The frame around the views: what is shown of what, keys, theme, help.
"use strict";

(function () {
  const { element, oneLine } = valgen.dom;
  const { data, state, loading } = valgen;
  const VIEWS = [["prompt", "Prompt", valgen.onePrompt], ["step", "Step", valgen.oneStep], ["curves", "Curves", valgen.curves], ["compare", "Compare", valgen.compare]];
  const AGAINST = ["before", "reference", "first", "none"];
  const THEMES = ["auto", "light", "dark"];
  const MAX_PROBLEMS = 4;
  const KEYS = [
    ["← →", "step before, next step"], ["Home End", "first, newest step"], ["b", "best step"],
    ["k j", "previous, next prompt"], ["1 2 3 4", "one prompt, one step, curves, side by side"],
    ["s", "next strategy"], ["c", "next completion"], ["d", "mark changes against something else"],
    ["/", "search"], ["r", "look for newer rounds"], ["t", "light, dark, or as the system has it"], ["?", "this help"],
  ];

  const title = element("h1", {});
  const tabs = VIEWS.map(([name, label], at) => element("a", { class: "tab", title: `${label} (${at + 1})` }, label));
  const status = element("span", { class: "status", role: "status" });
  const reload = element("button", { type: "button", title: "Look for newer rounds (r)", onclick: lookAgain }, "Reload");
  const themeButton = element("button", { type: "button", title: "Light or dark (t)", onclick: nextTheme });
  const helpButton = element("button", { type: "button", title: "Keys (?)", "aria-label": "Keys", onclick: help }, "?");
  const problems = element("div", { class: "problems", role: "alert" });
  const stage = element("main", {});
  const dialog = element("dialog", { "aria-label": "Keys" },
    element("h2", {}, "Keys"),
    element("dl", {}, KEYS.flatMap(([key, what]) => [element("dt", {}, key.split(" ").flatMap((one) => [element("kbd", {}, one), " "])), element("dd", {}, what)])),
    element("p", { class: "note" }, "Underlined is new, struck through is gone. The address of this page leads to what is shown."),
    element("button", { type: "button", onclick: () => dialog.close() }, "Close"));
  document.getElementById("app").append(
    element("header", {}, title, element("nav", { class: "tabs", "aria-label": "Views" }, tabs), element("span", { class: "grow" }), status, reload, themeButton, helpButton),
    problems, stage, dialog);

  let now = null; // what is shown; null while there is nothing
  let theme = "auto";

  function resolve() {
    const shown = state.get();
    const runNumber = data.runs[Number(shown.run)] ? Number(shown.run) : 0;
    const run = data.runs[runNumber];
    if (!run || !run.steps.length) return null;
    const newest = run.steps[run.steps.length - 1];
    const asked = shown.step === "" ? newest : Number(shown.step);
    const step = run.steps.filter((one) => one <= asked).pop() ?? (Number.isNaN(asked) ? newest : run.steps[0]);
    const at = run.known.get(shown.prompt) ?? 0;
    const strategy = run.strategies.includes(shown.strategy) ? shown.strategy : run.strategies[0];
    const completion = data.completionsOf(runNumber, strategy).includes(Number(shown.completion)) ? Number(shown.completion) : 0;
    const against = AGAINST.includes(shown.against) ? shown.against : "before";
    return { runNumber, run, step, at, key: run.keys[at], strategy, completion, against };
  }

  function want() {
    loading.want(now.runNumber, now.step);
    if (now.against === "before") loading.want(now.runNumber, data.stepBefore(now.runNumber, now.step));
    if (now.against === "first") loading.want(now.runNumber, now.run.steps[0]);
  }

  function drawFrame() {
    const shown = state.get();
    const names = data.runs.map((run) => run.name).filter(Boolean);
    title.textContent = oneLine(names.join(" | ") || "Validation samples", 80);
    title.title = data.runs.map((run) => oneLine(run.folder || "", 300)).join("\n");
    document.title = [now && `step ${now.step}`, names.join(" | ") || "Validation samples"].filter(Boolean).join(" · ");
    VIEWS.forEach(([name], at) => {
      tabs[at].href = state.hashOf({ view: name });
      if (viewName() === name) tabs[at].setAttribute("aria-current", "page");
      else tabs[at].removeAttribute("aria-current");
    });
    const { all, loaded } = loading.progress();
    status.textContent = all && loaded < all ? `${loaded} of ${all} steps loaded` : "";
    reload.hidden = !loading.canReload();
    const told = [...data.problems.values()];
    if (now && shown.prompt && !now.run.known.has(shown.prompt) && loaded === all) told.push("The prompt that this link names is not in this run.");
    if (told.length > MAX_PROBLEMS) told.splice(MAX_PROBLEMS - 1, told.length, `… and ${told.length - MAX_PROBLEMS + 1} more problems.`);
    const lines = told.join("\n");
    if (problems.dataset.lines !== lines) { // said once, not with every change
      problems.dataset.lines = lines;
      problems.replaceChildren(...told.map((text) => element("p", {}, oneLine(text, 400))));
    }
  }

  const viewName = () => (VIEWS.some(([name]) => name === state.get().view) ? state.get().view : "prompt");
  const view = () => VIEWS.find(([name]) => name === viewName())[2];

  function draw() {
    now = resolve();
    drawFrame();
    const isReady = now && (now.key !== undefined || now.run.failed.size > 0);
    if (!isReady) {
      const isEmpty = data.runs.length > 0 && !now;
      stage.replaceChildren(element("p", { class: "nothing centred" }, data.problems.size ? "Nothing to show." : isEmpty ? "No round has been recorded yet." : "Loading …"));
      if (now) want();
      return;
    }
    want();
    if (now.key === undefined && viewName() !== "curves") {
      stage.replaceChildren(element("p", { class: "nothing centred" }, "Loading …"));
      return;
    }
    const { node, update } = view();
    if (stage.firstElementChild !== node) stage.replaceChildren(node);
    update(now);
  }

  let isAsked = false;
  function ask() { // data comes faster than a screen is drawn
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(() => {
      isAsked = false;
      draw();
    });
  }

  function moveStep(by) {
    if (!now) return;
    const at = now.run.steps.indexOf(now.step) + by;
    if (at >= 0 && at < now.run.steps.length) state.set({ step: now.run.steps[at] });
  }

  function movePrompt(by) {
    const key = now && now.run.keys[now.at + by];
    if (key !== undefined) state.set({ prompt: key });
  }

  function cycle(name, values, current) {
    if (values.length > 1) state.set({ [name]: values[(values.indexOf(current) + 1) % values.length] });
  }

  function setTheme(name) {
    theme = THEMES.includes(name) ? name : "auto";
    document.documentElement.dataset.theme = theme;
    themeButton.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
    themeButton.setAttribute("aria-label", `Colours: ${theme}`);
    ask();
  }

  function nextTheme() {
    setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
    try {
      localStorage.setItem("valgen-theme", theme);
    } catch {
      // Not kept, then: some browsers keep nothing for files and frames.
    }
  }

  function keptTheme() {
    try {
      return localStorage.getItem("valgen-theme");
    } catch {
      return null;
    }
  }

  function help() {
    if (dialog.open) dialog.close();
    else dialog.showModal();
  }

  function lookAgain() {
    if (loading.canReload()) loading.reload();
  }

  function show(at) {
    state.set({ view: VIEWS[at][0] }, true);
    view().focus();
  }

  const onKey = {
    ArrowLeft: () => moveStep(-1), ArrowRight: () => moveStep(1),
    Home: () => now && state.set({ step: now.run.steps[0] }),
    End: () => now && state.set({ step: now.run.steps[now.run.steps.length - 1] }),
    b: () => now && now.run.best && state.set({ step: now.run.best.step }),
    j: () => movePrompt(1), k: () => movePrompt(-1),
    1: () => show(0), 2: () => show(1), 3: () => show(2), 4: () => show(3),
    s: () => now && cycle("strategy", now.run.strategies, now.strategy),
    c: () => now && cycle("completion", data.completionsOf(now.runNumber, now.strategy), now.completion),
    d: () => now && cycle("against", AGAINST, now.against),
    "/": () => {
      if (!view().search) show(1);
      view().search();
    },
    r: lookAgain, t: nextTheme, "?": help,
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !dialog.open) event.target.blur();
    if (event.ctrlKey || event.altKey || event.metaKey || !Object.hasOwn(onKey, event.key)) return;
    if (dialog.open && event.key !== "?") return;
    const tag = event.target.tagName;
    const isRange = tag === "INPUT" && event.target.type === "range";
    // What is typed belongs to the field; so do a slider's own keys, which do the same.
    if ((tag === "INPUT" && !isRange && event.target.type !== "checkbox") || tag === "SELECT" || tag === "TEXTAREA") return;
    if (isRange && ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    onKey[event.key]();
  });

  valgen.main = { moveStep, movePrompt, theme: () => theme + matchMedia("(prefers-color-scheme: dark)").matches };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ask);
  data.onChange(ask);
  state.onChange(draw);
  setTheme(keptTheme());
  loading.start();
})();
