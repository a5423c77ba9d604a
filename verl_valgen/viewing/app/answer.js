// What the views say of one prompt and one answer.
"use strict";

(function () {
  const { element, appendText, textBlock, number, oneLine } = valgen.dom;
  const { data, diff } = valgen;
  const MAX_LIST_CHARS = 1200; // of one text in a list, where a look is enough
  const ENDINGS = { eos: "ended", stop: "stopped", length: "cut off", time: "out of time" };

  const ending = (reason) => (Object.hasOwn(ENDINGS, reason) ? ENDINGS[reason] : oneLine(reason, 40));
  const shortened = (text) => (text.length > MAX_LIST_CHARS ? text.slice(0, MAX_LIST_CHARS) + "…" : text);

  function scoreChip(name, value) {
    const isUnit = value !== null && value >= 0 && value <= 1;
    const grade = !isUnit ? "" : value >= 0.999 ? " good" : value <= 0.001 ? " bad" : " mid";
    const sign = !isUnit ? "" : value >= 0.999 ? "✓ " : value <= 0.001 ? "✗ " : "";
    return element("span", { class: "chip" + grade, title: oneLine(name) }, element("span", { class: "name" }, oneLine(name, 40)), " ", sign + number(value));
  }

  /** Scores, why it ended, how long it is, and whether it was checked; in a list, that it was is not said. */
  function facts(answer, isList = false) {
    const isCut = answer.finish_reason === "length" || answer.finish_reason === "time";
    return element(
      "div", { class: "facts" },
      Object.entries(answer.scores).map(([name, value]) => scoreChip(name, value)),
      answer.finish_reason !== null && element("span", { class: "chip" + (isCut ? " warn" : " quiet"), title: "finish_reason: " + oneLine(answer.finish_reason) }, ending(answer.finish_reason)),
      element("span", { class: "chip quiet" }, `${answer.num_new_tokens} ${answer.num_new_tokens === 1 ? "token" : "tokens"}`),
      !isList && answer.verified === true && element("span", { class: "chip quiet", title: "The round's answers passed the check against the trainer's model" }, "verified"),
      data.isWithheld(answer) && element("span", { class: "chip bad" }, "withheld"),
      Object.entries(answer.score_texts || {}).map(([name, text]) =>
        element("span", { class: "chip quiet" }, element("span", { class: "name" }, oneLine(name, 40)), " ", oneLine(text, 60))),
    );
  }

  /** The answer's text in a block, with what differs from `old` marked; an empty one says so. */
  function answerText(answer, old, options = {}) {
    const cut = options.isList ? shortened : (text) => text;
    const block = element("div", { class: "text answer", dir: "auto" });
    if (answer === undefined) {
      block.append(element("span", { class: "nothing" }, options.missing || "no answer at this step"));
      return block;
    }
    if (data.isWithheld(answer)) {
      block.append(element("span", { class: "nothing" }, oneLine(answer.generation)));
      return block;
    }
    diff.appendMarked(block, old === undefined || old === null ? null : cut(old), cut(answer.generation), options.side);
    if (!answer.generation) block.append(element("span", { class: "nothing" }, "(empty)"));
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

  function labelled(label, node) {
    return element("div", { class: "labelled" }, element("div", { class: "label" }, label), node);
  }

  /** Everything that is seldom asked for. */
  function rest(prompt, answer) {
    const parts = [
      ["What the model got", prompt.prompt],
      ["The whole answer", answer && answer.generation_raw],
      ["All that is trained", prompt.reference_raw],
      ["What the data says", prompt.reference_text],
      ["Ground truth", prompt.ground_truth],
      ["Parameters", answer && JSON.stringify({ ...answer.params, seed: answer.seed, num_prompt_tokens: answer.num_prompt_tokens })],
    ].filter(([, text]) => text !== null && text !== undefined && text !== "");
    return parts.map(([label, text]) => labelled(label, appendText(element("pre", { class: "text raw", dir: "auto" }), text)));
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

  valgen.answer = { facts, answerText, oldText, promptTitle, labelled, rest, copy, ending, shortened, scoreChip };
})();
