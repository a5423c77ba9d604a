// One prompt over all steps.
"use strict";

(function () {
  const { element, textBlock, oneLine, select, number } = valgen.dom;
  const { data, answer: show, state } = valgen;

  const scroller = element("section", { class: "pane", tabindex: "-1", "aria-label": "One prompt over all steps" });
  const listScroller = element("nav", { class: "sidebar", tabindex: "-1", "aria-label": "Prompts" });
  const node = element("div", { class: "view split" }, listScroller, scroller);

  const title = element("h2", {});
  const copyButton = element("button", { type: "button", onclick: () => show.copy(copyButton, record()) }, "Copy as JSON");
  const before = element("button", { type: "button", title: "Previous prompt (k)", onclick: () => valgen.main.movePrompt(-1) }, "‹ Prompt");
  const next = element("button", { type: "button", title: "Next prompt (j)", onclick: () => valgen.main.movePrompt(1) }, "Prompt ›");
  const promptHost = element("div", { class: "card prompt-card" });
  const stepper = valgen.Stepper(describe);
  const strategy = select("Strategy", "strategy", (value) => state.set({ strategy: value }));
  const completion = select("Completion", "completion", (value) => state.set({ completion: value }));
  const against = select("Changes against", "against", (value) => state.set({ against: value }));
  const run = select("Run", "run", (value) => state.set({ run: value }));
  const answerHost = element("div", { class: "card current-answer", "aria-live": "polite" });
  const restHost = element("details", { class: "rest" });
  const historyTitle = element("h3", {}, "Every step");
  const historyHost = element("div", {});
  scroller.append(
    element("div", { class: "title-line" }, title, element("span", { class: "grow" }), before, next, copyButton),
    promptHost, stepper.node,
    element("div", { class: "fields" }, run.node, strategy.node, completion.node, against.node),
    answerHost, restHost, historyTitle, historyHost,
  );
  restHost.append(element("summary", {}, "Raw texts and parameters"));
  restHost.addEventListener("toggle", drawRest);

  let now = null; // what is shown; see `main.js`
  const listHost = element("div", {});
  listScroller.append(listHost);
  const list = valgen.VirtualList({ scroller: listScroller, host: listHost, estimate: 42, make: makePrompt });
  const history = valgen.VirtualList({ scroller, host: historyHost, estimate: 40, make: makeStep });

  function makePrompt(at) {
    const prompt = now.run.prompts[at];
    const found = data.find(now.runNumber, now.step, prompt.key, now.strategy, now.completion);
    const scores = found ? Object.values(found.scores) : [];
    return element(
      "a", {
        class: "sample prompt-row" + (prompt.key === now.key ? " current" : ""), href: state.hashOf({ prompt: prompt.key }),
        "aria-current": prompt.key === now.key ? "true" : null,
      },
      element("span", { class: "number" }, String(prompt.index + 1)),
      element("span", { class: "line", dir: "auto" }, oneLine(prompt.prompt_text, 80)),
      scores.length > 0 && element("span", { class: "mark " + (scores[0] >= 0.999 ? "good" : scores[0] <= 0.001 ? "bad" : "mid") },
        scores[0] === 1 ? "✓" : scores[0] === 0 ? "✗" : number(scores[0])),
    );
  }

  function groupAt(step) {
    const loaded = now.run.loaded.get(step);
    return loaded && loaded.groups.get(now.key);
  }

  function answerAt(step) {
    return data.answerOf(groupAt(step), now.strategy, now.completion);
  }

  function missing(step) {
    if (now.run.failed.has(step)) return now.run.failed.get(step);
    return now.run.loaded.has(step) ? "no answer at this step" : "loading …";
  }

  function makeStep(at) {
    const step = now.run.steps[at];
    const found = answerAt(step);
    const old = show.oldText(now.against, now.runNumber, step, groupAt(step), found);
    const isBest = now.run.best && now.run.best.step === step;
    return element(
      "a", {
        class: "sample step-row" + (step === now.step ? " current" : ""), href: state.hashOf({ step }),
        "aria-current": step === now.step ? "step" : null,
      },
      element("span", { class: "number" }, String(step), isBest && element("span", { class: "star", title: "best step" }, " ★")),
      show.answerText(found, old, { isList: true, missing: missing(step) }),
      found && show.facts(found, true),
    );
  }

  /** A step's bar: how high its first score is, and whether the answer is another than the step before. */
  function describe(step) {
    const found = answerAt(step);
    if (!found) return null;
    const [score] = Object.entries(found.scores);
    const previous = answerAt(data.stepBefore(now.runNumber, step));
    const isChanged = Boolean(previous) && previous.generation !== found.generation;
    const height = score && score[1] !== null ? Math.min(1, Math.max(0, score[1])) : null;
    return { height, isChanged, title: `step ${step}${score ? `, ${oneLine(score[0])} ${number(score[1])}` : ""}${isChanged ? ", changed" : ""}` };
  }

  function drawPrompt() {
    const group = groupAt(now.step);
    const prompt = group ? group.prompt : now.run.prompts[now.run.known.get(now.key)];
    title.textContent = show.promptTitle(prompt);
    promptHost.replaceChildren(
      show.labelled("Prompt", textBlock(prompt.prompt_text)),
      prompt.reference === null ? "" : show.labelled("Expected", textBlock(prompt.reference, { class: "reference" })),
    );
    before.disabled = now.at <= 0;
    next.disabled = now.at >= now.run.keys.length - 1;
  }

  function drawAnswer() {
    const found = answerAt(now.step);
    const group = groupAt(now.step);
    const old = show.oldText(now.against, now.runNumber, now.step, group, found);
    const names = { before: "the step before", reference: "the expected answer", first: "the first step" };
    let note = "";
    if (found && old !== null && now.against !== "none") {
      note = old === found.generation ? `the same as ${names[now.against]}` : `marked: what differs from ${names[now.against]}`;
    }
    answerHost.replaceChildren(
      element("div", { class: "label" }, `Answer at step ${now.step}`, note && element("span", { class: "note" }, note)),
      show.answerText(found, old, { missing: missing(now.step) }),
      found ? show.facts(found) : "",
    );
  }

  function drawRest() {
    const summary = restHost.firstElementChild;
    const group = groupAt(now.step);
    restHost.replaceChildren(summary, ...(restHost.open && group ? show.rest(group.prompt, answerAt(now.step)) : []));
  }

  function record() {
    const group = groupAt(now.step);
    if (!group) return null;
    const found = answerAt(now.step);
    return { run: now.run.name, step: now.step, ...group.prompt, ...(found || {}), prompt: group.prompt.prompt };
  }

  let listed = ""; // what the list on the left shows
  function update(shown) {
    now = shown;
    drawPrompt();
    stepper.update(now);
    run.set(data.runs.map((one, at) => [String(at), one.name || `run ${at + 1}`]), String(now.runNumber));
    strategy.set(now.run.strategies.map((name) => [name, name]), now.strategy);
    completion.set(data.completionsOf(now.runNumber, now.strategy).map((at) => [String(at), String(at + 1)]), String(now.completion));
    against.set([["before", "the step before"], ["reference", "the expected answer"], ["first", "the first step"], ["none", "nothing"]], now.against);
    drawAnswer();
    drawRest();
    historyTitle.hidden = now.run.steps.length < 2;
    history.reset(now.run.steps.length, true);
    list.reset(now.run.keys.length, true);
    const wanted = `${now.runNumber}:${now.key}`;
    if (wanted !== listed) list.show(now.at);
    listed = wanted;
  }

  valgen.onePrompt = { node, update, focus: () => scroller.focus() };
})();
