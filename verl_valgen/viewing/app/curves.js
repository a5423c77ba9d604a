// Curves of every number over steps.
"use strict";

(function () {
  const { element, span, oneLine, number } = valgen.dom;
  const { data, state } = valgen;
  const MAX_TABLE_STEPS = 200;
  const NUM_COLOURS = 6;
  const REDRAW_MS = 400; // while steps come in: each would draw all charts anew
  const LAST = ["num_samples", "seconds", "tokens_per_s", "best", "best_step"];

  const scroller = element("section", { class: "pane", tabindex: "-1", "aria-label": "Numbers over steps" });
  const node = element("div", { class: "view" }, scroller);
  const best = element("p", { class: "best-line" });
  const filter = element("input", {
    type: "search", name: "curves", placeholder: "Which numbers", "aria-label": "Which numbers",
    oninput: () => state.set({ curves: filter.value }),
  });
  const grid = element("div", { class: "charts" });
  const table = element("details", { class: "rest" }, element("summary", {}, "As a table"));
  table.addEventListener("toggle", () => drawTable());
  scroller.append(element("div", { class: "title-line" }, best, span("grow"), filter), grid, table);

  let drawn = ""; // what the charts show
  let drawnAt = 0;
  let timer = 0;
  let charts = [];
  let now = null;

  /** The chart that a number belongs to, and its name there: those that differ by strategy or source share one. */
  function placeOf(name) {
    const parts = name.split("/");
    const last = parts[parts.length - 1];
    if (parts[0] === "by_source" && parts.length > 2) {
      return { chart: `${last} by source`, kind: "source", series: parts.slice(1, -1).join("/") };
    }
    return { chart: last, kind: "strategy", series: parts.slice(0, -1).join("/") };
  }

  // The same strategy (or source) has the same colour in every chart. Of two runs, the second is dashed; in one, dashes
  // tell what colours tell.
  const looks = new Map(); // kind and name -> number of that kind
  function lookOf(kind, name, runNumber) {
    if (name === "") return { ink: 0, dash: runNumber };
    const key = `${kind}/${name}`;
    if (!looks.has(key)) looks.set(key, [...looks.keys()].filter((other) => other.startsWith(`${kind}/`)).length);
    return { ink: looks.get(key) % NUM_COLOURS, dash: data.runs.length > 1 ? runNumber : looks.get(key) };
  }

  function namesOf(run) {
    const names = new Set();
    for (const step of [...run.loaded.keys()].sort((a, b) => b - a)) {
      Object.keys(run.loaded.get(step).numbers).forEach((name) => names.add(name));
    }
    return [...names];
  }

  /** Chart -> its series; what is watched comes first, how long things took last. */
  function chartsOf(words) {
    const found = new Map();
    looks.clear();
    data.runs.forEach((run, runNumber) => {
      for (const name of namesOf(run)) {
        if (!words.every((word) => name.toLowerCase().includes(word))) continue;
        const { chart, series, kind } = placeOf(name);
        const parts = [data.runs.length > 1 ? run.name || `run ${runNumber + 1}` : "", series].filter(Boolean);
        if (!found.has(chart)) found.set(chart, []);
        const label = oneLine(parts.join(" · ") || chart, 50);
        found.get(chart).push({ label, run, runNumber, name, ...lookOf(kind, series, runNumber) });
      }
    });
    const isWatched = (chart) => found.get(chart).some(({ run, name }) => run.best_metric === name);
    const rank = (chart) => (isWatched(chart) ? 0 : LAST.includes(chart) ? 2 : 1);
    return [...found].sort(([a], [b]) => rank(a) - rank(b));
  }

  // Charts are drawn as they come into view: there may be hundreds of numbers.
  const sight = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) charts.filter(({ box }) => box === entry.target).forEach((chart) => chart.draw());
    }
  }, { rootMargin: "200px" });
  new ResizeObserver(() => charts.forEach((chart) => chart.resize())).observe(grid);

  function drawCharts(words) {
    sight.disconnect();
    charts.forEach((chart) => chart.destroy());
    const goTo = (step, run) => state.set({ view: "step", step, run }, true);
    charts = chartsOf(words).map(([title, series]) => valgen.Chart(title, series, () => now.step, goTo));
    const why = words.length ? "No number has this in its name." : "No numbers yet.";
    const nothing = element("p", { class: "nothing" }, why);
    grid.replaceChildren(...(charts.length ? charts.map(({ box }) => box) : [nothing]));
    charts.forEach(({ box }) => sight.observe(box));
  }

  function drawTable() {
    const summary = table.firstElementChild;
    table.replaceChildren(summary);
    if (!table.open || !now) return;
    const { loaded } = now.run;
    const names = namesOf(now.run);
    const steps = [...loaded.keys()].sort((a, b) => b - a).slice(0, MAX_TABLE_STEPS);
    const head = ["step", ...names].map((name) => element("th", { scope: "col" }, oneLine(name, 60)));
    const rows = steps.map((step) => element(
      "tr", {},
      element("th", { scope: "row" }, element("a", { href: state.hashOf({ view: "step", step }) }, String(step))),
      names.map((name) => element("td", {}, number(loaded.get(step).numbers[name]))),
    ));
    const whole = element("table", {}, element("thead", {}, element("tr", {}, head)), element("tbody", {}, rows));
    table.append(element("div", { class: "table-holder", tabindex: "0" }, whole));
  }

  function drawBest() {
    const lines = data.runs.filter((run) => run.best).map((run) => {
      const name = data.runs.length > 1 ? oneLine(run.name, 40) + ": " : "";
      const link = state.hashOf({ view: "step", step: run.best.step, run: data.runs.indexOf(run) });
      return [
        span("star", "★ "),
        `${name}${oneLine(run.best_metric || "", 80)}: best ${number(run.best.value)} at `,
        element("a", { href: link }, `step ${run.best.step}`), " ",
      ];
    });
    best.replaceChildren(...lines.flat());
  }

  function update(shown) {
    now = shown;
    drawBest();
    const text = state.get().curves;
    if (document.activeElement !== filter) filter.value = text;
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const there = data.runs.map((run) => [run.loaded.size, run.steps.length, run.best]);
    const wanted = JSON.stringify([words, now.runNumber, now.step, valgen.main.theme(), there]);
    if (wanted === drawn) return;
    clearTimeout(timer);
    const { all, loaded } = valgen.loading.progress();
    if (loaded < all && performance.now() - drawnAt < REDRAW_MS) {
      timer = setTimeout(() => update(now), REDRAW_MS);
      return;
    }
    drawn = wanted;
    drawnAt = performance.now();
    drawCharts(words);
    drawTable();
  }

  valgen.curves = { node, update, focus: () => scroller.focus(), search: () => filter.focus() };
})();
