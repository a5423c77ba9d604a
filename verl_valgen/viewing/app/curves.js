// Curves of every number over steps; a click goes to the step.
"use strict";

(function () {
  const { element, oneLine, number } = valgen.dom;
  const { data, state } = valgen;
  const HEIGHT_PX = 170;
  const MAX_TABLE_STEPS = 200;
  const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [4, 2], [12, 5]];
  const NUM_COLOURS = 6;

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
  scroller.append(element("div", { class: "title-line" }, best, element("span", { class: "grow" }), filter), grid, table);

  let drawn = ""; // what the charts show
  let charts = [];
  let now = null;

  /** The chart that a number belongs to, and its name there: those that differ by strategy or source share one. */
  function placeOf(name) {
    const parts = name.split("/");
    if (parts[0] === "by_source" && parts.length > 2) {
      return { chart: `${parts[parts.length - 1]} by source`, series: parts.slice(1, -1).join("/"), kind: "source" };
    }
    return { chart: parts[parts.length - 1], series: parts.slice(0, -1).join("/"), kind: "strategy" };
  }

  // The same strategy (or source) has the same colour in every chart. Of two runs, the second is dashed; in one, dashes
  // tell what colours tell.
  const looks = new Map(); // kind and name -> number of that kind
  function lookOf(kind, name, runNumber) {
    if (name === "") return { ink: 0, dash: runNumber };
    const key = `${kind}/${name}`;
    if (!looks.has(key)) looks.set(key, [...looks.keys()].filter((other) => other.startsWith(`${kind}/`)).length);
    const at = looks.get(key);
    return { ink: at % NUM_COLOURS, dash: (data.runs.length > 1 ? runNumber : at) % DASHES.length };
  }

  /** Chart -> its series, `{label, run, runNumber, name, ink, dash}`, in the order in which they came. */
  function chartsOf(words) {
    const found = new Map();
    data.runs.forEach((run, runNumber) => {
      const names = new Set();
      for (const step of [...run.loaded.keys()].sort((a, b) => b - a)) Object.keys(run.loaded.get(step).numbers).forEach((name) => names.add(name));
      for (const name of names) {
        if (!words.every((word) => name.toLowerCase().includes(word))) continue;
        const { chart, series, kind } = placeOf(name);
        const label = [data.runs.length > 1 ? run.name || `run ${runNumber + 1}` : "", series].filter(Boolean).join(" · ") || chart;
        if (!found.has(chart)) found.set(chart, []);
        found.get(chart).push({ label: oneLine(label, 50), run, runNumber, name, ...lookOf(kind, series, runNumber) });
      }
    });
    // What is watched comes first; how long things took, last.
    const rank = (chart) => {
      const names = found.get(chart).map((series) => series.name);
      if (data.runs.some((run) => names.includes(run.best_metric))) return 0;
      return ["num_samples", "seconds", "tokens_per_s", "best", "best_step"].includes(chart) ? 2 : 1;
    };
    return [...found].sort(([a], [b]) => rank(a) - rank(b));
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  /** From the least to the greatest value, with some room; a number that never moves gets a scale all the same. */
  function rangeOf(_, low, high) {
    if (low === null || low === high) return [Math.min(0, low || 0), Math.max(1, (low || 0) * 1.25)];
    const room = (high - low) * 0.06;
    return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  function marks(series) {
    const best = series.find(({ run, name }) => run.best && run.best_metric === name);
    const run = best ? best.run : series[0].run;
    return (plot) => {
      const { ctx, bbox } = plot;
      const at = (step, ink, dash) => {
        const x = Math.round(plot.valToPos(step, "x", true));
        if (!(x >= bbox.left && x <= bbox.left + bbox.width)) return;
        ctx.save();
        ctx.strokeStyle = ctx.fillStyle = ink;
        ctx.lineWidth = devicePixelRatio;
        ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        ctx.restore();
        return x;
      };
      at(now.step, colour("--faint"), [2, 2]);
      if (!run.best) return;
      const x = at(run.best.step, colour("--accent"), best ? [] : [3, 3]);
      if (x === undefined || !best) return;
      ctx.save();
      ctx.fillStyle = colour("--accent");
      ctx.font = `${13 * devicePixelRatio}px sans-serif`;
      ctx.textAlign = "center";
      ctx.fillText("★", x, bbox.top - 3 * devicePixelRatio);
      ctx.restore();
    };
  }

  function makeChart(title, series) {
    const steps = [...new Set(series.flatMap(({ run }) => [...run.loaded.keys()]))].sort((a, b) => a - b);
    const values = series.map(({ run, name }) => steps.map((step) => {
      const loaded = run.loaded.get(step);
      const value = loaded && loaded.numbers[name];
      return Number.isFinite(value) ? value : null;
    }));
    const holder = element("div", { class: "chart-body" });
    const reading = element("span", { class: "reading" });
    const isAlone = series.length === 1;
    const caption = element("figcaption", {}, oneLine(title, 60), isAlone && series[0].label !== title && element("span", { class: "note" }, ` ${series[0].label}`), reading);
    const box = element("figure", { class: "chart", "aria-label": `${title} over steps` }, caption, holder);
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px sans-serif" };
    const build = () => {
      const plot = new uPlot({
        width: Math.max(200, holder.clientWidth), height: HEIGHT_PX,
        padding: [16, 10, 0, 0],
        scales: { x: { time: false }, y: { range: rangeOf } },
        axes: [{ ...axis, size: 24, gap: 4 }, { ...axis, size: 46, gap: 4, values: (_, ticks) => ticks.map((tick) => number(tick)) }],
        cursor: { y: false, points: { size: 7 } },
        legend: {
          show: !isAlone, live: true,
          markers: { width: 2, dash: (_, at) => ((series[at - 1] || series[0]).dash ? "dashed" : "solid") },
        },
        series: [
          { label: "step", value: (_, step) => (step === null ? "" : String(step)) },
          ...series.map(({ label, ink, dash }) => ({
            label, stroke: colour(`--series-${ink}`), width: 1.75, dash: DASHES[dash], spanGaps: true,
            points: { show: steps.length <= 60, size: 5 },
            value: (_, value) => (value === null ? "" : number(value)),
          })),
        ],
        hooks: {
          draw: [marks(series)],
          setCursor: [({ cursor: { idx } }) => { reading.textContent = Number.isInteger(idx) ? `step ${steps[idx]}${isAlone ? `: ${number(values[0][idx])}` : ""}` : ""; }],
        },
      }, [steps, ...values], holder);
      plot.over.addEventListener("click", () => {
        const at = plot.cursor.idx;
        if (at === null || at === undefined) return;
        const found = series.find(({ run }) => run.loaded.has(steps[at]));
        state.set({ view: "step", step: steps[at], run: found.runNumber }, true);
      });
      return plot;
    };
    return { box, holder, build, plot: null };
  }

  // Charts are made as they come into view: there may be hundreds of numbers.
  const sight = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chart = charts.find(({ box }) => box === entry.target);
      if (entry.isIntersecting && chart && !chart.plot) chart.plot = chart.build();
    }
  }, { rootMargin: "200px" });
  new ResizeObserver(() => {
    charts.forEach(({ plot, holder }) => {
      if (plot && holder.clientWidth > 0) plot.setSize({ width: holder.clientWidth, height: HEIGHT_PX });
    });
  }).observe(grid);

  function clear() {
    charts.forEach(({ plot }) => plot && plot.destroy());
    sight.disconnect();
    charts = [];
    grid.replaceChildren();
  }

  function drawTable() {
    const summary = table.firstElementChild;
    table.replaceChildren(summary);
    if (!table.open || !now) return;
    const steps = [...now.run.loaded.keys()].sort((a, b) => b - a).slice(0, MAX_TABLE_STEPS);
    const names = [...new Set(steps.flatMap((step) => Object.keys(now.run.loaded.get(step).numbers)))];
    table.append(element("div", { class: "table-holder", tabindex: "0" }, element("table", {},
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "step"), names.map((name) => element("th", { scope: "col" }, oneLine(name, 60))))),
      element("tbody", {}, steps.map((step) => element("tr", {},
        element("th", { scope: "row" }, element("a", { href: state.hashOf({ view: "step", step }) }, String(step))),
        names.map((name) => element("td", {}, number(now.run.loaded.get(step).numbers[name])))))),
    )));
  }

  function drawBest() {
    const lines = data.runs.filter((run) => run.best).map((run) => [
      element("span", { class: "star" }, "★ "), `${data.runs.length > 1 ? oneLine(run.name, 40) + ": " : ""}${oneLine(run.best_metric || "", 80)}: best ${number(run.best.value)} at `,
      element("a", { href: state.hashOf({ view: "step", step: run.best.step, run: data.runs.indexOf(run) }) }, `step ${run.best.step}`), " ",
    ]);
    best.replaceChildren(...lines.flat());
  }

  function update(shown) {
    now = shown;
    drawBest();
    const text = state.get().curves;
    if (document.activeElement !== filter) filter.value = text;
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = JSON.stringify([words, now.step, valgen.main.theme(), data.runs.map((run) => [...run.loaded.keys(), run.best])]);
    if (wanted === drawn) return;
    drawn = wanted;
    clear();
    looks.clear();
    charts = chartsOf(words).map(([title, series]) => makeChart(title, series));
    if (!charts.length) grid.append(element("p", { class: "nothing" }, words.length ? "No number has this in its name." : "No numbers yet."));
    grid.append(...charts.map(({ box }) => box));
    charts.forEach(({ box }) => sight.observe(box));
    drawTable();
  }

  valgen.curves = { node, update, focus: () => scroller.focus(), search: () => filter.focus() };
})();
