// The words in which two texts differ, as elements: `ins` is new, `del` is gone; underlined and struck through.
"use strict";

(function () {
  const { MAX_SHOWN_CHARS, element, appendText, appendLong } = valgen.dom;
  const MAX_DIFF_MS = 150;
  // Scripts without blanks between words: there a dictionary tells the words.
  const SCRIPTS = ["Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar"];
  const UNSPACED = new RegExp(`[${SCRIPTS.map((name) => `\\p{Script=${name}}`).join("")}]`, "u");
  // A word, with the point in a number and the apostrophe in a word; a line break; other blanks; any other character.
  const TOKENS = /(?:[\p{L}\p{N}\p{M}_]|(?<=\p{N})[.,:](?=\p{N})|(?<=\p{L})['’](?=\p{L}))+|\n|[^\S\n]+|[^]/gu;

  const remembered = new Map();
  const MAX_REMEMBERED_CHARS = 4e6; // of all texts together
  let numRemembered = 0; // characters

  /** Pieces `{value, kind}` that lead from `old` to `text`; kind is "same", "ins" or "del". */
  function pieces(old, text) {
    const key = old.length + ":" + old + text;
    let found = remembered.get(key);
    if (found === undefined) {
      found = compute(old, text);
      if (numRemembered + key.length > MAX_REMEMBERED_CHARS) {
        remembered.clear();
        numRemembered = 0;
      }
      remembered.set(key, found);
      numRemembered += key.length;
    }
    return found;
  }

  function tokens(text) {
    if (!UNSPACED.test(text) || typeof Intl.Segmenter !== "function") return text.match(TOKENS) || [];
    return Array.from(new Intl.Segmenter("en", { granularity: "word" }).segment(text), ({ segment }) => segment);
  }

  function compute(old, text) {
    if (old === text) return text ? [{ value: text, kind: "same" }] : [];
    const parts = Diff.diffArrays(tokens(old), tokens(text), { timeout: MAX_DIFF_MS });
    if (parts === undefined) { // too different to be told in time
      return [{ value: old, kind: "del" }, { value: text, kind: "ins" }].filter((piece) => piece.value);
    }
    const kindOf = ({ added, removed }) => (added ? "ins" : removed ? "del" : "same");
    return joined(parts.map((part) => ({ value: part.value.join(""), kind: kindOf(part) })));
  }

  /** Changes that only blanks part become one: "two words" for "one thing" reads better than word by word. */
  function joined(found) {
    const result = [];
    let gone = "", come = "";
    const flush = () => {
      // A blank that both end in did not change.
      const blank = gone && come && gone.at(-1) === come.at(-1) && /\s/.test(come.at(-1)) ? come.at(-1) : "";
      if (blank) [gone, come] = [gone.slice(0, -1), come.slice(0, -1)];
      if (gone) result.push({ value: gone, kind: "del" });
      if (come) result.push({ value: come, kind: "ins" });
      if (blank) result.push({ value: blank, kind: "same" });
      gone = come = "";
    };
    found.forEach((piece, at) => {
      const isGap = piece.kind === "same" && /^[^\S\n]+$/.test(piece.value) && (gone || come) && at + 1 < found.length;
      if (piece.kind === "del" || isGap) gone += piece.value;
      if (piece.kind === "ins" || isGap) come += piece.value;
      if (piece.kind === "same" && !isGap) {
        flush();
        result.push(piece);
      }
    });
    flush();
    return result;
  }

  const isTooLong = (old, text) => Math.max(old.length, text.length) > MAX_SHOWN_CHARS;

  /** Appends `text`, with what differs from `old` marked. Without `old`, or with too long a text, nothing is. `side`:
   * "old" leaves out what is new, "new" what is gone, "both" neither. Returns the number of marks. */
  function appendMarked(parent, old, text, side = "both") {
    if (old === null || old === undefined || isTooLong(old, text)) {
      appendLong(parent, side === "old" ? old : text);
      return 0;
    }
    let numMarks = 0;
    for (const { value, kind } of pieces(old, text)) {
      if ((side === "old" && kind === "ins") || (side === "new" && kind === "del")) continue;
      if (kind === "same") appendText(parent, value);
      else {
        parent.append(appendText(element(kind, {}), value));
        numMarks++;
      }
    }
    return numMarks;
  }

  valgen.diff = { appendMarked, pieces, isTooLong, numRemembered: () => numRemembered };
})();
