// The frame around the views: what is shown of what, and how one gets to something else.
"use strict";

(function () {
  const { element, button, oneLine } = valgen.dom;
  const { data, state, loading } = valgen;
  const VIEWS = [
    ["prompt", "Prompt", valgen.onePrompt], ["step", "Step", valgen.oneStep],
    ["curves", "Curves", valgen.curves], ["compare", "Compare", valgen.compare],
  ];
  const AGAINST = ["before", "reference", "first", "none"];
  const MAX_PROBLEMS = 4;
  const HELP = [
    ["← →", "step before, next step"], ["Home End", "first, newest step"], ["b", "best step"],
    ["k j", "previous, next prompt"], ["1 2 3 4", "one prompt, one step, curves, side by side"],
    ["s", "next strategy"], ["c", "next completion"], ["d", "mark changes against something else"],
    ["/", "search"], ["r", "look for newer rounds"], ["t", "light, dark, or as the system has it"], ["?", "this help"],
  ];

  let now = null; // what is shown; null while there is nothing
  let isAsked = false; // for it to be drawn anew

  const title = element("h1", {});
  const tabs = VIEWS.map(([, label], at) => element("a", { class: "tab", title: `${label} (${at + 1})` }, label));
  const status = element("span", { class: "status", role: "status" });
  const reload = button("Reload", lookAgain, "Look for newer rounds (r)");
  const theme = valgen.Theme(() => ask());
  const keys = valgen.Keys({
    ArrowLeft: () => moveStep(-1), ArrowRight: () => moveStep(1),
    Home: () => now && state.set({ step: now.steps[0] }),
    End: () => now && state.set({ step: now.steps[now.steps.length - 1] }),
    b: () => now && now.run.best && state.set({ step: now.run.best.step }),
    j: () => movePrompt(1), k: () => movePrompt(-1),
    1: () => show(0), 2: () => show(1), 3: () => show(2), 4: () => show(3),
    s: () => now && cycle("strategy", now.run.strategies, now.strategy),
    c: () => now && cycle("completion", data.completionsOf(now.runNumber, now.strategy), now.completion),
    d: () => now && cycle("against", AGAINST, now.against),
    "/": search, r: lookAgain, t: () => theme.next(),
  }, HELP);
  const help = button("?", keys.toggle, "Keys (?)");
  const problems = element("div", { class: "problems", role: "alert" });
  const stage = element("main", {});
  document.getElementById("app").append(
    element("header", {}, title, element("nav", { class: "tabs", "aria-label": "Views" }, tabs),
      element("span", { class: "grow" }), status, reload, theme.button, help),
    problems, stage, keys.dialog);

  /** The steps that can be gone to: those of the run; where runs stand side by side, those of any. */
  function stepsOf(run) {
    if (viewName() !== "compare" || data.runs.length === 1) return run.steps;
    return [...new Set(data.runs.flatMap(({ steps }) => steps))].sort((a, b) => a - b);
  }

  /** The newest that all runs have where they stand side by side, so that there is something to compare. */
  function newestOf(steps) {
    const common = steps.filter((step) => data.runs.every((run) => run.steps.includes(step)));
    return (viewName() === "compare" ? common.pop() : undefined) ?? steps[steps.length - 1];
  }

  /** What the link names, or the nearest that there is: the newest step, the first prompt, the first strategy. */
  function resolve() {
    const shown = state.get();
    const runNumber = data.runs[Number(shown.run)] ? Number(shown.run) : 0;
    const run = data.runs[runNumber];
    if (!run || !run.steps.length) return null;
    const steps = stepsOf(run);
    const asked = shown.step === "" || Number.isNaN(Number(shown.step)) ? newestOf(steps) : Number(shown.step);
    const step = steps.filter((one) => one <= asked).pop() ?? steps[0];
    const at = run.known.get(shown.prompt) ?? 0;
    const strategy = run.strategies.includes(shown.strategy) ? shown.strategy : run.strategies[0];
    const isThere = data.completionsOf(runNumber, strategy).includes(Number(shown.completion));
    const completion = isThere ? Number(shown.completion) : 0;
    const against = AGAINST.includes(shown.against) ? shown.against : "before";
    return { runNumber, run, steps, step, at, key: run.keys[at], strategy, completion, against };
  }

  function want() {
    loading.want(now.runNumber, now.step);
    if (now.against === "before") loading.want(now.runNumber, data.stepBefore(now.runNumber, now.step));
    if (now.against === "first") loading.want(now.runNumber, now.run.steps[0]);
  }

  function drawFrame() {
    const names = data.runs.map((run) => run.name).filter(Boolean);
    title.textContent = oneLine(names.join(" | ") || "Validation samples", 80);
    title.title = data.runs.map((run) => oneLine(run.folder || "", 300)).join("\n");
    document.title = [now && `step ${now.step}`, title.textContent].filter(Boolean).join(" · ");
    VIEWS.forEach(([name], at) => {
      tabs[at].href = state.hashOf({ view: name });
      if (viewName() === name) tabs[at].setAttribute("aria-current", "page");
      else tabs[at].removeAttribute("aria-current");
    });
    const { all, loaded } = loading.progress();
    status.textContent = all && loaded < all ? `${loaded} of ${all} steps loaded` : "";
    reload.hidden = !loading.canReload();
    drawProblems(loaded === all);
  }

  function drawProblems(isComplete) {
    const told = [...data.problems.values()];
    const { prompt } = state.get();
    const isUnknown = now && prompt && !now.run.known.has(prompt);
    if (isUnknown && isComplete) told.push("The prompt that this link names is not in this run.");
    if (told.length > MAX_PROBLEMS) {
      told.splice(MAX_PROBLEMS - 1, told.length, `… and ${told.length - MAX_PROBLEMS + 1} more problems.`);
    }
    const lines = told.join("\n");
    if (problems.dataset.lines === lines) return; // said once, not with every change
    problems.dataset.lines = lines;
    problems.replaceChildren(...told.map((text) => element("p", {}, oneLine(text, 400))));
  }

  const viewName = () => (VIEWS.some(([name]) => name === state.get().view) ? state.get().view : "prompt");
  const view = () => VIEWS.find(([name]) => name === viewName())[2];

  function say(text) {
    stage.replaceChildren(element("p", { class: "nothing centred" }, text));
  }

  function draw() {
    now = resolve();
    drawFrame();
    if (!now) {
      const isEmpty = data.runs.length > 0;
      say(data.problems.size ? "Nothing to show." : isEmpty ? "No round has been recorded yet." : "Loading …");
      return;
    }
    want();
    if (now.key === undefined && viewName() !== "curves") {
      say(now.run.failed.size === now.run.steps.length ? "Nothing to show." : "Loading …");
      return;
    }
    const { node, update } = view();
    if (stage.firstElementChild !== node) stage.replaceChildren(node);
    update(now);
  }

  function ask() { // data comes faster than a screen is drawn
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(() => {
      isAsked = false;
      draw();
    });
  }

  function moveStep(by) {
    const at = now ? now.steps.indexOf(now.step) + by : -1;
    if (at >= 0 && at < now.steps.length) state.set({ step: now.steps[at] });
  }

  function movePrompt(by) {
    const key = now && now.run.keys[now.at + by];
    if (key !== undefined && key !== null) state.set({ prompt: key });
  }

  function cycle(name, values, current) {
    if (values.length > 1) state.set({ [name]: values[(values.indexOf(current) + 1) % values.length] });
  }

  function lookAgain() {
    if (loading.canReload()) loading.reload();
  }

  function show(at) {
    state.set({ view: VIEWS[at][0] }, true);
    view().focus();
  }

  function search() {
    if (!view().search) show(1);
    view().search();
  }

  valgen.main = { moveStep, movePrompt, theme: theme.current };
  data.onChange(ask);
  state.onChange(draw);
  ask();
  loading.start();
})();
