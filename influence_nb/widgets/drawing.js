// What a cloud shows, canvas by canvas, with its tooltip and its legend.
import { toData, toScreen } from "./geometry.js";
import { axes, dots, marker, rgb, thumbnail } from "./paint.js";
import { bytesOf, make } from "./shelf.js";

const number = (value) => Number(value.toPrecision(3)).toString().replaceAll("-", "\u2212");

function fresh(cloud, canvas) {
  const ctx = canvas.getContext("2d");
  ctx.setTransform(cloud.ratio, 0, 0, cloud.ratio, 0, 0);
  ctx.clearRect(0, 0, canvas.width, canvas.height);
  return ctx;
}

function clipped(cloud, ctx) {
  const { left, top, width, height } = cloud.area;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
}

export function drawBase(cloud) {
  const { train } = cloud.layers, { width, height } = cloud.base, n = train.xy.length / 2;
  const image = new ImageData(width, height);
  const [r, g, b] = rgb(cloud.theme.ground);
  new Uint32Array(image.data.buffer).fill((255 << 24) | (b << 16) | (g << 8) | r);
  const radius = Math.max(1.15, Math.min(3, 9.2 * (n + 1) ** -0.18));
  dots(image, cloud.ratio, train.xy, cloud.view, cloud.area, { colours: cloud.colours, classes: train.classes,
    hidden: train.hidden, ghost: rgb(cloud.theme.quiet), radius, alpha: 0.85 });
  cloud.base.getContext("2d").putImageData(image, 0, 0);
}

export function drawTests(cloud) {
  const ctx = fresh(cloud, cloud.tests), { xy, hidden, classes } = cloud.layers.test;
  const size = xy.length > 200 ? 4.5 : 5.5;
  for (let row = 0; row < xy.length / 2; row++) {
    const [x, y] = toScreen(cloud.view, cloud.area, xy[2 * row], xy[2 * row + 1]);
    ctx.globalAlpha = hidden[row] ? 0.12 : 1;
    marker(ctx, "diamond", x, y, size, cloud.css(classes[row]), cloud.theme.ground, 3);
    marker(ctx, "diamond", x, y, size, cloud.css(classes[row]), cloud.theme.ink, 1.2);
  }
}

export function drawChosen(cloud) {
  const ctx = fresh(cloud, cloud.chosen), selected = cloud.selected();
  cloud.root.dataset.selected = selected.length;
  clipped(cloud, ctx);
  if (cloud.get("ellipses")) drawEllipses(cloud, ctx);
  const [size, edge] = selected.length > 150 ? [2.6, null] : [3.8, cloud.theme.ink]; // many rings would hide what they ring
  for (const id of selected) mark(cloud, ctx, "train", id, "circle", size, cloud.css(cloud.layers.train.classes[id]), edge, 1.2);
  if (cloud.get("ellipses")) drawNames(cloud, ctx);
  ctx.restore();
}

// The groups of one colour: the middle of each in pixels, and the ellipse of two standard deviations.
function groups(cloud) {
  const rows = bytesOf(cloud.get("centres"), Float32Array), { view, area } = cloud;
  return Array.from({ length: rows.length / 6 }, (_, i) => {
    const [group, x, y, long, short, angle] = rows.subarray(6 * i, 6 * i + 6);
    const name = cloud.get("class_names")[group] ?? "";
    return { name, colour: cloud.css(group), at: toScreen(view, area, x, y), axes: [long * view.sx, short * view.sy], angle };
  });
}

function drawEllipses(cloud, ctx) {
  for (const { colour, at, axes: [long, short], angle } of groups(cloud)) {
    if (!(short > 0)) continue;
    ctx.beginPath();
    ctx.ellipse(...at, long, short, -angle, 0, 2 * Math.PI);
    for (const [stroke, width] of [[cloud.theme.ground, 4], [colour, 2]]) {
      [ctx.strokeStyle, ctx.lineWidth] = [stroke, width];
      ctx.stroke();
    }
  }
}

function drawNames(cloud, ctx) {
  const named = [], { ground, ink } = cloud.theme;
  ctx.font = "600 12px system-ui, sans-serif";
  [ctx.textAlign, ctx.textBaseline] = ["center", "middle"];
  for (const { name, colour, at: [x, y] } of groups(cloud)) {
    marker(ctx, "circle", x, y, 4, colour, ground, 2);
    const taken = named.some(([px, py]) => Math.abs(px - x) < 44 && Math.abs(py - y + 13) < 14);
    named.push([x, taken ? y + 13 : y - 13]); // below, where above is another name
    [ctx.strokeStyle, ctx.lineWidth, ctx.lineJoin, ctx.fillStyle] = [ground, 4, "round", ink];
    ctx.strokeText(name, ...named.at(-1));
    ctx.fillText(name, ...named.at(-1));
  }
}

// Highlights: the neighbours of the test point shown and, hollow, of the pinned one; cursor, lasso, axes, tooltip.
export function drawOver(cloud) {
  if (!cloud.view || !cloud.area) return;
  const ctx = fresh(cloud, cloud.over), { theme } = cloud, answer = cloud.current();
  const framed = Boolean(cloud.get("x_label"));
  const stale = Boolean(answer && framed && cloud.get("owner") !== `${answer.test_id}/${answer.method}`);
  clearTimeout(cloud.late);
  if (stale) cloud.late = setTimeout(() => say(cloud, cloud.get("stale")), 300);
  else say(cloud, cloud.get("note"));
  if (cloud.caption.textContent !== cloud.get("caption")) cloud.caption.textContent = cloud.get("caption");
  for (const [name, on] of Object.entries({ busy: cloud.get("busy"), muted: Boolean(answer || cloud.selected().length), stale })) {
    cloud.root.classList.toggle(`inb-${name}`, on);
  }
  cloud.over.classList.toggle("inb-lasso", cloud.get("lasso"));
  if (framed) axes(ctx, cloud.view, cloud.area, theme, cloud.get("x_label"), cloud.get("y_label"));
  clipped(cloud, ctx);
  if (cloud.get("diagonal")) drawDiagonal(cloud, ctx);
  const pinned = cloud.get("pinned"), other = cloud.get("pinned_answer");
  if (pinned !== null && other?.test_id === pinned && pinned !== answer?.test_id) {
    for (const id of other.harmful) mark(cloud, ctx, "train", id, "down", 6, null, theme.harmful);
    for (const id of other.helpful) mark(cloud, ctx, "train", id, "up", 6, null, theme.helpful);
  }
  if (answer && !stale) {
    const chosen = new Set(cloud.selected()), edge = (id) => (chosen.has(id) ? theme.ink : theme.ground);
    for (const id of [...answer.harmful].reverse()) mark(cloud, ctx, "train", id, "down", 7, theme.harmful, edge(id), 1.8);
    for (const id of [...answer.helpful].reverse()) mark(cloud, ctx, "train", id, "up", 7, theme.helpful, edge(id), 1.8);
  }
  point(cloud, ctx, pinned, false);
  point(cloud, ctx, answer?.test_id ?? cloud.get("test_id"), true);
  const { cursor, loop } = cloud.gestures;
  if (cursor[0] && document.activeElement === cloud.over) mark(cloud, ctx, ...cursor, "circle", 12, null, theme.accent, 2);
  if (loop.length > 1) drawLoop(ctx, loop, theme.accent);
  ctx.restore();
  drawTip(cloud, ctx);
}

function say(cloud, words) {
  if (cloud.note.textContent !== words) cloud.note.textContent = cloud.note.title = words;
}

function mark(cloud, ctx, layer, id, shape, size, fill, edge, width) {
  const [x, y] = cloud.place(layer, id);
  ctx.globalAlpha = cloud.layers[layer].hidden[cloud.rowOf(layer, id)] ? 0.4 : 1;
  marker(ctx, shape, x, y, size, fill, edge, width);
  ctx.globalAlpha = 1;
}

function point(cloud, ctx, id, shown) {
  if (id === null || !cloud.testRow.has(id)) return;
  const size = shown ? 9 : 7.5, colour = cloud.css(cloud.layers.test.classes[cloud.testRow.get(id)]);
  mark(cloud, ctx, "test", id, "diamond", size, colour, cloud.theme.ground, 5);
  mark(cloud, ctx, "test", id, "diamond", size, colour, cloud.theme.ink, 2);
  if (!shown) mark(cloud, ctx, "test", id, "circle", 13, null, cloud.theme.ink, 1.2);
}

function drawLoop(ctx, loop, colour) {
  ctx.beginPath();
  loop.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
  ctx.closePath();
  ctx.setLineDash([5, 4]);
  ctx.lineWidth = 1.5;
  ctx.strokeStyle = ctx.fillStyle = colour;
  ctx.stroke();
  ctx.setLineDash([]);
  ctx.globalAlpha = 0.08;
  ctx.fill();
  ctx.globalAlpha = 1;
}

// A ring round the point hovered over in any view; the words and the thumbnail only in the view under the pointer.
function drawTip(cloud, ctx) {
  const hover = cloud.get("hover"), [layer, word] = hover.split(" "), id = Number(word);
  const [x, y] = layer ? cloud.place(layer, id) : [NaN, NaN];
  const { left, top, width, height } = cloud.area;
  const shown = x >= left && x <= left + width && y >= top && y <= top + height;
  if (shown) {
    marker(ctx, "circle", x, y, layer === "test" ? 12 : 9, null, cloud.theme.ground, 4);
    marker(ctx, "circle", x, y, layer === "test" ? 12 : 9, null, cloud.theme.ink, 1.8);
  }
  const { tip, size } = cloud;
  tip.hidden = !(shown && (cloud.over.matches(":hover") || cloud.gestures.cursor[0]));
  if (tip.hidden) return;
  const lines = facts(cloud, layer, id), { picture, text, known } = cloud.shelf.get(layer, id);
  if (!known) cloud.shelf.want(cloud.model, layer, [id]);
  const key = JSON.stringify([lines, known]);
  if (tip.dataset.key !== key) {
    tip.dataset.key = key;
    tip.replaceChildren();
    if (picture) thumbnail(make("canvas", "inb-picture", tip), picture);
    const words = make("div", "inb-facts", tip);
    for (const line of lines) make("div", "", words, line);
    if (text) make("div", "inb-text", words, text);
  }
  const [w, h] = [tip.offsetWidth, tip.offsetHeight];
  tip.style.left = `${Math.max(4, x + 16 + w > size[0] ? x - w - 16 : x + 16)}px`;
  tip.style.top = `${Math.max(4, Math.min(size[1] - h - 4, y - h / 2))}px`;
}

// What a point is called, and what is said of it: ["training example 12", "6 predicted 2"].
export function called(cloud, layer, id) {
  const names = bytesOf(cloud.get("train_names"), Int32Array), kinds = cloud.get("kinds");
  const name = layer === "test" ? `${kinds[1]} ${id}` : `${kinds[0]} ${names.length ? names[id % names.length] : id}`;
  return [name, cloud.shelf.words(layer, id)].filter(Boolean);
}

function facts(cloud, layer, id) {
  const lines = called(cloud, layer, id), answer = cloud.current();
  if (cloud.get("diagonal")) {
    const at = cloud.layers[layer].xy, row = cloud.rowOf(layer, id);
    return [...lines, ...["predicted", "actual"].map((name, axis) => `${name}: ${number(at[2 * row + axis])}`)];
  }
  if (layer === "test" || !answer) return lines;
  const { xy } = cloud.layers.train, names = cloud.sides(answer.method);
  const ranks = [answer.helpful.indexOf(id), answer.harmful.indexOf(id)];
  const scores = [answer.helpful_scores, answer.harmful_scores];
  ranks.forEach((rank, side) => rank >= 0 && lines.push(`${names[side]} ${rank + 1}: ${number(scores[side][rank])}`));
  if (cloud.get("x_label")) {
    if (Math.max(...ranks) < 0) lines.push(`score: ${number(xy[2 * id + 1])}`);
    lines.push(`${cloud.get("x_label")}: ${number(xy[2 * id])}`);
  }
  return lines;
}

// Where y is what x foretold, and the place that the next point will have along x.
function drawDiagonal(cloud, ctx) {
  const { view, area, theme } = cloud, guess = cloud.get("guess");
  const line = (points, colour) => {
    ctx.beginPath();
    for (const [x, y] of points) ctx.lineTo(...toScreen(view, area, x, y));
    ctx.strokeStyle = colour;
    ctx.lineWidth = 1.2;
    ctx.setLineDash([5, 4]);
    ctx.stroke();
    ctx.setLineDash([]);
  };
  const [left, top] = toData(view, area, area.left, area.top);
  const [right, bottom] = toData(view, area, area.left + area.width, area.top + area.height);
  line([[left, left], [right, right]], theme.quiet);
  if (guess !== null) line([[guess, bottom], [guess, top]], theme.accent);
}

export function drawLegend(cloud) {
  cloud.legend.replaceChildren();
  if (!cloud.get("legend")) return;
  const { classes, hidden } = cloud.layers.train, names = cloud.get("class_names");
  const counts = names.map(() => 0), chosen = names.map(() => 0), selected = cloud.selected();
  classes.forEach((c, row) => hidden[row] || counts[c]++);
  for (const id of selected) hidden[id] || chosen[classes[id]]++;
  const item = (name, shape, colour) => {
    const entry = make("span", "inb-item", cloud.legend);
    make("span", `inb-mark inb-${shape}`, entry).style.setProperty("--colour", colour);
    make("span", "", entry, name);
    return entry;
  };
  if (cloud.get("diagonal")) {
    const [every, chosen, these, others] = names;
    if (every) item(every, "dot", "var(--inb-ink)");
    if (chosen) item(chosen, "diamond", "var(--inb-ink)");
    if (these) item(these, "square", cloud.css(1));
    if (others) item(others, "square", cloud.css(0));
    item("actual = predicted", "dashes", "var(--inb-quiet)");
    if (cloud.get("guess") !== null) item("predicted next", "dashes", "var(--inb-accent)");
    return;
  }
  names.forEach((name, c) => {
    make("span", "inb-count", item(name, "dot", cloud.css(c)), selected.length ? `${chosen[c]} of ${counts[c]}` : `${counts[c]}`);
  });
  const [up, down] = cloud.sides(cloud.get("method"));
  item("test point", "diamond", "var(--inb-ink)");
  item(up, "up", "var(--inb-helpful)");
  item(down, "down", "var(--inb-harmful)");
}
