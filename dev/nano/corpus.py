"""Creates the pre-training rows: pieces of files with at most `ROW_TOKENS` tokens, plain, with a gap to fill, or as a chat."""

import os
import random
import re

import sources
from tokenizers import Tokenizer

ROW_TOKENS = 512
PIECE_TOKENS = 480
PIECE_TOKENS_MIN = 24
GAP_SHARE = 0.40
CHAT_SHARE = 0.10
HEADER_SHARE = 0.10
HELD_OUT_BYTES = {"valid": 300_000, "test": 400_000}
PIECE_DUPLICATE_SHARE = 0.6

COMPLETE = ["Complete this Rust code.", "Continue this Rust code.", "What comes next in this Rust code?"]
DOCUMENT = ["Write the documentation comment of this Rust code.", "Document this Rust code."]
IMPLEMENT = ["Write the Rust code for this documentation.", "Write Rust code that is documented like this."]


# A documentation comment and the item below it with the same indentation.
DOCUMENTED = re.compile(
    r"(?m)^(( *)///[^\n]*\n(?:\2///[^\n]*\n)*)"
    r"((?:\2[^\s/][^\n]*\n|\2 +\S[^\n]*\n|\n)+?\2\}\n|\2[^\n]*;\n)"
)


def pieces(text, count):
    """Splits a text at blank lines before the least indented lines, into pieces of at most `PIECE_TOKENS` tokens.

    Each piece comes with the line that opens the block it is inside of, or an empty string.
    """
    lines = text.split("\n")
    costs = [count(line + "\n") for line in lines]
    found = []
    for start, end in cut(lines, costs, 0, len(lines)):
        while start < end and not lines[start].strip():
            start += 1
        if start < end:
            found.append((opening(lines, start), "\n".join(lines[start:end]).rstrip("\n") + "\n"))
    return found


def opening(lines, at):
    """The line that opens the innermost block of a line, if it is an `impl`, trait or module on one line."""
    for line in reversed(lines[:at]):
        if line.strip() and indentation(line) < indentation(lines[at]):
            found = re.match(r"\s*(pub(\(\w+\))? )?(unsafe )?(impl|trait|mod)\b[^\n]{,100}\{$", line)
            return line + "\n" if found else ""
    return ""


def cut(lines, costs, start, end):
    """Ranges of lines; adjacent ranges are joined while they fit."""
    if sum(costs[start:end]) <= PIECE_TOKENS:
        return [(start, end)]
    if end - start == 1:
        return []
    after_blank = [i for i in range(start + 1, end) if not lines[i - 1].strip() and lines[i].strip()]
    if after_blank:
        least = min(indentation(lines[i]) for i in after_blank)
        cuts = [i for i in after_blank if indentation(lines[i]) == least]
    else:
        cuts = [(start + end) // 2]
    bounds = [start, *cuts, end]
    joined = []
    for a, b in zip(bounds, bounds[1:]):
        for part in cut(lines, costs, a, b):
            if joined and joined[-1][1] == part[0] and sum(costs[joined[-1][0]:part[1]]) <= PIECE_TOKENS:
                joined[-1] = (joined[-1][0], part[1])
            else:
                joined.append(part)
    return joined


def indentation(line):
    return len(line) - len(line.lstrip())


def with_gap(text, random_state):
    """The piece as prefix, suffix and middle, or None if no gap is suitable."""
    line_starts = [0] + [m.end() for m in re.finditer("\n", text)]
    kind = random_state.random()
    if kind < 0.45:  # whole lines
        count = min(random_state.choice([1, 1, 2, 3, 4, 6, 8]), len(line_starts) // 3)
        first = random_state.randrange(1, max(2, len(line_starts) - count))
        if count < 1 or first + count >= len(line_starts):
            return None
        start, end = line_starts[first], line_starts[first + count]
        start += indentation(text[start:end])
        end -= 1
    elif kind < 0.70:  # the rest of a line
        spaces = [m.start() for m in re.finditer(r"(?<=\S)\b(?=.{3,}\n)", text)]
        if not spaces:
            return None
        start = random_state.choice(spaces)
        end = text.index("\n", start)
    elif kind < 0.85:  # the inside of a block
        blocks = [m for m in re.finditer(r"\{\n(( +)\S[^\n]*\n(?:(?:\2[^\n]*)?\n)*)(?= *\})", text) if len(m.group(1)) < 600]
        if not blocks:
            return None
        start, end = random_state.choice(blocks).span(1)
        start += indentation(text[start:end])
        end -= 1
    else:  # from one word to another
        edges = [m.start() for m in re.finditer(r"\b", text)]
        if len(edges) < 12:  # too little text
            return None
        first = random_state.randrange(1, len(edges) - 2)
        start, end = edges[first], edges[min(first + random_state.randrange(1, 40), len(edges) - 1)]
    middle = text[start:end]
    if not middle.strip():
        return None
    return f"<|fim_prefix|>{text[:start]}<|fim_suffix|>{text[end:]}<|fim_middle|>{middle}<|endoftext|>"


def chat(question, answer):
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def as_chat(text, random_state):
    """The piece as a question and an answer, or None."""
    documented = list(DOCUMENTED.finditer(text))
    if documented and random_state.random() < 0.75:
        found = random_state.choice(documented)
        comment, code = (re.sub(r"(?m)^" + found.group(2), "", part).rstrip("\n") for part in found.group(1, 3))
        if random_state.random() < 0.3:
            return chat(f"{random_state.choice(DOCUMENT)}\n{code}", comment)
        named = re.search(r"(?m)^(?:pub(?:\(\w+\))? )?(?:const |async |unsafe )*fn (\w+)", code)
        if named:
            comment += f"\nfn {named.group(1)}"
        opens = opening(text[:found.start()].split("\n") + [found.group(2) + "x"], -1) if found.group(2) else ""
        if opens:
            comment = opens.strip() + "\n" + re.sub(r"(?m)^", "    ", comment)
        return chat(f"{random_state.choice(IMPLEMENT)}\n{comment}", code)
    lines = text.rstrip("\n").split("\n")
    if len(lines) < 6:
        return None
    half = random_state.randrange(len(lines) // 3, 2 * len(lines) // 3 + 1)
    first, second = "\n".join(lines[:half]), "\n".join(lines[half:])
    if not first.strip() or not second.strip():
        return None
    return chat(f"{random_state.choice(COMPLETE)}\n{first}", second)


def make(files, model):
    """Rows by split and a report; validation and test rows are plain pieces."""
    tokenizer = Tokenizer.from_file(os.path.join(model, "tokenizer.json"))

    def counts(texts):
        return [len(e.ids) for e in tokenizer.encode_batch_fast(texts)]

    seen, rows, report = set(), {}, {}
    for split in ("test", "valid", "train"):
        random_state = random.Random(f"nano {split}")
        found = []
        for file in files[split] + (files["more"] if split == "train" else []):
            lines = [line + "\n" for line in file["text"].split("\n")]
            costs = dict(zip(lines, counts(lines)))
            for number, (opens, piece) in enumerate(pieces(file["text"], costs.__getitem__)):
                marks = sources.shingles(piece)
                if len(marks & seen) < PIECE_DUPLICATE_SHARE * len(marks):
                    seen |= marks
                    found.append((file, number, opens + piece if split == "train" else piece))
        sizes = counts([piece for _, _, piece in found])
        found = [entry for entry, size in zip(found, sizes) if PIECE_TOKENS_MIN <= size <= ROW_TOKENS]
        random_state.shuffle(found)
        if split == "train":
            made, kinds = training_rows(found, random_state)
        else:
            made, kinds = held_out_rows(found, HELD_OUT_BYTES[split])
        sizes = counts(made)
        made = [row for row, size in zip(made, sizes) if size <= ROW_TOKENS]
        rows[split] = made
        report[split] = {
            "rows": len(made), "bytes": sum(len(row.encode()) for row in made),
            "tokens": sum(size for size in sizes if size <= ROW_TOKENS), "kinds": kinds,
        }
    return rows, report


def training_rows(found, random_state):
    made, kinds = [], {"plain": 0, "plain with path": 0, "gap": 0, "chat": 0}
    for file, number, piece in found:
        draw = random_state.random()
        row, kind = None, "plain"
        if draw < GAP_SHARE:
            row, kind = with_gap(piece, random_state), "gap"
        elif draw < GAP_SHARE + CHAT_SHARE:
            row, kind = as_chat(piece, random_state), "chat"
        elif random_state.random() < HEADER_SHARE and number == 0:
            row, kind = f"<|repo_name|>{file['crate']}\n<|file_sep|>{file['path']}\n{piece}", "plain with path"
        if row is None:
            row, kind = piece, "plain"
        made.append(row)
        kinds[kind] += 1
    return made, kinds


def held_out_rows(found, bytes_max):
    """Pieces of alternating crates, so that a large crate does not fill the file."""
    by_crate = {}
    for file, _, piece in found:
        by_crate.setdefault(file["crate"], []).append(piece)
    made, total = [], 0
    while any(by_crate.values()):
        for queue in by_crate.values():
            if queue and total + len(queue[-1].encode()) <= bytes_max:
                total += len(queue[-1].encode())
                made.append(queue[-1])
            if queue:
                queue.pop()
    return made, {"plain": len(made)}
