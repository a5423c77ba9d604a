// A long list of which only what is visible is in the document. Heights are measured as items come into view.
"use strict";

(function () {
  const OVERSCAN_PX = 300;
  const MAX_ITEMS = 60; // of one list in the document, whatever is measured

  const FOCUSABLE = "a[href], button";

  /** `scroller` scrolls, `host` lies in it and holds the items; `make(index)` gives an item's element,
   * `identify(index)` what tells the same item after a reset, `estimate` is a height in px before it is measured. */
  function VirtualList({ scroller, host, estimate, make, identify }) {
    let count = 0;
    let heights = new Float64Array(0); // 0: not measured
    let offsets = new Float64Array(1);
    let width = 0;
    const nodes = new Map(); // index -> element
    const identities = new WeakMap(); // element -> what `identify` said of it
    const fresh = new Set(); // indices of elements that are not measured yet
    host.classList.add("virtual");

    function place() {
      let top = 0;
      for (let at = 0; at < count; at++) {
        offsets[at] = top;
        top += heights[at] || estimate;
      }
      offsets[count] = top;
      host.style.height = top + "px";
    }

    function indexAt(y) {
      let low = 0, high = count - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (offsets[middle] <= y) low = middle;
        else high = middle - 1;
      }
      return low;
    }

    function drop(index) {
      const node = nodes.get(index);
      if (node.contains(document.activeElement)) scroller.focus({ preventScroll: true });
      node.remove();
      nodes.delete(index);
      fresh.delete(index);
    }

    function add(index) {
      const node = make(index);
      node.classList.add("item");
      identities.set(node, identify(index));
      let next = null;
      for (const [other, known] of nodes) {
        if (other > index && (next === null || other < next[0])) next = [other, known];
      }
      host.insertBefore(node, next && next[1]); // in order, for those who go by Tab
      nodes.set(index, node);
      fresh.add(index);
    }

    /** Measures what is new; true where something has another height than was thought. */
    function measure() {
      let moved = false;
      for (const index of fresh) {
        const height = Math.max(1, Math.ceil(nodes.get(index).getBoundingClientRect().height));
        moved = moved || height !== (heights[index] || estimate);
        heights[index] = height;
      }
      fresh.clear();
      return moved;
    }

    function draw() {
      if (!host.isConnected) return;
      if (host.clientWidth !== width) { // other line breaks, other heights
        width = host.clientWidth;
        heights.fill(0);
        nodes.forEach((node, index) => fresh.add(index));
        measure();
        place();
      }
      for (let round = 0; round < 4; round++) {
        const above = scroller.getBoundingClientRect().top - host.getBoundingClientRect().top;
        const anchor = count ? indexAt(Math.max(0, above)) : 0;
        const into = above - offsets[anchor];
        const first = count ? indexAt(above - OVERSCAN_PX) : 0;
        const last = count ? Math.min(indexAt(above + scroller.clientHeight + OVERSCAN_PX), first + MAX_ITEMS - 1) : -1;
        for (const index of [...nodes.keys()]) if (index < first || index > last) drop(index);
        for (let index = first; index <= last; index++) if (!nodes.has(index)) add(index);
        const moved = measure();
        if (moved) place();
        for (const [index, node] of nodes) node.style.top = offsets[index] + "px";
        if (!moved) break;
        // What is looked at stays where it is, whatever was measured above it.
        const shift = offsets[anchor] + into - above;
        if (above > 0 && Math.abs(shift) >= 1) scroller.scrollTop += shift;
      }
    }

    const focusable = (node) => [node, ...node.querySelectorAll(FOCUSABLE)];

    /** Which item has the focus, and where within; undefined where none has. */
    function focused() {
      const node = [...nodes.values()].find((one) => one.contains(document.activeElement));
      return node && { identity: identities.get(node), place: focusable(node).indexOf(document.activeElement) };
    }

    function focusAgain({ identity, place }) {
      const node = [...nodes.values()].find((one) => identities.get(one) === identity);
      const target = node && focusable(node)[place];
      if (target) target.focus({ preventScroll: true });
    }

    let isAsked = false;
    function ask() {
      if (isAsked) return;
      isAsked = true;
      requestAnimationFrame(() => {
        isAsked = false;
        draw();
      });
    }
    scroller.addEventListener("scroll", ask, { passive: true });
    new ResizeObserver(ask).observe(scroller);

    return {
      /** Other items: all are made anew. With `keepHeights` they are the same as before but for what is in them. The
       * focus stays on the item that has it, if that is still there and in view. */
      reset(newCount, keepHeights = false) {
        const before = focused();
        [...nodes.keys()].forEach(drop);
        if (!keepHeights || newCount !== count) {
          heights = new Float64Array(newCount);
          offsets = new Float64Array(newCount + 1);
        }
        count = newCount;
        place();
        draw();
        if (before) focusAgain(before);
      },
      /** Scrolls as little as makes the item visible. */
      show(index) {
        if (index < 0 || index >= count) return;
        const above = scroller.getBoundingClientRect().top - host.getBoundingClientRect().top;
        const bottom = offsets[index] + (heights[index] || estimate);
        if (offsets[index] < above) scroller.scrollTop += offsets[index] - above;
        else if (bottom > above + scroller.clientHeight) scroller.scrollTop += bottom - above - scroller.clientHeight;
        draw();
      },
      node: (index) => nodes.get(index),
      draw,
    };
  }

  valgen.VirtualList = VirtualList;
})();
