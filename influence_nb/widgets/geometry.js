// The geometry of a point cloud: pure functions without a browser.
// A view {x, y, sx, sy} holds the data point at the middle of the plot and pixels per unit of data; an area
// {left, top, width, height} is the plot's rectangle in pixels; points are interleaved x, y; y grows upwards.

export function bounds(xy) {
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (let i = 0; i < xy.length; i += 2) {
    const x = xy[i], y = xy[i + 1];
    if (!Number.isFinite(x) || !Number.isFinite(y)) continue;
    if (x < x0) x0 = x;
    if (x > x1) x1 = x;
    if (y < y0) y0 = y;
    if (y > y1) y1 = y;
  }
  return x0 <= x1 ? [x0, x1, y0, y1] : [0, 1, 0, 1];
}

export function union(a, b) {
  return [Math.min(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.max(a[3], b[3])];
}

export function common(a, b) {
  return [Math.max(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[2], b[2]), Math.min(a[3], b[3])];
}

// One range for both axes, around 0, the points (where there are any) and the value expected next (where there is one).
export function squared(box, guess) {
  const values = [0, ...(box ?? []), ...(guess === null ? [] : [guess])];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return low < high ? [low, high, low, high] : [-1, 1, -1, 1];
}

// The view that shows all of `box`; `equal` keeps one scale for both axes, as a map needs.
export function fitted([x0, x1, y0, y1], area, equal, margin = 0.05) {
  const inner = 1 - 2 * margin;
  let sx = (area.width * inner) / (x1 - x0 || 1);
  let sy = (area.height * inner) / (y1 - y0 || 1);
  if (equal) sx = sy = Math.min(sx, sy);
  return { x: (x0 + x1) / 2, y: (y0 + y1) / 2, sx, sy };
}

export function toScreen(view, area, x, y) {
  return [area.left + area.width / 2 + (x - view.x) * view.sx, area.top + area.height / 2 - (y - view.y) * view.sy];
}

export function toData(view, area, px, py) {
  return [view.x + (px - area.left - area.width / 2) / view.sx, view.y - (py - area.top - area.height / 2) / view.sy];
}

export function panned(view, dx, dy) {
  return { ...view, x: view.x - dx / view.sx, y: view.y + dy / view.sy };
}

// Zoom by fx, fy about the pixel (px, py), which stays where it is.
export function zoomed(view, area, px, py, fx, fy) {
  const [x, y] = toData(view, area, px, py);
  return { x: x + (view.x - x) / fx, y: y + (view.y - y) / fy, sx: view.sx * fx, sy: view.sy * fy };
}

// About n round ticks in lo..hi, with labels of one precision.
export function ticks(lo, hi, n = 5) {
  const rough = (hi - lo) / n;
  if (!(rough > 0) || !Number.isFinite(rough)) return [];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * (rough < 1.5 * power ? 1 : rough < 3.5 * power ? 2 : rough < 7.5 * power ? 5 : 10);
  const largest = Math.max(Math.abs(lo), Math.abs(hi));
  const plain = largest < 1e5 && step >= 1e-4;
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const digits = Math.max(0, Math.floor(Math.log10(largest) + 1e-9) - Math.floor(Math.log10(step) + 1e-9));
  const out = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) {
    const value = i * step;
    const text = i === 0 ? "0" : plain ? value.toFixed(decimals) : value.toExponential(Math.min(digits, 4));
    out.push({ value, text: text.replace("e+", "e").replace(/^-/, "\u2212").replace("e-", "e\u2212") });
  }
  return out;
}

export function inside(polygon, x, y) {
  let odd = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [xi, yi] = polygon[i], [xj, yj] = polygon[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
  }
  return odd;
}

// Rows of the shown points within a polygon of pixels; what lies outside the plot is not shown.
export function lassoed(xy, hidden, view, area, polygon) {
  const corners = polygon.map(([px, py]) => toData(view, area, px, py));
  const [left, bottom] = toData(view, area, area.left, area.top + area.height);
  const [right, top] = toData(view, area, area.left + area.width, area.top);
  const [x0, x1, y0, y1] = common(bounds(corners.flat()), [left, right, bottom, top]);
  const rows = [];
  for (let i = 0; i < xy.length / 2; i++) {
    const x = xy[2 * i], y = xy[2 * i + 1];
    if (x >= x0 && x <= x1 && y >= y0 && y <= y1 && !hidden[i] && inside(corners, x, y)) rows.push(i);
  }
  return rows;
}

// A lasso's ids joined with those already selected: "replace", "add" or "remove".
export function combined(before, ids, how) {
  if (how === "replace") return ids;
  const drop = new Set(ids);
  const kept = Array.from(before).filter((id) => !drop.has(id));
  return (how === "add" ? kept.concat(ids) : kept).sort((a, b) => a - b);
}

// Points sorted into square cells, so that the nearest of 60,000 is found among a few dozen.
export class Grid {
  constructor(xy) {
    const n = xy.length / 2;
    this.xy = xy;
    this.box = bounds(xy);
    this.side = Math.max(1, Math.min(256, Math.ceil(Math.sqrt(n / 4))));
    this.start = new Int32Array(this.side * this.side + 1);
    const cell = new Int32Array(n);
    for (let i = 0; i < n; i++) {
      const x = xy[2 * i], y = xy[2 * i + 1];
      cell[i] = Number.isFinite(x) && Number.isFinite(y) ? this.column(x) + this.side * this.line(y) : -1;
      if (cell[i] >= 0) this.start[cell[i] + 1]++;
    }
    for (let c = 0; c < this.side * this.side; c++) this.start[c + 1] += this.start[c];
    this.rows = new Int32Array(n);
    const next = this.start.slice();
    for (let i = 0; i < n; i++) if (cell[i] >= 0) this.rows[next[cell[i]]++] = i;
  }

  column(x) {
    return this.cut((x - this.box[0]) / (this.box[1] - this.box[0] || 1));
  }

  line(y) {
    return this.cut((y - this.box[2]) / (this.box[3] - this.box[2] || 1));
  }

  cut(share) {
    return Math.max(0, Math.min(this.side - 1, Math.floor(share * this.side)));
  }

  // The row nearest to (x, y) within the ellipse of half-axes rx, ry, or -1; hidden rows are not there.
  nearest(x, y, rx, ry, hidden) {
    let best = -1, least = 1;
    for (let v = this.line(y - ry); v <= this.line(y + ry); v++) {
      for (let u = this.column(x - rx); u <= this.column(x + rx); u++) {
        const c = u + this.side * v;
        for (let k = this.start[c]; k < this.start[c + 1]; k++) {
          const i = this.rows[k];
          const d = ((this.xy[2 * i] - x) / rx) ** 2 + ((this.xy[2 * i + 1] - y) / ry) ** 2;
          if (d <= least && !hidden[i]) [best, least] = [i, d];
        }
      }
    }
    return best;
  }
}

// The nearest shown row from `from` (pixels) in the direction of an arrow key, or -1.
export function towards(xy, hidden, view, area, from, key) {
  const along = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  let best = -1, least = Infinity;
  for (let i = 0; i < xy.length / 2; i++) {
    if (hidden[i]) continue;
    const [px, py] = toScreen(view, area, xy[2 * i], xy[2 * i + 1]);
    const ahead = (px - from[0]) * along[0] + (py - from[1]) * along[1];
    const aside = Math.abs((px - from[0]) * along[1]) + Math.abs((py - from[1]) * along[0]);
    const cost = ahead + 2 * aside;
    if (ahead > 0.5 && aside <= 2 * ahead && cost < least) [best, least] = [i, cost];
  }
  return best;
}

// The preloaded answer for row `row` of the test points: ids and scores, strongest first, cut at k.
// ids and scores are [methods, rows, 2, depth]; unused places hold the id -1.
export function answered(ids, scores, { methods, rows, depth }, method, row, k) {
  if (!(method >= 0 && method < methods && row >= 0 && row < rows)) return null;
  const side = (s) => {
    const at = ((method * rows + row) * 2 + s) * depth;
    let n = 0;
    while (n < Math.min(k, depth) && ids[at + n] >= 0) n++;
    return [Array.from(ids.subarray(at, at + n)), Array.from(scores.subarray(at, at + n))];
  };
  const [[helpful, helpful_scores], [harmful, harmful_scores]] = [side(0), side(1)];
  return { helpful, helpful_scores, harmful, harmful_scores };
}
