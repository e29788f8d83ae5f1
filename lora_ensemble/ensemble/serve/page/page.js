"use strict";
// Whatever a person or a member said goes in as text (textContent), never as HTML.

const at = (id) => document.getElementById(id);
const number = (value) => value.toFixed(3);
let ensemble; // what GET /ensemble says
let asking; // the AbortController of the question under way

/** The answer's JSON; an Error in words where there is none. */
async function fetched(path, options) {
  const response = await fetch(path, options).catch((e) => {
    throw e.name === "AbortError" ? e : new Error("The service does not answer. Is it still running?");
  });
  if (response.ok) return response.json();
  const { detail } = await response.json().catch(() => ({}));
  // A list of mistakes with their places: body, texts, which question, which text of a pair.
  if (Array.isArray(detail)) throw new Error(detail.map(({ loc, msg }) => `${name(loc[3] ?? 0)}: ${msg}.`).join(" "));
  throw new Error(`There is no answer: ${detail ?? response.statusText}.`);
}

/** What a text is called on the page. */
function name(column) {
  return ensemble.text.length === 1 ? "Text" : `${["First", "Second"][column]} text (${ensemble.text[column]})`;
}

async function begin() {
  ensemble = await fetched("ensemble");
  const { task, members, decides, text } = ensemble;
  document.title = `${task}: ask the ensemble`;
  at("title").textContent = `${task}: ${members.length} ${members.length === 1 ? "member" : "members"}`;
  const what = text.length === 1 ? "a text" : "a pair of texts";
  at("about").textContent = `Type ${what}, and see what each member says. The ensemble decides by ${decides}.`;
  at("first-name").textContent = name(0);
  if (text.length === 1) return;
  at("second-name").textContent = name(1);
  at("pair").hidden = at("second").disabled = false;
}

async function ask(event) {
  event.preventDefault();
  asking?.abort(); // only the latest question counts
  const mine = (asking = new AbortController());
  at("error").textContent = "";
  document.body.classList.add("waiting");
  try {
    if (!ensemble) await begin();
    at("status").textContent = "Asking …";
    const texts = [ensemble.text.length === 1 ? at("first").value : [at("first").value, at("second").value]];
    const { answers } = await fetched("predict", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ texts, members: true }),
      signal: mine.signal,
    });
    show(answers[0]);
  } catch (e) {
    if (e.name === "AbortError") return;
    at("answer").hidden = true;
    at("status").textContent = "";
    at("error").textContent = e.message;
  } finally {
    if (mine === asking) document.body.classList.remove("waiting");
  }
}

function show({ decision, probabilities, members }) {
  const valued = ensemble.kind === "regression";
  const several = Array.isArray(decision); // of several labels the names of those that are there
  const words = (d) => (Array.isArray(d) ? d.join(", ") || "none of the labels" : d);
  const said = members.map((m) => (several ? words(m.decision) : m.decision));
  const agree = said.filter((d) => d === words(decision)).length;
  const range = () => `${number(Math.min(...said))} to ${number(Math.max(...said))}`;
  at("status").textContent = valued
    ? `The ensemble says ${number(decision)}; its members say ${range()}.`
    : `The ensemble decides ${words(decision)}; ${agree} of ${said.length} members agree.`;
  const what = ensemble.decides.startsWith("the majority") ? "share of the votes" : "probability";
  const classes = valued ? [] : ensemble.labels.map((label) => [label, number(probabilities[label])]);
  fill("classes", "The ensemble", ["label", what], classes);
  const rows = members.map((m, i) => {
    const { rank, weight } = ensemble.members[i];
    const alike = (label) => m.decision.includes(label) === decision.includes(label);
    const share = () => ensemble.labels.filter(alike).length / ensemble.labels.length;
    const own = valued ? m.decision - decision : several ? share() : m.probabilities[m.decision];
    return [m.name, valued ? number(m.decision) : words(m.decision), number(own), rank ?? "–", number(weight)];
  });
  const own = valued ? "difference" : several ? "labels decided alike" : "own probability";
  fill("members", "The members", ["member", "says", own, "rank r", "weight"], rows);
  at("classes").hidden = valued;
  at("answer").hidden = false;
}

/** Fill a table; the first cell of a row is its heading. */
function fill(id, title, header, rows) {
  at(id).replaceChildren();
  at(id).createCaption().textContent = title;
  const heading = (row, scope, textContent) =>
    row.append(Object.assign(document.createElement("th"), { scope, textContent }));
  const head = at(id).createTHead().insertRow();
  header.forEach((text) => heading(head, "col", text));
  const body = at(id).createTBody();
  for (const [first, ...rest] of rows) {
    const row = body.insertRow();
    heading(row, "row", first);
    rest.forEach((text) => (row.insertCell().textContent = text));
  }
}

at("ask").addEventListener("submit", ask);
at("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
begin().catch((e) => (at("error").textContent = e.message));
