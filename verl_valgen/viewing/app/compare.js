// Two strategies, or two runs, side by side.
"use strict";

(function () {
  const { element, textBlock, oneLine, select, number } = valgen.dom;
  const { data, answer: show, state } = valgen;

  const scroller = element("section", { class: "pane", tabindex: "-1", "aria-label": "Side by side" });
  const node = element("div", { class: "view" }, scroller);
  const stepper = valgen.Stepper(null);
  const left = select("Left", "left", (value) => state.set({ left: value }));
  const right = select("Right", "right", (value) => state.set({ right: value }));
  const differBox = element("input", { type: "checkbox", name: "differ", onchange: () => state.set({ differ: differBox.checked ? "1" : "" }) });
  const summary = element("span", { class: "summary", role: "status" });
  const heads = element("div", { class: "pair heads" });
  const host = element("div", {});
  const copyButton = element("button", { type: "button", onclick: () => show.copy(copyButton, rows.map(record)) }, "Copy as JSON");
  scroller.append(
    stepper.node,
    element("div", { class: "fields" }, left.node, right.node, element("label", { class: "check" }, differBox, "only where they differ")),
    element("div", { class: "title-line" }, summary, element("span", { class: "grow" }), copyButton),
    heads, host,
  );
  const list = valgen.VirtualList({ scroller, host, estimate: 120, make });
  let rows = []; // {prompt, left, right}: a prompt and the answers on both sides
  let sides = [];
  let drawn = "";

  /** Everything that can stand on a side: `run:completion:strategy` and how it is called. */
  function choices() {
    return data.runs.flatMap((run, runNumber) => run.strategies.flatMap((strategy) =>
      data.completionsOf(runNumber, strategy).map((completion, _, all) => [
        `${runNumber}:${completion}:${strategy}`,
        [data.runs.length > 1 ? run.name || `run ${runNumber + 1}` : "", run.strategies.length > 1 || data.runs.length === 1 ? strategy : "", all.length > 1 ? `completion ${completion + 1}` : ""]
          .filter(Boolean).join(" · "),
      ])));
  }

  function parse(text) {
    const [run, completion, ...strategy] = text.split(":");
    return { text, runNumber: Number(run), completion: Number(completion), strategy: strategy.join(":") };
  }

  /** What is chosen, or else the first strategy beside the other run's, or beside the second strategy. */
  function chosen(options, shown) {
    const known = new Set(options.map(([value]) => value));
    const one = known.has(shown.left) ? shown.left : options[0][0];
    const [run, completion, ...strategy] = one.split(":");
    const candidates = [
      shown.right, `${run === "0" ? 1 : 0}:${completion}:${strategy.join(":")}`,
      ...options.map(([value]) => value).filter((value) => value !== one && parse(value).strategy !== strategy.join(":")),
      ...options.map(([value]) => value).filter((value) => value !== one),
    ];
    return [parse(one), parse(candidates.find((value) => known.has(value)) || one)];
  }

  /** The step itself, or the last one before it that the run has. */
  function stepOf(runNumber, step) {
    const { steps } = data.runs[runNumber];
    return steps.filter((other) => other <= step).pop() ?? steps[0];
  }

  function collect(step) {
    const found = new Map();
    sides.forEach((side, at) => {
      side.step = stepOf(side.runNumber, step);
      valgen.loading.want(side.runNumber, side.step);
      side.loaded = data.runs[side.runNumber].loaded.get(side.step);
      for (const [key, group] of side.loaded ? side.loaded.groups : []) {
        if (!found.has(key)) found.set(key, { prompt: group.prompt });
        found.get(key)[at === 0 ? "left" : "right"] = data.answerOf(group, side.strategy, side.completion);
      }
    });
    return [...found.values()].filter((row) => row.left || row.right);
  }

  const differs = (row) => !row.left || !row.right || row.left.generation !== row.right.generation;

  function mean(all, side, name) {
    const values = all.map((row) => row[side] && row[side].scores[name]).filter((value) => Number.isFinite(value));
    return values.length ? number(values.reduce((sum, value) => sum + value, 0) / values.length) : "–";
  }

  function record(row) {
    return { prompt: row.prompt, step: sides.map((side) => side.step), left: row.left || null, right: row.right || null };
  }

  function side(row, which) {
    const answer = row[which];
    const other = row[which === "left" ? "right" : "left"];
    const loaded = sides[which === "left" ? 0 : 1].loaded;
    const isMarked = answer && other && !data.isWithheld(answer) && !data.isWithheld(other);
    const options = { isList: true, missing: loaded ? "no answer" : "loading …" };
    let block;
    if (!isMarked) block = show.answerText(answer, null, options);
    else if (which === "right") block = show.answerText(answer, other.generation, { ...options, side: "new" });
    else {
      block = element("div", { class: "text answer", dir: "auto" });
      valgen.diff.appendMarked(block, show.shortened(answer.generation), show.shortened(other.generation), "old");
      if (!answer.generation) block.append(element("span", { class: "nothing" }, "(empty)"));
    }
    block.classList.add("clamp");
    return element("div", { class: "side" }, block, answer && show.facts(answer, true));
  }

  function make(at) {
    const row = rows[at];
    return element(
      "article", { class: "sample card compare-sample" },
      element("div", { class: "head" }, element("a", { href: state.hashOf({ view: "prompt", prompt: row.prompt.key }) }, show.promptTitle(row.prompt)),
        !differs(row) && element("span", { class: "which" }, "the same")),
      textBlock(show.shortened(row.prompt.prompt_text), { class: "prompt-text clamp" }),
      row.prompt.reference !== null && element("div", { class: "expected" }, element("span", { class: "label" }, "Expected "), textBlock(show.shortened(row.prompt.reference), { class: "reference clamp" })),
      element("div", { class: "pair" }, side(row, "left"), side(row, "right")),
    );
  }

  function update(now) {
    stepper.update(now);
    const options = choices();
    if (options.length < 2) {
      rows = [];
      list.reset(0);
      summary.textContent = "There is one run with one strategy here: nothing to compare. `python -m verl_valgen page DIR --compare DIR2` puts two runs side by side.";
      return;
    }
    const shown = state.get();
    sides = chosen(options, shown);
    left.set(options, sides[0].text);
    right.set(options, sides[1].text);
    differBox.checked = Boolean(shown.differ);
    const all = collect(now.step);
    const different = all.filter(differs);
    rows = shown.differ ? different : all;
    const names = new Set(sides.flatMap((one) => data.scoreNames(one.runNumber)));
    summary.textContent = [`${different.length} of ${all.length} differ`, ...[...names].map((name) => `${oneLine(name, 40)} ${mean(all, "left", name)} | ${mean(all, "right", name)}`)].join(" · ");
    heads.replaceChildren(...sides.map((one) => element("div", { class: "label" }, oneLine(options.find(([value]) => value === one.text)[1], 80), ` · step ${one.step}`)));
    const which = JSON.stringify([sides.map((one) => [one.text, one.step]), shown.differ]);
    list.reset(rows.length, which === drawn);
    drawn = which;
  }

  valgen.compare = { node, update, focus: () => scroller.focus() };
})();
