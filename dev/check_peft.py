"""Compares a built `metal-candle` with transformers and peft on random models.

    python dev/check_peft.py target/release/metal-candle [--seed N] [--models N] [--only WORD] [--keep FOLDER]

The seed (printed, so that a run can be repeated) determines the unusual shape of each model. The script compares logits, plain and with
adapters in the formats of peft and mlx-lm; adapters of `metal-candle train`, read by peft; adapters of `metal-candle convert`, read by
mlx-lm and peft; and models of `metal-candle fuse`, read by transformers. Prints a table; exits with 1 if anything differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).resolve().parent.parent / "crates" / "metal-candle" / "tests" / "golden"
TOLERANCE = 1e-4
UNTYING = ["embeddings", "dora embeddings", "saved modules", "saved modules tied"]
WORDS = "the of sum value token model returns length index slice first last and vector of matrix rows columns".split()


def draw_sizes(draw):
    """An unusual Qwen2 configuration."""
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 3, 7])
    head_dim = draw.choice([6, 8, 10, 16, 34])
    hidden = draw.choice([heads * head_dim, heads * head_dim, 4 * draw.randint(7, 20)])
    return dict(
        hidden_size=hidden, head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=draw.randint(17, 130), num_hidden_layers=draw.randint(1, 5), vocab_size=draw.choice([502, 503, 509, 641]),
        rope_theta=draw.choice([1e4, 5e5, 1e6]), rms_norm_eps=draw.choice([1e-5, 1e-6]), tie_word_embeddings=draw.random() < 0.5,
        max_position_embeddings=512,
    )


def make_model(folder, sizes, seed, dtype, shard_size):
    config = transformers.Qwen2Config(**sizes, bos_token_id=None, eos_token_id=482, pad_token_id=None, attn_implementation="eager")
    model = transformers.Qwen2ForCausalLM(config).float()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            if name.endswith("bias"):
                parameter.copy_(0.4 * drawn)
            elif "norm" in name:
                parameter.copy_(1.0 + 0.2 * drawn)
            else:
                parameter.copy_(1.4 / parameter.shape[1] ** 0.5 * drawn)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        (folder / name).write_bytes((GOLDEN / "tokenizer" / name).read_bytes())


def load_model(folder):
    """The model with its weights as saved, using f32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def load_model_as_saved(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


class Checks:
    def __init__(self, binary, work, only):
        self.binary, self.work, self.only, self.failures, self.count, self.largest = binary, work, only, 0, 0, 0.0

    def is_selected(self, name):
        return not self.only or self.only in name

    def run(self, *arguments):
        command = [str(self.binary), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr[-1500:]}")
        return done.stdout

    def logits(self, model, ids, adapter=None):
        out = self.work / f"logits-{self.count}.safetensors"
        extra = ["--adapter", adapter] if adapter else []
        self.run("logits", "--model", model, *extra, "--ids", ",".join(map(str, ids)), "--out", out, "--device", "cpu")
        tensors = load_file(out)
        if set(tensors) != {"logits"} or tensors["logits"].dtype != torch.float32:
            raise RuntimeError(f"{out} holds {[(k, v.dtype) for k, v in tensors.items()]}, not one f32 tensor `logits`")
        return tensors["logits"]

    def row(self, name, difference, tolerance, note=""):
        good = difference <= tolerance
        self.failures += not good
        if good and tolerance == TOLERANCE:
            self.largest = max(self.largest, difference)
        print(f"{'ok  ' if good else 'FAIL'}  {name:<58} {difference:>10.3g}  {tolerance:>8.1g}  {note}", flush=True)

    def check(self, name, compute):
        """`compute` returns the difference, its tolerance and a note."""
        if not self.is_selected(name):
            return
        self.count += 1
        try:
            self.row(name, *compute())
        except (RuntimeError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
            self.row(name, float("nan"), 0.0, str(error).replace("\n", "\n        "))


def difference(found, expected):
    if found.shape != expected.shape:
        raise ValueError(f"shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    # Random adapters cause large logits; the tolerance is for logits below ten.
    return ((found - expected).abs().max() / max(1.0, expected.abs().max().item() / 10.0)).item()


def adapter_kinds(layers):
    last = layers - 1
    return {
        "qv": dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        "all-linear": dict(r=3, lora_alpha=8, target_modules="all-linear"),
        "rslora": dict(r=5, lora_alpha=7, target_modules=["k_proj", "o_proj", "up_proj"], use_rslora=True),
        "patterns": dict(
            r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "gate_proj"],
            rank_pattern={f"layers.{last}.self_attn.q_proj": 2, "down_proj": 7}, alpha_pattern={"gate_proj": 11, f"layers.{last}.mlp.down_proj": 1},
        ),
        "rslora-patterns": dict(
            r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 3}, use_rslora=True
        ),
        "some-layers": dict(r=2, lora_alpha=4, target_modules=["v_proj", "up_proj"], layers_to_transform=[last], layers_pattern="layers"),
        "one-layer-number": dict(r=2, lora_alpha=4, target_modules=["v_proj"], layers_to_transform=0),
        "expression": dict(r=2, lora_alpha=4, target_modules=r".*\.self_attn\.(q|k)_proj"),
        "full-paths": dict(r=2, lora_alpha=5, target_modules=["model.layers.0.self_attn.q_proj", f"layers.{last}.mlp.down_proj"]),
        "excluded": dict(r=2, lora_alpha=5, target_modules="all-linear", exclude_modules=["k_proj", "gate_proj"]),
        "dora": dict(r=3, lora_alpha=6, target_modules="all-linear", use_dora=True),
        "dora-rslora": dict(r=4, lora_alpha=6, target_modules=["v_proj", "down_proj"], use_dora=True, use_rslora=True),
        "embeddings": dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "o_proj"]),
        "dora-embeddings": dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "k_proj"], use_dora=True),
        "saved": dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"]),
        "saved-embedding": dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "saved-in-blocks": dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["mlp", "input_layernorm"]),
        "bias-all": dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], bias="all"),
        "bias-lora-only": dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], bias="lora_only"),
        "bias-all-saved": dict(r=2, lora_alpha=4, target_modules=["o_proj"], modules_to_save=["lm_head", "k_proj"], bias="all"),
        "dora-bias": dict(r=2, lora_alpha=4, target_modules="all-linear", use_dora=True, bias="lora_only"),
        "tokens": dict(r=2, lora_alpha=4, target_modules=["v_proj"], trainable_token_indices=[3, 0, 477, 12]),
        "tokens-bias": dict(r=2, lora_alpha=4, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [9, 5]}, bias="all"),
        "tokens-in-head": dict(
            r=2, lora_alpha=4, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [9, 5], "lm_head": [7, 30, 5]}
        ),
        "tokens-of-head": dict(r=2, lora_alpha=4, target_modules=["v_proj"], trainable_token_indices={"lm_head": [7, 30, 5]}),
        "tokens-tied": dict(r=2, lora_alpha=4, target_modules=["v_proj"], trainable_token_indices=[7, 30, 5], ensure_weight_tying=True),
        "saved-embedding-tied": dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        "saved-head-tied": dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
        "embedding-tied": dict(r=2, lora_alpha=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    }


# How PEFT writes an adapter; the first is its default.
REWRITTEN = ["qv", "dora", "embeddings", "saved", "bias-all", "tokens", "tokens-bias"]
WRITINGS = ["auto", "with-embeddings", "with-rounded-embeddings", "bin", "bin-with-embeddings", "bf16"]


def write_adapter(wrapped, folder, writing):
    wrapped.save_pretrained(folder, save_embedding_layers=True if "embeddings" in writing else "auto")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if "rounded" in writing:
        tensors = {name: tensor.bfloat16() if "embed_tokens.weight" in name or "lm_head.weight" in name else tensor for name, tensor in tensors.items()}
        save_file(tensors, path)
    if writing == "bf16":
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
        # copies of the base weights are accepted, rounded to any type
        peft.set_peft_model_state_dict(wrapped, {name: tensor for name, tensor in load_file(path).items() if "base_layer.weight" not in name})
    if "bin" in writing:
        torch.save(tensors, folder / "adapter_model.bin")
        path.unlink()


def make_adapter(folder, model_folder, settings, seed, writing="auto"):
    wrapped = peft.get_peft_model(load_model(model_folder), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(part in name for part in ["lora_magnitude", "modules_to_save", "token_adapter.trainable_tokens"]):
                parameter.mul_(1.0 + 0.2 * torch.randn(parameter.shape, generator=noise))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * (1.0 / parameter.shape[1] ** 0.5) * 0.7)
            elif parameter.requires_grad and "trainable_tokens" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    write_adapter(wrapped, folder, writing)
    return wrapped


def as_mlx(folder, peft_folder, layers):
    """The same adapter in mlx-lm's format, for the kinds that it supports."""
    config = json.loads((peft_folder / "adapter_config.json").read_text())
    tensors = load_file(peft_folder / "adapter_model.safetensors")
    names = {k.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"): v for k, v in tensors.items()}
    keys = sorted({".".join(name.split(".")[3:-1]) for name in names})
    folder.mkdir()
    save_file({name: tensor.T.contiguous() for name, tensor in names.items()}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "fine_tune_type": "lora", "num_layers": layers,
        "lora_parameters": {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0, "keys": keys},
    }))


# Kinds with more than low-rank updates, and kinds whose updates mlx-lm would also apply to a tied head.
UNKNOWN_TO_MLX = [
    "dora-embeddings", "saved", "saved-embedding", "saved-in-blocks", "bias-all", "bias-lora-only", "bias-all-saved", "dora-bias", "tokens",
    "tokens-bias", "tokens-in-head", "tokens-of-head", "tokens-tied", "saved-embedding-tied", "saved-head-tied",
]
OF_EMBEDDING = ["embeddings", "embedding-tied"]


def check_conversion(checks, title, folder, sizes, adapter, ids, expected, is_unknown):
    """`convert` to mlx-lm, run by mlx-lm, and back to PEFT, run by peft; adapters that mlx-lm does not support must be refused."""
    mlx, back = Path(f"{adapter}-to-mlx"), Path(f"{adapter}-to-peft")

    def convert(source, target, kind):
        checks.run("convert", "--model", folder, "--adapter", source, "--format", kind, "--output", target, "--device", "cpu")

    def refused():
        try:
            convert(adapter, mlx, "mlx")
        except RuntimeError as error:
            if "mlx-lm" in str(error) and "exit code 1" in str(error) and not mlx.exists():
                return 0.0, 0.0
            raise
        raise ValueError("mlx-lm does not support this adapter, but it was written")

    def by_mlx():
        import mlx.core as mx
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model as load_mlx

        convert(adapter, mlx, "mlx")
        # mlx-lm reads `rope_theta` where transformers 4 wrote it
        model = load_mlx(folder, model_config={"rope_theta": sizes["rope_theta"]})[0]
        model.set_dtype(mx.float32)
        load_adapters(model, str(mlx)).eval()
        return difference(torch.tensor(model(mx.array([ids]))[0].tolist()), expected), TOLERANCE

    def by_peft():
        convert(mlx if mlx.exists() else adapter, back, "peft")
        return difference(logits_of(peft.PeftModel.from_pretrained(load_model(folder), back).eval(), ids), expected), TOLERANCE

    # mlx-lm assumes that the head size is the width divided by the number of heads
    if is_unknown or sizes["hidden_size"] == sizes["num_attention_heads"] * sizes["head_dim"]:
        checks.check(title + " converted to mlx", refused if is_unknown else by_mlx)
    checks.check(title + " converted back", by_peft)


def check_logits(checks, name, folder, vocab, draw):
    model = load_model(folder)
    for length in [1, 2, 37, 257]:
        ids = [draw.randrange(vocab) for _ in range(length)]
        checks.check(f"{name} logits of {length}", lambda ids=ids: (difference(checks.logits(folder, ids), logits_of(model, ids)), TOLERANCE))


def check_adapters(checks, name, folder, sizes, draw):
    layers, vocab = sizes["num_hidden_layers"], sizes["vocab_size"]
    base = load_model(folder)
    for number, (kind, settings) in enumerate(adapter_kinds(layers).items()):
        title = f"{name} adapter {kind}"
        names = [title, title + " as mlx", title + " converted to mlx", title + " converted back", title + " fused", title + " fused weights", *(f"{title} written {w}" for w in WRITINGS)]
        if not any(map(checks.is_selected, names)):
            continue
        if "-tied" in kind and not sizes["tie_word_embeddings"]:
            continue
        ids = [draw.randrange(vocab) for _ in range(29)]
        adapter = checks.work / f"{name}-{kind}"
        wrapped = make_adapter(adapter, folder, settings, 100 + number)
        expected = logits_of(wrapped, ids)
        effect = (expected - logits_of(base, ids)).abs().max().item()
        checks.check(title, lambda: (difference(checks.logits(folder, ids, adapter), expected), TOLERANCE, f"effect {effect:.2g}"))
        if kind in ("qv", "all-linear"):
            mlx = checks.work / f"{name}-{kind}-mlx"
            as_mlx(mlx, adapter, layers)
            checks.check(title + " as mlx", lambda: (difference(checks.logits(folder, ids, mlx), expected), TOLERANCE))
        if checks.is_selected(title + " converted"):
            check_conversion(checks, title, folder, sizes, adapter, ids, expected, kind in UNKNOWN_TO_MLX or (kind in OF_EMBEDDING and sizes["tie_word_embeddings"]))
        for writing in WRITINGS[1:]:
            if kind not in REWRITTEN or (kind == "saved" and "rounded" in writing) or not checks.is_selected(f"{title} written {writing}"):
                continue
            written = checks.work / f"{name}-{kind}-{writing}"

            def rewritten(writing=writing, written=written):
                changed = make_adapter(written, folder, settings, 100 + number, writing)
                return difference(checks.logits(folder, ids, written), logits_of(changed, ids)), TOLERANCE

            checks.check(f"{title} written {writing}", rewritten)
        fused = checks.work / f"{name}-{kind}-fused"
        merged = wrapped.merge_and_unload()

        def fuse():
            checks.run("fuse", "--model", folder, "--adapter", adapter, "--output", fused, "--device", "cpu")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(fused, dtype="auto", attn_implementation="eager").eval()
            saved = theirs.dtype
            if saved != torch.float32:
                return weights_difference(theirs, merged), 1.0, f"weights, in steps of {saved}"
            return difference(logits_of(theirs, ids), logits_of(merged, ids)), TOLERANCE

        if kind in ("qv", "all-linear", "patterns", "rslora", "dora", "dora-rslora", "bias-all", "bias-lora-only", "dora-bias", "tokens", "tokens-bias"):
            checks.check(title + " fused", fuse)


def weights_difference(found, expected):
    """The largest distance of two weights in roundings of the narrow type."""
    bits = {torch.bfloat16: 8, torch.float16: 11}[found.dtype]
    theirs, ours, worst = expected.state_dict(), found.state_dict(), 0.0
    if set(theirs) != set(ours):
        raise ValueError(f"tensors differ: {sorted(set(theirs) ^ set(ours))}")
    for name, tensor in theirs.items():
        step = tensor.abs() * 2.0 ** (1 - bits) + 1e-6
        worst = max(worst, ((ours[name].float() - tensor).abs() / step).max().item())
    return worst


def write_data(folder, draw):
    """Rows in several schemas, so that training has something to read."""
    folder.mkdir()
    for split, count in [("train", 40), ("valid", 6), ("test", 4)]:
        rows = []
        for number in range(count):
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(2, 14))) for _ in range(2))
            rows.append([
                {"prompt": question, "completion": answer},
                {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
                {"instruction": question, "input": "", "output": answer},
            ][number % 3])
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def plain_key(name):
    """The key of a file for the name of a parameter."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def check_training(checks, name, folder, sizes, draw):
    data = checks.work / f"{name}-data"
    write_data(data, draw)
    base = load_model(folder)
    ids = [draw.randrange(sizes["vocab_size"]) for _ in range(31)]
    plain = logits_of(base, ids)
    for kind, flags in {
        "q,v": ["--rank", "4", "--alpha", "12", "--target-modules", "q_proj,v_proj"],
        "all-linear": ["--rank", "3", "--alpha", "5", "--target-modules", "all-linear"],
        "dora": ["--rank", "3", "--use-dora"],
        "pissa": ["--rank", "4", "--init-lora-weights", "pissa", "--target-modules", "q_proj,down_proj"],
        "pissa by iteration": ["--rank", "4", "--init-lora-weights", "pissa_niter_4", "--use-rslora"],
        "olora": ["--rank", "3", "--init-lora-weights", "olora", "--rank-pattern", "q_proj=2"],
        "orthogonal": ["--rank", "4", "--init-lora-weights", "orthogonal", "--neftune-noise-alpha", "5"],
        "embeddings": ["--rank", "3", "--target-modules", "q_proj,embed_tokens,lm_head"],
        "dora embeddings": ["--rank", "3", "--target-modules", "q_proj,embed_tokens,lm_head", "--use-dora"],
        "saved modules": ["--rank", "3", "--target-modules", "q_proj", "--modules-to-save", "lm_head,model.norm"],
        "tokens": ["--rank", "3", "--target-modules", "q_proj", "--trainable-tokens", "482,7,0,19"],
        "tokens, bias all": ["--rank", "3", "--target-modules", "q_proj", "--trainable-tokens", "5,12", "--bias", "all"],
        "bias lora_only": ["--rank", "3", "--target-modules", "q_proj,down_proj", "--bias", "lora_only", "--use-dora"],
        "saved modules tied": ["--rank", "3", "--target-modules", "q_proj", "--modules-to-save", "embed_tokens", "--ensure-weight-tying"],
        "patterns": ["--rank", "3", "--rank-pattern", r"layers\.0\..*=2,up_proj=5", "--alpha-pattern", "v_proj=9"],
        "rslora in one layer": ["--rank", "5", "--alpha", "5", "--target-modules", "k_proj,down_proj", "--use-rslora", "--layers", "0"],
    }.items():
        run = checks.work / f"{name}-run-{kind.replace(',', '').replace(' ', '-')}"

        def trained():
            checks.run("train", "--model", folder, "--data", data, "--output", run, "--steps", "5", "--learning-rate", "1e-2", "--seed", "3",
                       "--device", "cpu", *flags)
            wrapped = peft.PeftModel.from_pretrained(load_model(folder), run / "adapter").eval()
            tensors = load_file(run / "adapter" / "adapter_model.safetensors")
            known = {plain_key(key) for key, _ in wrapped.named_parameters() if "lora_" in key or "modules_to_save" in key or "tokens_delta" in key}
            known |= {key for key in tensors if key.endswith(".bias")}
            if config_of(run / "adapter").get("ensure_weight_tying"):
                known.add("base_model.model.lm_head.weight")
            if set(tensors) != known:
                raise ValueError(f"peft and the file differ in {sorted(set(tensors) ^ known)}")
            expected = logits_of(wrapped, ids)
            effect = (expected - plain).abs().max().item()
            if effect < 1e-3:
                raise ValueError(f"training changed no logit by more than {effect}")
            return difference(checks.logits(folder, ids, run / "adapter"), expected), TOLERANCE, f"effect {effect:.2g}"

        def fused():
            out = checks.work / f"{run.name}-fused"
            checks.run("fuse", "--model", folder, "--adapter", run / "adapter", "--output", out, "--device", "cpu")
            if kind in UNTYING:
                expected = logits_of(peft.PeftModel.from_pretrained(load_model(folder), run / "adapter").eval(), ids)
                return difference(logits_of(load_model(out), ids), expected), TOLERANCE
            wrapped = peft.PeftModel.from_pretrained(load_model(folder), run / "adapter").eval()
            theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", attn_implementation="eager").eval()
            if theirs.dtype != torch.float32:
                return weights_difference(theirs, wrapped.merge_and_unload()), 1.0, f"weights, in steps of {theirs.dtype}"
            return difference(logits_of(theirs, ids), logits_of(wrapped, ids)), TOLERANCE

        checks.check(f"{name} trained {kind}", trained)
        # in half precision only the weights can be compared, and peft does not untie the head when it merges
        if kind not in UNTYING or next(load_model_as_saved(folder).parameters()).dtype == torch.float32:
            checks.check(f"{name} trained {kind} fused", fused)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path)
    parser.add_argument("--seed", type=int, default=None, help="[default: random]")
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--only", default="", help="only checks whose name contains this")
    parser.add_argument("--keep", type=Path, default=None, help="a new folder for all files, which is not deleted")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.keep or Path(temporary)
        work.mkdir(exist_ok=True)
        checks = Checks(arguments.binary.resolve(), work, arguments.only)
        for number in range(arguments.models):
            draw = random.Random(seed + number)
            sizes = draw_sizes(draw)
            dtype, shard_size = [(torch.float32, "1GB"), (torch.float32, "100KB"), (torch.bfloat16, "1GB"), (torch.float16, "1GB")][number % 4]
            name = f"{number}"
            print(f"model {name}: {str(dtype).removeprefix('torch.')}, shards of {shard_size}, " + ", ".join(f"{k} {v}" for k, v in sizes.items()))
            folder = work / f"model-{name}"
            make_model(folder, sizes, seed + number, dtype, shard_size)
            check_logits(checks, name, folder, sizes["vocab_size"], draw)
            check_adapters(checks, name, folder, sizes, draw)
            check_training(checks, name, folder, sizes, draw)
    print(f"{checks.count} checks, {checks.failures} failed, largest difference of logits among the others {checks.largest:.3g}")
    return 1 if checks.failures or not checks.count else 0


if __name__ == "__main__":
    sys.exit(main())
