// What all views of one explorer know about its examples, kept once a page: labels, predictions, thumbnails, texts.
// Whatever is missing is asked of the kernel by id, many ids in one message.

const shelves = (globalThis.__influence_nb_shelves ??= new Map());

export const bytesOf = (value, Type = Uint8Array) => {
  if (!value || !value.byteLength) return new Type(0);
  const aligned = value.byteOffset % Type.BYTES_PER_ELEMENT === 0;
  const view = aligned ? value : new DataView(value.buffer.slice(value.byteOffset, value.byteOffset + value.byteLength));
  return new Type(view.buffer, view.byteOffset, view.byteLength / Type.BYTES_PER_ELEMENT);
};

export function make(tag, className, parent, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text; // never as HTML: it may come from data
  parent?.append(element);
  return element;
}

export const signed = (value) => {
  const text = value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? value.toPrecision(3) : value.toExponential(2);
  return (value > 0 ? "+" : "") + text.replaceAll("-", "\u2212");
};

export function forget(source) {
  shelves.delete(source);
}

export function shelf(source) {
  if (!shelves.has(source)) shelves.set(source, new Shelf());
  return shelves.get(source);
}

class Shelf {
  constructor() {
    this.classes = [];
    this.layers = { train: layer(), test: layer() };
    this.listeners = new Set(); // called when pictures have come
    this.models = new Set(); // of the views that share a hovered point
    this.wanted = new Set();
  }

  // Take in the gallery's traits: they hold what is preloaded.
  fill(model) {
    this.classes = model.get("classes");
    this.shape = model.get("picture_shape");
    for (const [name, at] of Object.entries(this.layers)) {
      at.label = bytesOf(model.get(`${name}_label`), Uint16Array);
      at.predicted = bytesOf(model.get(`${name}_predicted`), Uint16Array);
      this.put({ layer: name, ids: bytesOf(model.get(`${name}_picture_ids`), Int32Array),
        texts: model.get(`${name}_texts`) }, bytesOf(model.get(`${name}_pictures`)));
    }
    const ids = bytesOf(model.get("test_ids"), Int32Array);
    this.layers.test.row = new Map(Array.from(ids, (id, row) => [id, row]));
    this.layers.test.loss = bytesOf(model.get("test_loss"), Float32Array);
  }

  put({ layer: name, ids, texts }, bytes) {
    const size = this.shape.length ? this.shape.reduce((a, b) => a * b) : 0;
    ids.forEach((id, i) => {
      const text = texts?.[i];
      const picture = size ? { bytes: bytes.subarray(i * size, (i + 1) * size), shape: this.shape } : null;
      this.layers[name].pictures.set(id, { text, picture });
    });
    for (const listener of this.listeners) listener();
  }

  // {label, predicted, loss, text, picture} of an example: class names, or what of it is known.
  get(name, id) {
    const at = this.layers[name];
    const row = name === "test" ? at.row?.get(id) : id;
    const [label, predicted] = [at.label[row], at.predicted[row]];
    return { label, predicted, loss: at.loss?.[row], ...at.pictures.get(id), known: at.pictures.has(id) };
  }

  // "6 predicted 2", or "6" where the model is right.
  words(name, id) {
    const { label, predicted } = this.get(name, id);
    if (label === undefined) return "";
    const of = (index) => this.classes[index] ?? "?";
    return label === predicted ? of(label) : `${of(label)} predicted ${of(predicted)}`;
  }

  // Hovering is told to the views of the page and, with their next change, to the kernel: it has no use for each move.
  hover(layer, id) {
    for (const model of this.models) model.set("hover", layer ? `${layer} ${id}` : "");
  }

  want(model, name, ids) {
    const missing = ids.filter((id) => !this.layers[name].pictures.has(id) && !this.wanted.has(`${name} ${id}`));
    if (!missing.length) return;
    for (const id of missing) this.wanted.add(`${name} ${id}`);
    model.send({ type: "want", layer: name, ids: missing });
  }

  got(message, buffers) {
    if (message.type === "pictures") this.put(message, bytesOf(buffers[0]));
  }
}

function layer() {
  return { label: [], predicted: [], pictures: new Map() };
}
