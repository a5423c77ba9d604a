// One step, all prompts: filters and full-text search.
"use strict";

(function () {
  const { element, textBlock, oneLine, select, number } = valgen.dom;
  const { data, answer: show, state } = valgen;

  const scroller = element("section", { class: "pane", tabindex: "-1", "aria-label": "All prompts of one step" });
  const node = element("div", { class: "view" }, scroller);
  const stepper = valgen.Stepper(null);
  let timer = 0;
  const search = element("input", {
    type: "search", name: "q", placeholder: "Search prompts and answers  ( / )", "aria-label": "Search prompts and answers",
    oninput: () => {
      clearTimeout(timer);
      timer = setTimeout(() => state.set({ q: search.value }), 60);
    },
  });
  const control = (label, name) => select(label, name, (value) => state.set({ [name]: value }));
  const run = control("Run", "run");
  const strategy = control("Strategy", "every");
  const source = control("Source", "source");
  const finish = control("Ended", "finish");
  const score = control("Score", "score");
  const against = control("Changes against", "against");
  const bound = (name, label) => element("input", {
    type: "number", name, step: "any", "aria-label": label, placeholder: label, class: "bound",
    oninput: (event) => state.set({ [name]: event.target.value }),
  });
  const min = bound("min", "min");
  const max = bound("max", "max");
  const changedBox = element("input", { type: "checkbox", name: "changed", onchange: () => state.set({ changed: changedBox.checked ? "1" : "" }) });
  const bounds = element("span", { class: "field bounds" }, min, element("span", { "aria-hidden": "true" }, "–"), max);
  const clear = element("button", { type: "button", onclick: () => {
    search.value = "";
    state.set({ q: "", every: "", source: "", finish: "", score: "", min: "", max: "", changed: "" });
  } }, "Clear");
  const summary = element("span", { class: "summary", role: "status" });
  const copyButton = element("button", { type: "button", onclick: () => show.copy(copyButton, chosen.map(record)) }, "Copy as JSON");
  const host = element("div", {});
  scroller.append(
    stepper.node,
    element("div", { class: "fields filters", role: "search" }, search, run.node, strategy.node, source.node, finish.node, score.node, bounds,
      element("label", { class: "check" }, changedBox, "changed since the last round"), against.node, clear),
    element("div", { class: "title-line" }, summary, element("span", { class: "grow" }), copyButton),
    host,
  );
  const list = valgen.VirtualList({ scroller, host, estimate: 120, make });

  let now = null;
  let chosen = []; // the answers that pass the filters
  let found = ""; // by which filters, at which step

  // What is searched, in small letters; made once for each text.
  const lowered = new WeakMap();
  function lower(object, fields) {
    let text = lowered.get(object);
    if (text === undefined) {
      text = fields.map((name) => object[name] || "").join("\n").toLowerCase();
      lowered.set(object, text);
    }
    return text;
  }

  function matches(group, answer, words) {
    return words.every((word) =>
      lower(answer, ["generation"]).includes(word) || lower(group.prompt, ["prompt_text", "reference", "prompt", "origin"]).includes(word));
  }

  function isChanged(answer, group) {
    const before = data.stepBefore(now.runNumber, now.step);
    const old = data.find(now.runNumber, before, group.prompt.key, answer.strategy, answer.completion);
    return old !== undefined && old.generation !== answer.generation;
  }

  function passes(answer, group, shown, words, low, high) {
    if (shown.every && answer.strategy !== shown.every) return false;
    if (shown.source && (group.prompt.data_source || "–") !== shown.source) return false;
    if (shown.finish && (answer.finish_reason || "–") !== shown.finish) return false;
    if (low !== null || high !== null) {
      const value = answer.scores[shown.score];
      if (value === null || value === undefined || (low !== null && value < low) || (high !== null && value > high)) return false;
    }
    if (shown.changed && !isChanged(answer, group)) return false;
    return words.length === 0 || matches(group, answer, words);
  }

  function groupOf(answer) {
    const loaded = now.run.loaded.get(now.step);
    return loaded.groups.get(loaded.prompts[answer.prompt].key);
  }

  function record(answer) {
    const { prompt } = groupOf(answer);
    return { run: now.run.name, step: now.step, ...prompt, ...answer, prompt: prompt.prompt };
  }

  function make(at) {
    const answer = chosen[at];
    const group = groupOf(answer);
    const { prompt } = group;
    const old = show.oldText(now.against, now.runNumber, now.step, group, answer);
    const which = [now.run.strategies.length > 1 ? oneLine(answer.strategy, 40) : "", data.completionsOf(now.runNumber, answer.strategy).length > 1 ? `completion ${answer.completion + 1}` : ""].filter(Boolean).join(" · ");
    return element(
      "article", { class: "sample card step-sample" },
      element("div", { class: "head" },
        element("a", { href: state.hashOf({ view: "prompt", prompt: prompt.key, strategy: answer.strategy, completion: answer.completion }) }, show.promptTitle(prompt)),
        which && element("span", { class: "which" }, which), element("span", { class: "grow" }), show.facts(answer, true)),
      element("div", { class: "pair" },
        element("div", {},
          textBlock(show.shortened(prompt.prompt_text), { class: "prompt-text clamp" }),
          prompt.reference !== null && element("div", { class: "expected" }, element("span", { class: "label" }, "Expected "), textBlock(show.shortened(prompt.reference), { class: "reference clamp" }))),
        clamped(show.answerText(answer, old, { isList: true }))),
    );
  }

  function clamped(block) {
    block.classList.add("clamp");
    return block;
  }

  function setControls(loaded) {
    const shown = state.get();
    const all = (options) => [["", "all"], ...options.map((name) => [name, name])];
    const answers = loaded ? loaded.answers : [];
    const distinct = (values) => [...new Set(values)].sort();
    run.set(data.runs.map((one, at) => [String(at), one.name || `run ${at + 1}`]), String(now.runNumber));
    strategy.set(all(now.run.strategies), shown.every);
    strategy.node.hidden = now.run.strategies.length < 2;
    const sources = distinct((loaded ? loaded.prompts : []).map((prompt) => prompt.data_source || "–"));
    source.set(all(sources), shown.source);
    source.node.hidden = sources.length < 2;
    const reasons = distinct(answers.map((answer) => answer.finish_reason || "–"));
    finish.set([["", "all"], ...reasons.map((reason) => [reason, show.ending(reason)])], shown.finish);
    const names = data.scoreNames(now.runNumber);
    score.set(names.map((name) => [name, name]), shown.score || names[0] || "");
    score.node.hidden = names.length === 0;
    bounds.hidden = names.length === 0;
    against.set([["before", "the step before"], ["reference", "the expected answer"], ["first", "the first step"], ["none", "nothing"]], now.against);
    for (const [input, value] of [[search, shown.q], [min, shown.min], [max, shown.max]]) {
      if (document.activeElement !== input && input.value !== value) input.value = value;
    }
    changedBox.checked = Boolean(shown.changed);
    return { ...shown, score: shown.score || names[0] || "" };
  }

  function update(shownNow) {
    now = shownNow;
    stepper.update(now);
    const loaded = now.run.loaded.get(now.step);
    const shown = setControls(loaded);
    if (!loaded) {
      chosen = [];
      list.reset(0);
      summary.textContent = now.run.failed.get(now.step) || "loading …";
      return;
    }
    const before = data.stepBefore(now.runNumber, now.step);
    if (shown.changed || now.against === "before") valgen.loading.want(now.runNumber, before);
    const words = shown.q.toLowerCase().split(/\s+/).filter(Boolean);
    const bounded = (text) => (text === "" || Number.isNaN(Number(text)) ? null : Number(text));
    const low = bounded(shown.min), high = bounded(shown.max);
    chosen = loaded.answers.filter((answer) => passes(answer, groupOf(answer), shown, words, low, high));
    const which = JSON.stringify([now.runNumber, now.step, shown.every, shown.source, shown.finish, shown.score, low, high, shown.changed, words]);
    const num = (count) => `${count} ${count === 1 ? "sample" : "samples"}`;
    summary.textContent = chosen.length === loaded.answers.length ? num(chosen.length) : `${chosen.length} of ${num(loaded.answers.length)}`;
    if (shown.changed && before !== undefined && !now.run.loaded.has(before)) summary.textContent += ", as the step before is not loaded yet";
    if (shown.changed && before === undefined) summary.textContent += ": this is the first step";
    list.reset(chosen.length, which === found);
    if (which !== found && found !== "" && scroller.scrollTop > host.offsetTop) scroller.scrollTop = host.offsetTop;
    found = which;
  }

  valgen.oneStep = { node, update, focus: () => scroller.focus(), search: () => search.focus() };
})();
