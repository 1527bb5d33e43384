// A problem's page, its clock, the address, the keyboard.

let view = null; // what is drawn: {end, update(time)}

function drawProblem() {
  const entry = DATA.entries[state.entry], ratio = entry.ratio;
  const of = (arm) => (entry.arm === entry.direct_arm ? null : el("div", { class: "soft small" }, legible(DATA.arms[arm])));
  const speeds = [["fit", "in 8 s"], ["0.25", "0.25x"], ["1", "real time"], ["4", "4x"]];
  fill("main",
    el("h1", {}, nameOf(entry)),
    el("p", {}, badge(entry.label), " ", entry.marks.map((mark) => [badge(mark, true), " "]), el("span", { class: "soft small" }, legible(entry.reason))),
    el("div", { class: "task" }, entry.task),
    entry.expected !== null ? el("p", { class: "small" }, "Expected: ", el("code", {}, legible(entry.expected))) : null,
    el("div", { class: "sides" }, side("Direct", of(entry.direct_arm), entry.direct), side("Recursive", of(entry.arm), entry.rrm, ratio)),
    el("div", { class: "controls" },
      el("button", { id: "play", type: "button", onclick: toggle }, "▶ Replay"),
      el("select", { id: "speed", "aria-label": "Speed", onchange: (event) => { state.speed = event.target.value; } },
        speeds.map(([value, name]) => el("option", { value, selected: value === state.speed }, name))),
      el("input", { id: "time", type: "range", min: 0, max: 1000, value: 1000, "aria-label": "Time",
        oninput: (event) => { stop(); setTime(event.target.value >= 1000 ? Infinity : (view.end * event.target.value) / 1000); } }),
      el("output", { id: "clock" }),
      el("span", { class: "switch", role: "group", "aria-label": "View" }, [["time", "Time"], ["graph", "Graph"]].map(([name, what]) =>
        el("button", { type: "button", id: `view-${name}`, "aria-pressed": String(state.view === name), onclick: () => { state.view = name; drawProblem(); } }, what)))),
    state.view === "time" ? legend() : null,
    el("div", { id: "view" }));
  for (const answer of $("main").querySelectorAll(".answer")) answer.scrollTop = answer.scrollHeight; // it ends with what it states
  drawView();
}

function side(name, arm, job, ratio = null) {
  if (!job) return el("div", { class: "side" }, el("h3", {}, name), arm, el("p", { class: "soft" }, "no row"));
  const verdict = job.correct === null ? el("span", { class: "soft" }, "not graded") : job.correct ? el("span", { class: "good" }, "✓ right") : el("span", { class: "bad" }, "✗ wrong");
  const cut = Object.keys(job.cut ?? {});
  return el("div", { class: "side" }, el("h3", {}, name, verdict, el("span", { class: "space" }), ratio ? el("span", { class: ratio >= 1 ? "good" : "bad" }, faster(ratio)) : null), arm,
    el("div", { class: "figures" }, el("span", { class: "big" }, seconds(job.latency)), el("span", {}, plural(job.tokens, "token")),
      el("span", { title: "the longest chain of tokens decoded one after another" }, `path ${count(job.path_tokens)}`),
      job.path_steps ? el("span", { title: "forward passes on that chain" }, `${count(job.path_steps)} steps`) : null,
      el("span", {}, plural(job.node_count, "node")), el("span", {}, `first token ${seconds(job.ttft)}`)),
    el("div", { class: "answer" }, job.answer),
    job.error ? el("p", { class: "bad small" }, legible(job.error)) : null,
    cut.length ? el("p", { class: "warn small" }, `cut by ${cut.map((name) => `--${name.replaceAll("_", "-")}`).join(", ")}`) : null);
}

function legend() {
  const key = (colour, what, faint) => { const mark = el("i"); mark.style.background = colour; if (faint) mark.style.opacity = 0.45; return el("span", {}, mark, what); };
  return el("div", { class: "legend" }, key("var(--direct)", "direct"), key("var(--plan)", "plan"), key("var(--solve)", "solve"), key("var(--continue)", "continue"),
    key("var(--solve)", "prefill", true), key("var(--queued)", "queued"), el("span", {}, el("i", { class: "hatched" }), "paused"),
    el("span", {}, el("i", { class: "path" }), "critical path"), el("span", {}, "numbers: tokens"));
}

function drawView() {
  const entry = DATA.entries[state.entry], place = $("view");
  if (!place) return;
  view = state.view === "graph" ? drawGraph(place, entry) : drawTimeline(place, entry);
  document.querySelectorAll("#play, #time, #speed").forEach((control) => { control.disabled = !view; });
  setTime(state.time);
}

function setTime(time) {
  state.time = time;
  if (!view) return;
  const at = Math.min(time, view.end), entry = DATA.entries[state.entry];
  view.update(time);
  $("time").value = Math.round((1000 * at) / (view.end || 1));
  const busy = (entry.rrm?.nodes ?? []).filter((n) => n.phases.some((p) => p.ready <= at && at < p.end)).length;
  $("clock").textContent = time >= view.end ? `${seconds(view.end)} in all` : `${at.toFixed(2)} s · ${plural(busy, "node")} at work`;
  updateTexts();
}

function toggle() {
  if (state.playing) return stop();
  if (!view) return;
  state.playing = true;
  $("play").textContent = "❚❚ Pause";
  let last = performance.now();
  if (state.time >= view.end) setTime(0);
  const tick = (now) => {
    if (!state.playing || !view) return;
    const rate = state.speed === "fit" ? view.end / 8 : Number(state.speed);
    const next = state.time + ((now - last) / 1000) * rate;
    last = now;
    setTime(next >= view.end ? Infinity : next);
    if (next >= view.end) stop();
    else requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}

function stop() {
  state.playing = false;
  if ($("play")) $("play").textContent = "▶ Replay";
}

function go() {
  const to = readAddress(), same = to.entry === state.entry;
  if (!same) { stop(); state.time = Infinity; }
  Object.assign(state, to);
  drawNode(); // first, for it takes its width from the rest
  if (state.entry < 0) { view = null; drawOverview(); } else if (!same) drawProblem(); else drawView();
  markCurrent();
  if (!same) $("main").scrollTop = 0;
}

function neighbourNode(step) {
  const job = currentJob();
  if (!job) return;
  const shown = visibleNodes(job).shown, at = shown.findIndex((i) => job.nodes[i].path === state.node);
  const next = shown[Math.max(0, Math.min(shown.length - 1, at + step))];
  if (next !== undefined) choose(state.side, job.nodes[next].path);
}

const KEYS = {
  j: ["next problem", () => goToNeighbour(1)], k: ["previous problem", () => goToNeighbour(-1)],
  " ": ["replay or pause", toggle], ArrowRight: ["later", () => nudge(1)], ArrowLeft: ["earlier", () => nudge(-1)],
  n: ["next node", () => neighbourNode(1)], p: ["previous node", () => neighbourNode(-1)],
  d: ["direct or recursive row's node", () => { const other = state.side === "direct" ? "rrm" : "direct"; if (DATA.entries[state.entry]?.[other]?.nodes.length) choose(other, "root"); }],
  g: ["time or graph", () => { if (state.entry >= 0) { state.view = state.view === "time" ? "graph" : "time"; drawProblem(); } }],
  "/": ["search", () => $("search").focus()], o: ["figures of all rows", () => { location.hash = ""; }],
  Escape: ["close the node", () => { if (state.node !== null) location.hash = address(state.entry, null, state.side); }],
  "?": ["this list", help],
};

function nudge(step) {
  if (!view) return;
  stop();
  const next = Math.min(state.time, view.end) + (step * view.end) / 100;
  setTime(next >= view.end ? Infinity : Math.max(0, next));
}

function help() {
  const names = { " ": "space", ArrowRight: "→", ArrowLeft: "←" };
  const dialog = el("dialog", {}, el("h2", {}, "Keyboard"), el("table", { class: "facts" }, Object.entries(KEYS).map(([key, [what]]) =>
    el("tr", {}, el("td", {}, el("kbd", {}, names[key] ?? key)), el("td", {}, what)))), el("p", {}, el("button", { onclick: () => dialog.close() }, "Close")));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input[type=search], select, textarea");
  if (typing && event.key === "Escape") event.target.blur();
  if (typing || (event.target.matches("input[type=range]") && event.key.startsWith("Arrow"))) return;
  if (event.key === " " && event.target.matches("button, summary, a")) return;
  if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key][1](); }
});

function drawOrigin() {
  const about = (run) => [
    legible(run.model), run.parameters ? `${d3.format(".3~s")(run.parameters)} parameters` : null, `${run.dtype} on ${run.device}`, `seed ${run.seed}`,
    run.commit ? `commit ${run.commit.slice(0, 12)}${run.dirty ? " with changes" : ""}` : "no commit known", run.hardware].filter(Boolean).join(" · ");
  const unsure = DATA.runs.some((run) => !run.verdict || !run.verdict.whole);
  fill("origin", el("details", {}, el("summary", {}, DATA.runs.length === 1 ? about(DATA.runs[0]) : `${DATA.runs.length} runs`, " · ",
    el("span", { class: unsure ? "warn" : "good" }, DATA.runs.map((run) => run.verdict?.said ?? "not verified").filter((v, i, all) => all.indexOf(v) === i).join("; "))),
  DATA.runs.map((run) => el("table", { class: "facts" }, [
    ["run", run.name], ["what", about(run)], ["tasks", run.tasks], ["started", run.started], ["command", run.command],
    ["verify", run.verdict?.said ?? "not verified: python -m rrm_engine.verify RUN_DIR --json RUN_DIR/verify.json"],
    ["versions", Object.entries(run.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", ")],
    ["left out", run.left_out]].filter(([, value]) => value).map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", {}, legible(value)))))),
  el("p", {}, `Made by rrm_engine ${DATA.version}, ${DATA.made}. Drawn with d3 (ISC licence, © Mike Bostock).`)));
}

const alike = DATA.runs.every((run) => run.tasks === DATA.runs[0].tasks && run.model === DATA.runs[0].model);
$("what").textContent = [alike && `tasks ${legible(DATA.runs[0].tasks)}, model ${legible(DATA.runs[0].model)}`, DATA.runs.length > 1 && plural(DATA.runs.length, "run")].filter(Boolean).join(", ");
$("search").addEventListener("input", (event) => { wanted.words = event.target.value; drawList(); });
$("sort").addEventListener("change", (event) => { wanted.order = event.target.value; drawList(); });
$("keys").addEventListener("click", help);
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});
window.addEventListener("hashchange", go);
let resizing = 0;
window.addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => { if (state.entry >= 0) drawView(); }, 120); });
drawFilters();
drawList();
drawOrigin();
state.entry = -2;
go();
