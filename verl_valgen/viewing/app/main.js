"use strict";
const s = document.createElement("script"); s.src = "data/steps.js?x=1"; document.head.append(s);
document.getElementById("app").textContent = "hello";
