"use strict";
// Whatever a person or a member said goes in as text (textContent), never as HTML.

const at = (id) => document.getElementById(id);
let ensemble = null; // what GET /ensemble says
let asking = null; // the AbortController of the question under way

/** An element with text or children. */
function make(tag, content, look) {
  const element = document.createElement(tag);
  if (look) element.className = look;
  if (Array.isArray(content)) element.append(...content);
  else element.textContent = content;
  return element;
}

const number = (value) => value.toFixed(3);

/** The answer's JSON; an Error in words where there is none. */
async function fetched(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Error("The service does not answer. Is it still running?");
  }
  if (response.ok) return response.json();
  const { detail } = await response.json().catch(() => ({}));
  if (response.status === 413) throw new Error(`That is too long: a question may have ${ensemble.limits.bytes} bytes.`);
  if (response.status === 422) throw new Error(detail.map(wrong).join(" "));
  if (response.status === 503) throw new Error("The service is busy. Try again in a moment.");
  throw new Error(`The service failed (${response.status}${typeof detail === "string" ? `: ${detail}` : ""}).`);
}

/** One mistake that the service found: which text, and what. */
function wrong({ loc, msg, type }) {
  const which = loc[1] === "texts" && loc.length > 2 ? name(loc[3] ?? 0) : "The question";
  return type === "string_too_long" ? `${which}: more than ${ensemble.limits.chars} characters.` : `${which}: ${msg}.`;
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
  if (text.length === 2) {
    at("second-name").textContent = name(1);
    at("pair").hidden = at("second").disabled = false;
  }
}

async function ask(event) {
  event.preventDefault();
  asking?.abort(); // only the latest question counts
  const mine = (asking = new AbortController());
  at("error").textContent = "";
  document.body.classList.add("waiting");
  try {
    if (!ensemble) await begin();
    say("Asking …");
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
    say("");
    at("error").textContent = e.message;
  } finally {
    if (mine === asking) document.body.classList.remove("waiting");
  }
}

/** To who listens; to who looks too, unless the page shows the same. */
function say(text, shown = false) {
  at("status").textContent = text;
  at("status").className = shown ? "hidden" : "lede";
}

function show(answer) {
  const valued = ensemble.kind === "regression";
  const decision = valued ? number(answer.decision) : answer.decision;
  const others = answer.members.map((m) => m.decision);
  const m = others.length;
  const agreed = others.filter((d) => d === answer.decision).length;
  const range = valued ? `${number(Math.min(...others))} to ${number(Math.max(...others))}` : "";
  say(
    valued
      ? `The ensemble says ${decision}; its members say ${range}.`
      : `The ensemble decides ${decision}; ${agreed} of ${m} members agree.`,
    true,
  );

  const share = valued ? "" : `${shares()} ${number(answer.probabilities[answer.decision])}`;
  const boxes = [["The ensemble " + (valued ? "says" : "decides"), decision, share]];
  boxes.push(valued ? ["Its members say", range, "lowest to highest"] : ["Members that agree", `${agreed} of ${m}`, ""]);
  at("figures").replaceChildren(
    ...boxes.map(([term, value, note]) =>
      make("div", [make("dt", term), make("dd", value, "value"), make("dd", note, "note")])),
  );

  at("bars-box").hidden = valued;
  if (!valued) bars(answer);
  table(answer, valued);
  at("answer").hidden = false;
}

/** What the ensemble's numbers are: a majority's are shares of the votes. */
function shares() {
  return ensemble.decides.startsWith("the majority") ? "share of the votes" : "probability";
}

function bars({ probabilities, decision }) {
  at("bars-h").textContent = shares() === "probability" ? "Probabilities" : "Shares of the votes";
  at("bars").replaceChildren(
    ...ensemble.labels.map((label) => {
      const fill = make("span", "", "fill");
      fill.style.width = `${100 * probabilities[label]}%`;
      const track = make("span", [fill], "track");
      track.setAttribute("aria-hidden", "true"); // the number says it
      const parts = [make("span", label, "name"), track, make("span", number(probabilities[label]), "number")];
      return make("li", parts, label === decision ? "decided" : "");
    }),
  );
}

function table(answer, valued) {
  // What it says first: the rest may be out of sight on a phone.
  const header = ["Member", "says", ...(valued ? ["difference"] : ["probability", "agrees"]), "rank r", "weight"];
  at("terms").textContent = valued
    ? "The difference is to the ensemble; the weight is a member's part in the mean."
    : "The probability is a member's own, of what it says; the weight is its part in the mean, or of the votes.";
  at("head").replaceChildren(
    ...header.map((text) => {
      const cell = make("th", text);
      cell.scope = "col";
      return cell;
    }),
  );
  at("members").replaceChildren(
    ...answer.members.map((said, i) => {
      const member = ensemble.members[i];
      const heading = make("th", said.name);
      heading.scope = "row";
      const cells = [];
      if (valued) {
        const difference = said.decision - answer.decision;
        cells.push(make("td", number(said.decision)), make("td", (difference < 0 ? "" : "+") + number(difference)));
      } else {
        const agrees = said.decision === answer.decision;
        cells.push(make("td", said.decision), make("td", number(said.probabilities[said.decision])));
        cells.push(make("td", agrees ? "yes" : "no", agrees ? "" : "differs"));
      }
      cells.push(make("td", member.rank ?? "–"), make("td", number(member.weight)));
      return make("tr", [heading, ...cells]);
    }),
  );
}

at("ask").addEventListener("submit", ask);
at("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
begin().catch((e) => (at("error").textContent = e.message));
