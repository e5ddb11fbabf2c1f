// Elements of a page, tables and buttons.
export const by = id => document.getElementById(id);

export function element(tag, text = "", cls = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = cls;
  return made;
}

export function button(text, act, label = text) {
  const made = element("button", text);
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

export function row(cells) {
  const made = element("tr");
  for (const cell of cells) {
    const td = element("td");
    td.append(cell);
    made.append(td);
  }
  return made;
}

export function table(heads, rows) {
  const made = element("table"), head = element("tr");
  for (const text of heads) head.append(element("th", text));
  made.append(head, ...rows);
  return made;
}
