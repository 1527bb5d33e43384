// What the other parts share: the data, small makers of elements, numbers in words. Texts of models and tasks only ever
// become text nodes, never markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { entry: -1, node: null, side: "rrm", time: Infinity, view: "time", playing: false, speed: "fit", open: new Map() };

function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function fill(id, ...children) {
  const place = typeof id === "string" ? $(id) : id;
  place.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return place;
}

function text(index) {
  return index === null || index === undefined ? null : DATA.strings[index];
}

// What does not print is spelled out where a name stands on one line.
function legible(value) {
  return String(value ?? "").replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => "\\u{" + c.codePointAt(0).toString(16) + "}");
}

// The same of a text of several lines, for places that keep them.
const lines = (value) => String(value ?? "").split("\n").map(legible).join("\n");

const seconds = (s) => (s === null || s === undefined ? "–" : s < 1 ? `${(1000 * s).toFixed(0)} ms` : s < 100 ? `${s.toFixed(2)} s` : `${s.toFixed(0)} s`);
const count = (n) => (n === null || n === undefined ? "–" : d3.format(",")(Math.round(n)));
const percent = (x) => (x === null || x === undefined ? "–" : `${(100 * x).toFixed(0)} %`);
const times = (x) => (x === null || x === undefined ? "–" : `${x.toFixed(2)}x`);
const span = (pair, show) => (pair ? `${show(pair[0])} to ${show(pair[1])}` : "–");
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

function faster(ratio) {
  if (!ratio) return "";
  return ratio >= 1 ? `${ratio.toFixed(2)}x faster` : `${(1 / ratio).toFixed(2)}x slower`;
}

function badge(label, mark = false) {
  return el("span", { class: `badge ${mark ? "mark" : label.replaceAll(" ", "-")}` }, label);
}

// An entry's name, with what tells it from the others of its problem.
const MIXED = new Set(DATA.entries.map((entry) => entry.arm)).size > 1;
const SAMPLED = DATA.entries.some((entry) => entry.sample), SEEDED = DATA.entries.some((entry) => entry.seed);

function nameOf(entry) {
  const apart = [MIXED && legible(DATA.arms[entry.arm]), SEEDED && `seed ${entry.seed}`, SAMPLED && `sample ${entry.sample}`];
  return [legible(entry.id), ...apart.filter(Boolean)].join(" · ");
}

// Addresses: #job=KEY and #node=KEY:PATH, with &arm=N where there are several arms. A path holds no colon.
function address(entry, node = null, side = "rrm") {
  const found = DATA.entries[entry];
  const job = found[side] ?? found.rrm ?? found.direct;
  const arm = DATA.arms.length > 1 ? `&arm=${found.arm}` : "";
  const seed = found.seed ? `&seed=${found.seed}` : "";
  return node === null
    ? `#job=${encodeURIComponent(job.key)}${arm}${seed}`
    : `#node=${encodeURIComponent(`${job.key}:${node}`)}${arm}${seed}`;
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  let key = asked.get("job"), node = null;
  if (asked.has("node")) {
    const value = asked.get("node"), colon = value.lastIndexOf(":");
    key = value.slice(0, colon);
    node = value.slice(colon + 1);
  }
  if (key === null) return { entry: -1, node: null, side: "rrm" };
  const arm = asked.has("arm") ? Number(asked.get("arm")) : null, seed = asked.has("seed") ? Number(asked.get("seed")) : null;
  for (const side of ["rrm", "direct"]) {
    const entry = DATA.entries.findIndex(
      (e) => e[side]?.key === key && (arm === null || e.arm === arm) && (seed === null || e.seed === seed));
    if (entry >= 0) {
      const known = node !== null && DATA.entries[entry][side].nodes.some((n) => n.path === node);
      return { entry, node: known ? node : null, side };
    }
  }
  return { entry: -1, node: null, side: "rrm" };
}

function ratioOf(entry) {
  return entry.ratio;
}
