// One node: its prompt, what it wrote, what the machine read in that, what came back to it, what it took.

const pieces = []; // of the shown node's texts, each with the span of what is written by now and that of what is not

function choose(side, path) {
  location.hash = address(state.entry, path, side);
}

function currentJob() {
  const entry = DATA.entries[state.entry];
  return entry ? entry[state.side] ?? null : null;
}

function drawNode() {
  const panel = $("node"), job = currentJob(), node = job?.nodes.find((n) => n.path === state.node);
  $("body").classList.toggle("with-node", Boolean(node));
  panel.hidden = !node;
  pieces.length = 0;
  if (!node) return;
  const total = (name) => node.counters?.[name] ?? 0;
  const facts = [
    ["task", node.task && lines(node.task)],
    ["ended", `${node.how}${node.ok === false ? ", without an answer" : ""}${node.why ? `: ${legible(node.why)}` : ""}`],
    ["answer", node.answer !== null && node.answer !== undefined ? lines(node.answer) : null],
    ["used", node.useful ? null : "no: its conclusion reached nobody"],
    ["tokens", `${count(node.tokens)} written${node.counters ? `, ${count(total("prefilled"))} prefilled, ${count(total("reused"))} reused` : ""}`],
    ["KV", node.counters && [["forked_blocks", "blocks forked"], ["copied_blocks", "copied"], ["offloaded_blocks", "offloaded"], ["restored_blocks", "restored"], ["dropped", "times dropped"], ["preemptions", "preemptions"], ["spliced", "tokens attached"]]
      .filter(([name]) => total(name)).map(([name, what]) => `${count(total(name))} ${what}`).join(", ")],
  ].filter(([, value]) => value);
  fill(panel,
    el("button", { class: "close", type: "button", title: "Close (Esc)", onclick: () => { location.hash = address(state.entry, null, state.side); } }, "✕"),
    el("h1", {}, legible(node.path)),
    el("p", { class: "small" }, el("a", { href: address(state.entry, node.path, state.side) }, "link to this node"), ` · ${legible(job.key)}`),
    el("table", { class: "facts" }, facts.map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", {}, value)))),
    node.phases.map((phase, i) => drawPhase(job, node, phase, i)));
  panel.scrollTop = 0;
  updateTexts();
}

function drawPhase(job, node, phase, number) {
  const colour = el("i");
  colour.style.background = `var(--${state.side === "direct" ? "direct" : phase.kind})`;
  const repairs = new Map();
  for (const name of phase.events.flatMap((e) => e.repairs ?? [])) repairs.set(name, (repairs.get(name) ?? 0) + 1);
  const took = [
    `${plural(phase.tokens, "token")} in ${seconds(phase.end - phase.first)}`, `prefill ${seconds(phase.first - phase.admitted)}`,
    phase.admitted > phase.ready && `queued ${seconds(phase.admitted - phase.ready)}`, `ended by ${phase.reason}`,
    phase.budget && `budget ${count(phase.budget)}`, phase.grammar && "held to the grammar",
  ].filter(Boolean).join(" · ");
  const given = phase.after.map((a) => job.nodes[a.node]).map((n) =>
    el("li", {}, el("b", {}, legible(n.path)), ": ", legible(n.answer ?? "")));
  return el("section", { class: "phase" },
    el("h3", {}, colour, `${phase.kind}, from ${seconds(phase.ready)}`),
    el("div", { class: "small soft" }, took),
    repairs.size ? el("div", { class: "small" }, "repaired: ", [...repairs].map(([name, n]) => [badge(n > 1 ? `${name} ${n}x` : name, true), " "])) : null,
    folded("System prompt", text(phase.system)),
    folded(number ? "Turn with the conclusions, as injected" : "Prompt", text(phase.prompt), number > 0),
    given.length ? el("details", {}, el("summary", {}, `Conclusions given (${given.length})`), el("ul", { class: "parsed" }, given)) : null,
    phase.notes?.length ? el("p", { class: "small warn" }, "Told: ", phase.notes.map(legible).join("; ")) : null,
    phase.text ? written(phase) : el("p", { class: "small soft" }, "The run did not record this text; render --decode makes it from its token ids."),
    phase.events.length ? el("details", { open: true }, el("summary", {}, `Events read (${phase.events.length})`),
      el("ul", { class: "parsed" }, phase.events.map(parsed))) : null);
}

function folded(name, value, open = false) {
  return value ? el("details", { open }, el("summary", {}, `${name} (${count(value.length)} characters)`), el("pre", {}, value)) : null;
}

// Its parts: [kind, text], kind is "thinking" or "text". The spans are cut while a replay runs.
function written(phase) {
  const whole = phase.text.reduce((n, [, part]) => n + part.length, 0);
  let before = 0;
  return el("div", { class: "written" }, phase.text.map(([kind, part]) => {
    const seen = el("span", { class: "seen" }, part), later = el("span", { class: "later" });
    pieces.push({ seen, later, phase, whole, before, part });
    before += part.length;
    const block = el("pre", {}, seen, later);
    return kind === "thinking" ? el("details", {}, el("summary", {}, `Thinking (${count(part.length)} characters)`), block) : block;
  }));
}

// Text has no times of its own: within a phase it is taken to have come evenly.
function updateTexts() {
  for (const { seen, later, phase, whole, before, part } of pieces) {
    const share = state.time >= phase.end ? 1 : Math.max(0, (state.time - phase.first) / (phase.end - phase.first || 1));
    const cut = Math.max(0, Math.min(part.length, Math.round(share * whole) - before));
    if (seen.textContent.length === cut) continue;
    seen.textContent = part.slice(0, cut);
    later.textContent = part.slice(cut);
  }
}

function parsed(event) {
  const at = el("span", { class: "soft" }, `${seconds(event.t)} `);
  switch (event.kind) {
    case "child": {
      const about = event.child ? null : event.same_as ? `the same task as ${legible(event.same_as)}` : "refused";
      const name = event.child ? el("a", { href: address(state.entry, event.child, state.side) }, legible(event.id)) : legible(event.id);
      return el("li", { class: event.child || event.same_as ? "" : "refused" }, at, el("b", {}, "child "), name, about ? ` (${about})` : "",
        `: ${event.task}`, event.depends_on?.length ? ` · after ${event.depends_on.map(legible).join(", ")}` : "");
    }
    case "await": return el("li", {}, at, el("b", {}, "await "), event.children.map(legible).join(", "), event.rule ? ` · ${event.rule}` : "");
    case "atomic": return el("li", {}, at, el("b", {}, "atomic "), event.answer ?? "");
    case "done": return el("li", {}, at, el("b", {}, "done"));
    default: return el("li", { class: "malformed" }, at, el("b", {}, "not read "), `${event.reason}: ${event.text}`);
  }
}
