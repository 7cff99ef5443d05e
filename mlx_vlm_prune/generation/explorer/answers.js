// The answers beside the full one, with what differs; tables of all that the charts draw.

// Which of the words of `b` are in a longest common subsequence with `a`, and what of `a` is not.
function differences(a, b) {
  const longest = Array.from({ length: a.length + 1 }, () => new Int32Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const pieces = [];
  let [i, j] = [0, 0];
  const add = (kind, text) => {
    const last = pieces[pieces.length - 1];
    if (last && last.kind === kind) last.text += text;
    else pieces.push({ kind, text });
  };
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { add("same", b[j]); i += 1; j += 1; }
    else if (j >= b.length || (i < a.length && longest[i + 1][j] >= longest[i][j + 1])) { add("missing", a[i]); i += 1; }
    else { add("other", b[j]); j += 1; }
  }
  return pieces;
}

function wordsOf(text) {
  return text.match(/\s*\S+|\s+$/g) || [];
}

function answerBlock(answer) {
  const block = element("div", { class: "answer" });
  if (!fullAnswer || answer === fullAnswer) {
    block.append(answer.text || "(empty)");
    return block;
  }
  for (const piece of differences(wordsOf(fullAnswer.text), wordsOf(answer.text))) {
    if (piece.kind === "same") block.append(piece.text);
    else block.append(element(piece.kind === "other" ? "mark" : "del", {}, piece.text));
  }
  if (!answer.text) block.append("(empty)");
  return block;
}

function verdict(answer) {
  if (!fullAnswer || answer === fullAnswer) {
    return `${many(answer.generation_tokens, "token")}, ended by ${answer.finish_reason}.`;
  }
  const same = answer.text === fullAnswer.text;
  return same ? "The same answer as with all visual tokens."
    : "Another answer: marked words are not in the full one, struck ones only there.";
}

function table(heads, rows, textColumns = [0]) {
  const head = element("tr", {}, ...heads.map((text, i) => element("th",
    { scope: "col", class: textColumns.includes(i) ? "text" : null }, text)));
  const lines = rows.map((cells) => element("tr", {}, ...cells.map((cell, i) => element("td",
    { class: textColumns.includes(i) ? "text" : null }, cell))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines));
}

function inDetails(title, content, label) {
  return element("details", {}, element("summary", {}, title),
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, content));
}

// The tokens of an answer with their log-probabilities, as a chart and a table.
function oddsBlock(answer, width, label) {
  const odds = answer.logprobs && answer.logprobs.full_answer;
  if (!odds || !fullAnswer || !odds.full.length) return element("p", { class: "quiet" }, "Not computed.");
  const tokens = fullAnswer.tokens || odds.full.map((_, i) => `token ${i + 1}`);
  const pruned = odds.pruned || odds.full;
  const rows = tokens.map((token, i) => [visible(token), nats(odds.full[i]), nats(pruned[i]), nats(pruned[i] - odds.full[i])]);
  const gaps = tokens.map((_, i) => pruned[i] - odds.full[i]);
  const worst = gaps.indexOf(Math.min(...gaps));
  const sum = gaps.reduce((total, gap) => total + gap, 0);
  const text = answer === fullAnswer ? "All visual tokens." : gaps[worst] < -0.0005
    ? `Most is lost at “${visible(tokens[worst])}”: ${nats(gaps[worst])} nats. The whole answer: ${nats(sum)} nats.`
    : `No token is less likely than with all visual tokens. The whole answer: ${nats(sum)} nats.`;
  const block = element("div", {}, element("p", { class: "verdict" }, text),
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Log-probabilities, ${label}` },
      drawOdds(tokens, { full: odds.full, pruned }, width)),
    inDetails("Numbers, full answer", table(["token", "full, nats", "pruned, nats", "difference"], rows),
      `Log-probabilities of the full answer, ${label}`));
  const own = answer.logprobs.answer;
  if (own && own.full.length && answer !== fullAnswer && answer.text !== fullAnswer.text) {
    const names = answer.tokens || own.full.map((_, i) => `token ${i + 1}`);
    block.append(inDetails("Numbers, this answer", table(["token", "full, nats", "pruned, nats", "difference"],
      names.map((token, i) => [visible(token), nats(own.full[i]), nats(own.pruned[i]), nats(own.pruned[i] - own.full[i])])),
    `Log-probabilities of the pruned answer, ${label}`));
  }
  return block;
}

function timesTable(rows) {
  const parts = PARTS.filter((part) => rows.some((row) => typeof row.timings[part] === "number"));
  return table(["", ...parts.map((part) => `${part}, ms`), "total, ms"],
    rows.map((row) => [row.label, ...parts.map((part) => rounded(row.timings[part])), rounded(row.timings.total)]));
}

// Every answer in a line; a method's name puts it on the left side of the page.
function allTable(choose) {
  const lost = (answer) => {
    const odds = answer.logprobs && answer.logprobs.full_answer;
    if (!odds || !odds.pruned) return "–";
    return nats(odds.pruned.reduce((sum, value, i) => sum + Number(value) - Number(odds.full[i]), 0));
  };
  const columns = [
    ["method", (answer) => (answer === fullAnswer ? "all visual tokens"
      : element("button", { class: "link", type: "button", onclick: () => choose(answer) }, answer.pruner))],
    ["budget", (answer) => budgetText(answer.budget)],
    ["answer", (answer) => answer.text],
    ["tokens, mean of layers", (answer) => String(meanTokens(answer))],
    ["first token, ms", (answer) => rounded(answer.ttft_ms.total)],
    ["predicted, ms", (answer) => rounded(answer.predicted_ms && answer.predicted_ms.total)],
    ["cache, MB", (answer) => rounded(answer.cache_bytes / 1e6)],
    ["full answer, nats lost or won", lost],
  ];
  // A column that no answer has anything for is left out.
  const shown = columns.filter(([, cell]) => data.answers.some((answer) => cell(answer) !== "–"));
  return table(shown.map(([heading]) => heading), data.answers.map((answer) => shown.map(([, cell]) => cell(answer))),
    [0, shown.findIndex(([heading]) => heading === "answer")]);
}
