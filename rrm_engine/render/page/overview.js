// All rows at once: figures of the analysis, where recursion won and where it lost.

const MODES = { direct: "direct", rrm: "recursive" };
const QUANTITIES = { latency_s: "time to answer", critical_path_tokens: "critical path, tokens", critical_path_steps: "critical path, steps", total_tokens: "total tokens" };

// Columns of numbers are set to the right, those whose head is one of WORDS to the left.
const WORDS = ["arm", "mode", "pairs", "of", "what"];

function grid(heads, rows) {
  const side = (i) => (WORDS.includes(heads[i]) ? "words" : "");
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, heads.map((head, i) => el("th", { class: side(i) }, head)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", { class: side(i) }, cell ?? "–")))))));
}

function formulas(...names) {
  return el("p", { class: "formulas" }, names.filter((n) => DATA.analysis.formulas[n]).map((name) => [`${name} = ${DATA.analysis.formulas[name]}`, el("br")]));
}

function drawOverview() {
  const { arms, comparisons } = DATA.analysis, several = arms.length > 1;
  const of_arm = (arm, cells) => (several ? [legible(arm.name), ...cells] : cells);
  const head = (heads) => (several ? ["arm", ...heads] : heads);
  const stepped = arms.some((arm) => Object.values(arm.modes).some((f) => f.critical_path_steps_median));
  const sampled = arms.some((arm) => Object.values(arm.modes).some((f) => f.k > 1));
  fill("main",
    el("h1", {}, "What these rows show"),
    el("p", { class: "soft" }, headline(arms)),
    el("div", { class: "glance" }, el("div", { id: "scatter" }), cases()),
    el("h2", {}, "Accuracy, time and tokens"),
    grid(head(["mode", "rows", "right", "95 %", ...(sampled ? ["avg@k", "pass@k"] : []), "to answer", "path tokens", ...(stepped ? ["path steps"] : []), "tokens", "tok/s"]),
      arms.flatMap((arm) => Object.entries(arm.modes).map(([mode, f]) => of_arm(arm, [
        MODES[mode], count(f.n), percent(f.accuracy), span(f.accuracy_ci95, percent),
        ...(sampled ? [`${percent(f.avg_at_k)} @${f.k}`, percent(f.pass_at_k)] : []), seconds(f.latency_s_median),
        count(f.critical_path_tokens_median), ...(stepped ? [count(f.critical_path_steps_median)] : []), count(f.total_tokens_median), count(f.tokens_per_s)])))),
    formulas("accuracy", ...(sampled ? ["avg_at_k", "pass_at_k"] : []), "tokens_per_s"),
    el("h2", {}, "Direct over recursive, on the same problems"),
    grid(head(["pairs", "of", "n", "median", "95 %", "geometric mean", "of sums"]), arms.flatMap((arm) =>
      [["all", "all"], ["headline", "headline"], ["atomic", "did not split"]].flatMap(([name, label]) =>
        ratioRows(arm.direct_and_recursive[name]).map((cells, i) => of_arm(arm, [i ? "" : label, ...cells]))))),
    formulas("median", "geometric_mean", "of_sums", "tokens_per_s_ratio", "ci95"),
    arms.map((arm) => arm.direct_and_recursive.all.graded ? el("p", {}, several ? `${legible(arm.name)}: ` : "", agreement(arm.direct_and_recursive.all, "direct", "recursive")) : null),
    arms.map((arm) => arm.compared_with ? el("p", {}, several ? `${legible(arm.name)}: ` : "", `${legible(arm.compared_with)}.`) : null),
    el("h2", {}, "What recursive rows did"),
    grid(head(["rows", "split", "95 %", "nodes", "width", "depth", "tokens / path", "overlap", "any two beside each other"]),
      arms.filter((arm) => arm.shape.n).map((arm) => {
        const s = arm.shape, one = (v) => (v === null ? "–" : v.toFixed(1));
        return of_arm(arm, [count(s.n), percent(s.activation), span(s.activation_ci95, percent), one(s.nodes_mean), one(s.width_mean), one(s.depth_mean), one(s.parallelism_tokens), percent(s.overlap), percent(s.parallel)]);
      })),
    formulas("activation", "parallelism_tokens", "overlap", "parallel"),
    time(arms, of_arm, head),
    el("h2", {}, "Direct solving with what recursion was allowed"),
    grid(head(["what", "problems", "right", "95 %"]), arms.filter((arm) => arm.controls).flatMap((arm) =>
      [["recursive", "recursive"], ["direct", "direct"], ["matched_tokens", "direct, same total tokens"], ["matched_path", "direct, same critical path"]].map(([name, label], i) =>
        of_arm(arm, [label, count(arm.controls[name].problems), percent(arm.controls[name].accuracy), span(arm.controls[name].accuracy_ci95, percent)])))),
    arms.filter((arm) => arm.controls).map((arm) => { const p = arm.controls.one_at_a_time; return el("p", { class: "small" }, several ? `${legible(arm.name)}: ` : "",
      `path in tokens: direct ${count(p.direct)}, recursive ${count(p.recursive)}, recursive one node at a time ${count(p.one_at_a_time)}`); }),
    formulas("matched_tokens", "matched_path", "one_at_a_time"),
    comparisons.filter((found) => Object.values(found.modes).some((f) => f.n)).map((found) => [
      el("h2", {}, `${legible(found.first)} over ${legible(found.second)}`),
      grid(["pairs", "of", "n", "median", "95 %", "geometric mean", "of sums"], Object.entries(found.modes).flatMap(([mode, figures]) =>
        ratioRows(figures).map((cells, i) => [i ? "" : MODES[mode], ...cells]))),
      Object.entries(found.modes).map(([mode, f]) => f.graded ? el("p", {}, `${MODES[mode]}: `, agreement(f, "the first", "the second")) : null),
    ]),
    arms.flatMap((arm) => arm.cautions).map((caution) => el("p", { class: "warn" }, `Caution: ${legible(caution)}.`)));
  drawScatter();
}

function time(arms, of_arm, head) {
  const known = arms.filter((arm) => arm.batch.jobs);
  if (!known.length) return null;
  return [
    el("h2", {}, "What nodes did with their time"),
    grid(head(["at work", "idle parents", "queued", "longest queue", "nodes", "cancelled", "of no use", "their tokens"]), known.map((arm) => {
      const b = arm.batch, use = b.recursive;
      return of_arm(arm, [b.nodes_at_work === null ? null : b.nodes_at_work.toFixed(1), percent(b.idle_parents), percent(b.queued), seconds(b.queued_s_max),
        count(use.nodes), count(use.cancelled), percent(use.of_no_use), percent(use.tokens_of_no_use)]);
    })),
    formulas("nodes_at_work", "idle_parents", "queued", "of_no_use", "tokens_of_no_use"),
    known.map((arm) => arm.servers ? el("p", { class: "small" }, `Nodes by replica: ${Object.entries(arm.servers.nodes).map(([name, n]) => `${legible(name)} ${count(n)}`).join(", ")}`) : null),
    known.map((arm) => arm.batch.over_time.map((found) => drawBatch(arm, found))),
  ];
}

// Nodes in the batch over the time of one process that ran jobs.
function drawBatch(arm, found) {
  const width = 860, height = 92, left = 46, modes = Object.keys(found.nodes), length = found.nodes[modes[0]].length;
  const points = Array.from({ length }, (_, i) => Object.fromEntries([["t", (found.span_s * i) / length], ...modes.map((m) => [m, found.nodes[m][i]])]));
  const layers = d3.stack().keys(modes)(points);
  const x = d3.scaleLinear([0, found.span_s], [left, width - 12]), y = d3.scaleLinear([0, d3.max(layers.at(-1), (d) => d[1]) || 1], [height - 20, 6]);
  const svg = d3.select(document.createElementNS("http://www.w3.org/2000/svg", "svg")).attr("viewBox", `0 0 ${width} ${height}`).attr("role", "img")
    .attr("aria-label", "Nodes in the batch over time").style("max-width", `${width}px`);
  svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - 20})`).call(d3.axisBottom(x).ticks(8).tickFormat((s) => `${+s.toPrecision(6)} s`).tickSizeOuter(0));
  svg.append("g").attr("class", "axis").attr("transform", `translate(${left},0)`).call(d3.axisLeft(y).ticks(3).tickSizeOuter(0));
  const shape = d3.area().x((d) => x(d.data.t)).y0((d) => y(d[0])).y1((d) => y(d[1])).curve(d3.curveStepAfter);
  layers.forEach((layer) => svg.append("path").attr("class", layer.key === "direct" ? "direct" : "plan").attr("d", shape(layer)).append("title").text(MODES[layer.key]));
  return el("figure", {}, el("figcaption", { class: "small soft" }, `Nodes in the batch over time${DATA.arms.length > 1 ? `, ${legible(arm.name)}` : ""}: direct violet, recursive blue`), svg.node());
}

function headline(arms) {
  return arms.map((arm) => {
    const all = arm.direct_and_recursive.all, best = arm.direct_and_recursive.headline, ratio = all.latency_s;
    const name = arms.length > 1 ? `${legible(arm.name)}: ` : "";
    if (!ratio) return `${name}${plural(Object.values(arm.modes).reduce((n, f) => n + f.n, 0), "row")}.`;
    return `${name}${name ? "over" : "Over"} ${plural(all.timed, "pair")} recursive solving is ${faster(ratio.median)} (median)`
      + (best.latency_s ? `, ${faster(best.latency_s.median)} over the ${count(best.timed)} headline ones.` : "; none is a headline pair.");
  }).join(" ");
}

function agreement(f, first, second) {
  return `Of ${plural(f.graded, "graded pair")} ${count(f.both_right)} right on both sides, ${count(f.only_first_right)} only ${first}, `
    + `${count(f.only_second_right)} only ${second}, ${count(f.neither_right)} neither; exact McNemar ${f.mcnemar_p === null ? "has no discordant pair" : `p = ${f.mcnemar_p.toPrecision(2)}`}.`;
}

function ratioRows(figures) {
  const rows = Object.entries(QUANTITIES).filter(([name]) => figures[name]).map(([name, what]) => {
    const r = figures[name];
    return [what, count(r.n), times(r.median), span(r.median_ci95, times), times(r.geometric_mean), times(r.of_sums)];
  });
  if (figures.tokens_per_s) rows.push(["tok/s", count(figures.timed), "", "", "", times(figures.tokens_per_s.ratio)]);
  return rows;
}

function cases() {
  const known = DATA.entries.map((entry, index) => ({ entry, index })).filter(({ entry }) => entry.ratio !== null);
  if (!known.length) return null;
  known.sort((a, b) => b.entry.ratio - a.entry.ratio);
  const most = Math.min(6, Math.ceil(known.length / 2));
  const lost = DATA.entries.map((entry, index) => ({ entry, index })).filter(({ entry }) => entry.direct?.correct && entry.rrm && entry.rrm.correct === false);
  const item = ({ entry, index }) => el("li", {}, el("span", { class: `ratio ${entry.ratio >= 1 ? "good" : "bad"}` }, times(entry.ratio)),
    badge(entry.label), el("a", { href: address(index), title: entry.reason }, nameOf(entry)));
  return el("div", { class: "cases" },
    el("section", {}, el("h2", {}, "Most gained"), el("ol", {}, known.slice(0, most).map(item))),
    el("section", {}, el("h2", {}, "Least gained, or lost"), el("ol", {}, known.slice(-most).reverse().map(item))),
    lost.length ? el("section", {}, el("h2", {}, "Right directly, wrong recursively"), el("ol", {}, lost.slice(0, 6).map(item))) : null);
}

// Every pair as a dot: time directly against time recursively, on logarithmic axes.
function drawScatter() {
  const pairs = DATA.entries.map((entry, index) => ({ entry, index })).filter(({ entry }) => entry.ratio !== null);
  if (pairs.length < 2) return;
  const all = pairs.flatMap(({ entry }) => [entry.direct.latency, entry.rrm.latency]);
  const size = 320, left = 52, bottom = 40, [low, high] = d3.extent(all);
  const domain = [low / 1.15, high * 1.15];
  const x = d3.scaleLog(domain, [left, size - 10]), y = d3.scaleLog(domain, [size - bottom, 10]);
  const svg = d3.select(document.createElementNS("http://www.w3.org/2000/svg", "svg")).attr("viewBox", `0 0 ${size} ${size}`)
    .attr("role", "img").attr("aria-label", "Time directly against time recursively").style("max-width", "340px");
  const ticks = (axis) => axis.ticks(5, (s) => `${+s.toPrecision(3)} s`).tickSizeOuter(0);
  svg.append("g").attr("class", "axis").attr("transform", `translate(0,${size - bottom})`).call(ticks(d3.axisBottom(x)));
  svg.append("g").attr("class", "axis").attr("transform", `translate(${left},0)`).call(ticks(d3.axisLeft(y)));
  svg.append("line").attr("class", "end-mark").attr("x1", x(domain[0])).attr("y1", y(domain[0])).attr("x2", x(domain[1])).attr("y2", y(domain[1]));
  svg.append("text").attr("x", size - 10).attr("y", size - 6).attr("text-anchor", "end").text("time to answer, directly");
  svg.append("text").attr("x", left + 6).attr("y", 20).text("recursively");
  for (const { entry, index } of pairs) {
    const bad = ["wrong", "failed", "invalid graph"].includes(entry.label);
    svg.append("circle").attr("class", "dot").attr("r", 4.5).attr("cx", x(entry.direct.latency)).attr("cy", y(entry.rrm.latency))
      .style("fill", entry.label === "headline" ? "var(--solve)" : bad ? "var(--queued)" : "var(--continue)")
      .on("click", () => { location.hash = address(index); })
      .append("title").text(`${nameOf(entry)}: ${entry.label}, ${faster(entry.ratio)}`);
  }
  const key = (colour, what) => { const mark = el("i"); mark.style.background = colour; return el("span", {}, mark, what); };
  fill("scatter", svg.node(), el("div", { class: "legend" }, key("var(--solve)", "headline"), key("var(--queued)", "wrong or failed"),
    key("var(--continue)", "any other"), el("span", {}, "below the line recursion is faster")));
}
