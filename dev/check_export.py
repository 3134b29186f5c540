"""Compares the GGUF files that a built `metal-candle` writes with those of llama.cpp's own tools, key by key and byte by byte.

    python dev/check_export.py BINARY LLAMA_CPP [BUILD MODEL.gguf]

LLAMA_CPP is a source tree of llama.cpp, for its `convert_hf_to_gguf.py`: both programs convert tiny random models of each architecture.
With BUILD, a folder with `llama-quantize` and `llama-imatrix`, both quantize MODEL.gguf (f32, f16 or bf16) to each mixture, with and
without an importance matrix. Exits with 1 if anything differs.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from check_gguf import CASES, COMMON, convert
from families import build_config, make_model
from gguf import GGUFReader

# keys that only one of the programs writes, or that depend on a tokenizer or a folder name
IGNORED = ("GGUF.", "general.", "tokenizer.", "metal_candle.", "quantize.imatrix.")
# keys of layers and experts that a dense Granite 4 does not have, and the context of released models of Hunyuan, whatever the configuration
IGNORED += ("granite.ssm.", "granite.expert_", "granite.rope.scaling.finetuned", "hunyuan-dense.context_length", "hunyuan-dense.rope.scaling.")
# our files always contain head sizes, rotated sizes and the window of each layer
OURS = ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size", "attention.sliding_window_pattern",
        "rope.freq_base", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "attention.scale", "rope.freq_base_swa")
# keys that the converter always writes for some architectures and that have no effect
THEIRS = {"attention.sliding_window": 0, "rope.scaling.type": "none", "rope.scaling.original_context_length": COMMON["max_position_embeddings"]}
MIXTURES = (
    "q8_0 q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s q4_1 q4_0 iq4_nl iq4_xs q3_k_l q3_k_m q3_k_s q2_k".split()
)


def keys(reader):
    fields = {key: field.contents() if field.types else None for key, field in reader.fields.items()}
    # one number stands for a list of equal ones
    kv = [key for key in fields if key.endswith("head_count_kv") and isinstance(fields[key], list) and len(set(fields[key])) == 1]
    fields |= {key: fields[key][0] for key in kv}
    return {key: value for key, value in fields.items() if not key.startswith(IGNORED)}


def differences(theirs, ours):
    theirs, ours = GGUFReader(theirs), GGUFReader(ours)
    expected, found = keys(theirs), keys(ours)
    for key in sorted(set(expected) | set(found)):
        name = key.split(".", 1)[-1]
        if key not in expected and name in OURS:
            continue
        if key not in found and THEIRS.get(name) == expected[key]:
            continue
        if expected.get(key) != found.get(key):
            yield f"{key}: {expected.get(key)} and {found.get(key)}"
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    found = {tensor.name: tensor for tensor in ours.tensors}
    for name in sorted(set(expected) | set(found)):
        a, b = expected.get(name), found.get(name)
        if a is None or b is None:
            yield f"{name}: only in one file"
        elif a.tensor_type != b.tensor_type or list(a.shape) != list(b.shape):
            yield f"{name}: {a.tensor_type.name} {list(a.shape)} and {b.tensor_type.name} {list(b.shape)}"
        elif name.startswith("rope_"):
            # tables of divisors are computed in a different order
            if abs(a.data / b.data - 1).max() > 1e-6:
                yield f"{name}: other divisors"
        elif a.data.tobytes() != b.data.tobytes():
            share = (a.data.view("u1") != b.data.view("u1")).mean()
            yield f"{name}: {a.tensor_type.name}, {share:.2e} of the bytes differ"


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip()[-400:])


def report(name, found):
    found = list(found)
    print(f"{'FAIL' if found else 'ok  '} {name}" + "".join(f"\n     {line}" for line in found[:6]), flush=True)
    return bool(found)


def attempt(name, compare):
    try:
        return report(name, compare())
    except Exception as error:
        return report(name, [f"{type(error).__name__}: {error}"])


def main():
    binary, _, *quantizing = sys.argv[1:]
    has_failed = False
    for number, name in enumerate(CASES):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)

            def compare():
                make_model(build_config(**(COMMON | CASES[name])), 100 + number).save_pretrained(folder)
                run(binary, "convert", "--model", folder, "--format", "gguf", "--output", folder / "ours.gguf")
                convert(folder, folder / "theirs.gguf")
                return differences(folder / "theirs.gguf", folder / "ours.gguf")

            has_failed |= attempt(name, compare)
    if not quantizing:
        return has_failed
    build, model = map(Path, quantizing)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = folder / "text.txt"
        text.write_text(" ".join(f"The {n}th line is about {n * n} and {n * 7919 % 1000}." for n in range(600)))
        imatrix = folder / "imatrix.gguf"
        run(build / "llama-imatrix", "-m", model, "-f", text, "-o", imatrix, "-c", 512, "--chunks", 4)
        for name in MIXTURES:
            for importance in (None, imatrix):

                def compare():
                    with tempfile.TemporaryDirectory() as own:
                        theirs, ours = Path(own) / "theirs.gguf", Path(own) / "ours.gguf"
                        with_importance = ["--imatrix", importance] if importance else []
                        run(build / "llama-quantize", *with_importance, model, theirs, name)
                        run(binary, "quantize", "--model", model, "--type", name, "--output", ours, "--proof", text, *with_importance)
                        return list(differences(theirs, ours))

                has_failed |= attempt(f"{name}{' imatrix' if importance else ''}", compare)
    return has_failed


if __name__ == "__main__":
    sys.exit(main())
