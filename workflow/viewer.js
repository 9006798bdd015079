// The page of all samples. The URL's hash is its state. What models wrote becomes text nodes; nothing parses HTML.
"use strict";

const ROW = 54; // pixels from one row of the list to the next, as in the style sheet
const KEPT = 40; // files of texts in memory
const MOST_TAGS = 50; // a text with more has none of them made faint: a model may write thousands
const ORDERS = { "": "question", fewest: "fewest tokens", most: "most tokens", hardest: "hardest first" };

let index; // what samples/index.js passes to start()
let facets; // what can be filtered by a column of the index
let solved; // share of right samples, by model and question
let haystack; // questions in lower case, once somebody searches
let state = {}; // task, model, verdict, finish, strict, change, q, sort; at: the sample; view, fold: how it is shown
let found = []; // rows that pass the filters, in order
let current = -1; // the row that is shown
let shown = 0; // counts what was asked to be shown, because texts arrive later
const files = new Map(); // number of a file: promise of its texts; the last used comes last
const waiting = new Map(); // number of a file that is being loaded: what to do with its texts

const byId = (id) => document.getElementById(id);
const digits = (number) => number.toLocaleString("en");
const count = (number, noun) => `${digits(number)} ${noun}${number === 1 ? "" : "s"}`;
const plain = (reason) => reason.replaceAll("_", " ");

/** An element; attributes that begin with "on" are listeners, children are elements or text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Texts

/** The texts in a file, from memory or by a script element. */
function load(number) {
  const texts = files.get(number) ?? new Promise((resolve, reject) => {
    const src = `samples/${String(number).padStart(4, "0")}.js`;
    const script = element("script", { src });
    waiting.set(number, resolve);
    script.onload = () => script.remove();
    script.onerror = () => {
      script.remove();
      files.delete(number);
      waiting.delete(number);
      reject(new Error(`${src} cannot be read; keep the folder samples beside this page, or run the report again.`));
    };
    document.head.append(script);
  });
  files.delete(number);
  files.set(number, texts);
  return texts;
}

/** Called by each file of texts. The one that was used longest ago goes where there are too many. */
function addTexts(number, texts) {
  waiting.get(number)(texts);
  waiting.delete(number);
  if (files.size > KEPT) files.delete([...files.keys()].find((other) => !waiting.has(other)));
}

/** One row of the index with its texts. */
async function sampleOf(row) {
  const file = index.starts.findLastIndex((first) => first <= row);
  const texts = await load(file);
  const { question, model, sample, tokens, verdict, finish, strict } = index.rows;
  const [id, task] = index.questions[question[row]];
  const [completion, extracted, seed, taught] = texts.samples[row - index.starts[file]];
  const [reason, correct, sentence] = index.verdicts[verdict[row]];
  // What follows the last end of a thought is the answer, which was judged.
  const end = completion.lastIndexOf(index.endOfThought);
  const answer = end < 0 ? completion : completion.slice(end + index.endOfThought.length).trimStart();
  return {
    row, id, extracted, seed, taught, reason, correct, sentence, answer, ...texts.questions[question[row]],
    task: index.tasks[task][0], maxTokens: index.tasks[task][1], model: index.models[model[row]],
    sample: sample[row], tokens: tokens[row], finish: index.finishes[finish[row]], strict: strict[row],
    thoughts: completion.slice(0, completion.length - answer.length),
  };
}

// State

const filterNames = () => [...facets.map((facet) => facet.name), "change", "q"];

/** Name of a row in a link: model/task/question/sample. */
function nameOf(row) {
  const { question, model, sample } = index.rows;
  const [id, task] = index.questions[question[row]];
  return [index.models[model[row]], index.tasks[task][0], id, sample[row]].join("/");
}

/** The row of such a name, -1 where there is none. */
function rowOf(name) {
  const [model, task, ...rest] = name.split("/");
  const sample = Number(rest.pop());
  const id = rest.join("/");
  const n = index.questions.findIndex(([own, number]) => own === id && index.tasks[number][0] === task);
  const m = index.models.indexOf(model);
  const { rows } = index;
  return rows.question.findIndex((own, row) => own === n && rows.model[row] === m && rows.sample[row] === sample);
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const names = [...filterNames(), "sort", "at", "view", "fold"];
  return Object.fromEntries(names.map((name) => [name, given.get(name) ?? ""]));
}

/** Change the state and its link; `step` makes it one that the browser's Back returns from. */
function go(changes, step = false) {
  const next = { ...state, ...changes };
  const given = new URLSearchParams(Object.entries(next).filter(([, value]) => value));
  const url = `#${String(given).replaceAll("%2F", "/")}`;
  if (step) history.pushState(null, "", url);
  else history.replaceState(null, "", url);
  show(next);
}

/** Change a filter; the sample stays where it passes. */
function filterBy(changes) {
  const rows = filter({ ...state, ...changes }).rows;
  go({ ...changes, at: state.at && rows.includes(current) ? state.at : "" });
}

const clearFilters = () => filterBy(Object.fromEntries(filterNames().map((name) => [name, ""])));
const openRow = (row) => go({ at: nameOf(row) }, !state.at);
const toggleView = () => go({ at: nameOf(current), view: state.view ? "" : "question" }, true);

/** Show a state: the list where its filters are new, and the sample. */
function show(next) {
  const before = state;
  state = next;
  if ([...filterNames(), "sort"].some((name) => before[name] !== state[name])) {
    const { rows, counts } = filter(state);
    found = sorted(rows);
    drawFilters(counts);
    drawCount();
    byId("list").scrollTop = 0;
  }
  current = state.at ? rowOf(state.at) : found[0] ?? -1;
  document.body.classList.toggle("reading", state.at !== "");
  byId("floor").style.height = `${found.length * ROW}px`;
  scrollToCurrent();
  drawList();
  if (Object.keys(state).some((name) => name !== "fold" && before[name] !== state[name])) drawDetail();
}

// Filters

const passes = (facet, wanted, code) => !wanted || facet.passes(wanted, code);

/** The rows that pass, and for each value of each facet how many rows pass all other facets. */
function filter(wanted) {
  const { question } = index.rows;
  const asked = questionsThatPass(wanted);
  const allowed = facets.map((facet) => facet.names.map((_, code) => passes(facet, wanted[facet.name], code)));
  const counts = facets.map((facet) => facet.names.map(() => 0));
  const rows = [];
  for (let row = 0; row < question.length; row++) {
    if (!asked[question[row]]) continue;
    let failed = -1;
    let failures = 0;
    for (let f = 0; f < facets.length; f++) {
      if (!allowed[f][facets[f].column[row]]) {
        failed = f;
        failures++;
      }
    }
    if (failures === 0) rows.push(row);
    for (let f = 0; f < facets.length; f++) {
      if (failures === 0 || (failures === 1 && failed === f)) counts[f][facets[f].column[row]]++;
    }
  }
  return { rows, counts };
}

/** For each question whether it has all words of the search and changed between the models as wanted. */
function questionsThatPass({ q, change }) {
  const words = q.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length) haystack ??= index.questions.map(([id, , text]) => `${id} ${text}`.toLowerCase());
  const [how, first, second] = change.split("/");
  const a = solved[index.models.indexOf(first)];
  const b = solved[index.models.indexOf(second)];
  return index.questions.map((_, n) => {
    if (change && !(a && b && (how === "won" ? b[n] > a[n] : b[n] < a[n]))) return false;
    return words.every((word) => haystack[n].includes(word));
  });
}

function sorted(rows) {
  const { question, tokens } = index.rows;
  if (state.sort === "fewest") rows.sort((a, b) => tokens[a] - tokens[b]);
  if (state.sort === "most") rows.sort((a, b) => tokens[b] - tokens[a]);
  if (state.sort === "hardest") {
    const ease = index.questions.map((_, n) => solved.reduce((sum, shares) => sum + (shares[n] || 0), 0));
    rows.sort((a, b) => ease[question[a]] - ease[question[b]] || a - b);
  }
  return rows;
}

function drawFilters(counts) {
  facets.forEach((facet, f) => {
    for (const option of byId(facet.name).options) {
      const number = counts[f].reduce((sum, rows, code) => sum + (passes(facet, option.value, code) ? rows : 0), 0);
      const chosen = option.value === state[facet.name];
      option.textContent = chosen ? option.dataset.label : `${option.dataset.label} (${digits(number)})`;
    }
  });
  for (const name of [...filterNames(), "sort"]) {
    const control = byId(name);
    if (control.value !== state[name]) control.value = state[name];
    control.classList.toggle("set", state[name] !== "" && name !== "sort");
  }
}

function drawCount() {
  const right = found.filter((row) => index.verdicts[index.rows.verdict[row]][1]).length;
  const all = index.rows.question.length;
  const part = found.length === all ? "" : `${digits(found.length)} of `;
  byId("number").textContent = `${part}${count(all, "sample")}, ${digits(right)} correct`;
  byId("clear").hidden = !filterNames().some((name) => state[name]);
}

function buildFilters() {
  const field = (label, control, hidden) => element("label", { hidden: hidden && "" }, label, control);
  const option = ([value, label]) => element("option", { value, "data-label": label }, label);
  const select = (name, options, choose) => {
    const onchange = (event) => choose({ [name]: event.target.value });
    return element("select", { id: name, onchange }, ...options.map(option));
  };
  const changes = index.models.slice(1).flatMap((model, n) => [
    [`won/${index.models[n]}/${model}`, `${model} better than ${index.models[n]}`],
    [`lost/${index.models[n]}/${model}`, `${model} worse than ${index.models[n]}`],
  ]);
  const search = element("input", {
    id: "q", type: "search", autocomplete: "off", spellcheck: "false", placeholder: "question id or words",
    oninput: (event) => filterBy({ q: event.target.value }),
  });
  const limit = index.searched ? ` (first ${digits(index.searched)} characters)` : "";
  byId("filters").append(
    field(`Search${limit}`, search, false),
    ...facets.map(({ name, label, options }) =>
      field(label, select(name, [["", "all"], ...options], filterBy), options.length < 2)),
    field("Questions", select("change", [["", "all"], ...changes], filterBy), changes.length === 0),
    field("Order", select("sort", Object.entries(ORDERS), go), false),
  );
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
}

// List

function mark(correct) {
  const [kind, label, sign] = correct ? ["good", "correct", "\u2713"] : ["bad", "not correct", "\u2717"];
  return element("span", { class: `mark ${kind}`, role: "img", "aria-label": label }, sign);
}

/** The rows that are in view, and some around them. */
function drawList() {
  const list = byId("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const end = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const rows = found.slice(first, end).map((row, n) => {
    const [, task, text] = index.questions[index.rows.question[row]];
    const [reason, correct] = index.verdicts[index.rows.verdict[row]];
    const who = [
      `${index.models[index.rows.model[row]]} #${index.rows.sample[row]}`,
      ...(index.tasks.length > 1 ? [index.tasks[task][0]] : []),
      ...(correct ? [] : [plain(reason)]),
    ];
    return element(
      "div",
      {
        class: "row", role: "option", id: `row-${row}`, "aria-selected": String(row === current),
        "aria-posinset": first + n + 1, "aria-setsize": found.length, onclick: () => openRow(row),
      },
      mark(correct),
      element("span", { class: "what" }, text.slice(0, 200)),
      element("span", { class: "who" }, who.join(" \u00b7 ")),
      element("span", { class: "much" }, count(index.rows.tokens[row], "token")),
    );
  });
  rows.forEach((row, n) => (row.style.top = `${(first + n) * ROW}px`));
  list.replaceChildren(byId("floor"), ...rows);
  list.setAttribute("aria-activedescendant", `row-${current}`);
}

/** Just into view where it is near, into the middle where it is far. */
function scrollToCurrent() {
  const list = byId("list");
  const top = found.indexOf(current) * ROW;
  const last = top + ROW - list.clientHeight;
  if (top < 0) return;
  if (top < list.scrollTop - ROW || last > list.scrollTop + ROW) list.scrollTop = (top + last) / 2;
  else list.scrollTop = Math.min(top, Math.max(last, list.scrollTop));
}

/** The next row of the list, or the one before; beside each other, of the next question. */
function move(by) {
  const { question } = index.rows;
  let place = found.indexOf(current) + by;
  while (state.view && question[found[place]] === question[current]) place += by;
  if (found[place] !== undefined) go({ at: nameOf(found[place]) });
}

// Sample

const capital = (sentence) => sentence[0].toUpperCase() + sentence.slice(1);
const term = (name, ...value) => element("div", {}, element("dt", {}, name), element("dd", {}, ...value));
const none = (text) => element("span", { class: "none" }, text);

/** Text with the tags of the taught format made faint; nothing is left out. */
function tagged(text) {
  const parts = text.split(/(<\/?(?:think|answer)>)/);
  if (parts.length > 2 * MOST_TAGS) return [text];
  return parts.map((part, n) => (n % 2 ? element("span", { class: "tag" }, part) : part));
}

const textBlock = (text, attributes = {}) =>
  element("pre", { class: "text", tabindex: "0", ...attributes }, ...tagged(text));

/** A block that can grow when its text is longer than it is. */
function longBlock(text, name) {
  if (!text) return none("empty");
  const block = textBlock(text, { class: "text long", id: name, role: "group", "aria-label": name });
  const toggle = element("button", { class: "link more", type: "button", "aria-controls": name }, "Show in full");
  toggle.addEventListener("click", () => {
    toggle.textContent = block.classList.toggle("long") ? "Show in full" : "Show less";
  });
  const fits = () => block.matches(".long") && block.scrollHeight <= block.clientHeight;
  new ResizeObserver(() => (toggle.hidden = fits())).observe(block);
  return element("div", {}, block, toggle);
}

const characters = (text) => element("small", {}, count(text.length, "character"));

function question(sample) {
  const last = sample.messages.length - 1;
  return sample.messages.map(([role, content], n) => {
    if (role === "system") {
      return element("details", { class: "fold" }, element("summary", {}, "System prompt"), textBlock(content));
    }
    const block = element("div", { class: "text" }, content);
    return n === last ? block : element("div", {}, element("p", { class: "role" }, role), block);
  });
}

/** Why it counts as it does, beyond the verdict itself. */
function explanation({ thoughts, finish, tokens, correct, strict, taught }) {
  const end = index.endOfThought;
  const judged = thoughts ? `What follows the last ${end} was judged.` : `There is no ${end}, so all of it was judged.`;
  const cut = finish === "length" ? ` It was cut off at ${count(tokens, "token")}.` : "";
  if (!correct) return judged + cut;
  if (strict) return `${judged}${cut} Strict too: it is in the taught format.`;
  const flaw = taught ? "its <answer> alone does not equal the gold answer" : "it is not in the taught format";
  return `${judged}${cut} Not strict: ${flaw}.`;
}

/** Terms and texts, in two columns. */
const pairs = (texts) =>
  element("dl", { class: "pairs" }, ...texts.flatMap(([name, id, text]) => [
    element("dt", {}, name), element("dd", { class: "text mono", id }, text || none("nothing")),
  ]));

function detail(sample) {
  const { correct, reason, sentence, thoughts, answer } = sample;
  const folded = element("details", { open: state.fold === "" && "" });
  folded.append(element("summary", {}, "Thoughts", characters(thoughts)), longBlock(thoughts, "thoughts"));
  folded.addEventListener("toggle", () => {
    if (folded.isConnected && folded.open !== (state.fold === "")) go({ fold: folded.open ? "" : "1" });
  });
  const verdict = element("span", { class: correct ? "good" : "bad" }, ` ${capital(plain(reason))}`);
  return [
    element("h2", {}, mark(correct), verdict, `: ${sentence}`),
    element("p", { class: "why" }, explanation(sample)),
    element(
      "dl", { class: "facts" },
      term("Model", sample.model), term("Task", sample.task),
      term("Question", sample.id), term("Sample", String(sample.sample)),
      term("Tokens", `${digits(sample.tokens)}, limit ${digits(sample.maxTokens)}`),
      term("Finish reason", sample.finish), term("Strict", sample.strict ? "yes" : "no"),
      term("Seed", String(sample.seed)),
    ),
    pairs([["Read as", "extracted", sample.extracted], ["Gold", "gold", sample.gold]]),
    element("h3", {}, "Question"),
    element("div", { id: "question" }, ...question(sample)),
    ...(thoughts ? [folded] : []),
    element("h3", {}, thoughts ? "Answer" : "Completion", characters(answer)),
    longBlock(answer, "answer"),
  ];
}

/** All samples of one question, a column for each model. */
function comparison(samples) {
  const columns = index.models.map((model) => {
    const own = samples.filter((sample) => sample.model === model);
    const right = own.filter((sample) => sample.correct).length;
    const tokens = own.reduce((sum, sample) => sum + sample.tokens, 0) / own.length;
    const summary = `${right} of ${own.length} correct, ${count(Math.round(tokens), "token")} on average`;
    const title = element("h3", {}, model, element("small", {}, own.length ? summary : "not asked"));
    return element("section", { "aria-label": model }, title, ...own.map(card));
  });
  return [
    element("h3", {}, "Question", element("small", {}, samples[0].id)),
    element("div", { id: "question" }, ...question(samples[0])),
    pairs([["Gold", "gold", samples[0].gold]]),
    element("div", { class: "columns" }, ...columns),
  ];
}

function card({ row, sample, correct, reason, extracted, tokens, finish, thoughts, answer }) {
  const folded = element("details", { class: "fold" }, element("summary", {}, "Thoughts", characters(thoughts)));
  folded.addEventListener("toggle", () => folded.append(textBlock(thoughts)), { once: true });
  const open = () => {
    go({ at: nameOf(row), view: "" }, true);
    byId("detail").focus();
  };
  const read = extracted ? element("b", {}, extracted) : none("nothing");
  return element(
    "article", { class: row === current ? "card current" : "card" },
    element(
      "p", {},
      element("span", {}, mark(correct), ` ${plain(reason)}`),
      element("button", { class: "link", type: "button", onclick: open }, `sample ${sample}`),
    ),
    element(
      "p", {},
      element("span", { class: "text" }, "read as ", read),
      element("span", {}, `${count(tokens, "token")}, ${finish}`),
    ),
    ...(thoughts ? [folded] : []),
    answer ? textBlock(answer) : none("empty"),
  );
}

async function drawDetail() {
  const ticket = ++shown;
  const place = found.indexOf(current);
  const { question } = index.rows;
  const first = question.indexOf(question[current]);
  const rows = question.slice(first, question.lastIndexOf(question[current]) + 1).map((_, n) => first + n);
  byId("previous").disabled = place <= 0;
  byId("next").disabled = place < 0 || place === found.length - 1;
  byId("place").textContent = place < 0 ? "not in the list" : `${digits(place + 1)} of ${digits(found.length)}`;
  const all = `All ${count(rows.length, "sample")} of this question`;
  byId("compare").textContent = state.view ? "Back to the sample" : all;
  byId("compare").hidden = current < 0;
  const fill = (...content) => {
    byId("shown").replaceChildren(...content);
    byId("detail").scrollTop = 0;
  };
  if (current < 0) {
    const lost = `This link names the sample ${state.at}, which is not in this run.`;
    return fill(element("p", { class: "message" }, state.at ? lost : "No sample passes these filters."));
  }
  try {
    const samples = await Promise.all((state.view ? rows : [current]).map(sampleOf));
    const content = () => (state.view ? comparison(samples) : detail(samples[0]));
    if (ticket === shown) fill(element("article", { "data-at": nameOf(current) }, ...content()));
  } catch (error) {
    if (ticket === shown) fill(element("p", { class: "message" }, error.message));
  }
}

// Start

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.target.id === "q" && ["Escape", "Enter"].includes(event.key)) byId("list").focus();
    return;
  }
  const scrolls = event.target.matches("pre") && event.target.scrollHeight > event.target.clientHeight;
  const keys = {
    j: () => move(1), k: () => move(-1), c: toggleView, "/": () => byId("q").focus(),
    ...(scrolls ? {} : { ArrowDown: () => move(1), ArrowUp: () => move(-1) }),
    ...(state.view ? { Escape: toggleView } : {}),
  };
  if (event.target.id === "list") {
    keys.Home = () => openRow(found[0]);
    keys.End = () => openRow(found.at(-1));
    keys.Enter = () => openRow(current);
  }
  if (!keys[event.key] || (current < 0 && event.key !== "/")) return;
  event.preventDefault();
  keys[event.key]();
}

/** Called by samples/index.js. */
function start(given) {
  index = given;
  const { question, model, verdict } = index.rows;
  const facet = (name, label, column, names) => ({
    name, label, column, names,
    options: names.map((value) => [value, value]),
    passes: (wanted, code) => names[code] === wanted,
  });
  facets = [
    facet("task", "Task", question.map((n) => index.questions[n][1]), index.tasks.map(([name]) => name)),
    facet("model", "Model", model, index.models),
    facet("verdict", "Verdict", verdict, index.verdicts.map(([reason]) => reason)),
    facet("finish", "Finish reason", index.rows.finish, index.finishes),
    facet("strict", "Strict", index.rows.strict, ["no", "yes"]),
  ];
  const wrong = index.verdicts.filter(([, correct]) => !correct).map(([reason]) => [reason, plain(reason)]);
  facets[2].options = [["correct", "correct"], ["incorrect", "not correct"], ...wrong];
  facets[2].passes = (wanted, code) => {
    const [reason, correct] = index.verdicts[code];
    return wanted === "correct" ? correct : !correct && (wanted === "incorrect" || wanted === reason);
  };
  const right = index.models.map(() => index.questions.map(() => 0));
  const asked = index.models.map(() => index.questions.map(() => 0));
  question.forEach((n, row) => {
    asked[model[row]][n]++;
    if (index.verdicts[verdict[row]][1]) right[model[row]][n]++;
  });
  solved = right.map((counts, m) => counts.map((number, n) => number / asked[m][n]));
  buildFilters();
  byId("clear").addEventListener("click", clearFilters);
  byId("back").addEventListener("click", () => go({ at: "", view: "" }));
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  byId("compare").addEventListener("click", toggleView);
  byId("list").addEventListener("scroll", drawList);
  addEventListener("resize", drawList);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => show(readHash()));
  show(readHash());
}
