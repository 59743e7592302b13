// The test point's loss now, as predicted and as found: a small table with bars. Words come from Python, as text.
import { make } from "./shelf.js";

class Verdict {
  constructor(model, el) {
    this.model = model;
    this.root = make("div", "inb inb-verdict", el);
    this.title = make("div", "inb-headline", this.root);
    this.table = make("table", "inb-changes", this.root);
    this.lines = make("div", "inb-line", this.root);
    this.doubts = make("div", "inb-doubts", this.root);
    this.doubts.setAttribute("role", "alert");
    this.live = make("div", "inb-unseen", this.root);
    this.live.setAttribute("aria-live", "polite");
    this.draw = () => this.show(model.get("content"));
    model.on("change:content", this.draw);
    this.draw();
    this.root.dataset.ready = "1";
  }

  remove() {
    this.model.off("change:content", this.draw);
    this.root.remove();
  }

  show({ title, columns, rows, line, certificate, doubts, predicted, actual, removed, test_id, status }) {
    this.title.textContent = title ?? "";
    this.lines.replaceChildren();
    for (const words of [line, certificate].filter(Boolean)) make("div", "", this.lines, words);
    this.doubts.replaceChildren();
    for (const doubt of doubts ?? []) make("div", "", this.doubts, doubt);
    this.table.replaceChildren();
    if (rows?.length) this.fill(columns, rows);
    Object.assign(this.root.dataset, { testId: test_id ?? "", removed: removed ?? 0, predicted: predicted ?? "", actual: actual ?? "" });
    const spoken = rows?.filter(({ change }) => change !== null).map(({ name, texts }) => `${name} ${texts[0]}`) ?? [];
    this.live.textContent = [status, title, ...spoken].filter(Boolean).join(". ");
  }

  fill(columns, rows) {
    const head = make("tr", "", make("thead", "", this.table)), body = make("tbody", "", this.table);
    make("td", "", head);
    for (const name of columns) make("th", "inb-number", head, name).scope = "col";
    head.children[1].colSpan = 2; // the bar and its number
    const largest = Math.max(...rows.map(({ change }) => Math.abs(change ?? 0)));
    for (const { name, change, texts } of rows) {
      const row = make("tr", `inb-${name}`, body);
      make("th", "", row, name).scope = "row";
      bar(make("td", "inb-bar", row), change, largest);
      for (const text of texts) make("td", "inb-number", row, text);
      row.classList.toggle("inb-known", change !== null);
    }
  }
}

// A bar to the right of the middle where the loss rises, to the left where it falls.
function bar(cell, change, largest) {
  const track = make("div", "inb-track", cell);
  track.setAttribute("aria-hidden", "true");
  if (change === null || !largest) return;
  const fill = make("div", change > 0 ? "inb-rise" : "inb-fall", track), width = (50 * Math.abs(change)) / largest;
  fill.style.width = `${width}%`;
  fill.style.left = `${change > 0 ? 50 : 50 - width}%`;
}

function render({ model, el }) {
  const verdict = new Verdict(model, el);
  return () => verdict.remove();
}

export default { render };
