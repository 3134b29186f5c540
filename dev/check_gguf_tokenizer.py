"""Compares the tokenizer in a GGUF file with the one that llama.cpp's converter writes for the same model folder.

    python dev/check_gguf_tokenizer.py LLAMA_CPP FOLDER FILE.gguf

LLAMA_CPP is a source tree of llama.cpp, for its `convert_hf_to_gguf.py`; FOLDER has a tokenizer and a `config.json`; weights are not read.
Prints a line for each key `tokenizer.*`; exits with 1 if a value differs. Keys in only one of the files are printed and do not count:
`add_eos_token` is always written here, `add_sep_token` never. Without a `tokenizer.model` the converter has no scores and writes -1000.
"""

import subprocess
import sys
import tempfile
from pathlib import Path


def tokenizer_keys(file):
    import gguf

    fields = gguf.GGUFReader(file).fields
    return {key: ([kind.name for kind in field.types], field.contents()) for key, field in fields.items() if key.startswith("tokenizer.")}


def difference(key, theirs, ours):
    if theirs == ours:
        return None
    (their_kind, their_value), (our_kind, our_value) = theirs, ours
    if key == "tokenizer.chat_templates" and sorted(their_value) == sorted(our_value):
        return None  # the names of a set
    if their_kind != our_kind:
        return f"{their_kind} and {our_kind}"
    if not isinstance(their_value, list) or len(their_value) != len(our_value):
        return f"{str(their_value)[:60]!r} and {str(our_value)[:60]!r}"
    rows = [(index, *pair) for index, pair in enumerate(zip(their_value, our_value)) if pair[0] != pair[1]]
    return f"{len(rows)} of {len(our_value)}, first {rows[:4]}"


def main():
    llama_cpp, folder, file = sys.argv[1:]
    sys.path.insert(0, str(Path(llama_cpp) / "gguf-py"))
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / "theirs.gguf"
        command = [sys.executable, str(Path(llama_cpp) / "convert_hf_to_gguf.py"), "--vocab-only", folder, "--outfile", str(converted)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr.strip())
        theirs, ours = tokenizer_keys(converted), tokenizer_keys(file)
    has_failed = False
    for key in sorted(theirs | ours):
        if key not in theirs or key not in ours:
            print(f"only {'here  ' if key in ours else 'theirs'} {key}")
            continue
        found = difference(key, theirs[key], ours[key])
        has_failed |= found is not None
        print(f"{'ok  ' if found is None else 'FAIL'} {key} {found or ''}")
    return has_failed


if __name__ == "__main__":
    sys.exit(main())
