// One step, all prompts: filters and full-text search.
"use strict";

(function () {
  const { element, span, button, checkbox, textBlock, oneLine, select } = valgen.dom;
  const { data, answer: show, state } = valgen;

  const PROMPT_TEXTS = ["prompt_text", "prompt", "reference", "origin"]; // that are searched

  const scroller = element("section", { class: "pane", tabindex: "-1", "aria-label": "All prompts of one step" });
  const node = element("div", { class: "view" }, scroller);
  const stepper = valgen.Stepper(null);
  let timer = 0;
  const search = element("input", {
    type: "search", name: "q", placeholder: "Search prompts and answers  ( / )", "aria-label": "Search",
    oninput: () => {
      clearTimeout(timer);
      timer = setTimeout(() => state.set({ q: search.value }), 60);
    },
  });
  const control = (label, name) => select(label, name, (value) => state.set({ [name]: value }));
  const run = show.runControl();
  const strategy = control("Strategy", "every");
  const source = control("Source", "source");
  const finish = control("Ended", "finish");
  const score = control("Score", "score");
  const against = show.againstControl();
  const bound = (name, label) => element("input", {
    type: "number", name, step: "any", "aria-label": label, placeholder: label, class: "bound",
    oninput: (event) => state.set({ [name]: event.target.value }),
  });
  const min = bound("min", "min");
  const max = bound("max", "max");
  const changed = checkbox("changed since the last round", "changed", (value) => state.set({ changed: value }));
  const bounds = span("field bounds", min, element("span", { "aria-hidden": "true" }, "–"), max);
  const clear = button("Clear", () => {
    search.value = "";
    state.set({ q: "", every: "", source: "", finish: "", score: "", min: "", max: "", changed: "" });
  });
  const summary = element("span", { class: "summary", role: "status" });
  const copyButton = button("Copy as JSON", () => show.copy(copyButton, chosen.map(record)));
  const host = element("div", {});
  scroller.append(
    stepper.node,
    element(
      "div", { class: "fields filters", role: "search" },
      search, run.node, strategy.node, source.node, finish.node, score.node, bounds, changed.node, against.node, clear,
    ),
    element("div", { class: "title-line" }, summary, span("grow"), copyButton),
    host,
  );
  const list = valgen.VirtualList({ scroller, host, estimate: 120, make, identify });

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
    const texts = [lower(answer, ["generation"]), lower(group.prompt, PROMPT_TEXTS)];
    return words.every((word) => texts.some((text) => text.includes(word)));
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
      if (!Number.isFinite(value)) return false;
      if ((low !== null && value < low) || (high !== null && value > high)) return false;
    }
    if (shown.changed && !isChanged(answer, group)) return false;
    return words.length === 0 || matches(group, answer, words);
  }

  function groupOf(answer) {
    const loaded = now.run.loaded.get(now.step);
    return loaded.groups.get(loaded.prompts[answer.prompt].key);
  }

  function record(answer) {
    return show.record(now.run, now.step, groupOf(answer).prompt, answer);
  }

  function identify(at) {
    const { strategy: name, completion } = chosen[at];
    return JSON.stringify([groupOf(chosen[at]).prompt.key, name, completion]);
  }

  function make(at) {
    const answer = chosen[at];
    const group = groupOf(answer);
    const { prompt } = group;
    const old = show.oldText(now.against, now.runNumber, now.step, group, answer);
    const { strategy: name, completion } = answer;
    const hasMore = data.completionsOf(now.runNumber, name).length > 1;
    const which = [now.run.strategies.length > 1 && oneLine(name, 40), hasMore && `completion ${completion + 1}`];
    return element(
      "article", { class: "sample card step-sample" },
      show.head(
        prompt, state.hashOf({ view: "prompt", prompt: prompt.key, strategy: name, completion }),
        span("which", which.filter(Boolean).join(" · ")), span("grow"), show.facts(answer, true),
      ),
      element("div", { class: "pair" },
        element("div", {},
          textBlock(show.shortened(prompt.prompt_text), { class: "prompt-text clamp" }), show.expected(prompt)),
        clamped(show.answerText(answer, old, { isList: true }))),
    );
  }

  function clamped(block) {
    block.classList.add("clamp");
    return block;
  }

  /** `options`, and what is chosen where it is not among them: it says why nothing is found. */
  function withChosen(options, value, label = oneLine(value, 50)) {
    if (value === "" || options.some(([name]) => name === value)) return options;
    return [...options, [value, now.run.loaded.has(now.step) ? `${label} (0)` : label]];
  }

  function setControls(loaded) {
    const shown = state.get();
    const all = (options) => [["", "all"], ...options.map((name) => [name, name])];
    const answers = loaded ? loaded.answers : [];
    const distinct = (values) => [...new Set(values)].sort();
    run.set(now.runNumber);
    strategy.set(withChosen(all(now.run.strategies), shown.every), shown.every);
    strategy.node.hidden = now.run.strategies.length < 2 && shown.every === "";
    const sources = distinct((loaded ? loaded.prompts : []).map((prompt) => prompt.data_source || "–"));
    source.set(withChosen(all(sources), shown.source), shown.source);
    source.node.hidden = sources.length < 2 && shown.source === "";
    const reasons = distinct(answers.map((answer) => answer.finish_reason || "–"));
    const endings = [["", "all"], ...reasons.map((reason) => [reason, show.ending(reason)])];
    finish.set(withChosen(endings, shown.finish, show.ending(shown.finish)), shown.finish);
    const names = data.scoreNames(now.runNumber);
    score.set(withChosen(names.map((name) => [name, name]), shown.score), shown.score || names[0] || "");
    score.node.hidden = bounds.hidden = names.length === 0 && shown.score === "";
    against.set(now.against);
    for (const [input, value] of [[search, shown.q], [min, shown.min], [max, shown.max]]) {
      if (document.activeElement !== input && input.value !== value) input.value = value;
    }
    changed.set(Boolean(shown.changed));
    return { ...shown, score: shown.score || names[0] || "" };
  }

  function summarise(num, before, isChangedOnly) {
    const all = `${num} ${num === 1 ? "sample" : "samples"}`;
    const notes = [
      isChangedOnly && before === undefined && ": this is the first step",
      isChangedOnly && before !== undefined && !now.run.loaded.has(before) && ", as the step before is not loaded",
    ];
    const shown = chosen.length === num ? all : `${chosen.length} of ${all}`;
    summary.textContent = [shown, ...notes].filter(Boolean).join("");
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
    const { every, source: from, finish: ended, score: name } = shown;
    const which = JSON.stringify([now.runNumber, now.step, every, from, ended, name, low, high, shown.changed, words]);
    summarise(loaded.answers.length, before, Boolean(shown.changed));
    list.reset(chosen.length, which === found);
    if (which !== found && found !== "" && scroller.scrollTop > host.offsetTop) scroller.scrollTop = host.offsetTop;
    found = which;
  }

  valgen.oneStep = { node, update, focus: () => scroller.focus(), search: () => search.focus() };
})();
