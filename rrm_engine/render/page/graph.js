// The graph as a tree: who started whom, who waited for whom, what the answer hung on.

function drawGraph(place, entry) {
  const job = entry.rrm;
  if (!job || job.incomplete) {
    fill(place, el("p", { class: "soft" }, job ? `No graph: ${legible(job.incomplete)}` : "There is no recursive row."));
    return null;
  }
  const { shown, folded, children } = visibleNodes(job), visible = new Set(shown);
  const roots = shown.filter((i) => job.nodes[i].parent < 0);
  const build = (i) => ({ i, children: (children.get(i) ?? []).filter((c) => visible.has(c)).map(build) });
  const root = d3.hierarchy({ i: -1, children: roots.map(build) });
  d3.tree().nodeSize([30, 190])(root);
  const nodes = root.descendants().filter((d) => d.data.i >= 0);
  const [low, high] = d3.extent(nodes, (d) => d.x), deep = d3.max(nodes, (d) => d.y);
  const width = deep + 40, height = high - low + 56;
  const svg = d3.select(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  svg.attr("id", "graph").attr("width", width).attr("height", height).attr("viewBox", `${150} ${low - 28} ${width} ${height}`)
    .attr("role", "group").attr("aria-label", "Graph of nodes");
  const at = new Map(nodes.map((d) => [d.data.i, d]));
  const on_path = new Set(job.critical.map(([i]) => i));
  const link = d3.linkHorizontal().x((d) => d.y).y((d) => d.x);
  for (const d of nodes) {
    const giver = job.nodes[d.data.i].phases[0]?.giver, leads = (i) => Boolean(giver?.critical && giver.node === i);
    if (d.parent && d.parent.data.i >= 0) {
      svg.append("path").attr("class", `edge${leads(d.parent.data.i) ? " on-path" : ""}`)
        .attr("d", link({ source: d.parent, target: d }));
    }
    for (const given of job.nodes[d.data.i].phases[0]?.after ?? []) {
      const source = at.get(given.node);
      if (source) {
        svg.append("path").attr("class", `edge depends${leads(given.node) ? " on-path" : ""}`).attr("d", `M${source.y},${source.x}C${source.y - 40},${source.x} ${d.y - 40},${d.x} ${d.y},${d.x}`)
          .append("title").text(`${legible(job.nodes[d.data.i].path)} was given what ${legible(job.nodes[given.node].path)} concluded`);
      }
    }
  }
  const groups = nodes.map((d) => {
    const node = job.nodes[d.data.i], chosen = state.node === node.path && state.side === "rrm";
    const group = svg.append("g").attr("transform", `translate(${d.y},${d.x})`).attr("tabindex", 0).attr("role", "button")
      .attr("data-node", node.path).attr("aria-label", `${legible(node.path)}: open`)
      .attr("class", `gnode${chosen ? " chosen" : ""}${on_path.has(d.data.i) ? " on-path" : ""}${node.useful ? "" : " of-no-use"}`)
      .on("click", () => choose("rrm", node.path))
      .on("keydown", (event) => { if (event.key === "Enter") choose("rrm", node.path); });
    group.append("title").text(`${legible(node.path)}\n${legible((node.task ?? "").slice(0, 300))}\n${count(node.tokens)} tokens, ${node.how}${node.useful ? "" : ", of no use"}`);
    const splits = (children.get(d.data.i) ?? []).length > 0;
    group.append("circle").attr("r", 5 + Math.min(7, Math.sqrt(node.tokens) / 8)).attr("class", splits ? "plan" : "solve");
    const name = legible(node.path.split(".").at(-1));
    const label = group.append("text").text(name.length > 22 ? name.slice(0, 21) + "…" : name);
    if (d.children) {
      label.attr("y", -14).attr("text-anchor", "middle"); // edges leave to the right
    } else {
      label.attr("x", 15).attr("y", -1);
      group.append("text").attr("x", 15).attr("y", 11).style("fill", "var(--soft)").style("font-size", "10px").text(`${count(node.tokens)} tokens`);
    }
    if (folded.has(d.data.i)) {
      group.append("text").attr("x", -14).attr("y", 4).attr("text-anchor", "end").style("fill", "var(--accent)").text(`+${folded.get(d.data.i)}`)
        .on("click", (event) => { event.stopPropagation(); unfold(job, d.data.i); }).append("title").text("Unfold");
    }
    return { group, node };
  });
  fill(place, el("div", { class: "graph-scroll" }, svg.node()),
    el("p", { class: "small soft" }, "Lines: who started whom; dashed: conclusions that a node was started with; thick: the critical path. Pale: of no use, its conclusion reached nobody."));
  return {
    end: job.span,
    update(time) {
      for (const { group, node } of groups) {
        const whole = time >= job.span;
        group.classed("later", !whole && (node.phases[0]?.ready ?? 0) > time);
        group.classed("running", !whole && node.phases.some((p) => p.ready <= time && time < p.end));
      }
    },
  };
}
