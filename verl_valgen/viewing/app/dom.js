// Elements, and text that nobody vouches for. All text comes into the document through `textContent` or a text node.
"use strict";

var valgen = window.valgen || {};

(function () {
  // Control, format (bidi overrides, zero-width characters), surrogate, line and paragraph separator; as `text.py` has
  // it, but for line breaks and tabs, which a page can show.
  const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
  const MAX_SHOWN_CHARS = 20000; // of one text, until all of it is asked for: a browser lays out no more at once
  const EMOJI_BEFORE = /[\p{Extended_Pictographic}\u{1f3fb}-\u{1f3ff}\ufe0f]$/u;
  const EMOJI_AFTER = /^\p{Extended_Pictographic}/u;

  /** An element. Attributes and children that are `null` or `false` are left out; a function listens to `on<name>`. */
  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") node.addEventListener(name.slice(2), value);
      else if (name === "class") node.className = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  const span = (className, ...children) => element("span", { class: className }, ...children);
  const button = (label, act, title) => element("button", { type: "button", title, onclick: act }, label);

  /** A labelled check box; `onChange` gets "1" or "". */
  function checkbox(label, name, onChange) {
    const box = element("input", { type: "checkbox", name, onchange: () => onChange(box.checked ? "1" : "") });
    return { node: element("label", { class: "check" }, box, label), set: (isChecked) => { box.checked = isChecked; } };
  }

  function escapeOf(char) {
    const code = char.codePointAt(0);
    if (char === "\r") return "\\r";
    if (code < 0x100) return "\\x" + code.toString(16).padStart(2, "0");
    return code < 0x10000 ? "\\u" + code.toString(16).padStart(4, "0") : "\\U" + code.toString(16).padStart(8, "0");
  }

  /** Whether the zero-width joiner at `at` makes one emoji of two: then it hides nothing. */
  function joinsEmoji(text, at) {
    return EMOJI_BEFORE.test(text.slice(Math.max(0, at - 2), at)) && EMOJI_AFTER.test(text.slice(at + 1, at + 3));
  }

  /** Appends `text`; what cannot be seen in it becomes an escape that stands out. */
  function appendText(parent, text) {
    let from = 0;
    for (const match of text.matchAll(INVISIBLE)) {
      const char = match[0];
      if (char === "\n" || char === "\t" || (char === "\u200d" && joinsEmoji(text, match.index))) continue;
      if (match.index > from) parent.append(text.slice(from, match.index));
      parent.append(span("escape", escapeOf(char)));
      from = match.index + char.length;
    }
    if (from < text.length) parent.append(text.slice(from));
    return parent;
  }

  /** Appends `text`; of a very long one its beginning, and a button that shows the rest. */
  function appendLong(parent, text) {
    if (text.length <= MAX_SHOWN_CHARS) return appendText(parent, text);
    const isPair = /[\ud800-\udbff]/.test(text[MAX_SHOWN_CHARS - 1]); // whose second half would be cut off
    const end = MAX_SHOWN_CHARS - (isPair ? 1 : 0);
    const more = button(`show all (${text.length.toLocaleString("en")} characters)`, () => {
      more.remove();
      appendText(parent, text.slice(end));
      parent.tabIndex = -1;
      parent.focus({ preventScroll: true }); // it was on the button
    });
    more.className = "more";
    appendText(parent, text.slice(0, end)).append(more);
    return parent;
  }

  /** `text` in one line, for labels and titles: with escapes, also of line breaks, cut after `maxChars`. */
  function oneLine(text, maxChars = 120) {
    const cut = text.length > maxChars ? text.slice(0, maxChars - 1) + "…" : text;
    return cut.replace(INVISIBLE, (char) => (char === "\n" ? " ⏎ " : char === "\t" ? " " : escapeOf(char)));
  }

  /** A block of somebody's text, in its own direction. */
  function textBlock(text, attributes) {
    const extra = attributes || {};
    return appendLong(element("div", { ...extra, class: "text " + (extra.class || ""), dir: "auto" }), text);
  }

  function number(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    if (Number.isInteger(value)) return String(value);
    const size = Math.abs(value);
    return size >= 1000 ? value.toFixed(0) : size >= 0.01 ? String(+value.toFixed(3)) : value.toPrecision(2);
  }

  /** A labelled `<select>`; `options` are pairs of value and text. */
  function select(label, name, onChange) {
    const control = element("select", { name, onchange: () => onChange(control.value) });
    const node = element("label", { class: "field" }, element("span", {}, label), control);
    return {
      node,
      set(options, value) {
        const known = JSON.stringify(options);
        if (control.dataset.options !== known) {
          const made = options.map(([key, text]) => element("option", { value: key }, oneLine(text, 60)));
          control.replaceChildren(...made);
          control.dataset.options = known;
        }
        control.value = value;
        node.hidden = options.length < 2;
      },
    };
  }

  valgen.dom = {
    MAX_SHOWN_CHARS, element, span, button, checkbox, appendText, appendLong, oneLine, textBlock, number, select,
  };
})();
