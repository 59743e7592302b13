// A point cloud on stacked canvases: training points, test points, selected points, and what is highlighted.
// All are redrawn when the view changes; a click or a hover redraws the last one only.
import { Grid, answered, bounds, fitted, squared, toData, toScreen, union } from "./geometry.js";
import { rgb, themeOf } from "./paint.js";
import { bytesOf, shelf } from "./shelf.js";
import { drawBase, drawChosen, drawLegend, drawOver, drawTests } from "./drawing.js";
import { described, frame, keepKeys } from "./frame.js";
import { gestures } from "./gestures.js";

class Cloud {
  constructor(model, el) {
    this.model = model;
    this.shelf = shelf(model.get("source"));
    this.shelf.models.add(model);
    this.stopped = new AbortController();
    this.handlers = [];
    frame(this, el);
    this.read();
    this.box = this.extent();
    this.gestures = gestures(this);
    this.watch();
    this.resize();
    this.root.dataset.ready = "1";
  }

  get(name) {
    return this.model.get(name);
  }

  set(traits) {
    for (const [name, value] of Object.entries(traits)) this.model.set(name, value);
    this.model.save_changes();
  }

  // Traits to arrays. A layer is {xy, ids, classes, hidden, grid}; the id of a training point is its row.
  read() {
    const layer = (name) => ({
      xy: bytesOf(this.get(`${name}_xy`), Float32Array),
      classes: bytesOf(this.get(`${name}_class`), Uint16Array),
      hidden: bytesOf(this.get(`${name}_hidden`)),
    });
    this.layers = { train: layer("train"), test: layer("test") };
    this.testIds = bytesOf(this.get("test_ids"), Int32Array);
    this.testRow = new Map(Array.from(this.testIds, (id, row) => [id, row]));
    this.colours = this.get("palette").map(rgb);
    this.topk = [bytesOf(this.get("topk_ids"), Int32Array), bytesOf(this.get("topk_scores"), Float32Array)];
    this.title.textContent = this.get("title");
    this.over.setAttribute("aria-label", described(this));
    drawLegend(this);
  }

  watch() {
    const { model } = this;
    const on = (names, act) => names.split(" ").forEach((name) => {
      model.on(name, act);
      this.handlers.push([name, act]);
    });
    const changed = (names, act) => on(names.replaceAll(/\w+/g, "change:$&"), act);
    const refresh = () => this.schedule("all");
    changed("train_xy test_xy guess", () => {
      const before = this.box;
      this.read();
      this.box = this.extent();
      if (before.some((value, i) => value !== this.box[i])) this.showAll();
      refresh();
    });
    changed("train_class test_class palette class_names train_hidden test_hidden test_ids train_names topk_ids topk_scores title", () => {
      this.read();
      refresh();
    });
    changed("x_label y_label owner", refresh);
    changed("test_id method k answer", () => this.answer());
    changed("pinned method k", () => this.answerPinned());
    changed("pinned_answer lasso note busy caption", () => this.schedule("over"));
    changed("hover", () => {
      this.root.dataset.hover = this.get("hover");
      this.schedule("over");
    });
    changed("selected ellipses centres", () => {
      if (this.view) drawChosen(this);
      this.schedule("over");
    });
    changed("selected method", () => drawLegend(this));
    on("msg:custom", (message, buffers) => this.shelf.got(message, buffers));
    this.pictures = () => this.schedule("over");
    this.shelf.listeners.add(this.pictures);
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(this.stage);
    const themed = () => {
      const theme = themeOf(this.root);
      if (JSON.stringify(theme) === JSON.stringify(this.theme)) return;
      this.theme = theme;
      refresh();
    };
    this.themes = new MutationObserver(themed);
    for (const element of [document.body, document.documentElement]) {
      this.themes.observe(element, { attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-theme"] });
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themed, { signal: this.stopped.signal });
    this.answer();
    this.answerPinned();
  }

  remove() {
    this.stopped.abort();
    this.sizes.disconnect();
    this.themes.disconnect();
    this.shelf.listeners.delete(this.pictures);
    for (const [name, act] of this.handlers) this.model.off(name, act);
    cancelAnimationFrame(this.frame);
    clearTimeout(this.late);
    this.root.remove();
  }

  // The preloaded answer for a test point, or null.
  local(id) {
    const [methods, depth, method] = [this.get("preloaded").length, this.get("depth"), this.get("method")];
    if (id === null || !this.get("preloaded")[method]) return null;
    const shape = { methods, depth, rows: this.testIds.length };
    const found = answered(...this.topk, shape, method, this.testRow.get(id) ?? -1, this.get("k"));
    return found && { test_id: id, method, k: this.get("k"), ...found };
  }

  // See that the answer fits the question: from what is preloaded, if it is; otherwise the kernel's will come.
  answer() {
    const held = this.get("answer"), id = this.get("test_id");
    const fits = held.test_id === id && held.method === this.get("method") && held.k === this.get("k");
    const stale = this.testIds.length && id === null && held.test_id !== undefined;
    const found = fits ? null : stale ? {} : this.local(id);
    if (found) return this.set({ answer: found }); // and back here
    drawOver(this);
    const { dataset } = this.root, current = this.current();
    dataset.testId = current?.test_id ?? id ?? "";
    dataset.helpful = current?.helpful.join() ?? "";
    dataset.harmful = current?.harmful.join() ?? "";
    if (this.clicked && current?.test_id === this.clicked.id) {
      dataset.answered = (performance.now() - this.clicked.at).toFixed(2);
      this.clicked = null;
    }
  }

  answerPinned() {
    const id = this.get("pinned"), held = this.get("pinned_answer");
    const fits = held.test_id === id && held.method === this.get("method") && held.k === this.get("k");
    const stale = this.testIds.length && id === null && held.test_id !== undefined;
    const found = fits ? null : stale ? {} : this.local(id);
    if (found) this.set({ pinned_answer: found });
    this.schedule("over");
  }

  // The answer that belongs to the test point shown, or null. The scatter has no test points: its link brings answers.
  current() {
    const held = this.get("answer");
    if (held.test_id === undefined || held.test_id === null) return null;
    const asked = ["test_id", "method", "k"].every((name) => held[name] === this.get(name));
    return !this.testIds.length || asked ? held : null;
  }

  // A chosen point: a test point is explained, a training point is selected.
  choose(layer, id, at, toggle = false) {
    if (layer === "test") {
      this.clicked = { id, at };
      this.root.dataset.answered = "";
      if (this.get("test_id") === id) this.answer();
      else this.set({ test_id: id });
      return;
    }
    const before = Array.from(this.selected());
    const others = before.filter((other) => other !== id);
    this.select(toggle || this.get("collect") ? (others.length < before.length ? others : [...others, id].sort((a, b) => a - b)) : [id]);
  }

  selected() {
    return bytesOf(this.get("selected"), Int32Array);
  }

  select(ids) {
    this.set({ selected: new DataView(Int32Array.from(ids).buffer) });
  }

  hover(layer, id) {
    this.shelf.hover(layer, id);
  }

  clear() {
    if (this.selected().length) this.select([]);
    else if (this.testIds.length && this.get("test_id") !== null) this.set({ test_id: null, answer: {} });
    this.hover(null);
  }

  idOf(layer, row) {
    return layer === "test" ? this.testIds[row] : row;
  }

  rowOf(layer, id) {
    return layer === "test" ? this.testRow.get(id) ?? -1 : id;
  }

  place(layer, id) {
    const { xy } = this.layers[layer], row = this.rowOf(layer, id);
    if (!this.view || !(row >= 0 && 2 * row < xy.length)) return [NaN, NaN];
    return toScreen(this.view, this.area, xy[2 * row], xy[2 * row + 1]);
  }

  visible(layer, id) {
    if (!this.view) return false;
    const row = this.rowOf(layer, id), [x, y] = this.place(layer, id), { left, top, width, height } = this.area;
    return !this.layers[layer].hidden[row] && x >= left && x <= left + width && y >= top && y <= top + height;
  }

  clientXY(layer, id) {
    const [x, y] = this.place(layer, id), box = this.over.getBoundingClientRect();
    return [box.left + x, box.top + y];
  }

  // What is under the pointer: test points first, and from further away.
  pick(px, py) {
    const { left, top, width, height } = this.area;
    if (px < left || px > left + width || py < top || py > top + height) return [null, null];
    for (const [layer, reach] of [["test", 10], ["train", 7]]) {
      const { xy, hidden } = this.layers[layer];
      if (!xy.length) continue;
      this.layers[layer].grid ??= new Grid(xy);
      const [x, y] = toData(this.view, this.area, px, py);
      const row = this.layers[layer].grid.nearest(x, y, reach / this.view.sx, reach / this.view.sy, hidden);
      if (row >= 0) return [layer, this.idOf(layer, row)];
    }
    return [null, null];
  }

  extent() {
    const boxes = Object.values(this.layers).filter(({ xy }) => xy.length).map(({ xy }) => bounds(xy));
    const box = boxes.length ? boxes.reduce(union) : null;
    return this.get("diagonal") ? squared(box, this.get("guess")) : box ?? [0, 1, 0, 1];
  }

  resize() {
    const width = this.stage.clientWidth, height = this.stage.clientHeight;
    if (!width || !height) return;
    keepKeys(this.root);
    const ratio = devicePixelRatio || 1, before = this.area;
    if (before && this.size[0] === width && this.size[1] === height && this.ratio === ratio) return;
    this.size = [width, height];
    this.ratio = ratio;
    for (const canvas of [this.base, this.tests, this.chosen, this.over]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const framed = Boolean(this.get("x_label"));
    this.area = framed ? { left: 80, top: 6, width: width - 88, height: height - 52 } : { left: 0, top: 0, width, height };
    if (!this.view || this.whole) this.showAll();
    else { // a closer look stays one: the same middle, at the new width
      const wider = this.area.width / before.width, taller = this.area.height / before.height;
      this.view = { ...this.view, sx: this.view.sx * wider, sy: this.view.sy * (framed ? taller : wider) };
    }
    this.draw();
  }

  schedule(what) {
    this.pending = what === "all" || this.pending === "all" ? "all" : "over";
    this.frame ??= requestAnimationFrame(() => {
      const all = this.pending === "all";
      this.frame = this.pending = null;
      if (!this.area) return;
      if (all) this.draw();
      else drawOver(this);
    });
  }

  showAll() {
    this.whole = true;
    if (this.area) this.view = fitted(this.box, this.area, !this.get("x_label"));
  }

  draw() {
    this.theme ??= themeOf(this.root);
    drawBase(this);
    drawTests(this);
    drawChosen(this);
    drawOver(this);
  }

  css(index) {
    const palette = this.get("palette");
    return palette[index % palette.length];
  }

  // What the two ends of a method's ranking are called.
  sides(method) {
    return this.get("side_names")[method] ?? ["helpful", "harmful"];
  }
}

function render({ model, el }) {
  const cloud = new Cloud(model, el);
  return () => cloud.remove();
}

export default { render };
