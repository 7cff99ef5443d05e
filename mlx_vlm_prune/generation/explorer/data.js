// The page's data: answers by method and budget, and what became of a patch at a step.

const data = JSON.parse(document.getElementById("data").textContent);
const fullAnswer = data.answers.find((answer) => answer.pruner === "none") || null;
const methods = [...new Set(data.answers.map((answer) => answer.pruner))].filter((m) => m !== "none");
if (!methods.length) methods.push("none");
// The slider's places: every budget, the fewest tokens first, then all tokens.
const places = [...data.budgets, ...(fullAnswer ? [null] : [])];

function budgetText(budget) {
  if (budget === null) return "all";
  return budget.tokens === undefined ? `${rounded(100 * budget.share)} %` : String(budget.tokens);
}

// The slider's place of a budget, a number of tokens or a share; -1 where it has none.
function placeOf(budget) {
  return places.findIndex((each) => (each && budget ? each.tokens === budget.tokens && each.share === budget.share
    : each === budget));
}

// The answer of a method at a place of the slider; where it has none, the one nearest above it, or
// else below it, and why.
function answerAt(method, place) {
  if (places[place] === null || method === "none") return { answer: fullAnswer || data.answers[0], why: "" };
  const rows = data.answers.filter((answer) => answer.pruner === method);
  const exact = rows.find((answer) => placeOf(answer.budget) === place);
  if (exact) return { answer: exact, why: "" };
  const above = rows.filter((answer) => placeOf(answer.budget) > place).sort((a, b) => placeOf(a.budget) - placeOf(b.budget));
  const below = rows.filter((answer) => placeOf(answer.budget) < place).sort((a, b) => placeOf(b.budget) - placeOf(a.budget));
  const answer = above[0] || below[0] || fullAnswer;
  const refused = data.refused.find(
    (row) => row.pruner === method && (!row.budget || placeOf(row.budget) === place));
  const reason = refused ? `: ${refused.why}` : "";
  return { answer, why: `No answer with ${budgetText(places[place])}${reason}. Shown: ${budgetText(answer.budget)}.` };
}

// The steps of an answer at which something was left out or mixed; the last one at least.
function stepsOf(answer) {
  const steps = answer.steps.map((step, number) => ({ ...step, number, until: data.depth - 1 }));
  steps.forEach((step, i) => {
    const next = steps.slice(i + 1).find((later) => later.layer > step.layer);
    if (next) step.until = next.layer - 1;
  });
  const pruning = steps.filter((step) => step.name);
  return pruning.length ? pruning : steps.slice(-1);
}

const STAGES = { image: "the image", encoder: "the tower", features: "the tower's features",
  projected: "the projector's output", decoder: "the language model" };

// Visual tokens of a view at a step.
function tokensOf(view) {
  return (view.kept || view.size || []).length;
}

// Of an image, the mean over all layers.
function meanTokens(answer) {
  return Math.round(answer.visual_tokens_kept / Math.max(1, data.answers[0].kept_indices.length));
}

// With `mean`, the tokens that all layers hold on average, where layers hold different numbers.
function stepText(step, view, mean) {
  const where = step.stage === "decoder"
    ? (step.layer === step.until ? `layer ${step.layer}` : `layers ${step.layer} to ${step.until}`)
    : step.name ? `in ${STAGES[step.stage] || "the features"}` : "nothing was pruned";
  const name = step.name.replace(/, layer \d+$/, "");
  const average = mean === undefined ? "" : ` (${mean} on average over all layers)`;
  return `${name ? `${name}, ` : ""}${where}: ${many(tokensOf(view), "token")}${average}`;
}

// The slot of each patch at a step's view, -1 for none; made once.
function slotsOf(view, count) {
  if (!view.slots) {
    view.slots = new Int32Array(count).fill(-1);
    if (view.slot) view.slots.set(view.slot);
    else if (view.kept) view.kept.forEach((index, slot) => { view.slots[index] = slot; });
  }
  return view.slots;
}

// What became of a patch: "kept", "merged", "dropped", or "pooled" where slots have no place.
function fateOf(view, patch, count) {
  if (!view.kept) return "pooled";
  const slot = slotsOf(view, count)[patch];
  if (slot < 0) return "dropped";
  return view.kept[slot] === patch ? "kept" : "merged";
}

function sizeOf(view, slot) {
  return view.size ? view.size[slot] : 1;
}

function rounded(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value === "Infinity" ? "∞" : "−∞";
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

// Log-probabilities: thousandths of a nat.
function nats(value) {
  return Number.isFinite(Number(value)) ? rounded(Math.round(1000 * value) / 1000 || 0) : rounded(value);
}

// A token's text, also where it is only a space or nothing.
function visible(token) {
  return token.trim() || token.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";
}

function many(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

// A patch in words: its place, what became of it, its score and its rank.
function patchText(view, grid, patch, count) {
  const [, columns] = grid;
  const where = `Patch ${patch}, row ${Math.floor(patch / columns) + 1}, column ${patch % columns + 1}: `;
  const fate = fateOf(view, patch, count);
  const parts = [];
  if (fate === "pooled") {
    parts.push(view.read ? `read with ${rounded(view.read[patch])} of the most read patch's weight` : "pooled");
  } else if (fate === "dropped") {
    parts.push("dropped");
  } else {
    const slot = view.slots[patch];
    const size = many(sizeOf(view, slot), "patch").replace("patchs", "patches");
    parts.push(fate === "kept" ? `kept as slot ${slot + 1} of ${view.kept.length}, stands for ${size}`
      : `merged into slot ${slot + 1} of ${view.kept.length}, at patch ${view.kept[slot]}, which stands for ${size}`);
  }
  if (view.score) {
    const present = view.rank.reduce((most, rank) => Math.max(most, rank), 0);
    parts.push(view.rank[patch] ? `score ${rounded(view.score[patch])}, rank ${view.rank[patch]} of ${present}`
      : "no score: it had left before");
  } else if (view.kept && fate !== "pooled") {
    parts.push("no score of its own: tokens are chosen together");
  }
  return where + parts.join("; ") + ".";
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function shape(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
