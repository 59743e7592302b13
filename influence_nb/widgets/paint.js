// Painting on canvases: the colours of the page's theme, many small dots, markers, axes, thumbnails.
import { ticks, toData, toScreen } from "./geometry.js";

export function themeOf(element) {
  const style = getComputedStyle(element);
  const names = ["ground", "ink", "quiet", "line", "helpful", "harmful", "accent"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--inb-${name}`).trim()]));
}

const probe = () => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  return canvas.getContext("2d", { willReadFrequently: true });
};
let one = null;

// A CSS colour as [red, green, blue].
export function rgb(colour) {
  one ??= probe();
  one.clearRect(0, 0, 1, 1);
  one.fillStyle = "#888";
  one.fillStyle = colour;
  one.fillRect(0, 0, 1, 1);
  return Array.from(one.getImageData(0, 0, 1, 1).data.slice(0, 3));
}

// The soft edge of a dot of this radius: [dx, dy, coverage] of every pixel under it.
function stamp(radius) {
  const reach = Math.ceil(radius);
  const cells = [];
  for (let dy = -reach; dy <= reach; dy++) {
    for (let dx = -reach; dx <= reach; dx++) {
      const cover = Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(dx, dy)));
      if (cover > 0) cells.push([dx, dy, cover]);
    }
  }
  return cells;
}

// Blend one dot a row into `image` (an opaque ImageData). Rows go in a scattered order, so that no class lies on top.
export function dots(image, ratio, xy, view, area, { colours, classes, hidden, ghost, radius, alpha }) {
  const { data, width, height } = image;
  const n = xy.length / 2;
  const cells = stamp(radius * ratio);
  const reach = Math.ceil(radius * ratio);
  let stride = Math.max(1, Math.floor(n * 0.618));
  while (gcd(stride, n) !== 1) stride++;
  for (const ghosts of hidden.length ? [true, false] : [false]) {
    const strength = ghosts ? 0.16 : alpha;
    for (let k = 0, i = 0; k < n; k++, i = (i + stride) % n) {
      if (hidden.length && Boolean(hidden[i]) !== ghosts) continue;
      const [px, py] = toScreen(view, area, xy[2 * i], xy[2 * i + 1]);
      const x = Math.round(px * ratio - 0.5), y = Math.round(py * ratio - 0.5);
      if (!(x >= reach && y >= reach && x < width - reach && y < height - reach)) continue;
      const colour = ghosts ? ghost : colours[classes[i] % colours.length];
      for (const [dx, dy, cover] of cells) {
        const at = 4 * (x + dx + (y + dy) * width);
        const a = cover * strength;
        data[at] += (colour[0] - data[at]) * a;
        data[at + 1] += (colour[1] - data[at + 1]) * a;
        data[at + 2] += (colour[2] - data[at + 2]) * a;
      }
    }
  }
}

function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}

export function marker(ctx, shape, x, y, size, fill, edge, width = 1.5) {
  ctx.beginPath();
  if (shape === "up" || shape === "down") {
    const s = shape === "up" ? -1 : 1;
    ctx.moveTo(x, y + s * size * 1.15);
    ctx.lineTo(x - size, y - s * size * 0.7);
    ctx.lineTo(x + size, y - s * size * 0.7);
    ctx.closePath();
  } else if (shape === "diamond") {
    ctx.moveTo(x, y - size);
    ctx.lineTo(x + size, y);
    ctx.lineTo(x, y + size);
    ctx.lineTo(x - size, y);
    ctx.closePath();
  } else {
    ctx.arc(x, y, size, 0, 2 * Math.PI);
  }
  ctx.lineJoin = "round";
  if (fill) {
    ctx.fillStyle = fill;
    ctx.fill();
  }
  if (edge) {
    ctx.strokeStyle = edge;
    ctx.lineWidth = width;
    ctx.stroke();
  }
}

export function axes(ctx, view, area, theme, xLabel, yLabel) {
  const { left, top, width, height } = area;
  const [x0, y1] = toData(view, area, left, top), [x1, y0] = toData(view, area, left + width, top + height);
  ctx.font = "11px system-ui, sans-serif";
  ctx.lineWidth = 1;
  const rule = (ax, ay, bx, by, colour) => {
    ctx.strokeStyle = colour;
    ctx.beginPath();
    ctx.moveTo(ax, ay);
    ctx.lineTo(bx, by);
    ctx.stroke();
  };
  ctx.fillStyle = theme.quiet;
  ctx.textAlign = "center";
  ctx.textBaseline = "top";
  for (const { value, text } of ticks(x0, x1, width / 80)) {
    const px = Math.round(toScreen(view, area, value, 0)[0]) + 0.5;
    rule(px, top + height, px, top + height + 4, theme.quiet);
    ctx.fillText(text, px, top + height + 7);
  }
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  for (const { value, text } of ticks(y0, y1, height / 60)) {
    const py = Math.round(toScreen(view, area, 0, value)[1]) + 0.5;
    if (value === 0) rule(left, py, left + width, py, theme.line);
    rule(left - 4, py, left, py, theme.quiet);
    ctx.fillText(text, left - 7, py);
  }
  ctx.strokeStyle = theme.line;
  ctx.strokeRect(left + 0.5, top + 0.5, width - 1, height - 1);
  ctx.fillStyle = theme.ink;
  ctx.font = "12px system-ui, sans-serif";
  ctx.textAlign = "center";
  ctx.textBaseline = "alphabetic";
  ctx.fillText(xLabel, left + width / 2, top + height + 36);
  ctx.save();
  ctx.translate(13, top + height / 2);
  ctx.rotate(-Math.PI / 2);
  ctx.fillText(yLabel, 0, 0);
  ctx.restore();
}

// Show raw bytes [height, width, channels] on a canvas, magnified without smoothing.
export function thumbnail(canvas, { bytes, shape: [height, width, channels] }) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes[i * channels + (channels === 3 ? c : 0)];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
