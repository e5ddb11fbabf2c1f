// What a page and the program say to each other.

// Ask the program for something, by JSON; returns its answer. Where it cannot be done, `failed(sentence)` is called, and an
// Error is thrown.
export async function ask(what, content, failed) {
  const answer = await fetch(what, {method: "POST", headers: {"Content-Type": "application/json"},
    body: JSON.stringify(content)});
  const found = await answer.json();
  if (answer.ok) return found;
  failed(found.error);
  throw new Error(found.error);
}

// The open connection tells the program that the page is there, and the page what the program does: `heard(told)`.
// `say(sentence)` is called when the program has ended.
export function listen(heard, say) {
  const alive = new EventSource("alive");
  alive.addEventListener("message", event => heard(JSON.parse(event.data)));
  alive.addEventListener("error", () => {
    alive.close();
    say("The program has ended. Start it again to go on.");
  });
  addEventListener("pagehide", () => alive.close());
}
