// The slider over steps, with a bar for each; shared by the views that show a step.
"use strict";

(function () {
  const { element } = valgen.dom;
  const MAX_BARS = 160;

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
    const button = (text, label, act) => element("button", { type: "button", "aria-label": label, title: label, onclick: act }, text);
    const before = button("‹", "Step before (←)", () => valgen.main.moveStep(-1));
    const next = button("›", "Next step (→)", () => valgen.main.moveStep(1));
    let steps = [];

    const node = element(
      "div", { class: "stepper" },
      element("div", { class: "step-line" }, before, name, next, note),
      element("div", { class: "track" }, bars, slider),
    );
    return {
      node,
      update({ step, run }) {
        steps = run.steps;
        const at = steps.indexOf(step);
        slider.max = Math.max(0, steps.length - 1);
        slider.value = at;
        slider.disabled = steps.length < 2;
        slider.setAttribute("aria-valuetext", `step ${step}`);
        before.disabled = at <= 0;
        next.disabled = at >= steps.length - 1;
        name.textContent = `Step ${step}`;
        const isBest = run.best && run.best.step === step;
        note.textContent = `${at + 1} of ${steps.length}` + (isBest ? ` · ★ best ${run.best_metric} ${valgen.dom.number(run.best.value)}` : "");
        note.classList.toggle("best", Boolean(isBest));
        if (!describe || steps.length > MAX_BARS) {
          bars.replaceChildren();
          return;
        }
        bars.replaceChildren(...steps.map((other) => {
          const found = describe(other);
          const bar = element("span", { class: "bar" + (other === step ? " current" : ""), title: found ? found.title : "" });
          if (run.best && run.best.step === other) bar.append(element("span", { class: "star" }, "★"));
          if (found) {
            const fill = element("span", { class: "fill" + (found.height === null ? " dot" : "") + (found.isChanged ? " changed" : "") });
            if (found.height !== null) fill.style.height = `${Math.max(2, Math.round(found.height * 22))}px`;
            bar.append(fill);
          }
          bar.addEventListener("click", () => state.set({ step: other }));
          return bar;
        }));
      },
    };
  }

  valgen.Stepper = Stepper;
})();
