// The charts: where tokens leave, how likely each token of an answer is, the time to the first token.

const PARTS = ["image", "vision", "pruner", "prefill"];
const PART_NAMES = { image: "image: opening and preprocessing", vision: "vision: the tower", pruner: "pruner",
  prefill: "prefill: projector and language model", together: "parts that were not timed alone" };

// Tokens at each place from the image to the answer, and how many were merged or dropped there.
function flowOf(answer) {
  const total = data.views.reduce((sum, view) => sum + view.tokens, 0);
  const flow = [{ name: "image", tokens: total }];
  let tokens = total;
  // The projector gets what the features' methods left; what its own output's leave meets the layers.
  for (const [name, stages] of [["tower", ["", "image", "encoder"]], ["projector", ["features"]]]) {
    answer.steps.filter((s) => s.layer === 0 && stages.includes(s.stage)).forEach((s) => { tokens = s.tokens; });
    flow.push({ name, tokens });
  }
  for (const run of answer.layers) {
    for (let layer = run.first; layer <= run.last; layer += 1) {
      flow.push({ name: `layer ${layer}`, layer, tokens: run.visual_tokens });
    }
  }
  return flow;
}

// Of all patches, how many are in slots of others, how many in none, and how many in slots that
// have no place.
function fatesOf(step) {
  let [merged, dropped, pooled] = [0, 0, 0];
  step.views.forEach((view, v) => {
    const count = data.views[v].tokens;
    for (let patch = 0; patch < count; patch += 1) {
      const fate = fateOf(view, patch, count);
      merged += fate === "merged";
      dropped += fate === "dropped";
      pooled += fate === "pooled";
    }
  });
  return { merged, dropped, pooled };
}

function flowText(answer) {
  const flow = flowOf(answer);
  const changes = flow.filter((place, i) => i && place.tokens !== flow[i - 1].tokens);
  const last = answer.steps[answer.steps.length - 1];
  const { merged, dropped, pooled } = fatesOf(last);
  const parts = changes.map((place) => `${place.tokens} from ${place.layer === undefined ? `the ${place.name}` : place.name} on`);
  const patches = (count) => many(count, "patch").replace("patchs", "patches");
  const ends = pooled ? `at the end ${patches(pooled)} pooled into ${many(last.tokens, "slot")}`
    : `at the end ${patches(dropped)} dropped, ${merged} merged`;
  return `${flow[0].tokens} tokens of the image${parts.length ? `; ${parts.join("; ")}` : ", all of which stay"}; ${ends}.`;
}

function drawFlow(answer, width) {
  const flow = flowOf(answer);
  const [height, top, band, fall] = [236, 26, 100, 40];
  const right = width - 58;
  const slim = width < 420;
  const head = slim ? 60 : 72; // between the first places
  const x = flow.map((place, i) => (i < 3 ? 14 + i * head
    : 14 + 3 * head + (i - 3) * (right - 14 - 3 * head) / Math.max(1, flow.length - 3)));
  const y = (tokens) => top + band * tokens / flow[0].tokens;
  const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": flowText(answer) });
  const fade = shape("linearGradient", { id: `fade-${drawFlow.count += 1}`, x1: 0, x2: 0, y1: 0, y2: 1 },
    shape("stop", { offset: 0, "stop-color": "var(--accent)", "stop-opacity": 0.3 }),
    shape("stop", { offset: 1, "stop-color": "var(--accent)", "stop-opacity": 0 }));
  svg.append(shape("defs", {}, fade));
  let path = `M${x[0]},${top} L${right},${top} L${right},${y(flow[flow.length - 1].tokens)}`;
  for (let i = flow.length - 1; i > 0; i -= 1) {
    const [now, before] = [y(flow[i].tokens), y(flow[i - 1].tokens)];
    const middle = (x[i] + x[i - 1]) / 2;
    path += ` L${x[i]},${now} C${middle},${now} ${middle},${before} ${x[i - 1]},${before}`;
  }
  const losses = [];
  flow.forEach((place, i) => {
    if (!i || place.tokens === flow[i - 1].tokens) return;
    const [now, before] = [y(place.tokens), y(flow[i - 1].tokens)];
    const [a, b] = [x[i - 1], x[i]];
    const ends = b + Math.max(22, (b - a) / 2);
    losses.push(shape("path", { fill: `url(#${fade.id})`,
      d: `M${a},${before} C${(a + b) / 2},${before} ${b},${before} ${b},${before + fall} L${ends},${before + fall}`
        + ` C${ends},${now + 8} ${(a + b) / 2 + 6},${now} ${a + 4},${(now + before) / 2} Z` }));
    losses.push(shape("text", { x: (b + ends) / 2, y: before + fall + 13, class: "quiet", "text-anchor": "middle" },
      `−${flow[i - 1].tokens - place.tokens}`));
  });
  svg.append(...losses, shape("path", { class: "band", d: `${path} Z` }));
  flow.forEach((place, i) => {
    const isLayer = place.layer !== undefined;
    const every = Math.ceil((slim ? 26 : 18) * (flow.length - 3) / Math.max(1, right - x[3]));
    if (!isLayer || place.layer % every === 0) {
      svg.append(shape("text", { x: x[i], y: height - 22, class: "quiet", "text-anchor": i ? "middle" : "start" },
        isLayer ? String(place.layer) : slim && i ? ["", "", "proj."][i] : place.name));
    }
    if (!i || place.tokens !== flow[i - 1].tokens) {
      svg.append(shape("text", { x: x[i] + (i ? 2 : 0), y: top - 8, "text-anchor": i ? "middle" : "start" }, String(place.tokens)));
    }
  });
  svg.append(shape("text", { x: (x[3] + right) / 2, y: height - 4, class: "quiet", "text-anchor": "middle" }, "layer of the language model"));
  svg.append(shape("text", { x: right + 6, y: top + 12, class: "quiet" }, "answer"));
  return svg;
}
drawFlow.count = 0;

// Log-probabilities of tokens, with all visual tokens (rings) and with the kept ones (dots).
function drawOdds(tokens, odds, width) {
  const column = 38;
  const wide = Math.max(width, 46 + column * tokens.length);
  const [top, height] = [14, 150];
  const finite = [...odds.full, ...odds.pruned].map(Number).filter(Number.isFinite);
  const least = Math.min(-1, ...finite);
  const y = (value) => top + height * Math.min(1, Number(value) / least);
  const svg = shape("svg", { width: wide, height: 216, viewBox: `0 0 ${wide} 216`, role: "img",
    "aria-label": "Log-probability of each token in nats; the table below has the numbers." });
  for (const part of [0, 0.5, 1]) {
    svg.append(shape("line", { class: "axis", x1: 40, x2: wide, y1: y(least * part), y2: y(least * part) }),
      shape("text", { class: "quiet", x: 34, y: y(least * part) + 4, "text-anchor": "end" }, rounded(least * part, 2)));
  }
  tokens.forEach((token, i) => {
    const x = 58 + column * i;
    svg.append(shape("line", { class: "gap", x1: x, x2: x, y1: y(odds.full[i]), y2: y(odds.pruned[i]) }),
      shape("circle", { class: "full-dot", cx: x, cy: y(odds.full[i]), r: 5 }),
      shape("circle", { class: "pruned-dot", cx: x, cy: y(odds.pruned[i]), r: 4 }),
      shape("text", { x: x + 3, y: 182, transform: `rotate(28 ${x + 3} 182)` }, visible(token).slice(0, 9)));
  });
  return svg;
}

function partsOf(timings) {
  const timed = PARTS.filter((part) => typeof timings[part] === "number");
  const rest = timings.total - timed.reduce((sum, part) => sum + timings[part], 0);
  const parts = timed.map((part) => ({ part, ms: timings[part] }));
  if (timed.length < PARTS.length) parts.push({ part: "together", ms: Math.max(0, rest) });
  return parts;
}

// Stacked bars: rows are { label, timings, predicted }.
function drawTimes(rows, width) {
  const most = Math.max(...rows.map((row) => row.timings.total));
  const [step, bar, right] = [46, 18, 76];
  const svg = shape("svg", { width, height: step * rows.length, viewBox: `0 0 ${width} ${step * rows.length}`,
    role: "img", "aria-label": rows.map((row) => `${row.label}: ${rounded(row.timings.total)} ms`).join("; ") });
  rows.forEach((row, i) => {
    let x = 1;
    svg.append(shape("text", { x: 0, y: step * i + 14 }, row.label));
    partsOf(row.timings).forEach(({ part, ms }) => {
      const length = (width - right) * ms / most;
      const rect = shape("rect", { class: `part-${part}${row.predicted ? " predicted" : ""}`, x, y: step * i + 20,
        width: Math.max(0, length), height: bar });
      rect.append(shape("title", {}, `${PART_NAMES[part]}: ${rounded(ms)} ms`));
      svg.append(rect);
      x += length;
    });
    svg.append(shape("text", { x: x + 6, y: step * i + 34 }, `${rounded(row.timings.total)} ms`));
  });
  return svg;
}
