// One prompt over all steps.
"use strict";

(function () {
  const { element, span, button, textBlock, oneLine, select, number } = valgen.dom;
  const { data, answer: show, state } = valgen;

  const scroller = element("section", { class: "pane", tabindex: "-1", "aria-label": "One prompt over all steps" });
  const listScroller = element("nav", { class: "sidebar", tabindex: "-1", "aria-label": "Prompts" });
  const node = element("div", { class: "view split" }, listScroller, scroller);

  const title = element("h2", {});
  const copyButton = button("Copy as JSON", () => show.copy(copyButton, record()));
  const before = button("‹ Prompt", () => valgen.main.movePrompt(-1), "Previous prompt (k)");
  const next = button("Prompt ›", () => valgen.main.movePrompt(1), "Next prompt (j)");
  const promptHost = element("div", { class: "card prompt-card" });
  const stepper = valgen.Stepper(describe);
  const strategy = select("Strategy", "strategy", (value) => state.set({ strategy: value }));
  const completion = select("Completion", "completion", (value) => state.set({ completion: value }));
  const against = show.againstControl();
  const run = show.runControl();
  const answerHost = element("div", { class: "card current-answer", "aria-live": "polite" });
  const restHost = element("details", { class: "rest" });
  const historyTitle = element("h3", {}, "Every step");
  const historyHost = element("div", {});
  scroller.append(
    element("div", { class: "title-line" }, title, span("grow"), before, next, copyButton),
    promptHost, stepper.node,
    element("div", { class: "fields" }, run.node, strategy.node, completion.node, against.node),
    answerHost, restHost, historyTitle, historyHost,
  );
  restHost.append(element("summary", {}, "Raw texts and parameters"));
  restHost.addEventListener("toggle", drawRest);

  let now = null; // what is shown; see `main.js`
  const listHost = element("div", {});
  listScroller.append(listHost);
  const list = valgen.VirtualList({
    scroller: listScroller, host: listHost, estimate: 42, make: makePrompt, identify: (at) => now.run.keys[at],
  });
  const history = valgen.VirtualList({
    scroller, host: historyHost, estimate: 40, make: makeStep, identify: (at) => now.run.steps[at],
  });

  function makePrompt(at) {
    const prompt = now.run.prompts[at];
    const found = data.find(now.runNumber, now.step, prompt.key, now.strategy, now.completion);
    const [score] = found ? Object.values(found.scores) : [];
    const grade = score === undefined ? "" : show.gradeOf(score);
    const isCurrent = prompt.key === now.key;
    return element(
      "a", {
        class: "sample prompt-row" + (isCurrent ? " current" : ""), "aria-current": isCurrent ? "true" : null,
        href: state.hashOf({ prompt: prompt.key }),
      },
      span("number", String(prompt.index + 1)),
      element("span", { class: "line", dir: "auto" }, oneLine(prompt.prompt_text, 80)),
      score !== undefined && span(`mark ${grade}`, show.SIGNS[grade] || number(score)),
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
      span("number", String(step), isBest && span("star", " ★")),
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
    const words = [`step ${step}`, score && `${oneLine(score[0])} ${number(score[1])}`, isChanged && "changed"];
    return { height, isChanged, title: words.filter(Boolean).join(", ") };
  }

  let asked = []; // the texts in the prompt's card, left alone for the same reason
  function drawPrompt() {
    const group = groupAt(now.step);
    const prompt = group ? group.prompt : now.run.prompts[now.run.known.get(now.key)];
    title.textContent = show.promptTitle(prompt);
    before.disabled = now.at <= 0;
    next.disabled = now.at >= now.run.keys.length - 1;
    const { key, prompt_text: text, reference } = prompt;
    if ([key, text, reference].every((one, at) => one === asked[at])) return;
    asked = [key, text, reference];
    promptHost.replaceChildren(
      show.labelled("Prompt", textBlock(text)),
      reference === null ? "" : show.labelled("Expected", textBlock(reference, { class: "reference" })),
    );
  }

  function relation(old, text) {
    if (old !== text && valgen.diff.isTooLong(old, text)) return "too long to mark changes";
    return `${old === text ? "the same as" : "marked: what differs from"} ${show.AGAINST[now.against]}`;
  }

  let drawn = []; // what the answer's card shows: it is left alone, with what is marked in it, as other steps come in
  function drawAnswer() {
    const found = answerAt(now.step);
    const group = groupAt(now.step);
    const old = show.oldText(now.against, now.runNumber, now.step, group, found);
    const wanted = [now.step, now.against, found, old, missing(now.step)];
    if (drawn.length && wanted.every((one, at) => one === drawn[at])) return;
    drawn = wanted;
    const note = found && old !== null && relation(old, found.generation);
    answerHost.replaceChildren(
      element("div", { class: "label" }, `Answer at step ${now.step}`, note && span("note", note)),
      show.answerText(found, old, { missing: missing(now.step) }),
      found ? show.facts(found) : "",
    );
  }

  let opened = []; // what the raw texts are of, left alone likewise
  function drawRest() {
    const summary = restHost.firstElementChild;
    const { prompt } = groupAt(now.step) || {};
    const wanted = restHost.open && prompt ? [prompt, answerAt(now.step)] : [];
    if (wanted.length === opened.length && wanted.every((one, at) => one === opened[at])) return;
    opened = wanted;
    restHost.replaceChildren(summary, ...(wanted.length ? show.rest(...wanted) : []));
  }

  function record() {
    const group = groupAt(now.step);
    if (!group) return null;
    return show.record(now.run, now.step, group.prompt, answerAt(now.step));
  }

  let listed = ""; // what the list on the left shows
  function update(shown) {
    now = shown;
    drawPrompt();
    stepper.update(now);
    run.set(now.runNumber);
    strategy.set(now.run.strategies.map((name) => [name, name]), now.strategy);
    const completions = data.completionsOf(now.runNumber, now.strategy);
    completion.set(completions.map((at) => [String(at), String(at + 1)]), String(now.completion));
    against.set(now.against);
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
