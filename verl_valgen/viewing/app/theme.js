// Light, dark, or as the system has it; kept where the browser keeps anything for this page.
"use strict";

(function () {
  const { element } = valgen.dom;
  const NAMES = { auto: "Auto", light: "Light", dark: "Dark" };
  const KEPT_AS = "valgen-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");

  /** `onChange` is called with every change, of the system's too. */
  function Theme(onChange) {
    const button = element("button", { type: "button", title: "Light or dark (t)", onclick: () => next() });
    let name = "auto";

    function set(wanted) {
      name = Object.hasOwn(NAMES, wanted) ? wanted : "auto";
      document.documentElement.dataset.theme = name;
      button.textContent = NAMES[name];
      button.setAttribute("aria-label", `Colours: ${name}`);
      onChange();
    }

    function next() {
      const names = Object.keys(NAMES);
      set(names[(names.indexOf(name) + 1) % names.length]);
      try {
        localStorage.setItem(KEPT_AS, name);
      } catch {
        // Not kept, then: some browsers keep nothing for files and frames.
      }
    }

    function kept() {
      try {
        return localStorage.getItem(KEPT_AS);
      } catch {
        return null;
      }
    }

    system.addEventListener("change", onChange);
    set(kept());
    return { button, next, current: () => name + system.matches };
  }

  valgen.Theme = Theme;
})();
