// One chart: some series over steps, with the best step and the shown one marked; a click goes to the step.
"use strict";

(function () {
  const { element, span, oneLine, number } = valgen.dom;
  const HEIGHT_PX = 170;
  const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [4, 2], [12, 5]];
  const FONT = "11px sans-serif";

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  /** From the least to the greatest value, with some room; a number that never moves gets a scale all the same. */
  function rangeOf(_, low, high) {
    if (low === null || low === high) return [Math.min(0, low || 0), Math.max(1, (low || 0) * 1.25)];
    const room = (high - low) * 0.06;
    return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  /** Draws an upright line at a step; its place, or null where the step is not in sight. */
  function drawLine({ ctx, bbox, valToPos }, step, ink, dash) {
    const x = Math.round(valToPos(step, "x", true));
    if (!(x >= bbox.left && x <= bbox.left + bbox.width)) return null;
    ctx.save();
    ctx.strokeStyle = ink;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.restore();
    return x;
  }

  function drawStar({ ctx, bbox }, x) {
    ctx.save();
    ctx.fillStyle = colour("--accent");
    ctx.font = `${13 * devicePixelRatio}px sans-serif`;
    ctx.textAlign = "center";
    ctx.fillText("★", x, bbox.top - 3 * devicePixelRatio);
    ctx.restore();
  }

  /** Marks the shown step, and the best one: with a star where the chart has the number that it is the best of. */
  function marksOf(series, shownStep) {
    const watched = series.find(({ run, name }) => run.best && run.best_metric === name);
    const { best } = (watched || series[0]).run;
    return (plot) => {
      drawLine(plot, shownStep(), colour("--faint"), [2, 2]);
      if (!best) return;
      const x = drawLine(plot, best.step, colour("--accent"), watched ? [] : [3, 3]);
      if (watched && x !== null) drawStar(plot, x);
    };
  }

  function optionsOf(series, steps, values, width, reading, shownStep) {
    const isAlone = series.length === 1;
    const axis = {
      stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false },
      font: FONT, gap: 4,
    };
    return {
      width, height: HEIGHT_PX, padding: [16, 10, 0, 0],
      scales: { x: { time: false }, y: { range: rangeOf } },
      axes: [{ ...axis, size: 24 }, { ...axis, size: 46, values: (_, ticks) => ticks.map((tick) => number(tick)) }],
      cursor: { y: false, points: { size: 7 } },
      legend: {
        show: !isAlone, live: true,
        markers: { width: 2, dash: (_, at) => ((series[at - 1] || series[0]).dash ? "dotted" : "solid") },
      },
      series: [
        { label: "step" },
        ...series.map(({ label, ink, dash }) => ({
          label, stroke: colour(`--series-${ink}`), width: 1.75, dash: DASHES[dash % DASHES.length], spanGaps: true,
          points: { show: steps.length <= 60, size: 5 },
          value: (_, value) => (value === null ? "" : number(value)),
        })),
      ],
      hooks: {
        draw: [marksOf(series, shownStep)],
        setCursor: [({ cursor: { idx } }) => {
          const value = isAlone && Number.isInteger(idx) ? `: ${number(values[0][idx])}` : "";
          reading.textContent = Number.isInteger(idx) ? `step ${steps[idx]}${value}` : "";
        }],
      },
    };
  }

  /** `series`: `{label, run, runNumber, name, ink, dash}`; `goTo(step, runNumber)` is called for a click. The chart is
   * in the document as `box`, and drawn by `draw`, once it is to be seen. */
  function Chart(title, series, shownStep, goTo) {
    const steps = [...new Set(series.flatMap(({ run }) => [...run.loaded.keys()]))].sort((a, b) => a - b);
    const values = series.map(({ run, name }) => steps.map((step) => {
      const loaded = run.loaded.get(step);
      return loaded && Number.isFinite(loaded.numbers[name]) ? loaded.numbers[name] : null;
    }));
    const reading = span("reading");
    const note = series.length === 1 && series[0].label !== title && span("note", series[0].label);
    const holder = element("div", { class: "chart-body" });
    const box = element(
      "figure", { class: "chart", "aria-label": `${oneLine(title, 60)} over steps` },
      element("figcaption", {}, oneLine(title, 60), note, reading), holder,
    );
    let plot = null;
    return {
      box,
      draw() {
        if (plot) return;
        const width = Math.max(200, holder.clientWidth);
        plot = new uPlot(optionsOf(series, steps, values, width, reading, shownStep), [steps, ...values], holder);
        plot.over.addEventListener("click", () => {
          const at = plot.cursor.idx;
          if (!Number.isInteger(at)) return;
          goTo(steps[at], series.find(({ run }) => run.loaded.has(steps[at])).runNumber);
        });
      },
      resize() {
        if (plot && holder.clientWidth > 0) plot.setSize({ width: holder.clientWidth, height: HEIGHT_PX });
      },
      destroy() {
        if (plot) plot.destroy();
      },
    };
  }

  valgen.Chart = Chart;
})();
