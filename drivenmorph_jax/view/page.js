// The page of a result: opens the panels, lists the checks, and hears from the program.
import { deciding } from "./decide.js";
import { go, open } from "./panels.js";
import { listen } from "./program.js";
import { ended, heard, steer } from "./steer.js";
import { button, by, element, row, table } from "./table.js";

async function start() {
  const result = await (await fetch("result.json")).json();
  by("title").textContent = document.title = result.title;
  for (const [name, map] of Object.entries(result.overlays))
    if (name !== "labels") by("overlay").append(new Option(map.name, name));
  by("outline").hidden = !("labels" in result.overlays);
  checks(result.checks);
  if (result.pair) pair(result.pair);
  await open(result);
  steer(result, checks);
  listen(heard, words => { by("status").textContent = words; ended(words); });
  document.body.dataset.ready = "yes";
  places = await (await fetch("places.json")).json();
  checks(shown);
}

// In a cohort: the way to the others, and what is decided.
async function pair({name, next}) {
  const found = (await (await fetch("../pairs.json")).json()).find(one => one.name === name);
  const all = element("a", "All pairs"), follow = element("a", "Next pair"), said = element("span");
  all.href = "../";
  follow.href = `../${next}/`;
  said.setAttribute("role", "status");
  const say = words => { said.textContent = words; };
  by("pair").append(all, next === null ? "" : follow, ...deciding(found, "../", () => say("kept in cohort.csv"), say), said);
  by("pair").hidden = false;
}

let shown = [], places = {};

// After a correction a check may have a place of its own.
const place = one => one.place ?? places[one.name];

function checks(found) {
  shown = found;
  const number = x => x === null ? "" : String(Number(x.toPrecision(3)));
  by("checks").replaceChildren(table(
    ["", "check", "value", "at least", "at most", "where it is worst", "what it means"], found.map(one => row([
      element("span", one.status, one.status), one.name, number(one.value), ...one.limits.map(number),
      place(one) ? button("show", () => go(place(one)), `Show where ${one.name} is worst`) : "",
      one.found ? `${one.sentence} Of the result before the correction.` : one.sentence]))));
}

start().catch(error => { by("status").textContent = `The page cannot show the result: ${error.message}`; });
