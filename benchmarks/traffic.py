"""How many bytes a program compiled by XLA moves, from its text: every trip of its loops, and padding."""

import math
import re

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
        "copy-start", "copy-done", "slice-start", "slice-done", "async-done", "conditional"}
# Type, lengths, axes from minor to major, tiles and memory.
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def size(shapes, everywhere=False):
    """Bytes that the arrays in an instruction's type take, their tiles filled up: of those in the large memory, or of
    all."""
    total = 0
    for kind, lengths, order, layout in ARRAY.findall(shapes):
        if kind not in BYTES or not everywhere and re.search(r"S\([1-9]", layout):
            continue
        lengths = [int(n) for n in lengths.split(",") if n]
        lengths = [lengths[int(axis)] for axis in reversed(order.split(",")) if axis] or lengths
        tile = re.match(r"T\(([\d,]+)\)", layout)
        for k, n in enumerate(reversed(tile[1].split(",")) if tile else (), 1):
            if k <= len(lengths):
                lengths[-k] += -lengths[-k] % int(n)
        total += math.prod(lengths) * BYTES[kind]
    return total


def traffic(text):
    """Bytes that a compiled program moves, from its text, every trip of its loops counted.

    An operation reads its operands and writes its results once, padding included, but for those in the fast memory. A
    gather reads and writes its rows, a scatter reads and writes the places of its updates, and slices of a whole count
    as slices.
    """
    computations, types, entry = {}, {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\(?.*?\)?) ([\w-]+)\((.*)$", line):
            name, shapes, kind, rest = found.groups()
            types[name] = shapes
            lines.append((name, shapes, kind, rest))

    def called(rest, key):
        found = re.search(rf"{key}=%([\w.-]+)", rest)
        return found and found[1]

    def largest_constant(computation):
        """How often a loop with this condition runs: its bound is the only number there."""
        numbers = [0]
        for _, _, kind, rest in computations[computation]:
            numbers += [int(n) for n in re.findall(r"^(\d+)\)", rest) if kind == "constant"]
            if inner := called(rest, "calls"):
                numbers.append(largest_constant(inner))
        return max(numbers)

    def walk(computation, trips):
        total = 0
        for name, shapes, kind, rest in computations[computation]:
            if kind == "while":
                total += walk(called(rest, "body"), trips * max(1, largest_constant(called(rest, "condition"))))
            elif kind in ("call", "async-start"):
                inner = called(rest, "(?:to_apply|calls)")
                total += walk(inner, trips) if inner else 0
            elif kind not in FREE:
                what = name + kind
                of = [types[x] for x in re.findall(r"%([\w.-]+)", rest.split("), ")[0]) if x in types]
                result, operands = size(shapes), [size(x) for x in of]
                if "dynamic-update-slice" in what:
                    amount = 2 * sum(x for x in operands if 4 * x < result)
                elif "dynamic-slice" in what:
                    amount = 2 * result
                elif "gather" in what and "all-gather" not in what:
                    amount = size(shapes, True) + result
                elif "scatter" in what and "reduce-scatter" not in what:
                    amount = 2 * max((x for x in (size(x, True) for x in of) if x < result), default=0)
                else:
                    amount = result + sum(operands)
                total += trips * amount
        return total

    return walk(entry, 1)
