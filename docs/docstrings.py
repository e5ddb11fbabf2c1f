"""Docstrings as Markdown, for api.md: indented formulas become code blocks, and no character of them is markup."""

import re

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):$")


def markdown(text):
    out, inside, formula = [], False, False
    for line in text.split("\n"):
        indented = line.startswith(" ")
        if SECTION.match(line):
            inside = True
        elif line and not indented:
            inside = False
        starts = indented and not inside and (formula or not out or not out[-1].strip())
        formula = starts or (formula and not line)
        if starts:
            out.append("    " + line.removeprefix("  "))
            continue
        line = re.sub(r"<(?=\S)", "&lt;", line)
        line = re.sub(r"(?<![`\w*])\*(?=\w)", r"\*", line)  # *space is no emphasis
        out.append(re.sub(r"^References?:", lambda found: f"**{found[0]}**", line))
    return "\n".join(out)


class Formulas(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
