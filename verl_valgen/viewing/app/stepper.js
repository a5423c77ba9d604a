// The slider over steps, with a bar for each; shared by the views that show a step.
"use strict";

(function () {
  const { element, span, button, number } = valgen.dom;
  const MAX_BARS = 160;
  const MAX_BAR_PX = 22;

  /** `describe(step)` gives `{height: 0..1 or null, isChanged, title}` of a step's bar, or null where it has none. */
  function Stepper(describe) {
    const { state } = valgen;
    const bars = element("div", { class: "bars", "aria-hidden": "true" });
    const slider = element("input", {
      type: "range", min: "0", step: "1", "aria-label": "Step", class: "slider",
      oninput: () => state.set({ step: steps[Number(slider.value)] }),
    });
    const name = element("output", { class: "step-name" });
    const note = element("span", { class: "step-note" });
    const before = button("‹", () => valgen.main.moveStep(-1), "Step before (←)");
    const next = button("›", () => valgen.main.moveStep(1), "Next step (→)");
    let steps = [];

    function makeBar(step, isCurrent, best) {
      const found = describe(step);
      const bar = element("span", { class: "bar" + (isCurrent ? " current" : ""), title: found && found.title });
      if (best && best.step === step) bar.append(span("star", "★"));
      if (found) {
        const fill = span("fill" + (found.height === null ? " dot" : "") + (found.isChanged ? " changed" : ""));
        if (found.height !== null) fill.style.height = `${Math.max(2, Math.round(found.height * MAX_BAR_PX))}px`;
        bar.append(fill);
      }
      bar.addEventListener("click", () => state.set({ step }));
      return bar;
    }

    const node = element(
      "div", { class: "stepper" },
      element("div", { class: "step-line" }, before, name, next, note),
      element("div", { class: "track" }, bars, slider),
    );
    return {
      node,
      update({ step, steps: all, run }) {
        steps = all;
        const at = steps.indexOf(step);
        slider.max = Math.max(0, steps.length - 1);
        slider.value = at;
        slider.disabled = steps.length < 2;
        slider.setAttribute("aria-valuetext", `step ${step}`);
        before.disabled = at <= 0;
        next.disabled = at >= steps.length - 1;
        name.textContent = `Step ${step}`;
        const isBest = Boolean(run.best) && run.best.step === step;
        const best = isBest ? ` · ★ best ${run.best_metric} ${number(run.best.value)}` : "";
        note.textContent = `${at + 1} of ${steps.length}${best}`;
        note.classList.toggle("best", isBest);
        const isFew = describe && steps.length <= MAX_BARS;
        bars.replaceChildren(...(isFew ? steps.map((other) => makeBar(other, other === step, run.best)) : []));
      },
    };
  }

  valgen.Stepper = Stepper;
})();
