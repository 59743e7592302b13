// The test point asked about, the examples that helped and harmed it, and the selected ones, as cards.
import { thumbnail } from "./paint.js";
import { bytesOf, forget, make, shelf, signed } from "./shelf.js";

const SHOWN = 24; // cards of the selection, whose size is said in full

class Gallery {
  constructor(model, el) {
    this.model = model;
    this.shelf = shelf(model.get("source"));
    this.shelf.models.add(model);
    this.root = make("div", `inb inb-gallery${model.get("collect") ? " inb-collected" : ""}`, el);
    this.headline = make("div", "inb-headline", this.root);
    this.headline.setAttribute("aria-live", "polite");
    this.columns = make("div", "inb-columns", this.root);
    this.frame = null;
    this.handlers = [];
    const on = (names, act) => names.forEach((name) => {
      model.on(name, act);
      this.handlers.push([name, act]);
    });
    const later = () => (this.frame ??= requestAnimationFrame(() => this.draw()));
    on(["answer", "pinned", "pinned_answer", "side_titles", "headline"].map((name) => `change:${name}`), later);
    on(["change:selected"], later);
    on(["change:hover"], () => this.mark());
    on(["msg:custom"], (message, buffers) => this.shelf.got(message, buffers));
    this.shelf.listeners.add(later);
    this.later = later;
    this.draw();
    this.root.dataset.ready = "1";
  }

  remove() {
    for (const [name, act] of this.handlers) this.model.off(name, act);
    this.shelf.listeners.delete(this.later);
    cancelAnimationFrame(this.frame);
    this.root.remove();
  }

  draw() {
    this.frame = null;
    const answer = this.model.get("answer"), pinned = this.model.get("pinned");
    const asked = answer.test_id ?? null;
    const buttons = () => Array.from(this.columns.querySelectorAll("button[data-key]"));
    const place = buttons().indexOf(document.activeElement), focused = place < 0 ? null : document.activeElement.dataset.key;
    this.columns.replaceChildren();
    this.headline.textContent = asked === null ? "Choose a test point on the map: click one, or use the arrow keys and Enter."
      : this.model.get("headline") || this.summary(answer);
    if (asked !== null) this.explain(answer, pinned !== null && pinned !== asked ? this.model.get("pinned_answer") : null);
    if (pinned !== null && pinned !== asked) this.explain(this.model.get("pinned_answer"), answer, pinned);
    if (!this.model.get("collect")) this.drawSelected();
    const missing = new Set(Array.from(this.columns.querySelectorAll("[data-missing]"), (card) => card.dataset.key));
    for (const layer of ["train", "test"]) {
      const ids = Array.from(missing).filter((key) => key.startsWith(layer)).map((key) => Number(key.split(" ")[1]));
      this.shelf.want(this.model, layer, ids);
    }
    this.root.dataset.testId = asked ?? "";
    this.root.dataset.helpful = answer.helpful?.join() ?? "";
    this.root.dataset.harmful = answer.harmful?.join() ?? "";
    if (focused) (this.columns.querySelector(`[data-key="${focused}"]`) ?? buttons().at(place) ?? buttons().at(-1))?.focus({ preventScroll: true });
    this.mark();
  }

  summary({ test_id, helpful, harmful, method }) {
    const [up, down] = this.model.get("side_names")[method] ?? ["helpful", "harmful"];
    const list = (name, ids) => {
      const said = name.endsWith("ful") ? `Most ${name}` : name[0].toUpperCase() + name.slice(1);
      return `${said}: ${ids.length ? ids.slice(0, 3).join(", ") : "none"}.`;
    };
    return `Test point ${test_id}: ${this.shelf.words("test", test_id)}. ${list(up, helpful)} ${list(down, harmful)}`;
  }

  // One test point at the left, its two rows of cards at the right.
  explain(answer, other, pinned = null) {
    const id = pinned ?? answer.test_id;
    const block = make("div", pinned === null ? "inb-block" : "inb-block inb-pinned", this.columns);
    const { loss } = this.shelf.get("test", id);
    const point = make("div", "inb-point", block);
    make("div", "inb-kicker", point, pinned === null ? "Test point" : "Pinned");
    this.card(point, "test", id, [loss === undefined ? "" : `loss ${loss.toPrecision(3)} ${this.model.get("loss_unit")}`]);
    const rows = make("div", "inb-rows", block);
    if (answer?.test_id !== id || !answer.helpful) return;
    const titles = this.model.get("side_titles")[answer.method] ?? ["Helpful", "Harmful"];
    for (const [side, title] of [["helpful", titles[0]], ["harmful", titles[1]]]) {
      if (this.model.get("collect") && !answer[side].length) continue;
      const section = make("div", `inb-side inb-${side}`, rows);
      const heading = make("div", "inb-kicker", section);
      make("span", `inb-mark ${side === "helpful" ? "inb-up" : "inb-down"}`, heading).style.setProperty("--colour", `var(--inb-${side})`);
      make("span", "", heading, title);
      const cards = make("div", "inb-cards", section);
      cards.setAttribute("role", "group");
      cards.setAttribute("aria-label", title);
      const shared = new Set(other?.[side] ?? []);
      answer[side].forEach((train, rank) => {
        const card = this.card(cards, "train", train, [signed(answer[`${side}_scores`][rank])], `${side} ${rank + 1}, `);
        if (!shared.has(train)) return;
        card.classList.add("inb-shared");
        card.title = `also ${side} for test point ${other.test_id}`;
      });
      if (!answer[side].length) make("div", "inb-none", cards, "none: no score of this sign");
    }
  }

  drawSelected() {
    const ids = Array.from(bytesOf(this.model.get("selected"), Int32Array));
    if (!ids.length) return;
    const section = make("div", "inb-side inb-selected", this.columns);
    const more = ids.length > SHOWN ? `, the first ${SHOWN} shown` : "";
    make("div", "inb-kicker", section, `Selected: ${ids.length} training example${ids.length > 1 ? "s" : ""}${more}`);
    const cards = make("div", "inb-cards", section);
    for (const id of ids.slice(0, SHOWN)) this.card(cards, "train", id, [], "selected, ");
  }

  card(parent, layer, id, lines, spoken = "") {
    const { picture, text, known, label, predicted } = this.shelf.get(layer, id);
    const card = make(layer === "train" ? "button" : "div", text && !picture ? "inb-card inb-worded" : "inb-card", parent);
    if (layer === "train") card.type = "button";
    else card.setAttribute("role", "group");
    card.dataset.id = id;
    card.dataset.layer = layer;
    card.dataset.key = `${layer} ${id}`;
    card.dataset.lmSuppressShortcuts = "true";
    if (!known) card.dataset.missing = "1";
    if (picture) thumbnail(make("canvas", "inb-picture", card), picture);
    else if (text) make("span", "inb-text", card, text);
    else make("span", "inb-picture inb-blank", card);
    const facts = make("span", "inb-facts", card);
    const truth = make("span", "inb-label", facts);
    make("span", "inb-mark inb-dot", truth).style.setProperty("--colour", this.colour(label));
    make("span", "", truth, this.shelf.classes[label] ?? "?");
    if (label !== predicted) make("span", "inb-wrong", truth, `\u2192 ${this.shelf.classes[predicted] ?? "?"}`);
    for (const line of lines.filter(Boolean)) make("span", "inb-score", facts, line);
    make("span", "inb-id", facts, `#${id}`);
    const kind = layer === "test" ? "test point" : "training example";
    card.setAttribute("aria-label", `${spoken}${kind} ${id}, ${this.shelf.words(layer, id)}${lines[0] ? `, ${lines[0]}` : ""}` +
      (text ? `: ${text}` : ""));
    for (const name of ["pointerenter", "focus"]) card.addEventListener(name, () => this.shelf.hover(layer, id));
    for (const name of ["pointerleave", "blur"]) card.addEventListener(name, () => this.shelf.hover(null));
    if (layer === "train") card.addEventListener("click", (event) => this.choose(id, event.shiftKey || event.ctrlKey || event.metaKey));
    return card;
  }

  colour(label) {
    const palette = this.model.get("palette");
    return label === undefined ? "transparent" : palette[label % palette.length];
  }

  // A clicked card is the selection; once more, and it is not. Where a selection is collected, it joins or leaves it.
  choose(id, adding) {
    const before = Array.from(bytesOf(this.model.get("selected"), Int32Array));
    const others = before.filter((other) => other !== id);
    const was = others.length < before.length;
    const ids = adding || this.model.get("collect") ? (was ? others : [...others, id].sort((a, b) => a - b)) : was && before.length === 1 ? [] : [id];
    this.model.set("selected", new DataView(Int32Array.from(ids).buffer));
    this.model.save_changes();
  }

  mark() {
    const hover = this.model.get("hover"), ids = new Set(bytesOf(this.model.get("selected"), Int32Array));
    this.root.dataset.hover = hover;
    for (const card of this.columns.querySelectorAll("[data-id]")) {
      card.classList.toggle("inb-hovered", card.dataset.key === hover);
      if (card.dataset.layer === "train") card.setAttribute("aria-pressed", ids.has(Number(card.dataset.id)));
    }
  }
}

function initialize({ model }) {
  shelf(model.get("source")).fill(model);
  return () => forget(model.get("source"));
}

function render({ model, el }) {
  const gallery = new Gallery(model, el);
  return () => gallery.remove();
}

export default { initialize, render };
