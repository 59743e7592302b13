// A point cloud on three stacked canvases: training points, test points, and what is highlighted.
// The first two are redrawn when the view changes; a click or a hover redraws the third only.
import { Grid, answered, bounds, fitted, toData, toScreen, union } from "./geometry.js";
import { axes, dots, marker, rgb, themeOf, thumbnail } from "./paint.js";
import { bytesOf, shelf } from "./shelf.js";
import { gestures } from "./gestures.js";

const make = (tag, className, parent) => {
  const element = document.createElement(tag);
  element.className = className;
  parent?.append(element);
  return element;
};
const number = (value) => Number(value.toPrecision(3)).toString().replace("-", "\u2212");

class Cloud {
  constructor(model, el) {
    this.model = model;
    this.shelf = shelf(model.get("source"));
    this.stopped = new AbortController();
    this.handlers = [];
    this.build(el);
    this.read();
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

  build(el) {
    this.root = make("div", "inb inb-cloud", el);
    this.root.dataset.name = this.get("name");
    const head = make("div", "inb-head", this.root);
    this.title = make("div", "inb-title", head);
    this.note = make("div", "inb-note", head);
    this.note.setAttribute("role", "status");
    const zoom = make("div", "inb-zoom", head);
    for (const [text, name, factor] of [["\u2212", "Zoom out", 1 / 1.5], ["+", "Zoom in", 1.5], ["\u2922", "Show all", 0]]) {
      const button = make("button", "", zoom);
      button.type = "button";
      button.textContent = text;
      button.title = name;
      button.setAttribute("aria-label", `${name}: ${this.get("name")}`);
      button.dataset.lmSuppressShortcuts = "true";
      button.addEventListener("click", () => this.gestures.zoom(factor));
    }
    this.stage = make("div", "inb-stage", this.root);
    this.base = make("canvas", "inb-base", this.stage);
    this.tests = make("canvas", "inb-tests", this.stage);
    this.over = make("canvas", "inb-over", this.stage);
    for (const canvas of [this.base, this.tests]) canvas.setAttribute("aria-hidden", "true");
    this.over.tabIndex = 0;
    this.over.dataset.lmSuppressShortcuts = "true";
    this.over.setAttribute("role", "application");
    this.over.setAttribute("aria-roledescription", "point cloud");
    this.over.__pointcloud = {
      clientXY: (layer, id) => this.clientXY(layer, id),
      visible: (layer, id) => this.visible(layer, id),
    };
    this.tip = make("div", "inb-tip", this.stage);
    this.tip.hidden = true;
    this.legend = make("div", "inb-legend", this.root);
    this.live = make("div", "inb-unseen", this.root);
    this.live.setAttribute("aria-live", "polite");
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
    const { train, test } = this.layers;
    const counts = `${train.xy.length / 2} training points` + (test.xy.length ? `, ${test.xy.length / 2} test points` : "");
    this.over.setAttribute("aria-label", `${this.get("title")}: ${counts}. Arrow keys move between points, Enter selects, ` +
      "Escape clears, T changes between test and training points, plus, minus and 0 zoom.");
    this.drawLegend();
  }

  watch() {
    const { model } = this;
    const on = (names, act) => names.split(" ").forEach((name) => {
      model.on(name, act);
      this.handlers.push([name, act]);
    });
    const changed = (names, act) => on(names.replaceAll(/\w+/g, "change:$&"), act);
    const refresh = () => this.schedule("all");
    changed("train_xy test_xy", () => {
      const before = this.box;
      this.read();
      this.box = this.extent();
      if (before.some((value, i) => value !== this.box[i])) this.view = null;
      refresh();
    });
    changed("train_class test_class palette class_names train_hidden test_hidden test_ids topk_ids topk_scores title", () => {
      this.read();
      refresh();
    });
    changed("x_label y_label owner", refresh);
    changed("test_id method k", () => this.answer());
    changed("pinned", () => this.answerPinned());
    changed("answer", () => this.answerCame());
    changed("pinned_answer selected lasso note busy", () => this.schedule("over"));
    changed("selected method", () => this.drawLegend());
    changed("hover", () => this.schedule("over"));
    on("msg:custom", (message, buffers) => this.shelf.got(message, buffers));
    this.pictures = () => this.schedule("over");
    this.shelf.listeners.add(this.pictures);
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(this.stage);
    const themed = () => {
      this.theme = null;
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
    this.root.remove();
  }

  // Answer from what is preloaded, if it is; otherwise the kernel's answer will come as the trait.
  local(id) {
    const [methods, depth, method] = [this.get("preloaded").length, this.get("depth"), this.get("method")];
    if (id === null || !this.get("preloaded")[method]) return null;
    const shape = { methods, depth, rows: this.testIds.length };
    const found = answered(...this.topk, shape, method, this.testRow.get(id) ?? -1, this.get("k"));
    return found && { test_id: id, method, k: this.get("k"), ...found };
  }

  answer() {
    const id = this.get("test_id"), held = this.get("answer");
    const same = held.test_id === id && held.method === this.get("method") && held.k === this.get("k");
    const found = same ? null : this.local(id);
    if (found) this.set({ answer: found });
    else this.answerCame();
    this.answerPinned();
  }

  answerPinned() {
    const id = this.get("pinned");
    const found = this.local(id);
    if (found) this.set({ pinned_answer: found });
    this.schedule("over");
  }

  answerCame() {
    const held = this.get("answer"), id = this.get("test_id");
    if (this.get("preloaded").length && held.test_id === id && held.method !== this.get("method")) {
      const found = this.local(id); // a late answer of the kernel to an older question
      if (found) return this.set({ answer: found });
    }
    this.drawOver();
    const { dataset } = this.root;
    const current = this.current();
    dataset.testId = current?.test_id ?? id ?? "";
    dataset.helpful = current?.helpful.join() ?? "";
    dataset.harmful = current?.harmful.join() ?? "";
    if (this.clicked && current?.test_id === this.clicked.id) {
      dataset.answered = (performance.now() - this.clicked.at).toFixed(2);
      this.clicked = null;
    }
  }

  // The answer that belongs to the test point shown, or null. The scatter has no test_id of its own: its link brings answers.
  current() {
    const held = this.get("answer");
    if (held.test_id === undefined || held.test_id === null) return null;
    return !this.testIds.length || held.test_id === this.get("test_id") ? held : null;
  }

  // A chosen point: a test point is explained, a training point is selected.
  choose(layer, id, at, toggle = false) {
    if (layer === "test") {
      this.clicked = { id, at };
      this.root.dataset.answered = "";
      if (this.get("test_id") === id) this.answerCame();
      else this.set({ test_id: id });
      return;
    }
    const before = Array.from(this.selected());
    const others = before.filter((other) => other !== id);
    this.select(toggle ? (others.length < before.length ? others : [...others, id].sort((a, b) => a - b)) : [id]);
  }

  selected() {
    return bytesOf(this.get("selected"), Int32Array);
  }

  select(ids) {
    this.set({ selected: new DataView(Int32Array.from(ids).buffer) });
  }

  hover(layer, id) {
    const text = layer ? `${layer} ${id}` : "";
    if (text !== this.get("hover")) this.set({ hover: text });
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
    return row >= 0 && 2 * row < xy.length ? toScreen(this.view, this.area, xy[2 * row], xy[2 * row + 1]) : [NaN, NaN];
  }

  visible(layer, id) {
    const row = this.rowOf(layer, id), [x, y] = this.place(layer, id), { left, top, width, height } = this.area;
    return !this.layers[layer].hidden[row] && x >= left && x <= left + width && y >= top && y <= top + height;
  }

  clientXY(layer, id) {
    const [x, y] = this.place(layer, id), box = this.over.getBoundingClientRect();
    return [box.left + x, box.top + y];
  }

  // What is under the pointer: test points first, and from further away.
  pick(px, py) {
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
    const { train, test } = this.layers;
    return test.xy.length ? union(bounds(train.xy), bounds(test.xy)) : bounds(train.xy);
  }

  resize() {
    const width = this.stage.clientWidth, height = this.stage.clientHeight;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    if (this.view && this.area && (width !== this.size?.[0] || height !== this.size?.[1])) this.view = null;
    this.size = [width, height];
    this.ratio = ratio;
    for (const canvas of [this.base, this.tests, this.over]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const framed = Boolean(this.get("x_label"));
    this.area = framed ? { left: 66, top: 6, width: width - 76, height: height - 52 } : { left: 0, top: 0, width, height };
    this.box ??= this.extent();
    this.draw();
  }

  schedule(what) {
    this.pending = what === "all" || this.pending === "all" ? "all" : "over";
    this.frame ??= requestAnimationFrame(() => {
      const all = this.pending === "all";
      this.frame = this.pending = null;
      if (!this.area) return;
      if (all) this.draw();
      else this.drawOver();
    });
  }

  draw() {
    this.theme ??= themeOf(this.root);
    this.view ??= fitted(this.box, this.area, !this.get("x_label"));
    const { train, test } = this.layers, { width, height } = this.base;
    const context = this.base.getContext("2d", { willReadFrequently: true });
    context.fillStyle = this.theme.ground;
    context.fillRect(0, 0, width, height);
    const image = context.getImageData(0, 0, width, height);
    const radius = Math.max(1.1, Math.min(3, 9.2 * (train.xy.length / 2 + 1) ** -0.18));
    dots(image, this.ratio, train.xy, this.view, this.area, { colours: this.colours, classes: train.classes,
      hidden: train.hidden, ghost: rgb(this.theme.quiet), radius, alpha: 0.85 });
    context.putImageData(image, 0, 0);
    const ctx = this.fresh(this.tests);
    for (let row = 0; row < test.xy.length / 2; row++) {
      const [x, y] = toScreen(this.view, this.area, test.xy[2 * row], test.xy[2 * row + 1]);
      ctx.globalAlpha = test.hidden[row] ? 0.12 : 1;
      marker(ctx, "diamond", x, y, 5.5, this.css(test.classes[row]), this.theme.ground, 3);
      marker(ctx, "diamond", x, y, 5.5, this.css(test.classes[row]), this.theme.ink, 1.3);
    }
    this.drawOver();
  }

  css(index) {
    const palette = this.get("palette");
    return palette[index % palette.length];
  }

  fresh(canvas) {
    const ctx = canvas.getContext("2d");
    ctx.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    ctx.clearRect(0, 0, canvas.width, canvas.height);
    return ctx;
  }

  drawOver() {
    if (!this.view || !this.area) return;
    const ctx = this.fresh(this.over), { theme, area } = this, answer = this.current();
    const stale = answer && this.get("x_label") && this.get("owner") !== `${answer.test_id}/${answer.method}`;
    this.note.textContent = stale ? this.get("stale") : this.get("note");
    this.root.classList.toggle("inb-busy", this.get("busy"));
    this.root.classList.toggle("inb-muted", Boolean(answer));
    this.root.classList.toggle("inb-stale", Boolean(stale));
    this.over.classList.toggle("inb-lasso", this.get("lasso"));
    if (this.get("x_label")) axes(ctx, this.view, area, theme, this.get("x_label"), this.get("y_label"));
    ctx.save();
    ctx.beginPath();
    ctx.rect(area.left, area.top, area.width, area.height);
    ctx.clip();
    const selected = this.selected();
    this.root.dataset.selected = selected.length;
    for (const id of selected) this.mark(ctx, "train", id, "circle", 3.5, this.css(this.layers.train.classes[id]), theme.ink, 1.2);
    const pinned = this.get("pinned"), other = this.get("pinned_answer");
    if (pinned !== null && other?.test_id === pinned && pinned !== answer?.test_id) {
      for (const id of other.harmful) this.mark(ctx, "train", id, "down", 6, null, theme.harmful);
      for (const id of other.helpful) this.mark(ctx, "train", id, "up", 6, null, theme.helpful);
    }
    if (answer && !stale) {
      for (const id of answer.harmful.toReversed()) this.mark(ctx, "train", id, "down", 7, theme.harmful, theme.ground);
      for (const id of answer.helpful.toReversed()) this.mark(ctx, "train", id, "up", 7, theme.helpful, theme.ground);
    }
    if (pinned !== null) this.point(ctx, pinned, false);
    if (answer || this.get("test_id") !== null) this.point(ctx, answer?.test_id ?? this.get("test_id"), true);
    const [layer, id] = this.gestures?.cursor ?? [];
    if (layer && document.activeElement === this.over) this.mark(ctx, layer, id, "circle", 11, null, theme.accent, 2);
    if (this.gestures?.loop.length > 1) this.drawLoop(ctx, this.gestures.loop);
    ctx.restore();
    this.drawTip(ctx);
  }

  mark(ctx, layer, id, shape, size, fill, edge, width) {
    const [x, y] = this.place(layer, id);
    ctx.globalAlpha = this.layers[layer].hidden[this.rowOf(layer, id)] ? 0.4 : 1;
    marker(ctx, shape, x, y, size, fill, edge, width);
    ctx.globalAlpha = 1;
  }

  point(ctx, id, chosen) {
    if (!this.testRow.has(id)) return;
    this.mark(ctx, "test", id, "diamond", chosen ? 9 : 7.5, this.css(this.layers.test.classes[this.testRow.get(id)]), this.theme.ground, 5);
    this.mark(ctx, "test", id, "diamond", chosen ? 9 : 7.5, null, this.theme.ink, 2);
    if (!chosen) this.mark(ctx, "test", id, "circle", 13, null, this.theme.ink, 1.2);
  }

  drawLoop(ctx, loop) {
    ctx.beginPath();
    loop.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
    ctx.closePath();
    ctx.strokeStyle = this.theme.accent;
    ctx.setLineDash([5, 4]);
    ctx.lineWidth = 1.5;
    ctx.stroke();
    ctx.globalAlpha = 0.08;
    ctx.fillStyle = this.theme.accent;
    ctx.fill();
    ctx.globalAlpha = 1;
    ctx.setLineDash([]);
  }

  drawTip(ctx) {
    const [layer, word] = this.get("hover").split(" ");
    const { dataset } = this.root, id = Number(word);
    dataset.hover = this.get("hover");
    const [x, y] = layer ? this.place(layer, id) : [NaN];
    const { left, top, width, height } = this.area;
    const shown = x >= left && x <= left + width && y >= top && y <= top + height;
    if (shown) {
      const ring = layer === "test" ? 11 : 9;
      marker(ctx, "circle", x, y, ring, null, this.theme.ground, 4);
      marker(ctx, "circle", x, y, ring, null, this.theme.ink, 1.8);
    }
    const pointed = shown && (this.over.matches(":hover") || this.gestures?.cursor[0]);
    this.tip.hidden = !pointed;
    if (!pointed) return;
    const key = `${this.get("hover")} ${this.shelf.get(layer, id).known} ${JSON.stringify(this.facts(layer, id))}`;
    if (key !== this.tipped) this.fillTip(layer, id, key);
    const [w, h] = [this.tip.offsetWidth, this.tip.offsetHeight];
    this.tip.style.left = `${Math.max(4, x + 16 + w > this.size[0] ? x - w - 16 : x + 16)}px`;
    this.tip.style.top = `${Math.max(4, Math.min(this.size[1] - h - 4, y - h / 2))}px`;
  }

  sides(method) {
    return this.get("side_names")[method] ?? ["helpful", "harmful"];
  }

  facts(layer, id) {
    const lines = [`${layer === "test" ? "test point" : "training example"} ${id}`, this.shelf.words(layer, id)];
    const answer = this.current();
    if (layer === "test" || !answer) return lines;
    const { xy } = this.layers.train;
    const [up, down] = [answer.helpful.indexOf(id), answer.harmful.indexOf(id)];
    const names = this.sides(answer.method);
    if (up >= 0) lines.push(`${names[0]} ${up + 1}: ${number(answer.helpful_scores[up])}`);
    if (down >= 0) lines.push(`${names[1]} ${down + 1}: ${number(answer.harmful_scores[down])}`);
    if (this.get("x_label")) lines.push(`${this.get("x_label")}: ${number(xy[2 * id])}`);
    if (this.get("x_label") && up < 0 && down < 0) lines.push(`score: ${number(xy[2 * id + 1])}`);
    return lines;
  }

  fillTip(layer, id, key) {
    this.tipped = key;
    this.tip.replaceChildren();
    const { picture, text, known } = this.shelf.get(layer, id);
    if (!known) this.shelf.want(this.model, layer, [id]);
    if (picture) thumbnail(make("canvas", "inb-picture", this.tip), picture);
    const words = make("div", "inb-facts", this.tip);
    for (const line of this.facts(layer, id)) make("div", "", words).textContent = line;
    if (text) make("div", "inb-text", words).textContent = text;
  }

  drawLegend() {
    this.legend.replaceChildren();
    if (!this.get("legend")) return;
    const { classes, hidden } = this.layers.train, names = this.get("class_names");
    const counts = names.map(() => 0), chosen = names.map(() => 0);
    classes.forEach((c, row) => hidden[row] || counts[c]++);
    const selected = this.selected();
    for (const id of selected) chosen[classes[id]]++;
    const item = (name, mark, colour) => {
      const entry = make("span", "inb-item", this.legend);
      make("span", `inb-mark ${mark}`, entry).style.setProperty("--colour", colour);
      make("span", "", entry).textContent = name;
      return entry;
    };
    names.forEach((name, c) => {
      const count = make("span", "inb-count", item(name, "inb-dot", this.css(c)));
      count.textContent = selected.length ? `${chosen[c]} of ${counts[c]}` : counts[c];
    });
    const [up, down] = this.sides(this.get("method"));
    item("test point", "inb-diamond", "var(--inb-ink)");
    item(up, "inb-up", "var(--inb-helpful)");
    item(down, "inb-down", "var(--inb-harmful)");
  }
}

function render({ model, el }) {
  const cloud = new Cloud(model, el);
  return () => cloud.remove();
}

export default { render };
