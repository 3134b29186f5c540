"""Creates the fine-tuning data: from documentation, block and name of a public function to its signature."""

import hashlib
import re
from collections import Counter, defaultdict

ROWS = {"train": 3600, "valid": 300, "test": 300}
CRATE_ROWS_MAX = {"train": 120, "valid": 60, "test": 60}
SIGNATURE_ROWS_MAX = {"train": 12, "valid": 3, "test": 3}
SIGNATURE_CHARACTERS_MAX = 120
DOCUMENTATION_CHARACTERS_MAX = 240
BLOCK_CHARACTERS_MAX = 80

FUNCTION = re.compile(
    r"(?m)^(?P<indent>[ ]*)(?P<documentation>///[ ][^\n]*\n(?:(?P=indent)///[^\n]*\n){0,40})"
    r"(?:(?P=indent)#!?\[[^\n]*\]\n)*"
    r"(?P=indent)(?P<signature>pub (?:const |async |unsafe )*fn (?P<name>\w+)[^{};]*?)\s*\{"
)


def one_line(text):
    """A signature as rustfmt would write it without a limit on the line length."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([(<\[]) ", r"\1", text)
    text = re.sub(r",? ([)\]])", r"\1", text)
    return re.sub(r",([)>])", r"\1", text)


def block(text, at, indent):
    """The head of the `impl` around a method, without its `where` clause."""
    if not indent:
        return ""
    heads = list(re.finditer(r"(?m)^(?P<indent> *)(?P<head>(?:unsafe )?impl\b[^{};]*?)\s*\{", text[:at]))
    closest = next((h for h in reversed(heads) if len(h["indent"]) < len(indent)), None)
    if closest is None or len(closest["indent"]) + 4 != len(indent):
        return None
    between = text[closest.end():at]
    if re.search(r"(?m)^ {0,%d}\S" % len(closest["indent"]), between.split("\n", 1)[-1]):
        return None
    return one_line(re.sub(r"\bwhere\b.*", "", closest["head"], flags=re.DOTALL))


def functions(file):
    """The rows of one file."""
    text = file["text"]
    for match in FUNCTION.finditer(text):
        if re.search(r"//[^\n]*\n$", text[:match.start()][-200:]):
            continue
        documentation = [re.sub(r"^ *///", "", line).strip() for line in match["documentation"].rstrip("\n").split("\n")]
        paragraph = documentation[:documentation.index("")] if "" in documentation else documentation
        signature = one_line(match["signature"])
        head = block(text, match.start(), match["indent"])
        if head is None or len(head) > BLOCK_CHARACTERS_MAX or not 1 <= len(paragraph) <= 3:
            continue
        written = "".join(paragraph)
        if not 12 <= len(written) <= DOCUMENTATION_CHARACTERS_MAX or "```" in written or written.startswith("#"):
            continue
        if len(signature) > SIGNATURE_CHARACTERS_MAX or re.search(r"\bwhere\b|[$#!\"]|//|/\*|\bmacro", signature):
            continue
        if not written.isascii() or not signature.isascii() or "$" in head or "$" in written:
            continue
        space = "    " if head else ""
        lines = [f"{head} {{"] if head else []
        lines += [f"{space}/// {line}" for line in paragraph]
        lines.append(f"{space}fn {match['name']}")
        yield {"crate": file["crate"], "name": match["name"], "block": head, "user": "\n".join(lines), "assistant": signature}


def rank(row):
    return hashlib.blake2b((row["crate"] + row["user"] + row["assistant"]).encode(), digest_size=8).digest()


def choose(rows, split, taken):
    """Rows in an order that does not depend on their position, with limits per crate and per signature."""
    crates, signatures, chosen = Counter(), Counter(), []
    for row in sorted(rows, key=rank):
        documentation = re.sub(r"\W+", " ", " ".join(re.findall(r"/// (.*)", row["user"]))).lower()
        keys = {row["user"], (row["name"], documentation)}
        if keys & taken or crates[row["crate"]] >= CRATE_ROWS_MAX[split]:
            continue
        if signatures[row["assistant"]] >= SIGNATURE_ROWS_MAX[split] or len(chosen) == ROWS[split]:
            continue
        taken |= keys
        crates[row["crate"]] += 1
        signatures[row["assistant"]] += 1
        chosen.append(row)
    return chosen


def own_type(head):
    """The type of an `impl` head, without its path."""
    found = re.search(r"(?:\bfor\s+|impl(?:<.*?>)?\s+)(?:[\w:]+::)?(\w+(?:<.*>)?)$", head)
    return found.group(1) if found else ""


def shape(row):
    """The signature with placeholders for the function's name and the type of its block."""
    before, rest = row["assistant"].split(f"fn {row['name']}", 1)
    if own_type(row["block"]):
        rest = re.sub(r"(?<!\w)" + re.escape(own_type(row["block"])) + r"(?!\w)", "$TYPE", rest)
    return f"{before}fn $NAME{rest}"


def baselines(train, held_out):
    """Shares of exact signatures of guesses from counts."""
    def most_common(key, value):
        counts = defaultdict(Counter)
        for row in train:
            counts[key(row)][value(row)] += 1
        return {k: c.most_common(1)[0][0] for k, c in counts.items()}

    def first_word(row):
        return row["name"].split("_")[0], bool(row["block"])

    whole = most_common(lambda row: row["name"], lambda row: row["assistant"])
    by_name = most_common(lambda row: row["name"], shape)
    by_word = most_common(first_word, shape)
    by_block = most_common(lambda row: bool(row["block"]), shape)

    def guess(row):
        found = by_name.get(row["name"]) or by_word.get(first_word(row)) or by_block[bool(row["block"])]
        return found.replace("$NAME", row["name"]).replace("$TYPE", own_type(row["block"]))

    right = {
        "most common signature of the name": sum(whole.get(row["name"]) == row["assistant"] for row in held_out),
        "most common shape of the name, else of its first word": sum(guess(row) == row["assistant"] for row in held_out),
    }
    return {name: round(count / len(held_out), 4) for name, count in right.items()}


def make(files):
    """Rows in the chat schema by split, and a report."""
    taken, chosen = set(), {}
    for split in ("test", "valid", "train"):
        chosen[split] = choose([row for file in files[split] for row in functions(file)], split, taken)
    report = {
        split: {
            "rows": len(rows), "crates": len({r["crate"] for r in rows}), "signatures": len({r["assistant"] for r in rows}),
            "bytes": sum(len(r["user"].encode()) + len(r["assistant"].encode()) for r in rows),
        }
        for split, rows in chosen.items()
    }
    for split in ("valid", "test"):
        report[split]["exactly right by counting in train"] = baselines(chosen["train"], chosen[split])
    rows = {
        split: [
            {"messages": [{"role": "user", "content": r["user"]}, {"role": "assistant", "content": r["assistant"]}]} for r in found
        ]
        for split, found in chosen.items()
    }
    return rows, report
