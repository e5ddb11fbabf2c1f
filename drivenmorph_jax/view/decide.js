// What a person decides about a pair of a cohort: a choice and a note, which the program keeps in cohort.csv.
import { ask } from "./program.js";
import { element } from "./table.js";

// [choice, note] of a pair; `root` is the address of the cohort. `kept()` is called when the program has kept a change,
// `failed(sentence)` when it could not.
export function deciding(pair, root, kept, failed) {
  const choice = element("select"), note = element("input");
  for (const value of new Set(["", "accept", "redo", pair.decision]))  // it may be another word, from a spreadsheet
    choice.append(new Option(value || "not decided", value));
  choice.value = pair.decision;
  choice.setAttribute("aria-label", `Decision on ${pair.name}`);
  note.value = pair.note;
  note.placeholder = "note";
  note.setAttribute("aria-label", `Note on ${pair.name}`);
  for (const one of [choice, note])
    one.addEventListener("change", () => ask(
      `${root}decide`, {name: pair.name, decision: choice.value, note: note.value}, failed).then(kept, () => {}));
  return [choice, note];
}
