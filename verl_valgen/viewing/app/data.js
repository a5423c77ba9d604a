"use strict";
window.valgen = window.valgen || {};
valgen.got = [];
valgen.index = (p) => { valgen.got.push(["index", p]); };
valgen.step = (p) => { valgen.got.push(["step", p]); };
