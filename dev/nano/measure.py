"""Measures a model like `assets/nano`: bits per byte, completions, and the effect of the default fine-tuning."""

import argparse
import hashlib
import json
import os
import random
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import corpus
from make import ROOT, read_rows

PROMPTS = {"valid": 100, "test": 100}
PREFIX_CHARACTERS_MIN = 200
LINE_CHARACTERS_MIN = 8
GAP_CHARACTERS_MAX = 160
TOKENS_MAX = 96


def call(program, *flags, text=None):
    """The JSON output of a command."""
    done = subprocess.run([program, "--json", *flags], input=text, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rank(text):
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def line_prompt(text):
    """The text before one of its lines, and that line; None if no line is suitable."""
    lines = text.split("\n")
    lines_with_context = []
    for at in range(1, len(lines)):
        before = "\n".join(lines[:at]) + "\n"
        if len(before) >= PREFIX_CHARACTERS_MIN and lines[at - 1].strip() and len(lines[at].strip()) >= LINE_CHARACTERS_MIN:
            lines_with_context.append((before, lines[at]))
    return random.Random(text).choice(lines_with_context) if lines_with_context else None


def gap_prompt(text):
    """The text with a gap as in the corpus, and the text of the gap; None if no short gap was found."""
    state = random.Random(text)
    for _ in range(20):
        row = corpus.with_gap(text, state)
        if row is not None:
            before, middle = row.removesuffix("<|endoftext|>").split("<|fim_middle|>")
            if LINE_CHARACTERS_MIN <= len(middle) <= GAP_CHARACTERS_MAX:
                return before + "<|fim_middle|>", middle
    return None


def prompts(texts, make, count):
    found = (make(text) for text in sorted(texts, key=rank))
    return [prompt for prompt in found if prompt is not None][:count]


def edits(left, right):
    """The Levenshtein distance."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def complete(arguments, asked, *flags):
    """The share of exact texts of greedy continuations, and the mean of 1 minus the share of edits."""
    def write(prompt):
        written = call(
            arguments.program, "generate", "--model", arguments.model, "--raw", "--temperature", "0", "--max-tokens", str(TOKENS_MAX),
            "--device", "cpu", "--prompt", "-", *flags, text=prompt + "\n",  # the command removes one line break
        )
        return written["text"]

    with ThreadPoolExecutor(arguments.jobs) as pool:
        texts = list(pool.map(write, (prompt for prompt, _ in asked)))
    pairs = [(text.strip(), expected.strip()) for text, (_, expected) in zip(texts, asked)]
    return {
        "prompts": len(pairs),
        "right": sum(text == expected for text, expected in pairs) / len(pairs),
        "similarity": sum(1 - edits(text, expected) / max(len(text), len(expected), 1) for text, expected in pairs) / len(pairs),
    }


def fine_tuned(arguments):
    """The default run on the sample data, and the number of exact test rows before and after it."""
    with tempfile.TemporaryDirectory() as folder:
        return call(
            arguments.program, "train", "--model", arguments.model, "--data", os.path.join(ROOT, "assets", "nano", "data"),
            "--learning-rate", "3e-3", "--test-samples", "300", "--device", "cpu", "--output", os.path.join(folder, "run"),
            *(["--epochs", arguments.epochs] if arguments.epochs else []), *(["--steps", arguments.steps] if arguments.steps else []),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True, help="metal-candle, built with --release")
    parser.add_argument("--corpus", required=True, help="folder with valid.jsonl and test.jsonl")
    parser.add_argument("--model", default=os.path.join(ROOT, "assets", "nano"), help="folder of the model")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel prompts")
    parser.add_argument("--epochs", help="of the fine-tuning, instead of the default")
    parser.add_argument("--steps", help="of the fine-tuning, instead of the default")
    parser.add_argument("--no-fine-tuning", action="store_true", help="skip the fine-tuning")
    arguments = parser.parse_args()
    found = {}
    for split, count in PROMPTS.items():
        path = os.path.join(arguments.corpus, f"{split}.jsonl")
        texts = [row["text"] for row in read_rows(path)]
        evaluation = call(arguments.program, "eval", "--model", arguments.model, "--data", path, "--device", "cpu")
        found[split] = {
            "bits per byte": evaluation["bits_per_byte"],
            "next line": complete(arguments, prompts(texts, line_prompt, count), "--stop", "\n"),
            "gap": complete(arguments, prompts(texts, gap_prompt, count)),
        }
        print(split, json.dumps(found[split]), flush=True)
    if not arguments.no_fine_tuning:
        report = fine_tuned(arguments)
        names = (
            "total_steps", "seconds", "valid_loss_before", "valid_loss_after", "exactly_right_before", "exactly_right_after",
            "test_samples",
        )
        found["fine-tuning"] = {name: report[name] for name in names}
        print("fine-tuning", json.dumps(found["fine-tuning"]), flush=True)
    print("\n| | valid | test |\n| --- | ---: | ---: |")
    print("| bits per byte | {:.3f} | {:.3f} |".format(*(found[s]["bits per byte"] for s in PROMPTS)))
    for kind in ("next line", "gap"):
        print("| {}, exactly right | {:.1%} | {:.1%} |".format(kind, *(found[s][kind]["right"] for s in PROMPTS)))
        print("| {}, similarity | {:.3f} | {:.3f} |".format(kind, *(found[s][kind]["similarity"] for s in PROMPTS)))
    if "fine-tuning" in found:
        f = found["fine-tuning"]
        print("\n{total_steps} steps in {seconds:.0f} s: validation loss {valid_loss_before:.3f}, then {valid_loss_after:.3f}; "
              "{exactly_right_before}, then {exactly_right_after} of {test_samples} signatures right".format(**f))


if __name__ == "__main__":
    main()
