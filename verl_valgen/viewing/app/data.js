// The samples: what the data scripts call (`valgen.index`, `valgen.step`), and how it is found again.
//
// A run has steps; a step has groups, one for each prompt, with the prompt's answers. The same prompt has the same key
// at every step.
"use strict";

(function () {
  const FORMAT = 1;
  const runs = [];
  const listeners = [];
  const problems = new Map(); // where -> what is wrong, for people
  let refusal = null;

  function newRun() {
    return {
      name: "", folder: "", steps: [], best_metric: null, best_mode: "max", best: null,
      loaded: new Map(), // step -> what `receiveStep` has made of it
      failed: new Map(), // step -> why it could not be loaded
      keys: [], // of prompts, in the order of the newest step, then those that came up elsewhere
      known: new Map(), // key -> position in `keys`
      prompts: [], // by that position: the prompt as the step that came first has it
      strategies: [],
      completions: new Map(), // strategy -> how many completions a prompt has
    };
  }

  function changed() {
    listeners.forEach((listener) => listener());
  }

  function checkFormat(payload, where) {
    if (typeof payload !== "object" || payload === null) throw new Error(where + " holds no data");
    if (payload.format !== FORMAT) {
      throw new Error(`${where} has format ${payload.format}, this page reads format ${FORMAT}: make the page anew`);
    }
  }

  function receiveIndex(index) {
    checkFormat(index, "data/steps.js");
    // What came with an earlier index is forgotten: since then another run may have begun, or a step been made again.
    index.runs.forEach((given, number) => {
      runs[number] = Object.assign(newRun(), given, { steps: [...given.steps].sort((a, b) => a - b) });
    });
    problems.clear();
    changed();
  }

  /** Half a character (a lone surrogate) cannot stand in a link: what is named in links is kept as it stands there. */
  const linkable = (text) => (typeof text === "string" ? text.replace(/\p{Cs}/gu, "\ufffd") : text);

  function receiveStep(payload) {
    checkFormat(payload, `the data of step ${payload && payload.step}`);
    payload.prompts.forEach((prompt) => {
      prompt.key = linkable(prompt.key);
      prompt.data_source = linkable(prompt.data_source);
    });
    payload.answers.forEach((answer) => { answer.strategy = linkable(answer.strategy); });
    const run = runs[payload.run];
    const groups = new Map();
    payload.prompts.forEach((prompt) => groups.set(prompt.key, { prompt, answers: [] }));
    payload.answers.forEach((answer) => {
      const prompt = payload.prompts[answer.prompt];
      groups.get(prompt.key).answers.push(answer);
      if (!run.strategies.includes(answer.strategy)) run.strategies.push(answer.strategy);
      run.completions.set(answer.strategy, Math.max(run.completions.get(answer.strategy) || 1, answer.completion + 1));
    });
    payload.prompts.forEach((prompt) => {
      if (run.known.has(prompt.key)) return;
      run.known.set(prompt.key, run.keys.length);
      run.keys.push(prompt.key);
      run.prompts.push(prompt);
    });
    run.loaded.set(payload.step, { ...payload, groups });
    run.failed.delete(payload.step);
  }

  function answerOf(group, strategy, completion) {
    return group && group.answers.find((answer) => answer.strategy === strategy && answer.completion === completion);
  }

  /** The answer of a prompt at a step; undefined where there is none, or the step is not there yet. */
  function find(runNumber, step, key, strategy, completion) {
    const loaded = runs[runNumber] && runs[runNumber].loaded.get(step);
    return loaded && answerOf(loaded.groups.get(key), strategy, completion);
  }

  /** The step before, of those that the run has; undefined at the first. */
  function stepBefore(runNumber, step) {
    return runs[runNumber].steps[runs[runNumber].steps.indexOf(step) - 1];
  }

  /** The names of all scores of the steps that are there. */
  function scoreNames(runNumber) {
    const names = new Set();
    for (const step of runs[runNumber].loaded.values()) {
      // Every answer of a step has the same metrics; those that were withheld have none.
      for (const answer of step.answers) {
        const own = Object.keys(answer.scores);
        own.forEach((name) => names.add(name));
        if (own.length) break;
      }
    }
    return [...names];
  }

  /** What a data script calls. It must not throw: browsers hide from a page what is thrown in a file beside it. */
  function guarded(receive) {
    return (payload) => {
      try {
        receive(payload);
      } catch (error) {
        refusal = error.message;
      }
    };
  }

  /** The numbers of a strategy's completions, from 0. */
  function completionsOf(runNumber, strategy) {
    return [...Array(runs[runNumber].completions.get(strategy) || 1).keys()];
  }

  valgen.index = guarded(receiveIndex);
  valgen.step = guarded(receiveStep);
  valgen.data = {
    receiveIndex, receiveStep,
    /** Why the last payload was refused; null where it was not. Told once. */
    takeRefusal() {
      const reason = refusal;
      refusal = null;
      return reason;
    },
    runs, problems, find, answerOf, stepBefore, scoreNames, completionsOf, changed,
    onChange: (listener) => listeners.push(listener),
    isWithheld: (answer) => answer.verified === false,
  };
})();
