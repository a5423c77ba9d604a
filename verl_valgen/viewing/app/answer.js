// What the views say of one prompt and one answer.
"use strict";

(function () {
  const { element, span, appendLong, textBlock, number, oneLine, select } = valgen.dom;
  const { data, diff } = valgen;
  const MAX_LIST_CHARS = 1200; // of one text in a list, where a look is enough
  const ENDINGS = { eos: "ended", stop: "stopped", length: "cut off", time: "out of time" };

  const AGAINST = { before: "the step before", reference: "the expected answer", first: "the first step" };

  const ending = (reason) => (Object.hasOwn(ENDINGS, reason) ? ENDINGS[reason] : oneLine(reason, 40));
  const shortened = (text) => (text.length > MAX_LIST_CHARS ? text.slice(0, MAX_LIST_CHARS) + "…" : text);

  function chip(kind, title, ...children) {
    return element("span", { class: `chip ${kind}`, title }, ...children);
  }

  /** "good", "bad" or "mid" for a score from 0 to 1; "" for others. */
  function gradeOf(value) {
    if (value === null || value < 0 || value > 1) return "";
    return value >= 0.999 ? "good" : value <= 0.001 ? "bad" : "mid";
  }

  const SIGNS = { good: "✓ ", bad: "✗ " };
  const named = (name) => span("name", oneLine(name, 40));

  function scoreChip(name, value) {
    const grade = gradeOf(value);
    return chip(grade, oneLine(name), named(name), " ", (SIGNS[grade] || "") + number(value));
  }

  /** Scores, why it ended, how long it is, and whether it was checked; in a list, that it was is not said. */
  function facts(answer, isList = false) {
    const { finish_reason: reason, num_new_tokens: num, verified } = answer;
    const isCut = reason === "length" || reason === "time";
    return element(
      "div", { class: "facts" },
      Object.entries(answer.scores).map(([name, value]) => scoreChip(name, value)),
      reason !== null && chip(isCut ? "warn" : "quiet", "finish_reason: " + oneLine(reason), ending(reason)),
      chip("quiet", null, `${num} ${num === 1 ? "token" : "tokens"}`),
      !isList && verified === true && chip("quiet", "It passed the check against the trainer's model", "verified"),
      data.isWithheld(answer) && chip("bad", null, "withheld"),
      Object.entries(answer.score_texts).map(([name, text]) => chip("", null, named(name), " ", oneLine(text, 60))),
    );
  }

  /** The answer's text in a block, with what differs from `old` marked; an empty one says so. */
  function answerText(answer, old, options = {}) {
    const cut = options.isList ? shortened : (text) => text;
    const block = element("div", { class: "text answer", dir: "auto" });
    if (answer === undefined) {
      block.append(span("nothing", options.missing || "no answer at this step"));
      return block;
    }
    if (data.isWithheld(answer)) {
      block.append(span("nothing", oneLine(answer.generation)));
      return block;
    }
    diff.appendMarked(block, old === undefined || old === null ? null : cut(old), cut(answer.generation), options.side);
    if (!answer.generation) block.append(span("nothing", "(empty)"));
    return block;
  }

  /** The text that an answer is compared with: that of the step before, the reference, or that of the first step. */
  function oldText(against, run, step, group, answer) {
    if (!group || !answer || data.isWithheld(answer) || against === "none") return null;
    if (against === "reference") return group.prompt.reference;
    const other = against === "first" ? data.runs[run].steps[0] : data.stepBefore(run, step);
    if (other === undefined || other === step) return null;
    const found = data.find(run, other, group.prompt.key, answer.strategy, answer.completion);
    return found && !data.isWithheld(found) ? found.generation : null;
  }

  function origin(prompt) {
    if (prompt.origin) return oneLine(prompt.origin);
    if (prompt.row === null || prompt.row === undefined) return "";
    return `row ${prompt.row}` + (prompt.file ? ` of ${oneLine(prompt.file)}` : "");
  }

  function promptTitle(prompt) {
    return [`Prompt ${prompt.index + 1}`, origin(prompt), prompt.data_source ? oneLine(prompt.data_source) : ""]
      .filter(Boolean).join(" · ");
  }

  /** The expected answer in a list; nothing where there is none. */
  function expected({ reference }) {
    if (reference === null) return null;
    return element(
      "div", { class: "expected" },
      span("label", "Expected "), textBlock(shortened(reference), { class: "reference clamp" }),
    );
  }

  /** The beginning of an item in a list: a link to the prompt over all steps, and what else is said of it. */
  function head(prompt, link, ...children) {
    return element("div", { class: "head" }, element("a", { href: link }, promptTitle(prompt)), ...children);
  }

  function labelled(label, node) {
    return element("div", { class: "labelled" }, element("div", { class: "label" }, label), node);
  }

  /** Everything that is seldom asked for. */
  function rest(prompt, answer) {
    const { params, seed, num_prompt_tokens } = answer || {};
    const parts = [
      ["What the model got", prompt.prompt],
      ["The whole answer", answer && answer.generation_raw],
      ["All that is trained", prompt.reference_raw],
      ["What the data says", prompt.reference_text],
      ["Ground truth", prompt.ground_truth],
      ["Parameters", answer && JSON.stringify({ ...params, seed, num_prompt_tokens })],
    ].filter(([, text]) => text !== null && text !== undefined && text !== "");
    const raw = (text) => appendLong(element("pre", { class: "text raw", dir: "auto" }), text);
    return parts.map(([label, text]) => labelled(label, raw(text)));
  }

  /** A record, near to that in the JSONL files. */
  function record(run, step, prompt, answer) {
    return { run: run.name, step, ...prompt, ...(answer || {}), prompt: prompt.prompt };
  }

  /** Copies `value` as JSON and says so on `button`. */
  async function copy(button, value) {
    const text = JSON.stringify(value, null, 2);
    let isCopied = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // not there, or not allowed
      const area = element("textarea", { class: "offscreen", "aria-hidden": "true" });
      area.value = text;
      document.body.append(area);
      area.select();
      isCopied = document.execCommand("copy");
      area.remove();
      button.focus();
    }
    const label = button.textContent;
    button.textContent = isCopied ? "Copied" : "Not copied";
    button.disabled = true;
    setTimeout(() => {
      button.textContent = label;
      button.disabled = false;
    }, 1200);
  }

  /** Which run, where there are two; and what changes are marked against. */
  function runControl() {
    const control = select("Run", "run", (value) => valgen.state.set({ run: value }));
    const names = () => data.runs.map((run, at) => [String(at), run.name || `run ${at + 1}`]);
    return { node: control.node, set: (value) => control.set(names(), String(value)) };
  }

  function againstControl() {
    const control = select("Changes against", "against", (value) => valgen.state.set({ against: value }));
    const options = [...Object.entries(AGAINST), ["none", "nothing"]];
    return { node: control.node, set: (value) => control.set(options, value) };
  }

  valgen.answer = {
    AGAINST, ending, gradeOf, SIGNS, shortened, facts, answerText, oldText, promptTitle, expected, head, labelled, rest,
    record, copy, runControl, againstControl,
  };
})();
