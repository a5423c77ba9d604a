// What is shown, as it stands in `location.hash`: a link restores it.
"use strict";

(function () {
  const DEFAULTS = {
    view: "prompt", run: "0", prompt: "", step: "", strategy: "", completion: "0", against: "before",
    q: "", source: "", finish: "", score: "", min: "", max: "", changed: "", every: "",
    left: "", right: "", differ: "", curves: "",
  };
  const listeners = [];
  let current = { ...DEFAULTS };

  function parse(hash) {
    const found = { ...DEFAULTS };
    for (const [name, value] of new URLSearchParams(hash.replace(/^#/, ""))) {
      if (Object.hasOwn(DEFAULTS, name)) found[name] = value;
    }
    return found;
  }

  /** The hash of what is shown now, with `changes`: for links. */
  function hashOf(changes) {
    const merged = { ...current, ...changes };
    const parts = Object.keys(DEFAULTS).filter((name) => String(merged[name]) !== DEFAULTS[name]);
    return "#" + new URLSearchParams(parts.map((name) => [name, String(merged[name])])).toString();
  }

  /** Shows something else. With `isNew` the browser's way back leads here; not for every move of a slider. */
  function set(changes, isNew = false) {
    const hash = hashOf(changes);
    current = parse(hash);
    try {
      history[isNew ? "pushState" : "replaceState"](null, "", hash);
    } catch {
      // A page inside a sandboxed frame has no history; it shows the same, without a link.
    }
    listeners.forEach((listener) => listener());
  }

  window.addEventListener("hashchange", () => {
    current = parse(location.hash);
    listeners.forEach((listener) => listener());
  });
  current = parse(location.hash);

  valgen.state = {
    get: () => current,
    set, hashOf,
    onChange: (listener) => listeners.push(listener),
  };
})();
