// Two strategies, or two runs, side by side.
"use strict";

(function () {
  const { element, span, button, checkbox, textBlock, oneLine, select, number } = valgen.dom;
  const { data, answer: show, state } = valgen;

  const NOTHING = "There is one run with one strategy here: nothing to compare. "
    + "`python -m verl_valgen page DIR --compare DIR2` puts two runs side by side.";

  const scroller = element("section", { class: "pane", tabindex: "-1", "aria-label": "Side by side" });
  const node = element("div", { class: "view" }, scroller);
  const stepper = valgen.Stepper(null);
  const left = select("Left", "left", (value) => state.set({ left: value }));
  const right = select("Right", "right", (value) => state.set({ right: value }));
  const differ = checkbox("only where they differ", "differ", (value) => state.set({ differ: value }));
  const summary = element("span", { class: "summary", role: "status" });
  const heads = element("div", { class: "pair heads" });
  const host = element("div", {});
  const copyButton = button("Copy as JSON", () => show.copy(copyButton, rows.map(record)));
  scroller.append(
    stepper.node,
    element("div", { class: "fields" }, left.node, right.node, differ.node),
    element("div", { class: "title-line" }, summary, span("grow"), copyButton),
    heads, host,
  );
  const list = valgen.VirtualList({ scroller, host, estimate: 120, make, identify: (at) => rows[at].prompt.key });
  let rows = []; // {prompt, left, right}: a prompt and the answers on both sides
  let sides = [];
  let drawn = "";

  /** Everything that can stand on a side: `run:completion:strategy`, and how it is called. */
  function choices() {
    const isOneRun = data.runs.length === 1;
    return data.runs.flatMap((run, runNumber) => run.strategies.flatMap((strategy) => {
      const completions = data.completionsOf(runNumber, strategy);
      return completions.map((completion) => [`${runNumber}:${completion}:${strategy}`, [
        !isOneRun && (run.name || `run ${runNumber + 1}`),
        (isOneRun || run.strategies.length > 1) && strategy,
        completions.length > 1 && `completion ${completion + 1}`,
      ].filter(Boolean).join(" · ")]);
    }));
  }

  function parse(text) {
    const [run, completion, ...strategy] = text.split(":");
    return { text, runNumber: Number(run), completion: Number(completion), strategy: strategy.join(":") };
  }

  /** What is chosen, or else the first strategy beside the other run's, or beside the second strategy. */
  function chosen(options, shown) {
    const values = options.map(([value]) => value);
    const one = parse(values.includes(shown.left) ? shown.left : values[0]);
    const others = values.filter((value) => value !== one.text);
    const candidates = [
      shown.right, `${one.runNumber === 0 ? 1 : 0}:${one.completion}:${one.strategy}`,
      ...others.filter((value) => parse(value).strategy !== one.strategy), ...others,
    ];
    return [one, parse(candidates.find((value) => values.includes(value)))];
  }

  function collect(step) {
    const found = new Map();
    sides.forEach((side, at) => {
      side.step = step;
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
    const { step } = sides[0];
    return { prompt: row.prompt, left_step: step, left: row.left || null, right_step: step, right: row.right || null };
  }

  /** Why there is no answer. */
  function missing({ runNumber, step }) {
    const { steps, loaded, failed } = data.runs[runNumber];
    if (steps.includes(step) && !loaded.has(step)) return failed.get(step) || "loading …";
    return `no answer at step ${step}`;
  }

  function side(row, which) {
    const answer = row[which];
    const other = row[which === "left" ? "right" : "left"];
    const isMarked = answer && other && !data.isWithheld(answer) && !data.isWithheld(other);
    const options = { isList: true, missing: missing(sides[which === "left" ? 0 : 1]) };
    let block;
    if (!isMarked) block = show.answerText(answer, null, options);
    else if (which === "right") block = show.answerText(answer, other.generation, { ...options, side: "new" });
    else {
      block = element("div", { class: "text answer", dir: "auto" });
      valgen.diff.appendMarked(block, show.shortened(answer.generation), show.shortened(other.generation), "old");
      if (!answer.generation) block.append(span("nothing", "(empty)"));
    }
    block.classList.add("clamp");
    return element("div", { class: "side" }, block, answer && show.facts(answer, true));
  }

  function make(at) {
    const row = rows[at];
    const { runNumber: run, step, strategy, completion } = sides[row.left ? 0 : 1];
    return element(
      "article", { class: "sample card compare-sample" },
      show.head(
        row.prompt, state.hashOf({ view: "prompt", prompt: row.prompt.key, run, step, strategy, completion }),
        !differs(row) && span("which", "the same"),
      ),
      textBlock(show.shortened(row.prompt.prompt_text), { class: "prompt-text clamp" }),
      show.expected(row.prompt),
      element("div", { class: "pair" }, side(row, "left"), side(row, "right")),
    );
  }

  function update(now) {
    stepper.update(now);
    const options = choices();
    if (options.length < 2) {
      rows = [];
      list.reset(0);
      summary.textContent = NOTHING;
      return;
    }
    const shown = state.get();
    sides = chosen(options, shown);
    left.set(options, sides[0].text);
    right.set(options, sides[1].text);
    differ.set(Boolean(shown.differ));
    const all = collect(now.step);
    const different = all.filter(differs);
    rows = shown.differ ? different : all;
    const names = new Set(sides.flatMap((one) => data.scoreNames(one.runNumber)));
    const both = (name) => `${mean(all, "left", name)} | ${mean(all, "right", name)}`;
    const means = [...names].map((name) => `${oneLine(name, 40)} ${both(name)}`);
    summary.textContent = [`${different.length} of ${all.length} differ`, ...means].join(" · ");
    const called = new Map(options);
    heads.replaceChildren(...sides.map(({ text, step }) =>
      element("div", { class: "label" }, `${oneLine(called.get(text), 80)} · step ${step}`)));
    const which = JSON.stringify([sides.map((one) => [one.text, one.step]), shown.differ]);
    list.reset(rows.length, which === drawn);
    drawn = which;
  }

  valgen.compare = { node, update, focus: () => scroller.focus() };
})();
