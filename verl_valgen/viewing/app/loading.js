// Brings the data in: scripts beside the page, a few at a time, or the block inside it.
//
// What is asked for comes first, then each run's newest step, its first, and the others from new to old. Classic
// scripts, because neither modules nor `fetch` load from the file system.
"use strict";

(function () {
  const { data } = valgen;
  const MAX_SAMPLES_UNASKED = 50000; // what lies beyond is loaded when it is shown: memory has an end
  const wanted = []; // [run, step] that are on the screen
  const MAX_IN_FLIGHT = 4; // more would keep what is asked for next waiting
  const inFlight = new Set(); // paths
  let query = ""; // behind the files' names: keeps browsers from taking what they had of an earlier look
  let isComplete = false; // everything came with the page

  function inject(path, done) {
    const script = document.createElement("script");
    script.src = path + query;
    script.onload = () => {
      script.remove();
      const refusal = data.takeRefusal();
      done(refusal === null ? null : `is broken: ${valgen.dom.oneLine(refusal, 300)}`);
    };
    script.onerror = () => {
      script.remove();
      done("is missing, or cannot be read");
    };
    document.head.append(script);
  }

  function fileOf(run, step) {
    return `data/${run > 0 ? `run${run}/` : ""}step_${String(step).padStart(8, "0")}.js`;
  }

  function isOpen(run, step) {
    const { loaded, failed } = data.runs[run];
    return !loaded.has(step) && !failed.has(step) && !inFlight.has(fileOf(run, step));
  }

  function nextStep() {
    while (wanted.length) {
      const [run, step] = wanted.shift();
      if (data.runs[run] && isOpen(run, step)) return [run, step];
    }
    let numSamples = 0;
    data.runs.forEach((run) => run.loaded.forEach((step) => { numSamples += step.answers.length; }));
    if (numSamples >= MAX_SAMPLES_UNASKED) return null;
    for (let back = 0; back < Math.max(0, ...data.runs.map((run) => run.steps.length)); back++) {
      for (let run = 0; run < data.runs.length; run++) {
        const { steps } = data.runs[run];
        // Newest, first, then backwards.
        const step = back === 1 ? steps[0] : steps[steps.length - (back === 0 ? 1 : back)];
        if (step !== undefined && isOpen(run, step)) return [run, step];
      }
    }
    return null;
  }

  function loadNext() {
    if (isComplete || inFlight.size >= MAX_IN_FLIGHT) return;
    const next = nextStep();
    if (next === null) return;
    const [run, step] = next;
    const path = fileOf(run, step);
    inFlight.add(path);
    inject(path, (problem) => {
      inFlight.delete(path);
      if (problem === null && !data.runs[run].loaded.has(step)) problem = "is broken";
      if (problem !== null) {
        data.runs[run].failed.set(step, `${path} ${problem}`);
        data.problems.set(path, `${path} ${problem}: step ${step} is not shown.`);
      }
      data.changed();
      setTimeout(loadNext); // lets the page be drawn in between
    });
    loadNext();
  }

  /** Asks for a step before all others; of one that the run does not have there is no file. */
  function want(run, step) {
    if (!data.runs[run] || !data.runs[run].steps.includes(step) || !isOpen(run, step)) return;
    wanted.push([run, step]);
    loadNext();
  }

  function loadIndex() {
    inject("data/steps.js", (problem) => {
      if (problem === null && !data.runs.length) problem = "is broken";
      if (problem !== null) {
        data.problems.set("index", `data/steps.js ${problem}. This page needs the folder data/ that lies beside it.`);
        data.changed();
      }
      data.runs.forEach((run) => run.failed.clear());
      loadNext();
    });
  }

  async function loadInline(block) {
    const packed = atob(block.textContent.trim());
    block.remove();
    const bytes = new Uint8Array(packed.length);
    for (let at = 0; at < packed.length; at++) bytes[at] = packed.charCodeAt(at);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const { index, steps } = await new Response(stream).json();
    data.receiveIndex(index);
    for (const step of steps) {
      try {
        data.receiveStep(step);
      } catch (error) {
        data.problems.set(`step ${step && step.step}`, `A step of this page cannot be read: ${error.message}`);
      }
    }
    data.changed();
  }

  function start() {
    const block = document.getElementById("valgen-data");
    if (block === null) {
      loadIndex();
      return;
    }
    isComplete = true;
    loadInline(block).catch((error) => {
      const isOld = typeof DecompressionStream === "undefined";
      const reason = isOld ? "this browser is too old (it has no DecompressionStream)" : error.message;
      data.problems.set("index", `The samples in this page cannot be read: ${reason}`);
      data.changed();
    });
  }

  valgen.loading = {
    start, want,
    /** Looks for newer rounds. */
    reload() {
      query = `?at=${Date.now()}`;
      loadIndex();
    },
    canReload: () => !isComplete,
    progress() {
      const all = data.runs.reduce((sum, run) => sum + run.steps.length, 0);
      const loaded = data.runs.reduce((sum, run) => sum + run.loaded.size, 0);
      return { all, loaded };
    },
  };
})();
