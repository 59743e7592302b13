// The page without a kernel: a stand-in for the widget model, links between models, and two controls.
// `views` holds the unchanged modules of the point cloud and the gallery.

class Model {
  constructor(traits) {
    this.traits = traits;
    this.listeners = new Map();
  }

  get(name) {
    return this.traits[name];
  }

  set(name, value) {
    const same = value === this.traits[name] || (!(value instanceof DataView) && JSON.stringify(value) === JSON.stringify(this.traits[name]));
    if (same) return;
    this.traits[name] = value;
    for (const act of [...(this.listeners.get(`change:${name}`) ?? [])]) act();
  }

  on(name, act) {
    if (!this.listeners.has(name)) this.listeners.set(name, new Set());
    this.listeners.get(name).add(act);
  }

  off(name, act) {
    this.listeners.get(name)?.delete(act);
  }

  save_changes() {}

  send() {}
}

function follow(from, to, name, target = name) {
  const copy = () => to.set(target, from.get(name));
  from.on(`change:${name}`, copy);
  copy();
}

// All arrays lie in one deflated block of base64; {"$bytes": [start, length]} stands for one of them.
async function unpacked(text) {
  const deflated = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function restored(value, block) {
  if (Array.isArray(value)) return value.map((item) => restored(item, block));
  if (value === null || typeof value !== "object") return value;
  if (value.$bytes) return new DataView(block, ...value.$bytes);
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, restored(item, block)]));
}

const typed = (view, Type) => new Type(view.buffer, view.byteOffset, view.byteLength / Type.BYTES_PER_ELEMENT);

// Distance and score of every training example, from 16-bit columns: column 0 of a test point is the distance.
function dense({ columns, ranges, count }, n, row, method) {
  const values = typed(columns, Uint16Array), limits = typed(ranges, Float32Array), xy = new Float32Array(2 * n);
  [0, 1 + method].forEach((column, axis) => {
    const at = row * count + column, low = limits[2 * at], high = limits[2 * at + 1];
    for (let i = 0; i < n; i++) xy[2 * i + axis] = low + ((high - low) * values[at * n + i]) / 65535;
  });
  return xy;
}

// The same for the strongest neighbours alone; all others are nowhere.
function sparse({ distances }, n, row, method, cloud) {
  const [ids, scores] = [typed(cloud.get("topk_ids"), Int32Array), typed(cloud.get("topk_scores"), Float32Array)];
  const far = typed(distances, Float32Array), width = 2 * cloud.get("depth"), rows = cloud.get("test_ids").byteLength / 4;
  const xy = new Float32Array(2 * n).fill(NaN);
  for (let at = (method * rows + row) * width; at < (method * rows + row + 1) * width; at++) {
    if (ids[at] >= 0) [xy[2 * ids[at]], xy[2 * ids[at] + 1]] = [far[at], scores[at]];
  }
  return xy;
}

async function start(views, element) {
  const data = restored(JSON.parse(document.getElementById("data").textContent),
    await unpacked(document.getElementById("block").textContent));
  const [map, scatter, gallery] = [data.map, data.scatter, data.gallery].map((traits) => new Model(traits));
  const ids = typed(map.get("test_ids"), Int32Array), n = map.get("train_xy").byteLength / 8;
  const points = () => {
    const { test_id, method } = map.get("answer");
    if (test_id === undefined || test_id === null) return;
    const row = ids.indexOf(test_id), read = data.points.columns ? dense : sparse;
    scatter.set("train_xy", new DataView(read(data.points, n, row, method, map).buffer));
    scatter.set("y_label", data.y_labels[method]);
    scatter.set("title", `${data.methods[method]} against distance`);
    scatter.set("caption", data.captions[row][method]);
    scatter.set("owner", `${test_id}/${method}`);
  };
  for (const view of [scatter, gallery]) {
    follow(map, view, "answer");
    follow(map, view, "selected");
    follow(view, map, "selected");
  }
  for (const name of ["pinned", "pinned_answer"]) follow(map, gallery, name);
  follow(map, scatter, "lasso");
  map.on("change:answer", points);
  points();

  const method = element.querySelector("[name=method]"), k = element.querySelector("[name=k]");
  data.methods.forEach((name, index) => method.append(new Option(name, index)));
  method.value = map.get("method");
  k.value = map.get("k");
  const count = element.querySelector("output");
  const showCount = () => (count.textContent = k.value);
  showCount();
  method.addEventListener("change", () => map.set("method", Number(method.value)));
  k.addEventListener("input", () => {
    showCount();
    map.set("k", Number(k.value));
  });
  for (const name of ["ellipses", "lasso"]) {
    const button = element.querySelector(`[name=${name}]`);
    const press = () => button.setAttribute("aria-pressed", map.get(name));
    press();
    button.addEventListener("click", () => {
      map.set(name, !map.get(name));
      press();
    });
  }
  const pin = element.querySelector("[name=pin]");
  pin.addEventListener("click", () => {
    map.set("pinned", map.get("pinned") === null ? map.get("test_id") : null);
    pin.textContent = map.get("pinned") === null ? "Pin" : "Unpin";
  });
  views.gallery.initialize({ model: gallery });
  views.cloud.render({ model: map, el: element.querySelector(".map") });
  views.cloud.render({ model: scatter, el: element.querySelector(".scatter") });
  views.gallery.render({ model: gallery, el: element.querySelector(".cards") });
}
