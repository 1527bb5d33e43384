// Direct and recursive solving on one axis of time: a lane a node, and the KV cache below.

const LEFT = 168, RIGHT = 22, LANE = 22, BAR = 15, TOP = 22, KV = 74, MOST_LANES = 100;

// The nodes that are shown: of more than MOST_LANES, what is below a folded node is left out, and of many siblings the rest.
function visibleNodes(job) {
  const children = new Map();
  job.nodes.forEach((node, i) => {
    if (!children.has(node.parent)) children.set(node.parent, []);
    children.get(node.parent).push(i);
  });
  const folding = job.nodes.length > MOST_LANES, shown = [], folded = new Map();
  const below = (i) => (children.get(i) ?? []).reduce((n, c) => n + 1 + below(c), 0);
  const visit = (i, depth) => {
    shown.push(i);
    const all = children.get(i) ?? [];
    if (!all.length) return;
    const open = !folding || isOpen(job, i, depth);
    const most = folding ? 40 : Infinity;
    const kept = open ? (state.open.get(`${job.key}:${i}:all`) ? all : all.slice(0, most)) : [];
    kept.forEach((c) => visit(c, depth + 1));
    const left = all.filter((c) => !kept.includes(c)).reduce((n, c) => n + 1 + below(c), 0);
    if (left) folded.set(i, left);
  };
  (children.get(-1) ?? []).forEach((i) => visit(i, 0));
  return { shown, folded, children };
}

function isOpen(job, i, depth) {
  return state.open.get(`${job.key}:${i}`) ?? depth < 1;
}

function unfold(job, i) {
  const key = `${job.key}:${i}`, depth = job.nodes[i].path.split(".").length - 1;
  if (isOpen(job, i, depth)) state.open.set(`${key}:all`, true);
  state.open.set(key, true);
  drawView();
}

function depthOf(node) {
  return node.path.split(".").length - 1;
}

function drawTimeline(place, entry) {
  const jobs = [["direct", entry.direct], ["rrm", entry.rrm]].filter(([, job]) => job && !job.incomplete);
  if (!jobs.length) {
    fill(place, el("p", { class: "soft" }, "No time line: ", legible(entry.rrm?.incomplete ?? entry.direct?.incomplete ?? "there is no job.")));
    return null;
  }
  const lanes = jobs.flatMap(([side, job]) => visibleNodes(job).shown.map((i) => ({ side, job, i, node: job.nodes[i] })));
  const place_of = new Map(lanes.map((lane, at) => [`${lane.side}:${lane.i}`, at]));
  const gap = (at) => (lanes[at].side === "rrm" && lanes[0].side === "direct" ? 10 : 0);
  const y = (at) => TOP + at * LANE + gap(at);
  const end = d3.max(jobs, ([, job]) => job.span), width = Math.max(560, place.clientWidth || 900);
  const height = y(lanes.length - 1) + LANE + 6, x = d3.scaleLinear([0, end || 1], [LEFT, width - RIGHT]);

  const svg = d3.select(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  svg.attr("viewBox", `0 0 ${width} ${height}`).attr("height", height).attr("id", "timeline").attr("role", "group")
    .attr("aria-label", "Nodes over time");
  const defs = svg.append("defs");
  const pattern = defs.append("pattern").attr("id", "hatched").attr("width", 5).attr("height", 5)
    .attr("patternUnits", "userSpaceOnUse").attr("patternTransform", "rotate(45)");
  pattern.append("rect").attr("width", 2).attr("height", 5).style("fill", "var(--waiting)");
  defs.append("marker").attr("id", "head").attr("viewBox", "0 0 6 6").attr("refX", 5).attr("refY", 3)
    .attr("markerWidth", 6).attr("markerHeight", 6).attr("orient", "auto").append("path").attr("d", "M0,0L6,3L0,6Z");
  svg.append("g").attr("class", "axis").attr("transform", `translate(0,${TOP - 2})`)
    .call(d3.axisTop(x).ticks(Math.max(4, width / 110)).tickFormat((s) => `${+s.toPrecision(6)} s`).tickSizeInner(-(height - TOP)).tickSizeOuter(0));

  const under = svg.append("g"); // arrows go behind bars, and lanes know where the pointer is
  for (const [at, lane] of lanes.entries()) drawLane(svg, lane, at, y(at), x, width);
  drawArrows(under, lanes, place_of, y, x);
  for (const [side, job] of jobs) {
    const last = y(d3.max(lanes, (l, at) => (l.side === side ? at : 0))) + LANE, first = y(lanes.findIndex((l) => l.side === side));
    svg.append("line").attr("class", "end-mark").attr("x1", x(job.span)).attr("x2", x(job.span)).attr("y1", first).attr("y2", last)
      .append("title").text(`${side === "direct" ? "direct" : "recursive"} answers after ${seconds(job.span)}`);
    for (const hop of job.critical) {
      const at = place_of.get(`${side}:${hop[0]}`);
      if (at === undefined) continue;
      svg.append("line").attr("class", "path").attr("x1", x(hop[1])).attr("x2", x(hop[2])).attr("y1", y(at) + LANE - 2.5).attr("y2", y(at) + LANE - 2.5);
    }
  }
  const veil = svg.append("rect").attr("class", "veil").attr("y", TOP - 2).attr("height", height - TOP);
  const cursor = svg.append("line").attr("class", "cursor").attr("y1", TOP - 6).attr("y2", height);
  const strip = svg.append("rect").attr("class", "scrub").attr("x", LEFT - 6).attr("width", width - LEFT - RIGHT + 12)
    .attr("y", 0).attr("height", TOP).attr("fill", "transparent");
  scrubbing(strip, x, end);

  const kv = drawKv(entry, jobs, x, width, end);
  fill(place, svg.node(), kv.node);
  return {
    end,
    update(time) {
      const at = x(Math.min(time, end));
      veil.attr("x", at).attr("width", Math.max(0, width - RIGHT - at + 8)).style("display", time >= end ? "none" : null);
      cursor.attr("x1", at).attr("x2", at).style("display", time >= end ? "none" : null);
      kv.update(at, time >= end);
    },
  };
}

function scrubbing(strip, x, end) {
  const move = (event) => setTime(Math.max(0, Math.min(end, x.invert(d3.pointer(event, strip.node().ownerSVGElement)[0]))));
  strip.on("pointerdown", (event) => {
    stop();
    strip.node().setPointerCapture(event.pointerId);
    move(event);
    strip.on("pointermove", move);
  });
  strip.on("pointerup pointercancel", () => strip.on("pointermove", null));
}

function drawLane(svg, lane, at, top, x, width) {
  const { side, job, node } = lane, folded = visibleNodes(job).folded.get(lane.i);
  const chosen = state.node === node.path && state.side === side;
  const group = svg.append("g").attr("class", `lane${chosen ? " chosen" : ""}`).attr("tabindex", 0).attr("role", "button")
    .attr("data-node", node.path).attr("data-side", side).attr("aria-label", `${side === "direct" ? "direct" : legible(node.path)}: open`)
    .on("click", () => choose(side, node.path))
    .on("keydown", (event) => { if (event.key === "Enter") choose(side, node.path); });
  group.append("title").text(`${legible(node.path)}\n${legible((node.task ?? "").slice(0, 300))}`);
  group.append("rect").attr("class", "lane-hit").attr("x", 0).attr("y", top).attr("width", width).attr("height", LANE);
  const name = side === "direct" ? "direct" : legible(node.path.split(".").at(-1)), indent = 8 + 12 * depthOf(node);
  const most = Math.floor((LEFT - indent - 12 - (folded ? 34 : 0)) / 6.4);
  group.append("text").attr("class", "lane-label").attr("x", indent).attr("y", top + LANE / 2 + 4)
    .text(name.length > most ? name.slice(0, Math.max(1, most - 1)) + "…" : name);
  if (folded) {
    group.append("text").attr("x", LEFT - 10).attr("y", top + LANE / 2 + 4).attr("text-anchor", "end").style("fill", "var(--accent)")
      .text(`+${folded}`).on("click", (event) => { event.stopPropagation(); unfold(job, lane.i); }).append("title").text("Unfold");
  }
  const middle = top + (LANE - BAR) / 2 - 1;
  const bar = (from, to, cls, title) => {
    if (!(to > from)) return;
    group.append("rect").attr("class", cls).attr("x", x(from)).attr("width", Math.max(0.6, x(to) - x(from))).attr("y", middle).attr("height", BAR)
      .append("title").text(title);
  };
  for (const [from, to] of node.waits) {
    group.append("rect").attr("fill", "url(#hatched)").attr("x", x(from)).attr("width", Math.max(0, x(to) - x(from))).attr("y", middle + 3).attr("height", BAR - 6)
      .append("title").text(`paused for ${seconds(to - from)}`);
  }
  for (const phase of node.phases) {
    const colour = side === "direct" ? "direct" : phase.kind;
    bar(phase.ready, phase.admitted, "queued", `queued for ${seconds(phase.admitted - phase.ready)}`);
    bar(phase.admitted, phase.first, `${colour} prefill`, `prefill: ${plural(phase.given, "token")} in ${seconds(phase.first - phase.admitted)}`);
    bar(phase.first, phase.end, colour, `${phase.kind}: ${plural(phase.tokens, "token")} in ${seconds(phase.end - phase.first)}, then ${phase.reason}`);
    for (const [from, to] of phase.out) bar(from, to, "queued", `out of the batch for ${seconds(to - from)}`);
    const label = count(phase.tokens);
    const marked = phase.events.filter((event) => event.kind === "child" || event.kind === "await");
    const from = marked.length ? x(d3.max(marked, (event) => event.t)) : x(phase.first);
    if (phase.tokens && x(phase.end) - from > 10 + 6.5 * label.length) {
      group.append("text").attr("class", "bar-text").attr("x", from + (marked.length ? 6 : 4)).attr("y", middle + BAR - 4).text(label);
    }
    for (const event of marked) {
      group.append("circle").attr("class", "event").attr("cx", x(event.t)).attr("cy", middle + BAR / 2).attr("r", event.kind === "child" ? 2.2 : 3.2);
    }
  }
}

// A start: from the event that made the node ready. A join: from each conclusion that a phase was given.
function drawArrows(svg, lanes, place_of, y, x) {
  const middle = (at) => y(at) + LANE / 2 - 1;
  for (const [at, { side, job, node }] of lanes.entries()) {
    node.phases.forEach((phase, number) => {
      const giver = phase.giver && { ...phase.giver, on: phase.giver.critical };
      const sources = [...(giver ? [giver] : []), ...phase.after.filter((a) => !giver || a.node !== giver.node).map((a) => ({ ...a, on: false }))];
      for (const source of sources) {
        const from = place_of.get(`${side}:${source.node}`);
        if (from === undefined || from === at) continue;
        const down = at > from ? 1 : -1, x1 = x(source.t), x2 = x(phase.ready), y1 = middle(from) + (down * BAR) / 2, y2 = middle(at) - (down * BAR) / 2;
        const bend = (y1 + y2) / 2;
        svg.append("path").attr("class", `arrow ${number ? "join" : "start"}${source.on ? " on-path" : ""}`).attr("marker-end", "url(#head)")
          .attr("d", `M${x1},${y1}C${x1},${bend} ${x2},${bend} ${x2},${y2}`);
      }
    });
  }
}

const KV_LAYERS = [["run", "of running nodes"], ["pin", "pinned by paused nodes"], ["host", "offloaded to host memory"], ["drop", "dropped, to be computed again"]];

function drawKv(entry, jobs, x, width, end) {
  const svg = d3.select(document.createElementNS("http://www.w3.org/2000/svg", "svg")), shown = jobs.filter(([, job]) => job.kv.t.length);
  const box = el("div", { class: "kv" });
  if (!shown.length) return { node: box, update() {} };
  const high = d3.max(shown, ([, job]) => d3.max(job.kv.t, (_, i) => KV_LAYERS.reduce((n, [name]) => n + job.kv[name][i], 0))) || 1;
  const height = shown.length * (KV + 18) + 8;
  svg.attr("viewBox", `0 0 ${width} ${height}`).attr("height", height).attr("id", "kv").attr("role", "img").attr("aria-label", "KV blocks over time");
  shown.forEach(([side, job], i) => {
    const top = 8 + i * (KV + 18), level = d3.scaleLinear([0, high], [top + KV, top]);
    svg.append("text").attr("x", 8).attr("y", top + 12).text(side === "direct" ? "direct" : "recursive");
    svg.append("text").attr("x", 8).attr("y", top + 27).style("fill", "var(--soft)").text("KV blocks");
    svg.append("g").attr("class", "axis").attr("transform", `translate(${LEFT},0)`).call(d3.axisLeft(level).ticks(3).tickSizeOuter(0));
    const points = job.kv.t.map((t, k) => ({ t, ...Object.fromEntries(KV_LAYERS.map(([name]) => [name, job.kv[name][k]])) }));
    const layers = d3.stack().keys(KV_LAYERS.map(([name]) => name))(points);
    const shape = d3.area().x((d) => x(Math.min(d.data.t, end))).y0((d) => level(d[0])).y1((d) => level(d[1]));
    layers.forEach((layer) => svg.append("path").attr("class", `kv-${layer.key}`).attr("d", shape(layer)));
  });
  const veil = svg.append("rect").attr("class", "veil").attr("y", 0).attr("height", height);
  const cursor = svg.append("line").attr("class", "cursor").attr("y1", 0).attr("y2", height);
  const used = KV_LAYERS.filter(([name]) => shown.some(([, job]) => job.kv[name].some((n) => n > 0)));
  box.append(svg.node(), el("div", { class: "legend" }, used.map(([name, what]) => {
    const mark = el("i");
    mark.style.background = `var(--kv-${name})`;
    return el("span", {}, mark, what);
  })));
  return {
    node: box,
    update(at, whole) {
      veil.attr("x", at).attr("width", Math.max(0, width - at)).style("display", whole ? "none" : null);
      cursor.attr("x1", at).attr("x2", at).style("display", whole ? "none" : null);
    },
  };
}
