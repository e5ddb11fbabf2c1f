// The page of a cohort: its pairs, and what is decided about them.
import { deciding } from "./decide.js";
import { listen } from "./program.js";
import { by, element, row, table } from "./table.js";

const say = words => { by("status").textContent = words; };
const number = x => x === "" ? "" : String(Number(Number(x).toPrecision(3)));

function shown(pairs) {
  if (by("rows").contains(document.activeElement) && document.activeElement.matches("input")) return;  // a note is written
  by("rows").replaceChildren(table(
    ["pair", "status", "decision", "note", "warnings", "which", "similarity before", "after", "Dice before", "after",
      "J ≤ 0 (%)"],
    pairs.map(one => {
      const link = element(one.number === null ? "span" : "a", one.name);
      if (one.number !== null) link.href = `${one.number}/`;
      return row([link, element("span", one.status, one.status === "done" ? "" : "warn"), ...deciding(one, "", () => {}, say),
        one.warnings, one.error || one.checks, number(one.similarity_before), number(one.similarity_after),
        number(one.dice_before), number(one.dice_after), number(one.fold_pct)]);
    })));
}

listen(({title, pairs}) => {
  by("title").textContent = document.title = title;
  const done = pairs.filter(one => one.decision).length;
  say(`${pairs.length} pairs, ${done} decided`);
  shown(pairs);
  document.body.dataset.ready = "yes";
}, say);
