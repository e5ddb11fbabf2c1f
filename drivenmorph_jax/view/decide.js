// What a person decides about a pair of a cohort: a choice and a note, which the program keeps in cohort.csv.
import { element } from "./table.js";

// [choice, note] of a pair; `root` is the address of the cohort, `say` shows a sentence.
export function deciding(pair, root, say) {
  const choice = element("select"), note = element("input");
  for (const [value, text] of [["", "not decided"], ["accept", "accept"], ["redo", "redo"]]) choice.append(new Option(text, value));
  choice.value = pair.decision;
  if (choice.value !== pair.decision) {  // another word, from a spreadsheet
    choice.append(new Option(pair.decision, pair.decision));
    choice.value = pair.decision;
  }
  choice.setAttribute("aria-label", `Decision on ${pair.name}`);
  note.value = pair.note;
  note.placeholder = "note";
  note.setAttribute("aria-label", `Note on ${pair.name}`);
  for (const one of [choice, note])
    one.addEventListener("change", async () => {
      const answer = await fetch(`${root}decide`, {method: "POST", headers: {"Content-Type": "application/json"},
        body: JSON.stringify({name: pair.name, decision: choice.value, note: note.value})});
      say(answer.ok ? `${pair.name}: kept.` : (await answer.json()).error);
    });
  return [choice, note];
}
