"""Compares speed and memory of LoRA training with PEFT, alternating between both sides.

    python dev/compare_peft.py target/release/metal-candle [--python PYTHON] [--rounds 3] [--steps 4] [--threads N]
                               [--only WORD] [--types f32,bf16] [--work FOLDER]

Creates models with random bf16 weights in FOLDER if they do not exist, at the shape of Qwen2.5-0.5B and at a tiny shape. All sides
train LoRA of rank 8 with AdamW on sequences of 256 tokens: metal-candle with the weights as in the file, PEFT with weights widened to
f32 and in bf16 (its adapters are f32 in both). A round is one process of each side, one after the other; each makes one untimed step
and then the timed steps.

A step is forward, backward, clipping (metal-candle only) and update; tokens/s is the median over the steps of all rounds. Memory is
the peak RAM of a process: for metal-candle from its start, for PEFT after the model was loaded (where Linux allows resetting the
peak). PYTHON needs torch, transformers, peft and safetensors; the default is the running Python. On processors without bf16 products,
torch is very slow with bf16: use `--types f32`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "assets" / "nano"
LENGTH = 256
# ids that both tokenizers have
VOCABULARY = 4000
TARGETS = {"q+v": ["q_proj", "v_proj"], "all linears": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
SHAPES = {
    "0.5B": dict(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151936,
    ),
    "tiny": dict(
        hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=704, vocab_size=4096,
    ),
}
CASES = [("0.5B", 1, "q+v"), ("0.5B", 1, "all linears"), ("tiny", 8, "q+v")]


# the code that PYTHON runs


def make_model(folder, shape):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **SHAPES[shape], tie_word_embeddings=True, rms_norm_eps=1e-6, max_position_embeddings=4096, bos_token_id=None, eos_token_id=0,
    )
    # written under a different name first, so an existing folder is complete
    unfinished = Path(f"{folder}.unfinished")
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(unfinished)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(NANO / name, unfinished)
    unfinished.rename(folder)


def peak_memory():
    import resource

    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def train_peft(folder, kind, batch, targets, steps, threads):
    import time

    import peft
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[kind])
    model.config.use_cache = False
    lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS[targets], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    seconds = []
    for _ in range(1 + steps):
        ids = torch.randint(0, VOCABULARY, (batch, LENGTH))
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return dict(seconds=seconds[1:], memory=peak_memory(), trained=sum(p.numel() for p in trained), versions=versions)


def work(request):
    if request["do"] == "make":
        return make_model(request["folder"], request["shape"])
    del request["do"]
    return train_peft(**request)


# the code of this process


def environment(threads):
    number = str(threads)
    return {**os.environ, "RAYON_NUM_THREADS": number, "OMP_NUM_THREADS": number, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(command, threads):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment(threads))
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode}: {' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout


def in_python(arguments, **request):
    lines = run([arguments.python, __file__, "--request", json.dumps(request)], arguments.threads).splitlines()
    return json.loads(lines[-1])


def write_rows(path, count):
    """Rows of text with more than enough tokens, each of other words."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    with open(path, "w") as file:
        for _ in range(count):
            words = ["".join(draw.choices(letters, k=draw.randint(3, 8))) for _ in range(LENGTH)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def train_ours(arguments, folder, batch, targets):
    with tempfile.TemporaryDirectory() as space:
        rows, output = Path(space) / "rows.jsonl", Path(space) / "run"
        steps = 1 + arguments.steps
        write_rows(rows, steps * batch)
        command = [
            arguments.binary, "train", "--model", folder, "--data", rows, "--output", output, "--device", "cpu",
            "--rank", 8, "--alpha", 16, "--target-modules", ",".join(TARGETS[targets]), "--steps", steps,
            "--truncate", "--max-tokens-per-sample", LENGTH, "--batch-tokens", batch * LENGTH, "--valid-fraction", 0,
            "--test-samples", 0, "--learning-rate", 1e-4, "--schedule", "constant", "--save-interval", steps, "--profile", "--json",
        ]
        result = json.loads(run(command, arguments.threads))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        tokens = [line["tokens"] for line in lines if line["event"] == "step"]
        if tokens != [batch * LENGTH] * steps:
            sys.exit(f"expected {steps} steps of {batch * LENGTH} tokens, found {tokens}")
        spans = json.loads((output / "profile.json").read_text())["traceEvents"]
        seconds = [span["dur"] / 1e6 for span in spans if span["name"] == "step"]
        if len(seconds) != steps:
            sys.exit(f"expected {steps} steps in profile.json, found {len(seconds)}")
        return dict(seconds=seconds[1:], memory=result["peak_memory_bytes"], trained=result["num_trainable_parameters"])


def compare(arguments, shape, batch, targets):
    folder = arguments.work / f"qwen2-{shape}"
    sides = ["metal-candle"] + [f"peft {kind}" for kind in arguments.types]
    seconds, memory, trained, versions = ({side: [] for side in sides}, dict.fromkeys(sides, 0), set(), None)
    for number in range(arguments.rounds):
        for side in sides:
            print(f"round {number + 1} of {arguments.rounds}: {shape} {batch} x {LENGTH} {targets}, {side}", file=sys.stderr, flush=True)
            if side == "metal-candle":
                found = train_ours(arguments, folder, batch, targets)
            else:
                found = in_python(
                    arguments, do="train", folder=str(folder), kind=side.split()[1], batch=batch, targets=targets,
                    steps=arguments.steps, threads=arguments.threads,
                )
                versions = found["versions"]
            seconds[side] += found["seconds"]
            memory[side] = max(memory[side], found["memory"])
            trained.add(found["trained"])
    if len(trained) != 1:
        sys.exit(f"the sides train different numbers of parameters: {sorted(trained)}")
    tokens = batch * LENGTH
    print(f"\n{shape} shape, {batch} x {LENGTH}, {targets} ({trained.pop():,} parameters; {versions})")
    print(f"{'':<16}{'tokens/s':>10}{'spread':>16}{'ratio':>8}{'memory MB':>12}{'ratio':>8}")
    ours = tokens / statistics.median(seconds["metal-candle"])
    for side in sides:
        speed = tokens / statistics.median(seconds[side])
        spread = f"{tokens / max(seconds[side]):.0f} to {tokens / min(seconds[side]):.0f}"
        # the speed ratio and the memory ratio of metal-candle
        print(
            f"{side:<16}{speed:>10.0f}{spread:>16}{ours / speed:>8.2f}{memory[side] / 1e6:>12.0f}"
            f"{memory['metal-candle'] / memory[side]:>8.2f}",
            flush=True,
        )


def main():
    if sys.argv[1:2] == ["--request"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    # child processes end with this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path, help="a release build of metal-candle")
    parser.add_argument("--python", default=sys.executable, help="the Python with torch, transformers and peft")
    parser.add_argument("--rounds", type=int, default=3, help="number of processes of each side")
    parser.add_argument("--steps", type=int, default=4, help="number of timed steps of each process, at most 19")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of threads of each side")
    parser.add_argument("--only", default="", help="only cases with this in their name, such as `tiny 8 x 256 q+v`")
    parser.add_argument("--types", type=lambda text: text.split(","), default=["f32", "bf16"], help="dtypes of PEFT's weights")
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "compare-peft", help="the folder of the models")
    arguments = parser.parse_args()
    if not 1 <= arguments.steps <= 19 or arguments.rounds < 1:
        parser.error("--steps is 1 to 19, --rounds at least 1")
    unknown = set(arguments.types) - {"f32", "bf16"}
    if unknown:
        parser.error(f"--types: expected f32 or bf16, found {', '.join(sorted(unknown))}")
    cases = [case for case in CASES if arguments.only in f"{case[0]} {case[1]} x {LENGTH} {case[2]}"]
    if not cases:
        parser.error("--only matches no case")
    arguments.binary, arguments.work = arguments.binary.resolve(), arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for shape in dict.fromkeys(case[0] for case in cases):
        folder = arguments.work / f"qwen2-{shape}"
        if not folder.is_dir():
            print(f"creating {folder}", file=sys.stderr)
            in_python(arguments, do="make", folder=str(folder), shape=shape)
    for case in cases:
        compare(arguments, *case)


if __name__ == "__main__":
    main()
