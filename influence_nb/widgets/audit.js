// The example to be decided on: its picture or text, what speaks for its label and against it, and a key for each decision.
import { keepKeys } from "./frame.js";
import { thumbnail } from "./paint.js";
import { bytesOf, make, signed } from "./shelf.js";

const MOVES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
const ACTS = { k: "keep", r: "remove", u: "undo" };

class Desk {
  constructor(model, el) {
    this.model = model;
    this.sent = null; // the turn that waits for an answer: a second key would fall on an example not yet seen
    this.classes = model.get("classes");
    this.root = make("div", "inb inb-desk", el);
    this.root.tabIndex = 0;
    this.root.setAttribute("role", "application");
    this.root.setAttribute("aria-roledescription", "label audit");
    this.root.setAttribute("aria-label", "Labels to check. K keeps the label, the key of a class fixes it, R removes the example, " +
      "U takes back the last decision, arrow keys move.");
    this.root.dataset.lmSuppressShortcuts = "true"; // on the element itself: else notebook keys win
    this.headline = make("div", "inb-headline", this.root);
    const block = make("div", "inb-block", this.root);
    this.example = make("div", "inb-example", block);
    this.rows = make("div", "inb-rows", block);
    this.buttons(make("div", "inb-keys", this.root));
    this.error = make("div", "inb-doubts", this.root);
    this.error.setAttribute("role", "alert");
    this.history = make("div", "inb-line", this.root);
    this.history.setAttribute("role", "status");
    this.live = make("div", "inb-unseen", this.root);
    this.live.setAttribute("aria-live", "polite");
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.draw = () => this.show(model.get("content"));
    model.on("change:content", this.draw);
    this.draw();
    this.placed = new ResizeObserver(() => keepKeys(this.root)); // when the controls round it are on the page
    this.placed.observe(this.root);
    this.root.dataset.ready = "1";
  }

  remove() {
    this.placed.disconnect();
    this.model.off("change:content", this.draw);
    this.root.remove();
  }

  buttons(parent) {
    const keys = this.model.get("letters");
    const add = (key, name, act, tip) => {
      const button = make("button", `inb-key inb-${act.act}`, parent);
      button.type = "button";
      button.dataset.lmSuppressShortcuts = "true";
      button.title = tip;
      if (key) make("kbd", "", button, key);
      make("span", "", button, name);
      button.addEventListener("click", () => this.tell(act));
      return button;
    };
    add("k", "keep", { act: "keep" }, "The label is right");
    this.fixes = this.classes.map((name, c) => add(keys[c], name, { act: "fix", label: c }, `The label should be ${name}`));
    add("r", "remove", { act: "remove" }, "Leave the example out");
    this.undo = add("u", "undo", { act: "undo" }, "Take back the last decision");
    add("\u2190", "back", { act: "move", step: -1 }, "The example before");
    add("\u2192", "next", { act: "move", step: 1 }, "The next example");
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key, label = this.model.get("letters").indexOf(key);
    const act = ACTS[key] ? { act: ACTS[key] } : MOVES[key] ? { act: "move", step: MOVES[key] }
      : key.length === 1 && label >= 0 && label < this.classes.length ? { act: "fix", label } : null;
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.repeat || act.act === "move") this.tell(act);
  }

  tell(act) {
    const { turn, id } = this.model.get("content");
    if (this.sent === turn) return;
    this.sent = turn;
    this.root.dataset.waiting = "1";
    this.model.send({ ...act, id });
  }

  show(content) {
    const { id, turn, place, count, label, predicted, decision, after, score, tally, done, text } = content;
    if (this.sent !== turn) delete this.root.dataset.waiting;
    const name = (c) => this.classes[c] ?? "?";
    const given = label === predicted ? `labelled ${name(label)}, and predicted so` : `labelled ${name(label)}, predicted ${name(predicted)}`;
    const decided = { keep: "kept", remove: "removed", fix: `now ${name(after)}` }[decision] ?? "";
    this.headline.textContent = (done ? "All are checked. " : "") + `${tally}.`;
    this.example.replaceChildren();
    const pictures = this.pictures();
    this.picture(this.example, pictures[0], text);
    const facts = make("div", "inb-facts", this.example);
    const truth = make("span", "inb-label", facts);
    this.dot(truth, label);
    make("span", "", truth, name(label));
    if (label !== predicted) make("span", "inb-wrong", truth, `\u2192 ${name(predicted)}`);
    make("span", "inb-score", facts, score);
    make("span", "inb-id", facts, `#${id}, ${place} of ${count}`);
    const mark = make("span", "inb-decided", facts, decided);
    mark.dataset.decision = decision ?? "";
    this.rows.replaceChildren();
    let at = 1;
    for (const [side, title] of [["helpful", content.titles[0]], ["harmful", content.titles[1]]]) {
      if (title) this.side(side, title, content[side], pictures.slice(at, at + content[side].length));
      at += content[side].length;
    }
    this.fixes.forEach((button, c) => {
      button.classList.toggle("inb-given", c === label);
      button.classList.toggle("inb-guessed", c === predicted && c !== label);
    });
    this.error.textContent = content.error;
    if (this.history.dataset.runs !== `${content.history.length}`) {
      this.history.dataset.runs = content.history.length;
      this.history.replaceChildren();
      for (const line of content.history) make("div", "", this.history, line);
    }
    this.live.textContent = `Example ${id}, ${place} of ${count}: ${given}. ${decided}${text ? ` ${text}` : ""}`;
    Object.assign(this.root.dataset, { id, turn, place, label, predicted, decision: decision ?? "", after: after ?? "" });
  }

  side(side, title, cards, pictures) {
    const section = make("div", `inb-side inb-${side}`, this.rows), heading = make("div", "inb-kicker", section);
    make("span", `inb-mark ${side === "helpful" ? "inb-up" : "inb-down"}`, heading).style.setProperty("--colour", `var(--inb-${side})`);
    make("span", "", heading, title);
    const list = make("div", "inb-cards", section);
    list.setAttribute("role", "group");
    list.setAttribute("aria-label", title);
    cards.forEach(({ id, label, value, text }, i) => {
      const card = make("div", text && !pictures[i] ? "inb-card inb-worded" : "inb-card", list);
      card.dataset.id = id;
      this.picture(card, pictures[i], text);
      const facts = make("span", "inb-facts", card), truth = make("span", "inb-label", facts);
      this.dot(truth, label);
      make("span", "", truth, this.classes[label] ?? "?");
      make("span", "inb-score", facts, signed(value));
      make("span", "inb-id", facts, `#${id}`);
    });
    if (!cards.length) make("div", "inb-none", list, "none: no score of this sign");
  }

  picture(parent, picture, text) {
    if (picture) thumbnail(make("canvas", "inb-picture", parent), picture);
    if (text) make("div", "inb-text", parent, text);
  }

  dot(parent, label) {
    const palette = this.model.get("palette");
    make("span", "inb-mark inb-dot", parent).style.setProperty("--colour", palette[label % palette.length]);
  }

  // {bytes, shape} of the example and of its neighbours, in order.
  pictures() {
    const shape = this.model.get("picture_shape"), bytes = bytesOf(this.model.get("pictures"));
    if (!shape.length) return [];
    const size = shape.reduce((a, b) => a * b);
    return Array.from({ length: bytes.length / size }, (_, i) => ({ bytes: bytes.subarray(i * size, (i + 1) * size), shape }));
  }
}

function render({ model, el }) {
  const desk = new Desk(model, el);
  return () => desk.remove();
}

export default { render };
