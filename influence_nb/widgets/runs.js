// The table of retrainings. A click on a row's number brings back what was removed.
import { make } from "./shelf.js";

const NAMES = ["change:rows", "change:shown"];

class Runs {
  constructor(model, el) {
    this.model = model;
    this.root = make("div", "inb inb-runs", el);
    this.draw = () => this.show(model.get("columns"), model.get("rows"), model.get("shown"));
    for (const name of NAMES) model.on(name, this.draw);
    this.draw();
    this.root.dataset.ready = "1";
  }

  remove() {
    for (const name of NAMES) this.model.off(name, this.draw);
    this.root.remove();
  }

  show(columns, rows, shown) {
    const focused = this.root.contains(document.activeElement) ? document.activeElement.dataset.number : null;
    const scrolled = this.root.querySelector(".inb-scroll")?.scrollTop ?? 0;
    this.root.replaceChildren();
    this.root.dataset.runs = rows.length;
    this.root.dataset.shown = shown ?? "";
    make("div", "inb-headline", this.root, rows.length ? "Retrainings so far" : "No retraining yet");
    if (!rows.length) {
      make("div", "inb-line", this.root, "Each one lands as a diamond above: on the dashed line if the prediction was right.");
      return;
    }
    const scroll = make("div", "inb-scroll", this.root), table = make("table", "inb-changes", scroll);
    const head = make("tr", "", make("thead", "", table)), body = make("tbody", "", table);
    columns.forEach((name, i) => make("th", i ? "inb-number" : "", head, name).scope = "col");
    for (const { number, cells, doubt } of [...rows].reverse()) {
      const row = make("tr", "", body), button = make("button", "inb-run", make("th", "", row), `${number}`);
      button.type = "button";
      button.dataset.number = number;
      button.dataset.lmSuppressShortcuts = "true";
      button.title = "Bring back what was removed";
      button.setAttribute("aria-label", `Bring back retraining ${number}`);
      button.setAttribute("aria-pressed", number === shown);
      button.addEventListener("click", () => this.model.send({ recall: number }));
      cells.forEach((text) => make("td", "inb-number", row, text));
      if (doubt) make("span", "inb-doubt", row.lastChild, " !").title = doubt;
      row.addEventListener("click", (event) => event.target !== button && button.click());
    }
    scroll.scrollTop = scrolled;
    if (focused) body.querySelector(`[data-number="${focused}"]`)?.focus({ preventScroll: true });
  }
}

function render({ model, el }) {
  const runs = new Runs(model, el);
  return () => runs.remove();
}

export default { render };
