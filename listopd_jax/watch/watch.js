"use strict";
// Everything shown is text: model output and names of files become text nodes, never markup.
const EVERY_MS = 3000;
const STAGES = { sft_teacher: "SFT teacher", sft_student: "SFT student" };
const SVG = "http://www.w3.org/2000/svg";
const drawn = {}; // section -> the data that it shows

const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
const fill = (element, attributes, children) => {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return element;
};

const known = (value) => value !== null && value !== undefined;
const decimal = (value) => (known(value) ? value.toFixed(3) : "–");
const percent = (value) => (known(value) ? `${(100 * value).toFixed(0)} %` : "–");
const short = (value) => (Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.01) ? value.toExponential(1) : String(+value.toPrecision(3)));
const duration = (seconds) => {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
};

function show(id, data, isEmpty, build) {
  const section = document.getElementById(id), now = JSON.stringify(data);
  if (drawn[id] === now) return; // what has not changed keeps its scroll, focus and open details
  drawn[id] = now;
  section.hidden = isEmpty;
  section.querySelector("div").replaceChildren(...(isEmpty ? [] : build()));
}

function table(head, rows) {
  const top = make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col", class: name === "state" ? "words" : "" }, name))));
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, top, make("tbody", {}, ...rows)));
}

// --- what is running

function headline(state) {
  const entry = state.workdirs.find((one) => one.name === state.chosen);
  document.getElementById("root").textContent = state.root;
  const words = entry ? sentence(entry) : ["No run here yet", "A run appears as soon as it has written its config.json."];
  document.getElementById("headline").textContent = words[0];
  document.getElementById("detail").textContent = words[1];
  document.title = entry ? `${words[0]} · ${entry.label}` : words[0];
  const share = entry && entry.total ? (100 * entry.done) / entry.total : 0;
  const bar = document.getElementById("bar");
  bar.hidden = !(entry && entry.total);
  bar.setAttribute("aria-valuenow", share.toFixed(0));
  bar.firstElementChild.style.width = `${share}%`;
}

function sentence(entry) {
  const name = entry.label === "." ? "" : `${entry.label}: `;
  if (entry.state === "broken" || entry.state === "failed") return [`${name}${entry.state}`, entry.why];
  const steps = entry.total ? `${entry.done.toLocaleString("en")} of ${entry.total.toLocaleString("en")} training steps` : "";
  if (entry.state === "done") return [`${name}done`, steps];
  if (entry.state === "waiting") return [`${name}waiting`, ""];
  const eta = known(entry.eta) ? `about ${duration(entry.eta)} of this stage’s training left` : "";
  const stage = entry.state === "running" ? entry.stage : `stopped while ${entry.stage}; the same command resumes`;
  return [`${name}${stage}`, [steps, eta].filter(Boolean).join(" · ")];
}

// --- the grid

function grids(state) {
  const groups = new Map();
  for (const entry of state.workdirs) {
    const name = entry.name.startsWith("points/") ? "points" : entry.name;
    for (const run of entry.runs) if (run.stage === "opd") groups.set(name, [...(groups.get(name) ?? []), { ...run, workdir: entry.name }]);
  }
  return [...groups].map(([name, runs]) => ({ name, runs }));
}

const column = (run) => `λ = ${run.lambda}${run.plain ? ", plain" : ""}`;

function matrix({ name, runs }, titled) {
  const columns = [...new Map(runs.map((run) => [column(run), run])).values()].sort((a, b) => a.lambda - b.lambda || b.plain - a.plain);
  const seeds = [...new Set(runs.map((run) => run.seed))].sort((a, b) => a - b);
  const head = make("tr", {}, make("th"), ...columns.map((run) => make("th", { scope: "col" }, column(run))));
  const rows = seeds.map((seed) => {
    const cells = columns.map((of) => cell(runs.find((run) => column(run) === column(of) && run.seed === seed)));
    return make("tr", {}, make("th", { scope: "row" }, `seed ${seed}`), ...cells);
  });
  const cells = make("table", { class: "cells" }, make("thead", {}, head), make("tbody", {}, ...rows));
  return [titled ? make("p", { class: "group" }, name) : null, make("div", { class: "scroll", tabindex: "0" }, cells)].filter(Boolean);
}

function cell(run) {
  if (!run) return make("td", { class: "waiting" }, "–");
  if (run.state === "done") return make("td", { class: "done" }, percent(run.parse), make("small", {}, `useful ${decimal(run.useful)}`));
  return make("td", { class: run.state }, run.step ? `${run.step} of ${run.steps}` : "·", make("small", {}, run.state));
}

function workdirRows(state) {
  return state.workdirs.map((entry) => {
    const link = make("a", { href: `#${encodeURIComponent(entry.name)}` }, entry.label);
    const report = entry.report ? make("a", { href: `/report?workdir=${encodeURIComponent(entry.name)}` }, "report") : "–";
    const about = entry.why ? make("td", { class: "why" }, entry.why) : make("td", { class: "words" }, entry.stage || "");
    const done = entry.total ? percent(entry.done / entry.total) : "–";
    const state_ = make("td", { class: "words" }, make("span", { class: `pill ${entry.state}` }, entry.state));
    const chosen = entry.name === state.chosen ? { class: "chosen" } : {};
    return make("tr", chosen, make("th", { scope: "row" }, link), state_, make("td", {}, done), make("td", {}, report), about);
  });
}

// --- curves

const curveName = (curve) => (curve.lambda === null ? STAGES[curve.stage] ?? curve.stage : `λ = ${curve.lambda}`);

function looks(figures) {
  const lambdas = [...new Set(figures.flatMap((figure) => figure.curves).map((c) => c.lambda).filter(known))].sort((a, b) => a - b);
  const place = (lam) => (lambdas.length > 1 ? Math.round((7 * lambdas.indexOf(lam)) / (lambdas.length - 1)) : 4);
  return (curve) => (curve.lambda === null ? (curve.stage === "sft_teacher" ? "teacher" : "student") : `r${place(curve.lambda)}`);
}

function plots(figures) {
  const look = looks(figures), entries = new Map();
  for (const curve of figures.flatMap((figure) => figure.curves)) entries.set(curveName(curve), look(curve));
  const legend = [...entries].map(([name, kind]) => {
    const sample = draw("svg", { viewBox: "0 0 20 4", "aria-hidden": "true" }, draw("rect", { width: 20, height: 4, rx: 2, class: kind }));
    return make("li", {}, sample, name);
  });
  return [make("ul", { class: "legend" }, ...legend), make("div", { class: "plots" }, ...figures.map((figure) => plot(figure, look)))];
}

function plot({ metric, title, curves }, look) {
  const [width, height, left, bottom] = [300, 160, 38, 20];
  const all = curves.flatMap((curve) => curve.points);
  const last = Math.max(...all.map(([step]) => step)), values = all.map(([, value]) => value);
  const [low, high] = metric === "parse" ? [0, 1] : nice(Math.min(...values), Math.max(...values));
  const x = (step) => left + ((width - left - 6) * (step - 1)) / Math.max(1, last - 1);
  const y = (value) => height - bottom - ((height - bottom - 8) * (value - low)) / (high - low || 1);
  const ticks = [0, 0.5, 1].map((share) => low + share * (high - low)).flatMap((value) => [
    draw("line", { x1: left, x2: width - 6, y1: y(value), y2: y(value), class: "gridline" }),
    draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, metric === "parse" ? percent(value) : short(value)),
  ]);
  const ends = [[left, "start", "step 1"], [width - 6, "end", Math.round(last)]].map(([at, anchor, text]) =>
    draw("text", { x: at, y: height - 4, "text-anchor": anchor }, text));
  const lines = curves.map((curve) =>
    draw("polyline", { class: `line ${look(curve)}`, points: curve.points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
  const newest = curves.map((curve) => `${curve.label} ${short(curve.points.at(-1)[1])}`).join("; ");
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${newest}` }, ...ticks, ...ends, ...lines);
  return make("figure", {}, make("h3", {}, title), svg);
}

function nice(low, high) {
  const unit = 10 ** Math.floor(Math.log10(Math.max(high - low, 1e-9)));
  return [Math.floor(low / unit) * unit, Math.ceil(high / unit) * unit];
}

// --- completions and results

function card(one) {
  const badge = make("b", { class: `badge ${one.failure === "ok" ? "ok" : "not"}` }, one.failure === "ok" ? "parses" : one.failure.replaceAll("_", " "));
  const prompt = make("details", {}, make("summary", {}, "Prompt"), make("pre", {}, one.prompt));
  return make("article", {}, make("h3", {}, one.label, badge, make("span", {}, `step ${one.step}`)), make("pre", {}, one.output || "(empty)"), prompt);
}

const resultRow = (one) => make("tr", {}, make("th", { scope: "row" }, one.label), ...[one.steps ?? "–", one.n ?? "–", percent(one.parse), decimal(one.useful), decimal(one["ndcg@1"])].map((text) => make("td", {}, text)));

// --- refreshing

function page(state) {
  headline(state);
  const found = grids(state);
  show("grid", found, !found.length, () => found.flatMap((group) => matrix(group, found.length > 1)));
  show("runs", [state.workdirs, state.chosen], !state.workdirs.length, () => [table(["workdir", "state", "done", "", ""], workdirRows(state))]);
  for (const stage of ["opd", "sft"]) {
    const figures = state.curves.filter((figure) => figure.stage === stage);
    show(stage, figures, !figures.length, () => plots(figures));
  }
  show("completions", state.completions, !state.completions.length, () => [make("div", { class: "cards" }, ...state.completions.map(card).reverse())]);
  show("results", state.results, !state.results.length, () => [table(["policy", "steps", "lists", "parse", "useful", "NDCG@1"], state.results.map(resultRow))]);
}

async function refresh() {
  const fresh = document.getElementById("fresh");
  try {
    const answer = await fetch(`/state.json?workdir=${encodeURIComponent(chosen())}`);
    if (!answer.ok) throw new Error(answer.status);
    page(await answer.json());
    fresh.textContent = `read ${new Date().toLocaleTimeString()}`;
    fresh.className = "";
  } catch {
    fresh.textContent = "the server does not answer";
    fresh.className = "lost";
  }
}

function chosen() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return ""; // a hash that is not a name
  }
}

addEventListener("hashchange", refresh);
setInterval(() => document.hidden || refresh(), EVERY_MS);
refresh();
