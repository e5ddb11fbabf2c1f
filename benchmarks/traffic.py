"""How many bytes a program compiled by XLA moves, from its text: every trip of its loops, and padding."""

import math
import re

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
        "copy-start", "copy-done", "slice-start", "slice-done", "async-done", "conditional"}
# Type, lengths, axes from minor to major, tiles and memory.
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def arrays(shapes):
    """(bytes of a value, lengths, tile, whether in the fast memory) of the arrays in an instruction's type, major to
    minor as they are stored."""
    for kind, lengths, order, layout in ARRAY.findall(shapes):
        if kind in BYTES:
            lengths = [int(n) for n in lengths.split(",") if n]
            lengths = [lengths[int(axis)] for axis in reversed(order.split(",")) if axis] or lengths
            tile = re.match(r"T\(([\d,]+)\)", layout)
            yield (BYTES[kind], lengths, [int(n) for n in tile[1].split(",")] if tile else [],
                   bool(re.search(r"S\([1-9]", layout)))


def size(shapes):
    """Bytes that they take of the large memory, their tiles filled up."""
    total = 0
    for value, lengths, tile, fast in arrays(shapes):
        for k, n in enumerate(reversed(tile[-len(lengths):]) if lengths else (), 1):
            lengths[-k] += -lengths[-k] % n
        total += 0 if fast else value * math.prod(lengths)
    return total


def rows(shapes, table):
    """Bytes moved where as many rows of the table are looked at as `shapes` has: the tile that holds each."""
    value, lengths, tile, _ = next(arrays(table))
    of = next(arrays(shapes))[1]
    return math.prod(of) // max(1, min(lengths[-1], math.prod(of))) * value * math.prod(tile)


def traffic(text):
    """Bytes that a compiled program moves, from its text, every trip of its loops counted.

    An operation reads its operands and writes its results once, padding included, but for those in the fast memory.
    Slices of a whole count as slices. A gather reads the tile of every row that it takes, and a scatter reads and
    writes those of its updates: so does XLA count; hardware that fetches less of a tile does better.
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
                    amount = rows(shapes, max(of, key=size)) + result
                elif "scatter" in what and "reduce-scatter" not in what:
                    amount = 2 * rows(max((x for x in of if size(x) < result), key=size, default="f32[0]"), shapes)
                else:
                    amount = result + sum(operands)
                total += trips * amount
        return total

    return walk(entry, 1)
