// The pointer and the keyboard on a cloud: pan, zoom, lasso, hover, choose.
import { called } from "./drawing.js";
import { combined, lassoed, panned, toScreen, towards, zoomed } from "./geometry.js";

export function gestures(cloud) {
  const canvas = cloud.over;
  const state = { cursor: [null, null], loop: [], zoom };
  let drag = null, layer = cloud.testIds.length ? "test" : "train", wheeledOutside = 0;
  let waiting = null, pointer = null;
  const signal = cloud.stopped.signal;
  const listen = (target, name, act, options = {}) => target.addEventListener(name, act, { signal, ...options });
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  function zoom(factor, px = null, py = null, fx = factor, fy = factor) {
    const { area } = cloud;
    if (!cloud.view) return;
    cloud.whole = false;
    if (!factor) cloud.showAll();
    else cloud.view = zoomed(cloud.view, area, px ?? area.left + area.width / 2, py ?? area.top + area.height / 2, fx, fy);
    cloud.schedule("all");
  }

  listen(canvas, "pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    const lasso = cloud.get("lasso") || event.shiftKey;
    drag = { from: at(event), last: at(event), lasso, moved: false };
  });
  listen(canvas, "pointermove", (event) => {
    const [x, y] = at(event);
    if (!drag) {
      pointer = [x, y];
      waiting ??= requestAnimationFrame(() => {
        waiting = null;
        if (cloud.view && !drag) cloud.hover(...cloud.pick(...pointer));
      });
      return;
    }
    if (Math.hypot(x - drag.from[0], y - drag.from[1]) > 4) drag.moved = true;
    if (!drag.moved) return;
    cloud.hover(null);
    if (drag.lasso) {
      if (!state.loop.length) state.loop.push(drag.from);
      state.loop.push([x, y]);
      cloud.schedule("over");
    } else {
      cloud.whole = false;
      cloud.view = panned(cloud.view, x - drag.last[0], y - drag.last[1]);
      cloud.schedule("all");
    }
    drag.last = [x, y];
  });
  listen(canvas, "pointerup", (event) => {
    if (!drag) return;
    const { moved, lasso } = drag;
    drag = null;
    if (moved && lasso) {
      const { train } = cloud.layers;
      const adding = event.ctrlKey || event.metaKey || (event.shiftKey && cloud.get("lasso")) || cloud.get("collect");
      const how = event.altKey ? "remove" : adding ? "add" : "replace";
      const rows = lassoed(train.xy, train.hidden, cloud.view, cloud.area, state.loop);
      state.loop = [];
      cloud.select(combined(cloud.selected(), rows, how));
    } else if (!moved) {
      const [found, id] = cloud.pick(...at(event));
      state.cursor = [null, null];
      cloud.hover(found, id);
      if (found) cloud.choose(found, id, event.timeStamp, event.shiftKey || event.ctrlKey || event.metaKey);
    }
  });
  listen(canvas, "pointercancel", () => {
    drag = null;
    state.loop = [];
    cloud.schedule("over");
  });
  listen(canvas, "pointerleave", () => !drag && cloud.hover(null));
  listen(canvas, "dblclick", (event) => cloud.pick(...at(event))[0] || zoom(0));

  // A page that is being scrolled goes on scrolling when a plot comes under the pointer.
  listen(window, "wheel", (event) => {
    if (!cloud.root.contains(event.target)) wheeledOutside = event.timeStamp;
  }, { capture: true, passive: true });
  listen(canvas, "wheel", (event) => {
    if (event.timeStamp - wheeledOutside < 250) {
      wheeledOutside = event.timeStamp;
      return;
    }
    event.preventDefault();
    const [x, y] = at(event), { area } = cloud;
    const factor = Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015));
    const [onY, onX] = [x < area.left, y > area.top + area.height]; // over an axis, zoom that axis alone
    zoom(factor, x, y, onY ? 1 : factor, onX ? 1 : factor);
  }, { passive: false });

  function move(row) {
    if (row < 0) return;
    state.cursor = [layer, cloud.idOf(layer, row)];
    cloud.hover(...state.cursor);
    cloud.live.textContent = called(cloud, ...state.cursor).join(": ");
    cloud.schedule("over");
  }

  function step(key) {
    const { xy, hidden } = cloud.layers[layer];
    const shown = Array.from({ length: xy.length / 2 }, (_, row) => row).filter((row) => !hidden[row]);
    const now = shown.indexOf(cloud.rowOf(...state.cursor));
    const next = { Home: 0, End: shown.length - 1, PageDown: Math.min(now + 1, shown.length - 1), PageUp: Math.max(now - 1, 0) };
    move(shown[next[key]] ?? -1);
  }

  function arrow(key) {
    const { xy, hidden } = cloud.layers[layer], { area } = cloud;
    const start = state.cursor[0] === layer ? state.cursor[1] : layer === "test" ? cloud.get("test_id") : null;
    const known = start !== null && cloud.place(layer, start).every(Number.isFinite);
    const from = known ? cloud.place(layer, start) : [area.left + area.width / 2, area.top + area.height / 2];
    move(towards(xy, hidden, cloud.view, area, from, key));
  }

  listen(canvas, "keydown", (event) => {
    const { key } = event;
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (key.startsWith("Arrow")) arrow(key);
    else if (["Home", "End", "PageUp", "PageDown"].includes(key)) step(key);
    else if (key === "Enter" || key === " ") {
      if (state.cursor[0]) cloud.choose(...state.cursor, event.timeStamp, key === " " || event.shiftKey);
    } else if (key === "Escape") {
      state.cursor = [null, null];
      state.loop = [];
      drag = null;
      cloud.clear();
      cloud.schedule("over");
    } else if (key === "+" || key === "=") zoom(1.5);
    else if (key === "-") zoom(1 / 1.5);
    else if (key === "0") zoom(0);
    else if (key === "t" || key === "T") {
      layer = layer === "train" && cloud.testIds.length ? "test" : "train";
      cloud.live.textContent = `arrow keys now move between ${cloud.get("kinds")[layer === "test" ? 1 : 0]}s`;
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  // Keys in the stock controls, too, belong to them and not to the notebook; the mark counts on the element itself alone.
  listen(document, "focusin", ({ target }) => {
    if (target.closest?.(".inb-explorer")) target.dataset.lmSuppressShortcuts = "true";
  });
  listen(canvas, "focus", () => cloud.schedule("over"));
  listen(canvas, "blur", () => {
    cloud.hover(null);
    cloud.schedule("over");
  });
  return state;
}
