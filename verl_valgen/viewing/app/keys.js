// The keyboard: which key does what, and the help that says so.
"use strict";

(function () {
  const { element } = valgen.dom;

  /** `actions`: from a key, as events name it, to what it does. `help`: pairs of keys and words. */
  function Keys(actions, help) {
    const names = (keys) => keys.split(" ").flatMap((one) => [element("kbd", {}, one), " "]);
    const dialog = element(
      "dialog", { "aria-label": "Keys" },
      element("h2", {}, "Keys"),
      element("dl", {}, help.flatMap(([keys, what]) => [element("dt", {}, names(keys)), element("dd", {}, what)])),
      element("p", { class: "note" }, "Underlined is new, struck through is gone. The address leads to what is shown."),
      element("button", { type: "button", onclick: () => dialog.close() }, "Close"),
    );

    /** What is typed belongs to the field; so do a slider's own keys, which do the same. */
    function belongsTo(target, key) {
      if (target.tagName === "SELECT" || target.tagName === "TEXTAREA") return true;
      if (target.tagName !== "INPUT" || target.type === "checkbox") return false;
      return target.type !== "range" || ["ArrowLeft", "ArrowRight", "Home", "End"].includes(key);
    }

    document.addEventListener("keydown", (event) => {
      const { key, target } = event;
      if (key === "Escape" && !dialog.open) target.blur();
      if (event.ctrlKey || event.altKey || event.metaKey || !(key === "?" || Object.hasOwn(actions, key))) return;
      if ((dialog.open && key !== "?") || belongsTo(target, key)) return;
      event.preventDefault();
      if (key === "?") toggle();
      else actions[key]();
    });

    function toggle() {
      if (dialog.open) dialog.close();
      else dialog.showModal();
    }

    return { dialog, toggle };
  }

  valgen.Keys = Keys;
})();
