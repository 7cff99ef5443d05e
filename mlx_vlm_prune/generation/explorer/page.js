// The page: two sides, each a method; one slider over budgets; everything is drawn again on a change.

const state = { place: Math.max(0, Math.floor((data.budgets.length - 1) / 2)), view: 0, colour: "kept" };
const byId = (id) => document.getElementById(id);
const images = data.views.map((view) => { const image = new Image(); image.src = view.picture; return image; });
const sides = methods.slice(0, 2).map((method, i) => ({ method, step: null, word: null, name: "AB"[i] }));

function answerOf(side) { return answerAt(side.method, state.place); }

function stepOf(side, answer) {
  const steps = stepsOf(answer);
  return steps[side.step === null ? steps.length - 1 : Math.min(side.step, steps.length - 1)];
}

function wordsOfStep(answer, step) {
  return answer.words.find((each) => each.step === step.number && each.view === state.view) || null;
}

function heatOf(side, answer, step, view) {
  const words = wordsOfStep(answer, step);
  if (side.word !== null && words && words.words[side.word] !== undefined) {
    const row = words.attention[side.word];
    const most = Math.max(...row.filter((x) => x !== null), 1e-12);
    return row.map((x) => (x === null ? null : Math.max(0, x / most)));
  }
  if (state.colour !== "score" || !view.rank) return null;
  const most = Math.max(...view.rank);
  return view.rank.map((rank) => (rank ? (most - rank + 1) / most : null));
}

function menu(label, options, value, onchange) {
  const id = `menu-${menu.count += 1}`;
  const select = element("select", { id, onchange: () => onchange(select.value) },
    ...options.map(([key, text]) => element("option", { value: key }, text)));
  select.value = value;
  return element("div", { class: "control" }, element("label", { for: id }, label), select);
}
menu.count = 0;

function slider(id, label, last, value, oninput) {
  const input = element("input", { id, type: "range", min: 0, max: last, step: 1, value,
    oninput: () => oninput(Number(input.value)) });
  const shown = element("output", { for: id, id: `${id}-text` });
  return { node: element("div", { class: "control wide" }, element("div", {},
    element("label", { for: id }, `${label}: `), shown), input), input, shown };
}

function makeControls() {
  const controls = byId("controls");
  const units = [...new Set(data.budgets.flatMap(Object.keys))].sort().reverse(); // tokens first
  const unit = units.map((name) => ({ tokens: "tokens an image", share: "of an image" })[name]).join(", or ");
  if (places.length > 1) {
    const budget = slider("budget", `Budget, ${unit}`, places.length - 1, state.place, (place) => {
      state.place = place;
      show();
    });
    budget.node.append(element("div", { class: "ticks", "aria-hidden": "true" },
      ...places.map((each) => element("span", {}, budgetText(each)))));
    state.budget = budget;
    controls.append(budget.node);
  }
  controls.append(menu("Picture shows", [["kept", "what was kept"], ["score", "ranks of scores"]], state.colour,
    (value) => { state.colour = value; show(); }));
  if (data.views.length > 1) {
    controls.append(menu("Picture", data.views.map((view, i) => [i, `${i + 1} of ${data.views.length} (image ${view.image + 1})`]),
      0, (value) => { state.view = Number(value); show(); }));
  }
}

function makePanel(side) {
  side.picture = new Picture(`Patches of the picture, side ${side.name}`, (patch) => sides.forEach((each) => point(each, patch)));
  side.readout = element("p", { class: "readout", id: `readout-${side.name}` });
  side.about = element("p", { class: "about" });
  side.note = element("p", { class: "note" });
  side.steps = slider(`step-${side.name}`, "Step", 0, 0, (step) => { side.step = step; show(); });
  side.chooser = menu(`Method, side ${side.name}`, methods.map((name) => [name, name === "none" ? "all visual tokens" : name]),
    side.method, (method) => { side.method = method; side.step = null; side.word = null; show(); });
  side.panel = element("div", { class: "panel" }, side.chooser, side.picture.canvas, side.readout,
    side.steps.node, side.note, side.about);
  return side.panel;
}

function point(side, patch) {
  const grid = data.views[state.view].grid;
  const view = stepOf(side, answerOf(side).answer).views[state.view];
  const text = patchText(view, grid, patch, data.views[state.view].tokens);
  const words = wordsOfStep(answerOf(side).answer, stepOf(side, answerOf(side).answer));
  const word = words && side.word !== null ? ` “${visible(words.words[side.word])}”: ${rounded(words.attention[side.word][patch])}.` : "";
  side.picture.move(patch, text + word);
  side.readout.textContent = text + word;
}

function showPanel(side) {
  const { answer, why } = answerOf(side);
  const steps = stepsOf(answer);
  const step = stepOf(side, answer);
  const view = step.views[state.view];
  const names = side.method === "none" ? [] : side.method.replace(/ \(\d+\)$/, "").split("+").map((spec) => spec.split(":")[0]);
  const titles = names.filter((name) => data.methods[name]).map((name) => data.methods[name].title);
  side.about.textContent = titles.length > 1 ? titles.map((title, i) => `${i + 1}. ${title}`).join(" ") : titles.join("");
  side.note.textContent = why;
  side.note.hidden = !why;
  side.steps.node.hidden = steps.length < 2;
  side.steps.input.max = steps.length - 1;
  side.steps.input.value = steps.indexOf(steps.find((each) => each.number === step.number));
  const mean = answer.layers.length > 1 ? meanTokens(answer) : undefined;
  const text = stepText(step, view, mean);
  side.steps.shown.textContent = text;
  side.steps.input.setAttribute("aria-valuetext", text);
  side.picture.show(images[state.view], data.views[state.view].grid, view, heatOf(side, answer, step, view));
  if (side.picture.cursor === null) side.readout.textContent = `${text}.`;
  else point(side, Math.min(side.picture.cursor, data.views[state.view].tokens - 1));
}

function titled(side, ...children) {
  const { answer } = answerOf(side);
  const budget = answer === fullAnswer ? "" : `, ${budgetText(answer.budget)}`;
  const name = answer === fullAnswer ? "all visual tokens" : answer.pruner;
  return element("div", {}, element("h3", {}, `${name}${budget}`), ...children);
}

function fill(id, ...children) { byId(id).replaceChildren(...children); }

function showWords() {
  const blocks = sides.map((side) => {
    const { answer } = answerOf(side);
    const words = wordsOfStep(answer, stepOf(side, answer));
    if (!words) return titled(side, element("p", { class: "quiet" }, "This method does not read the prompt word by word at this step."));
    const kept = new Set(stepOf(side, answer).views[state.view].kept || []);
    const rows = words.words.map((word, i) => {
      const row = words.attention[i].map((x) => x || 0);
      const sum = row.reduce((total, x) => total + x, 0);
      const share = row.reduce((total, x, patch) => total + (kept.has(patch) ? x : 0), 0) / Math.max(sum, 1e-12);
      const bar = element("i");
      bar.style.width = `${100 * share}%`;
      return element("button", { class: "word", type: "button", "aria-pressed": String(side.word === i),
        onclick: () => { side.word = side.word === i ? null : i; show(); } },
      element("span", {}, visible(word)), element("span", { class: "track" }, bar), element("b", {}, `${rounded(100 * share, 3)} %`));
    });
    return titled(side, element("div", { class: "words" }, ...rows));
  });
  byId("words-section").hidden = !data.answers.some((answer) => answer.words.length);
  fill("words", ...blocks);
}

function showTimes() {
  byId("times-section").hidden = !data.timing;
  if (!data.timing) return;
  const rows = [];
  const answers = [...new Set([fullAnswer, ...sides.map((side) => answerOf(side).answer)].filter(Boolean))];
  for (const answer of answers) {
    const name = answer === fullAnswer ? "all visual tokens" : `${answer.pruner}, ${budgetText(answer.budget)}`;
    rows.push({ label: `${name}: measured`, timings: answer.ttft_ms });
    if (answer.predicted_ms) rows.push({ label: `${name}: predicted`, timings: answer.predicted_ms, predicted: true });
  }
  fill("times", drawTimes(rows, byId("times").clientWidth), inDetails("Numbers", timesTable(rows), "Times in milliseconds"));
  const parts = [...new Set(rows.flatMap((row) => partsOf(row.timings).map(({ part }) => part)))];
  fill("times-legend", ...parts.map((part) => element("li", {}, element("i", { class: `part-${part}` }), PART_NAMES[part])));
}

function showRepeat() {
  const command = (title, text) => (text ? element("div", { class: "command" }, element("h3", {}, title), element("code", {}, text)) : null);
  const answers = [...new Set([fullAnswer, ...sides.map((side) => answerOf(side).answer)].filter(Boolean))];
  fill("repeat", ...[command("The whole page", data.command), ...answers.map((answer) => command(
    answer === fullAnswer ? "The answer with all visual tokens" : `The answer of ${answer.pruner}, ${budgetText(answer.budget)}`,
    answer.command))].filter(Boolean));
}

function show() {
  if (state.budget) {
    const text = places[state.place] === null ? "all visual tokens" : budgetText(places[state.place]);
    state.budget.shown.textContent = text;
    state.budget.input.value = state.place;
    state.budget.input.setAttribute("aria-valuetext", text);
  }
  sides.forEach(showPanel);
  showDetails();
}

// What is below the pictures follows in the next frame, so that the slider never waits for it.
function showDetails() {
  cancelAnimationFrame(state.frame);
  state.frame = requestAnimationFrame(() => {
    const width = parseFloat(getComputedStyle(byId("flows")).gridTemplateColumns); // of the first column
    fill("answers", ...sides.map((side) => titled(side, answerBlock(answerOf(side).answer),
      element("p", { class: "verdict" }, verdict(answerOf(side).answer)))));
    fill("flows", ...sides.map((side) => titled(side, drawFlow(answerOf(side).answer, width),
      element("p", { class: "verdict" }, flowText(answerOf(side).answer)))));
    fill("odds", ...sides.map((side) => titled(side, oddsBlock(answerOf(side).answer, width, `side ${side.name}`))));
    showWords();
    showTimes();
    showRepeat();
  });
}

function choose(answer) {
  Object.assign(sides[0], { method: answer.pruner, step: null, word: null });
  sides[0].chooser.querySelector("select").value = answer.pruner;
  state.place = Math.max(0, placeOf(answer.budget));
  show();
  sides[0].picture.canvas.focus();
}

function start() {
  const tokens = data.views.reduce((sum, view) => sum + view.tokens, 0);
  byId("prompt").textContent = data.prompt || "An answer about a picture";
  byId("prompt").classList.toggle("long", data.prompt.length > 160);
  byId("lead").textContent = `${data.model ? `${data.model}: ` : ""}${many(tokens, "visual token")}, ${data.depth} layers in the language model.`;
  byId("odds-about").textContent = "Log-probability in nats of each token of the full answer: rings with all visual tokens, dots with those that were kept. "
    + "A dot below its ring: pruning made this token less likely. 0 nats is a probability of 1, -0.7 of a half, -2.3 of a tenth.";
  byId("odds-section").hidden = !data.answers.some((answer) => answer.logprobs);
  byId("times-about").textContent = `In milliseconds, on ${data.machine.cpu} (${data.machine.cores} cores, ${data.machine.device}); ${data.timing}.`
    + (data.answers.some((answer) => answer.predicted_ms) ? ` Predicted bars come from ${data.prediction}.` : "");
  makeControls();
  byId("panels").append(...sides.map(makePanel));
  document.querySelectorAll(".pair").forEach((pair) => pair.classList.toggle("single", sides.length < 2));
  if (fullAnswer) {
    fill("full-answer", element("h3", {}, "All visual tokens"), answerBlock(fullAnswer),
      element("p", { class: "verdict" }, verdict(fullAnswer)));
  }
  fill("all", allTable(choose));
  fill("refused", ...data.refused.map((row) => element("p", { class: "quiet" },
    `${row.pruner}${row.budget ? `, ${budgetText(row.budget)}` : ""} was refused: ${row.why}`)));
  const versions = Object.entries(data.versions).filter(([, version]) => version).map(([name, version]) => `${name} ${version}`);
  const units = Object.entries(data.units).map(([name, unit]) => `${name} in ${unit}`).join("; ");
  fill("machine", `${data.machine.system}, ${data.machine.cpu}. ${versions.join(", ")}.`,
    element("details", {}, element("summary", {}, "Units of the data"), `${units}.`));
  const themes = { automatic: "light", light: "dark", dark: "automatic" };
  let theme = "automatic";
  byId("theme").addEventListener("click", () => {
    theme = themes[theme];
    if (theme === "automatic") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (width !== window.innerWidth) { width = window.innerWidth; showDetails(); } });
  show();
  document.documentElement.dataset.ready = "true";
}

Promise.all(images.map((image) => image.decode())).then(start, start);
