"""Creates the built-in model's sources, tokenizer, corpus and fine-tuning data; see README.md in this folder."""

import argparse
import array
import json
import os
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path, rows):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path, value):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def source_files(folder):
    return {split: read_rows(os.path.join(folder, "sources", f"{split}.jsonl")) for split in ("train", "valid", "test", "more")}


def make_sources(arguments):
    import sources

    listed, more_listed = os.path.join(HERE, "crates.json"), os.path.join(HERE, "more.json")
    report, more = read_json(listed), read_json(more_listed)
    if arguments.from_lock:
        found = sources.locked_packages(ROOT)
        files, new, seen = sources.collect(found, sources.splits(found))
    else:
        side = {crate["name"]: crate["split"] for crate in report["used"]}
        found = sources.listed_packages(report["used"])
        files, new, seen = sources.collect(found, side)
        if new["used"] != report["used"]:
            raise SystemExit("the files differ from those that `crates.json` lists")
    found = [package for package in found if package["name"] in {crate["name"] for crate in new["used"]}]
    versions = {package["name"]: package["version"] for package in found}
    if arguments.from_lock or arguments.more_from_list:
        with open(os.path.join(HERE, "more.txt"), encoding="utf-8") as file:
            others = sources.fetched(line.strip() for line in file if line.strip() and not line.startswith("#"))
    else:
        others = sources.listed_packages([crate for crate in more["used"] if crate["name"] not in versions])
    everything = sorted(
        found + [package for package in others if package["name"] not in versions],
        key=lambda package: (package["name"], sources.version_key(package["version"])),
    )
    files["more"], new_more = sources.collect_more(everything, files, seen, sources.held_out_among(everything))
    for split, rows in files.items():
        write_rows(os.path.join(arguments.corpus, "sources", f"{split}.jsonl"), rows)
        print(split, len(rows), "files", sum(len(r["text"].encode()) for r in rows), "bytes", file=sys.stderr)
    if not arguments.from_lock and not arguments.more_from_list:
        if new_more["used"] != more["used"]:
            raise SystemExit("the files differ from those that `more.json` lists")
        return
    if arguments.from_lock:
        write_json(listed, new)
    write_json(more_listed, new_more)
    with open(os.path.join(arguments.model, "PROVENANCE.md"), "w", encoding="utf-8", newline="\n") as file:
        file.write(sources.provenance(new, new_more))


def make_tokenizer(arguments):
    import tokenizer

    tokenizer.write_model_folder(arguments.model, [row["text"] for row in source_files(arguments.corpus)["train"]])


def make_corpus(arguments):
    import corpus

    rows, report = corpus.make(source_files(arguments.corpus), arguments.model)
    for split, texts in rows.items():
        write_rows(os.path.join(arguments.corpus, f"{split}.jsonl"), [{"text": text} for text in texts])
    print(json.dumps(report, indent=2))


def make_signatures(arguments):
    import signatures

    rows, report = signatures.make(source_files(arguments.corpus))
    for split, found in rows.items():
        write_rows(os.path.join(arguments.model, "data", f"{split}.jsonl"), found)
    print(json.dumps(report, indent=2))


def make_weights(arguments):
    """The weights of a training run, rounded to bf16 (to the nearest, ties to even)."""
    if not arguments.weights:
        return
    with open(os.path.join(arguments.weights, "model.safetensors"), "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    metadata = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
    tensors, parts, end = {}, [], 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert tensor["dtype"] == "F32", name
        bits = array.array("I", data[slice(*tensor["data_offsets"])])
        parts.append(array.array("H", ((x + 0x7FFF + (x >> 16 & 1)) >> 16 for x in bits)).tobytes())
        tensors[name] = {"dtype": "BF16", "shape": tensor["shape"], "data_offsets": [end, end + len(parts[-1])]}
        end += len(parts[-1])
    head = json.dumps(metadata | tensors, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(os.path.join(arguments.model, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head + b"".join(parts))
    print("weights", end, "bytes", file=sys.stderr)


STEPS = {
    "sources": make_sources, "tokenizer": make_tokenizer, "corpus": make_corpus, "signatures": make_signatures,
    "weights": make_weights,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[*STEPS, "all"], help="the step to run; `all`: all steps in this order, with weights if --weights is set")
    parser.add_argument("--corpus", help="folder for the sources and the corpus; required by all steps except `weights`")
    parser.add_argument("--from-lock", action="store_true", help="select the crates again from Cargo.lock instead of crates.json")
    parser.add_argument("--more-from-list", action="store_true", help="select the additional crates again from more.txt")
    parser.add_argument("--weights", help="folder of a trained model, for the step `weights`, which rounds them to bf16")
    parser.add_argument("--model", default=os.path.join(ROOT, "assets", "nano"), help="folder of the model")
    arguments = parser.parse_args()
    if arguments.corpus is None and arguments.step != "weights":
        parser.error("--corpus is missing")
    for name, step in STEPS.items():
        if arguments.step in (name, "all"):
            step(arguments)


if __name__ == "__main__":
    main()
