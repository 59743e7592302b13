// The elements of a cloud: a head with title, note and zoom, the stacked canvases, tooltip, legend, and a voice.
import { make } from "./shelf.js";

const ZOOMS = [["\u2212", "Zoom out", 1 / 1.5], ["+", "Zoom in", 1.5], ["\u2922", "Show all", 0]];

export function frame(cloud, el) {
  const name = cloud.get("name");
  cloud.root = make("div", "inb inb-cloud", el);
  cloud.root.dataset.name = name;
  const head = make("div", "inb-head", cloud.root);
  cloud.title = make("div", "inb-title", head);
  cloud.note = make("div", "inb-note", head);
  cloud.note.setAttribute("role", "status");
  const zoom = make("div", "inb-zoom", head);
  for (const [text, words, factor] of ZOOMS) {
    const button = make("button", "", zoom, text);
    button.type = "button";
    button.title = words;
    button.setAttribute("aria-label", `${words}: ${name}`);
    button.dataset.lmSuppressShortcuts = "true";
    button.addEventListener("click", () => cloud.gestures.zoom(factor));
  }
  cloud.stage = make("div", "inb-stage", cloud.root);
  for (const layer of ["base", "tests", "chosen", "over"]) {
    cloud[layer] = make("canvas", `inb-${layer}`, cloud.stage);
    if (layer !== "over") cloud[layer].setAttribute("aria-hidden", "true");
  }
  const { over } = cloud;
  over.tabIndex = 0;
  over.dataset.lmSuppressShortcuts = "true"; // on the element itself: else notebook keys win
  over.setAttribute("role", "application");
  over.setAttribute("aria-roledescription", "point cloud");
  over.__pointcloud = {
    clientXY: (layer, id) => cloud.clientXY(layer, id),
    visible: (layer, id) => cloud.visible(layer, id),
  };
  cloud.tip = make("div", "inb-tip", cloud.stage);
  cloud.tip.hidden = true;
  cloud.legend = make("div", "inb-legend", cloud.root);
  cloud.caption = make("div", "inb-caption", cloud.root);
  cloud.caption.setAttribute("role", "status");
  cloud.live = make("div", "inb-unseen", cloud.root);
  cloud.live.setAttribute("aria-live", "polite");
}

// What the cloud says of itself to those who do not see it.
export function described(cloud) {
  const [kind, other] = cloud.get("kinds"), { train, test } = cloud.layers;
  const counts = `${train.xy.length / 2} ${kind}s` + (test.xy.length ? `, ${test.xy.length / 2} ${other}s` : "");
  return `${cloud.get("title")}: ${counts}. Arrow keys move between points, Enter selects, Escape clears, ` +
    `T changes between ${other}s and ${kind}s, plus, minus and 0 zoom.`;
}

// The notebook takes arrow keys and space from every control that does not say, on itself, that it wants them.
export function keepKeys(root) {
  const controls = root.closest(".inb-explorer")?.querySelectorAll("select, input, button, [role=slider]") ?? [];
  for (const control of controls) control.dataset.lmSuppressShortcuts = "true";
}
