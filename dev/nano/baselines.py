"""Measures bits per byte of the validation and test text: `xz -9`, and 5-gram models over the tokenizer's tokens, trained on the same files."""

import argparse
import lzma
import math
import os
from collections import Counter

from make import ROOT, read_rows
from tokenizers import Tokenizer

ORDER = 5
TOKEN_BITS = 12
START = "<|endoftext|>"


def encode(tokenizer, texts):
    """Token ids of each text after `ORDER - 1` start tokens."""
    start = [tokenizer.token_to_id(START)] * (ORDER - 1)
    return [start + e.ids for e in tokenizer.encode_batch_fast(texts)]


def grams(sequences, width):
    """Each sequence of `width` tokens that ends with a token of the text, as one number."""
    mask = (1 << (TOKEN_BITS * width)) - 1
    for ids in sequences:
        number = 0
        for token in ids[:ORDER - 1]:
            number = number << TOKEN_BITS | token
        for token in ids[ORDER - 1:]:
            number = (number << TOKEN_BITS | token) & mask
            yield number


class WittenBell:
    """Interpolated Witten-Bell smoothing (Chen and Goodman 1999, section 2.4)."""

    def __init__(self, counts, vocabulary):
        self.counts, self.vocabulary = counts, vocabulary
        self.totals = [totals(of_order) for of_order in counts]

    def probability(self, number):
        estimate = 1 / self.vocabulary
        for width, (counts, (total, kinds, _)) in enumerate(zip(self.counts, self.totals), 1):
            gram = number & ((1 << (TOKEN_BITS * width)) - 1)
            context = gram >> TOKEN_BITS
            if context in total:
                estimate = (counts.get(gram, 0) + kinds[context] * estimate) / (total[context] + kinds[context])
        return estimate


class KneserNey:
    """Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999, section 3)."""

    def __init__(self, counts, vocabulary):
        self.vocabulary = vocabulary
        # All orders except the highest count the contexts of a sequence, not its occurrences.
        mask = [(1 << (TOKEN_BITS * width)) - 1 for width in range(ORDER + 1)]
        self.counts = [Counter(gram & mask[width] for gram in counts[width]) for width in range(1, ORDER)] + [counts[-1]]
        self.discounts = []
        for of_order in self.counts:
            often = Counter(of_order.values())
            ratio = often[1] / (often[1] + 2 * often[2])
            self.discounts.append([0.0] + [k - (k + 1) * ratio * often[k + 1] / often[k] for k in (1, 2, 3)])
        self.totals = [totals(of_order) for of_order in self.counts]

    def probability(self, number):
        estimate = 1 / self.vocabulary
        levels = zip(self.counts, self.totals, self.discounts)
        for width, (counts, (total, _, often), discount) in enumerate(levels, 1):
            gram = number & ((1 << (TOKEN_BITS * width)) - 1)
            context = gram >> TOKEN_BITS
            if context in total:
                count = counts.get(gram, 0)
                left = sum(d * n for d, n in zip(discount[1:], often[context]))
                estimate = (count - discount[min(count, 3)] + left * estimate) / total[context]
        return estimate


def totals(counts):
    """For each context: the number of occurrences, of distinct continuations, and of continuations that occur once, twice and more often."""
    total, kinds, often = Counter(), Counter(), {}
    for gram, count in counts.items():
        context = gram >> TOKEN_BITS
        total[context] += count
        kinds[context] += 1
        often.setdefault(context, [0, 0, 0])[min(count, 3) - 1] += 1
    return total, kinds, often


def bits(model, sequences):
    return sum(-math.log2(model.probability(gram)) for gram in grams(sequences, ORDER))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="folder written by `make.py`")
    parser.add_argument("--model", default=os.path.join(ROOT, "assets", "nano"), help="folder of the tokenizer")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(os.path.join(arguments.model, "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    assert vocabulary <= 1 << TOKEN_BITS
    train = encode(tokenizer, [row["text"] for row in read_rows(os.path.join(arguments.corpus, "sources", "train.jsonl"))])
    counts = [Counter(grams(train, width)) for width in range(1, ORDER + 1)]
    models = {"5-gram, Witten-Bell": WittenBell(counts, vocabulary), "5-gram, modified Kneser-Ney": KneserNey(counts, vocabulary)}
    print("| text | bytes | tokens | model | bits per byte |\n| --- | --- | --- | --- | --- |")
    for split in ("valid", "test"):
        texts = [row["text"] for row in read_rows(os.path.join(arguments.corpus, f"{split}.jsonl"))]
        size = sum(len(text.encode()) for text in texts)
        sequences = encode(tokenizer, texts)
        tokens = sum(len(ids) - (ORDER - 1) for ids in sequences)
        found = {"`xz -9`": 8 * len(lzma.compress("".join(texts).encode(), preset=9))}
        found |= {name: bits(model, sequences) for name, model in models.items()}
        for name, total in found.items():
            print(f"| {split} | {size} | {tokens} | {name} | {total / size:.3f} |")


if __name__ == "__main__":
    main()
