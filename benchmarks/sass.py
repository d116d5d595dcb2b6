"""What nvdisasm's text tells with no GPU: what a warp issues, by pipe, on a kernel's hot path; operands overwritten.

The hot path goes forward through the code, into each loop once, and meets as many wanted instructions (wide accesses, products,
exchanges between lanes) as a path can, by as few others as it can: so it takes no handling of odd strides or of numbers that
are not finite, and nothing that a called function does. The path through the largest loop counts as often as the loop turns.
"""

import collections
import re

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
# A call of a label is a jump too: so sm_80 leaves loops. Functions have other names.
JUMP = re.compile(r"\b(?:BRA|CALL)\b.*`\((\.L\w+)\)")
WANTED = r"\w*MMA|LDGSTS|SHFL|(?:LDG|STG|LDS|STS)\S*\.(?:64|128)"

# Pipes by the first that matches the name. A warp's instruction takes 32 / (lanes a clock) clocks of a multiprocessor's pipe;
# what matches nothing takes a place in the issue alone.
PIPES = (
    ("tensor", r"[A-Z]*MMA"),
    ("memory", r"LD|ST[GSL]|ATOM|RED(?!UX)|SHFL|UTMA|UBLKCP"),
    ("slow", r"MUFU|[FI]2[FI](?!P)|FRND|POPC|FLO|BREV"),
    ("fp16", r"H(ADD|MUL|FMA|MNMX|SET)\w*2"),
    ("mad", r"IMAD"),
    ("fp32", r"F(ADD|MUL|FMA)|FSWZADD"),
    ("integer", r"LOP|SHF|LEA|PLOP|PRMT|SGXT|BMSK|MOV|V?I(ADD|ABS|MNMX|SCADD)|[FI]?(SETP?|SEL)|FMNMX|[FI]2[FI]P"),
)


def parsed(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, with their predicates, and the place of each label."""
    found, places = [], {}
    for line in sass.splitlines():
        label, instruction = re.match(r"\s*(\.L\w+):", line), INSTRUCTION.match(line)
        if label:
            places[label[1]] = len(found)
        elif instruction:
            found.append(instruction[1])
    return found, places


def name(instruction: str) -> str:
    """Without predicate and operands."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def pipe(instruction: str) -> str:
    return next((pipe for pipe, pattern in PIPES if re.match(pattern, name(instruction))), "issue")


def width(instruction: str) -> int:
    """Wavefronts of 128 bytes that a warp's access takes, neighbouring lanes at neighbouring places."""
    wide = re.search(r"\.(64|128)\b", name(instruction))
    return int(wide[1]) // 32 if wide else 1


def hot_path(
    sass: str, wanted: str = WANTED, shunned: str | None = None
) -> tuple[list[str], list[int], list[tuple[int, int]]]:
    """(all instructions, places of those on the hot path, loops on it as (first, one past the last) places)."""
    code, places = parsed(sass)
    to = [places.get(found[1]) if (found := JUMP.search(text)) else None for text in code]
    back = [(target, i + 1) for i, target in enumerate(to) if target is not None and target < i]
    good = [
        bool(re.match(wanted, name(text))) - len(code) * bool(shunned and re.match(shunned, name(text)))
        for text in code
    ]

    def after(i: int) -> list[int]:
        text = code[i]
        if re.match(r"EXIT|RET|BRX|TRAP", text):
            return []
        if to[i] is None:
            return [i + 1]
        always = re.match(r"(BRA|CALL)\S* `", text) is not None  # no predicate before or behind
        if to[i] > i:
            return [to[i]] if always else [i + 1, to[i]]
        # out of the loop, by its end or, if that always goes back, by any of its exits
        return [t for t in to[to[i] : i] if t is not None and t > i] if always else [i + 1]

    best = [(0, 0)] * (len(code) + 1)  # (wanted ones, less others) from here on
    follow: list[int | None] = [None] * len(code)
    for i in range(len(code) - 1, -1, -1):
        follow[i] = max(after(i), key=best.__getitem__, default=None)
        rest = best[follow[i]] if follow[i] is not None else (0, 0)
        best[i] = rest[0] + good[i], rest[1] - 1
    path, i = [], 0 if code else None
    while i is not None and i < len(code):
        path.append(i)
        i = follow[i]
    steps = dict(zip(path, path[1:], strict=False))
    left = lambda begin, end: any(i in steps and steps[i] >= end for i in range(begin, end))  # noqa: E731
    return code, path, [(begin, end) for begin, end in back if begin in steps and left(begin, end)]


def issued(sass: str, turns: float, wanted: str = WANTED, shunned: str | None = None) -> dict[str, float]:
    """Instructions of one warp by pipe, "memory" in wavefronts, and their sum as "issue"; `turns` of the largest loop."""
    code, path, loops = hot_path(sass, wanted, shunned)
    inside = [sum(begin <= i < end for i in path) for begin, end in loops]
    begin, end = loops[inside.index(max(inside))] if loops else (0, 0)
    taken: dict[str, float] = collections.Counter()
    for i in path:
        times = turns if begin <= i < end else 1
        taken["issue"] += times
        if pipe(code[i]) != "issue":
            taken[pipe(code[i])] += times * (width(code[i]) if pipe(code[i]) == "memory" else 1)
    return dict(taken)


# What reads the general register that it names first, or behind a predicate.
READERS = r"BAR|WARPSYNC|BR[AX]|RET|CALL|NANOSLEEP|R2P|FCHK"
DOUBLE = r"\S*WIDE|CS2R(?!\.32)|D(?:ADD|MUL|FMA|MNMX)|\S*\.64\b"
MOST_GROUPS = 8


def written(instruction: str) -> range:
    """The general registers that an instruction writes, predicated or not."""
    text = re.sub(r"^@!?U?P\w+\s+", "", instruction)
    if re.match(READERS, text):
        return range(0)
    first = re.match(r"(\S+) (?:U?P\w+, )?R(\d+)\b", text)  # SHFL and sums name a predicate before
    if not first:
        return range(0)
    called, at = first[1], int(first[2])
    product = re.match(r"HGMMA\.64x(\d+)x\d+\.(F32|F16)", called)
    if product:
        count = int(product[1]) // (2 if product[2] == "F32" else 4)
    elif called.startswith("HMMA"):
        count = 4 if ".F32" in called else 2
    elif called.startswith("LDSM"):
        count = int(called[-1]) if re.search(r"\.[24]$", called) else 1
    else:
        count = 4 if ".128" in called else 2 if re.match(DOUBLE, called) else 1
    return range(at, at + count)


def overwritten(sass: str) -> list[str]:
    """Instructions of a kernel for sm_90 that write a register while a product on its way may still read it, on any path. PTX
    has them wait for the product; ptxas before 13.3 did not always (release notes of CUDA 13.3)."""
    code, places = parsed(sass)
    found, seen = set(), set()
    left = [(0, (), frozenset())]  # place, the committed groups' operands, those of the group that is open
    while left:
        state = i, groups, held = left.pop()
        if state in seen or i >= len(code):
            continue
        seen.add(state)
        text = code[i]
        if set(written(text)) & held.union(*groups):
            found.add(f"{i}: {text}")
        if name(text).startswith("HGMMA"):
            a = re.search(r"HGMMA\S+ R\d+, R(\d+)", text)
            held = held | frozenset(range(int(a[1]), int(a[1]) + 4) if a else ())
            if "gsb0" in text:
                groups, held = (*groups, held), frozenset()
            if len(groups) > MOST_GROUPS:  # of a loop without a wait: those that came first are one
                groups = (groups[0] | groups[1], *groups[2:])
        elif name(text).startswith("WARPGROUP.DEPBAR"):
            pending = int(text.split("0x")[1], 16)
            groups = groups[len(groups) - pending :] if pending < len(groups) else groups
        ends, jump = re.match(r"EXIT|RET|TRAP", text), JUMP.search(text)
        if not ends and not (jump and re.match(r"BRA\S* `", text)):
            left.append((i + 1, groups, held))
        if jump and jump[1] in places:
            left.append((places[jump[1]], groups, held))
    return sorted(found, key=lambda line: int(line.split(":")[0]))
