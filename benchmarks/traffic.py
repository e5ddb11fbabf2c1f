"""The bytes that a program compiled by XLA moves, from its text: with all iterations of its loops, and padding."""

import math
import re

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
        "copy-start", "copy-done", "slice-start", "slice-done", "async-done", "conditional"}
# Type, side lengths, axes from minor to major, tiles and memory space.
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def arrays(shapes):
    """(bytes of a value, side lengths, tile, whether in the fast memory) of each array in the type of an instruction.

    The lengths are in the order in which the axes are stored, major to minor.
    """
    for kind, lengths, order, layout in ARRAY.findall(shapes):
        if kind in BYTES:
            lengths = [int(n) for n in lengths.split(",") if n]
            lengths = [lengths[int(axis)] for axis in reversed(order.split(",")) if axis] or lengths
            tile = re.match(r"T\(([\d,]+)\)", layout)
            yield (BYTES[kind], lengths, [int(n) for n in tile[1].split(",")] if tile else [],
                   bool(re.search(r"S\([1-9]", layout)))


def size(shapes):
    """Bytes of the large memory that the arrays take, with their tiles filled up."""
    total = 0
    for value, lengths, tile, fast in arrays(shapes):
        for k, n in enumerate(reversed(tile[-len(lengths):]) if lengths else (), 1):
            lengths[-k] += -lengths[-k] % n
        total += 0 if fast else value * math.prod(lengths)
    return total


def values(shapes):
    """Number of values of an array, in any memory."""
    return math.prod(next(arrays(shapes))[1])


def rows(shapes, table):
    """Bytes moved when as many rows of the table are accessed as `shapes` has: for each, the tile that holds it."""
    value, lengths, tile, fast = next(arrays(table))
    return 0 if fast else values(shapes) // max(1, min(lengths[-1], values(shapes))) * value * math.prod(tile)


def traffic(text):
    """Bytes that a compiled program moves, computed from its text, with every iteration of its loops.

    An operation reads its operands once and writes its results once, padding included, except those in the fast memory.
    A slice of an array counts as the slice, also within a fused operation. A gather reads the tile of every row that it
    takes. A scatter reads and writes the tile of every row that it updates. XLA counts in the same way. Hardware that
    fetches less than a tile moves fewer bytes.
    """
    return sum(amount for amount, _ in moves(text))


def moves(text):
    """(bytes, the instruction as text) of every operation that moves bytes, over all iterations of its loop."""
    computations, types, entry = {}, {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\(?.*?\)?) ([\w-]+)\((.*)$", line):
            name, shapes, kind, rest = found.groups()
            types[name] = shapes
            lines.append((name, shapes, kind, rest))

    def called(rest, key="(?:to_apply|calls)"):
        found = re.search(rf"{key}=%([\w.-]+)", rest)
        return found and found[1]

    def operands(rest):
        return [x for x in re.findall(r"%([\w.-]+)", rest.split("), ")[0]) if x in types]

    def largest_constant(computation):
        """The number of iterations of a loop with this condition: its bound is the only number there."""
        numbers = [0]
        for _, _, kind, rest in computations[computation]:
            numbers += [int(n) for n in re.findall(r"^(\d+)\)", rest) if kind == "constant"]
            if inner := called(rest):
                numbers.append(largest_constant(inner))
        return max(numbers)

    def read(computation, name):
        """Bytes of this array that a fused operation reads, where it reads slices of it; else infinity."""
        total = 0
        for user, shapes, kind, rest in computations[computation]:
            for place, operand in enumerate(operands(rest)):
                if operand != name:
                    continue
                if kind == "dynamic-slice":
                    total += size(shapes)
                elif kind == "bitcast":
                    total += read(computation, user)
                elif kind == "fusion":
                    total += read(called(rest), parameter(called(rest), place))
                elif kind != "dynamic-update-slice" or place:
                    return math.inf
        return total

    def parameter(computation, place):
        return next(name for name, _, kind, rest in computations[computation]
                    if kind == "parameter" and rest.startswith(f"{place})"))

    def written(computation, shapes):
        """Bytes that a fused operation with these results writes. Some results are in-place updates of a part."""
        made = {name: (kind, rest) for name, _, kind, rest in computations[computation]}
        root, _, kind, rest = computations[computation][-1]
        total = 0
        for result, name in zip(ARRAY.finditer(shapes), operands(rest) if kind == "tuple" else [root], strict=False):
            while made.get(name, [""])[0] == "bitcast":
                name = operands(made[name][1])[0]
            kind, rest = made.get(name, ("", ""))
            part = types[operands(rest)[1]] if kind == "dynamic-update-slice" else result[0]
            total += min(size(result[0]), size(part))
        return total

    def walk(computation, trips):
        for name, shapes, kind, rest in computations[computation]:
            if kind == "while":
                yield from walk(called(rest, "body"), trips * max(1, largest_constant(called(rest, "condition"))))
            elif kind in ("call", "async-start"):
                yield from walk(called(rest), trips) if called(rest) else ()
            elif kind not in FREE:
                what, of = name + kind, operands(rest)
                result, sizes = size(shapes), [size(types[x]) for x in of]
                if "gather" in what and "all-gather" not in what:
                    amount = rows(shapes, max((types[x] for x in of), key=values)) + result
                elif "scatter" in what and "reduce-scatter" not in what:
                    updates = [types[x] for x in of if values(types[x]) < values(shapes)]
                    amount = 2 * rows(max(updates, key=values, default="f32[0]"), shapes)
                elif kind == "fusion" and (inner := called(rest)) in computations:
                    amount = written(inner, shapes) + sum(
                        min(whole, read(inner, parameter(inner, place))) for place, whole in enumerate(sizes))
                elif kind == "dynamic-update-slice":
                    amount = 2 * sizes[1]
                elif kind == "dynamic-slice":
                    amount = 2 * result
                else:
                    amount = result + sum(sizes)
                yield trips * amount, f"{name} = {shapes} {kind}({rest}"

    return walk(entry, 1)
