// The list of problems: search, filters by label and mark, order.

const wanted = { labels: new Set(), words: "", order: "run" };
const haystacks = DATA.entries.map((e) =>
  [e.id, e.task, e.expected, e.label, ...e.marks, DATA.arms[e.arm], e.rrm?.answer, e.direct?.answer].join("\n").toLowerCase());

function shownEntries() {
  const words = wanted.words.toLowerCase().split(/\s+/).filter(Boolean);
  const found = DATA.entries
    .map((entry, index) => ({ entry, index }))
    .filter(({ entry }) => !wanted.labels.size || [entry.label, ...entry.marks].some((l) => wanted.labels.has(l)))
    .filter(({ index }) => words.every((word) => haystacks[index].includes(word)));
  if (wanted.order !== "run") {
    const sign = wanted.order === "gain" ? -1 : 1;
    const value = ({ entry }) => (entry.ratio === null ? Infinity : sign * entry.ratio);
    found.sort((a, b) => value(a) - value(b));
  }
  return found;
}

function drawFilters() {
  const counts = new Map();
  for (const entry of DATA.entries) for (const label of [entry.label, ...entry.marks]) counts.set(label, (counts.get(label) ?? 0) + 1);
  fill("filters", [...counts].map(([label, n]) =>
    el("button", {
      type: "button", class: "chip", "aria-pressed": String(wanted.labels.has(label)),
      onclick: () => {
        if (!wanted.labels.delete(label)) wanted.labels.add(label);
        drawFilters();
        drawList();
      },
    }, `${label} ${n}`)));
}

function drawList() {
  const found = shownEntries(), all = DATA.entries, problems = new Set(all.map((e) => `${e.id}\n${e.task}`)).size;
  const what = problems < all.length ? "sample" : "problem";
  $("count").textContent = found.length === all.length ? plural(all.length, what) : `${count(found.length)} of ${plural(all.length, what)}`;
  fill("entries", found.map(({ entry, index }) => {
    return el("li", {}, el("a", { href: address(index), "aria-current": String(index === state.entry), title: entry.reason },
      el("div", { class: "entry-head" }, el("b", {}, nameOf(entry)),
        el("span", { class: `ratio ${entry.ratio >= 1 ? "good" : "bad"}` }, entry.ratio ? times(entry.ratio) : "")),
      el("div", {}, badge(entry.label), " ", entry.marks.map((mark) => [badge(mark, true), " "])),
      el("div", { class: "entry-task" }, legible(entry.task.slice(0, 160).replace(/\s+/g, " ")))));
  }));
}

function markCurrent() {
  const shown = shownEntries();
  $("entries").querySelectorAll("a").forEach((a, i) => a.setAttribute("aria-current", String(shown[i].index === state.entry)));
  $("entries").querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
}

function goToNeighbour(step) {
  const shown = shownEntries();
  if (!shown.length) return;
  const at = shown.findIndex(({ index }) => index === state.entry);
  const next = at < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(shown.length - 1, Math.max(0, at + step));
  location.hash = address(shown[next].index);
}
