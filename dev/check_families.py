"""Compares a built `metal-candle` with transformers and peft on random models of every dense family.

    python dev/check_families.py BINARY [--seed N] [--models N] [--family NAME] [--only WORD] [--keep FOLDER]

The seed determines sizes, features, the style of config.json, and the type and number of weight files. For each model, the script compares
logits, 64 greedy tokens, an SGD step on a LoRA, adapters in both directions between peft and metal-candle, and fused models read by
transformers. Prints a table; exits with 1 if anything differs.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from pathlib import Path

from families import NO_MAMBA, build_config, greedy_tokens, make_model, next_token_loss, wrap_all_linear
from check_peft import GOLDEN, TOLERANCE, WORDS, Checks, adapter_kinds, difference, load_model, logits_of, make_adapter, weights_difference

import peft
import torch
import transformers
from safetensors.torch import load_file

SLIDING, FULL = "sliding_attention", "full_attention"
LEARNING_RATE = 2.0
GREEDY, TEXT = 64, 160


def maybe(draw, share=0.5):
    return draw.random() < share


def draw_rope(draw, rotated, types=("linear", "llama3", "yarn", "dynamic", "longrope")):
    """Parameters of a rotary table for heads with `rotated` rotated values."""
    rope = dict(rope_type="default", rope_theta=draw.choice([1e4, 1e4, 5e5, 1e6, 1234.5, 100.0]))
    if maybe(draw):
        return rope
    rope["rope_type"] = kind = draw.choice(types)
    rope["factor"] = draw.choice([2.0, 4.0, 8.0, 1.5])
    if kind == "llama3":
        rope |= dict(low_freq_factor=draw.choice([1.0, 1, 2.0]), high_freq_factor=draw.choice([4.0, 4, 3.0]), original_max_position_embeddings=draw.choice([16, 32, 64]))
    elif kind == "yarn":
        rope["original_max_position_embeddings"] = draw.choice([32, 64, 400])
        extra = dict(beta_fast=draw.choice([32.0, 16, 4.0]), beta_slow=draw.choice([1.0, 2, 0.5]), truncate=draw.choice([True, False, None]), mscale=1.0, mscale_all_dim=0.8, attention_factor=1.1)
        rope |= {key: value for key, value in extra.items() if maybe(draw, 0.4)}
    elif kind == "longrope":
        rope |= dict(
            short_factor=[round(1 + draw.random(), 3) for _ in range(rotated // 2)], long_factor=[round(1 + 8 * draw.random(), 3) for _ in range(rotated // 2)],
        )
        if maybe(draw, 0.3):
            rope["attention_factor"] = 1.25
        if maybe(draw):
            del rope["factor"]
        if len(types) > 1:
            # generation must not cross this length: outside Phi-3 transformers keeps the keys of the shorter table in its cache
            rope["original_max_position_embeddings"] = draw.choice([8, 256])
    elif kind == "dynamic":
        rope["factor"] = draw.choice([2.0, 4])
    return rope


def draw_layer_types(draw, layers):
    return [draw.choice([SLIDING, FULL]) for _ in range(layers)]


def draw_keys(draw, family):
    """Sizes and features for `build_config`."""
    kv_heads, layers = draw.choice([1, 2, 3]), draw.randint(1, 5)
    heads = kv_heads * draw.choice([1, 2, 3])
    head_dim = draw.choice([8, 16, 20, 32, 32, 6, 10, 48, 96])
    # llama and gemma require whole quotients, whatever the head size
    hidden = heads * draw.choice([head_dim, 8, 12])
    # transformers caches everything for a window of 1
    window = draw.choice([2, 3, 8, 17, 64, 4096])
    keys = dict(
        model_type=family, vocab_size=draw.choice([502, 503, 509, 641]), hidden_size=hidden, intermediate_size=draw.randint(17, 130), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=draw.choice([256, 512]), tie_word_embeddings=maybe(draw),
    )
    eps = draw.choice([1e-5, 1e-6, 1e-3])
    keys["norm_epsilon" if family == "starcoder2" else "layer_norm_eps" if family.startswith(("cohere", "stablelm", "jais2")) else "rms_norm_eps"] = eps
    partial = 1.0
    if family == "phi3" or (head_dim * heads == hidden and maybe(draw)):
        # transformers derives the size of phi3's tables from hidden size and heads
        head_dim = hidden // heads
        if family in ("ministral", "ministral3", "qwen3", "seed_oss", "ernie4_5", "hunyuan_v1_dense") or family.startswith(("gemma", "glm")):
            keys["head_dim"] = head_dim
    else:
        keys["head_dim"] = head_dim
    if family in ("llama", "qwen3", "smollm3", "olmo", "olmo2", "olmo3", "granite", "granitemoehybrid", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "cohere", "cohere2", "arcee", "seed_oss", "helium", "hunyuan_v1_dense", "jais2"):
        keys["attention_bias"] = maybe(draw)
    if family == "helium":
        # its output projection is square
        keys |= dict(hidden_size=heads * head_dim, head_dim=head_dim)
    if family == "stablelm":
        # the size of a head is always that quotient
        keys |= dict(hidden_size=heads * head_dim, use_qkv_bias=maybe(draw), use_parallel_residual=maybe(draw))
        keys.pop("head_dim", None)
    if family == "seed_oss":
        keys["attention_out_bias"] = maybe(draw)
    if family == "ernie4_5":
        keys["use_bias"] = maybe(draw)
    if family == "exaone4":
        keys |= draw.choice([dict(sliding_window=None, layer_types=[FULL] * layers), dict(sliding_window=window), dict(sliding_window=window, sliding_window_pattern=2)])
        if keys["sliding_window"] and maybe(draw):
            keys["layer_types"] = draw_layer_types(draw, layers)
    if family in ("llama", "smollm3", "granite", "arcee", "seed_oss", "helium", "jais2"):
        keys["mlp_bias"] = maybe(draw)
    if family in ("qwen2", "qwen3"):
        keys |= dict(use_sliding_window=maybe(draw), sliding_window=window, max_window_layers=draw.randint(0, layers))
    if family in ("mistral", "ministral", "ministral3", "phi3", "starcoder2"):
        keys["sliding_window"] = draw.choice([None, window])
    if family in ("ministral", "olmo3", "gemma2", "gemma3", "gemma3_text", "cohere2"):
        keys["sliding_window"] = window
        if maybe(draw):
            keys["layer_types"] = draw_layer_types(draw, layers)
    if family in ("phi3", "glm", "glm4", "stablelm"):
        partial = draw.choice([0.25, 0.5, 0.75, 1.0])
        if int(head_dim * partial) < 3 or (family == "stablelm" and int(head_dim * partial) % 2):
            # transformers cannot rotate an odd number of elements in StableLM
            partial = 1.0
    rotated = int(head_dim * partial)
    types = ("longrope",) if family == "phi3" else ("linear", "llama3", "dynamic", "longrope") if rotated % 2 else ("linear", "llama3", "yarn", "dynamic", "longrope")
    rope = draw_rope(draw, rotated + rotated % 2, types=types)
    if rope["rope_type"] == "dynamic":
        # shorter than the longest text
        keys["max_position_embeddings"] = 128
        if family == "hunyuan_v1_dense" and maybe(draw):
            rope["alpha"] = draw.choice([1.0, 1000.0])
    if rope["rope_type"] in ("llama3", "yarn", "longrope") and family not in ("gemma3", "gemma3_text", "olmo3") and maybe(draw, 0.2):
        keys["original_max_position_embeddings"] = draw.choice([8, 256])
    if maybe(draw, 0.1):
        keys["intermediate_size"] = transformers.AutoConfig.for_model(family).get_text_config().intermediate_size
    if family in ("phi3", "glm", "glm4", "stablelm"):
        rope["partial_rotary_factor"] = partial
    if family == "phi3":
        keys["original_max_position_embeddings"] = draw.choice([32, 64, 256])
    if family == "ministral3":
        if rope["rope_type"] != "yarn":
            rope["original_max_position_embeddings"] = 20
        rope["llama_4_scaling_beta"] = draw.choice([0.1, 0.5])
    if family == "smollm3":
        keys |= dict(use_sliding_window=maybe(draw), sliding_window=draw.choice([None, window]))
        keys |= draw.choice([{}, dict(no_rope_layer_interval=draw.choice([2, 3])), dict(no_rope_layers=[draw.choice([0, 1]) for _ in range(layers)])])
    if family == "olmo":
        keys |= dict(clip_qkv=draw.choice([None, 0.7, 2.0]))
        del keys["rms_norm_eps"]
    if family.startswith("granite"):
        keys |= dict(
            embedding_multiplier=draw.choice([1.0, 12, 3.5]), residual_multiplier=draw.choice([1.0, 0.22, 0.7]), attention_multiplier=draw.choice([1.0, 0.015625, 0.25]),
            logits_scaling=draw.choice([1.0, 8, 0.5]),
        )
    if family == "granitemoehybrid":
        keys |= dict(
            NO_MAMBA, mamba_n_heads=hidden, shared_intermediate_size=draw.randint(17, 90), layer_types=[draw.choice(["attention", FULL])] * layers,
            position_embedding_type=draw.choice([None, "rope"]),
        )
    if family == "starcoder2":
        keys["use_bias"] = maybe(draw, 0.7)
    if family in ("gemma2", "gemma3", "gemma3_text"):
        keys["query_pre_attn_scalar"] = draw.choice([head_dim, 24, 256])
        cap = draw.choice([None, 3.0, 30.0])
        keys |= dict(attn_logit_softcapping=draw.choice([None, 2.0, 50.0]), final_logit_softcapping=cap)
    if family == "gemma":
        keys["hidden_act"] = draw.choice(["gelu", "gelu_pytorch_tanh"])
    if family.startswith("cohere"):
        keys["logit_scale"] = draw.choice([0.0625, 1.0, 0.3])
    if family == "cohere":
        keys["use_qk_norm"] = maybe(draw)
    if family in ("gemma3", "gemma3_text", "olmo3"):
        rope = {FULL: rope, SLIDING: dict(rope_type="default", rope_theta=draw.choice([1e4, 50.0]))}
    keys["rope_parameters"] = rope
    return keys


FAMILIES = [
    "qwen2", "qwen3", "llama", "mistral", "ministral", "ministral3", "smollm3", "phi3", "olmo", "olmo2", "olmo3", "granite", "granitemoehybrid", "starcoder2",
    "gemma", "gemma2", "gemma3_text", "gemma3", "glm", "glm4", "cohere", "cohere2", "arcee", "seed_oss", "ernie4_5", "helium", "exaone4", "hunyuan_v1_dense", "stablelm", "jais2",
]


def to_old_style(draw, config):
    """config.json with the keys of transformers 4. If they cannot express a setting, transformers uses a different one, and so must we."""
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.46.0"
    rope = config.pop("rope_parameters", None) or {}
    if FULL in rope:
        if config["model_type"] == "gemma3_text":
            config["rope_local_base_freq"] = (rope.get(SLIDING) or {}).get("rope_theta", 1e4)
        rope = rope[FULL]
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta", 1e4)
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type", "default")
    if kind != "default" or "llama_4_scaling_beta" in rope:
        rope = draw.choice([dict(type=kind), dict(rope_type=kind), dict(type=kind, rope_type=kind)]) | rope
        if config["model_type"] == "phi3" and "attention_factor" not in rope:
            # the names of the first releases
            if "rope_type" not in rope and maybe(draw):
                rope["type"] = draw.choice(["su", "longrope"])
            del config["rope_theta"]
            config["rope_theta"] = 1e4
        config["rope_scaling"] = rope
    elif maybe(draw):
        config["rope_scaling"] = None
    if config["model_type"] in ("gemma3_text", "cohere2") and "layer_types" in config and maybe(draw):
        del config["layer_types"]
        config["sliding_window_pattern"] = draw.choice([2, 3])
        config.pop("_sliding_window_pattern", None)
    elif config["model_type"] in ("qwen2", "qwen3", "gemma2", "smollm3", "olmo3") and maybe(draw):
        config.pop("layer_types", None)


def edit_config(draw, folder):
    """Rewrites config.json as another program might write it; transformers defines its meaning."""
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    config = whole.get("text_config", whole)
    style = draw.choice(["as saved", "old", "sparse", "old and sparse"])
    if "old" in style:
        to_old_style(draw, config)
    if "sparse" in style:
        defaults = transformers.AutoConfig.for_model(config["model_type"]).to_dict()
        for key, value in list(config.items()):
            if key != "model_type" and key in defaults and defaults[key] == value and maybe(draw):
                del config[key]
    kind = config["model_type"]
    # keys whose absence does not mean a default
    if kind == "mistral" and maybe(draw, 0.3):
        config["layer_types"] = draw_layer_types(draw, config["num_hidden_layers"])
        config["sliding_window"] = config.get("sliding_window") or 5
    if kind == "ministral3" and maybe(draw, 0.2):
        for key in ["rope_parameters", "rope_scaling", "rope_theta"]:
            config.pop(key, None)
    if kind == "phi3" and maybe(draw, 0.2):
        config.pop("original_max_position_embeddings", None)
    if kind == "smollm3" and config.get("no_rope_layers") and maybe(draw, 0.3):
        config["no_rope_layers"] = config["no_rope_layers"] + [1]
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if kind != "phi3" and config.get("original_max_position_embeddings") and rope and maybe(draw):
        # the key next to the settings takes precedence
        rope["original_max_position_embeddings"] = 4096
    if maybe(draw, 0.3):
        whole["a_key_nobody_knows"] = None
    path.write_text(json.dumps(whole, indent=2))
    return style


def write_model(draw, folder, family, seed):
    """Creates and saves a model; returns a description to print."""
    keys = draw_keys(draw, family)
    model = make_model(build_config(**keys), seed, std=None)
    dtype, shard = draw.choice([(torch.float32, "1GB"), (torch.float32, "60KB"), (torch.bfloat16, "1GB"), (torch.float16, "40KB")])
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        (folder / name).write_bytes((GOLDEN / "tokenizer" / name).read_bytes())
    style = edit_config(draw, folder)
    shown = {key: value for key, value in keys.items() if key not in NO_MAMBA}
    return f"{str(dtype).removeprefix('torch.')}, shards of {shard}, config {style}, {json.dumps(shown)}"


def check_logits(checks, name, folder, draw):
    model = load_model(folder)
    vocab = model.config.get_text_config().vocab_size
    for length in [1, 2, 23, TEXT]:
        ids = [draw.randrange(vocab) for _ in range(length)]
        checks.check(f"{name} logits of {length}", lambda ids=ids: (difference(checks.logits(folder, ids), logits_of(model, ids)), TOLERANCE))


def refusal(checks, folder):
    """Why the model cannot be loaded, if it cannot: one line instead of a failure of each check."""
    try:
        checks.logits(folder, [1])
    except RuntimeError as error:
        return str(error).partition("\n")[2].strip()
    return None


def check_generation(checks, name, folder, draw):
    def generated():
        text = " ".join(draw.choices(WORDS, k=9))
        answer = json.loads(checks.run(
            "generate", "--model", folder, "--raw", "--prompt", text, "--max-tokens", GREEDY, "--temperature", 0, "--json", "--device", "cpu",
        ))
        found = answer["tokens"]
        model = load_model(folder)
        expected, lead = greedy_tokens(model, answer["prompt_ids"], GREEDY)
        # an end token is the last one; GLM-4 always has one
        ends = model.config.get_text_config().eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        expected = expected[: next((index + 1 for index, token in enumerate(expected) if token in ends), GREEDY)]
        equal = next((index for index, (ours, theirs) in enumerate(zip(found, expected)) if ours != theirs), len(expected))
        if equal < len(expected):
            logits = logits_of(model, answer["prompt_ids"] + expected[:equal])[-1]
            lead = (logits[expected[equal]] - logits[found[equal]]).item()
            # rounding may decide between equal logits
            return (0.0 if abs(lead) < 3e-3 else float(len(expected) - equal)), 0.0, f"token {equal} differs, {lead:.2g} worse"
        return float(len(found) != len(expected)), 0.0, f"smallest lead {lead:.2g}"

    checks.check(f"{name} {GREEDY} greedy tokens", generated)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def check_step(checks, name, folder, adapter, draw):
    """One step of plain SGD, so that the change of the adapter is its gradient."""
    text = " ".join(draw.choices(WORDS, k=draw.randint(5, 30)))
    data, run = checks.work / f"{name}-data", checks.work / f"{name}-run"
    data.mkdir()
    (data / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")

    def trained():
        checks.run(
            "train", "--model", folder, "--adapter", adapter, "--data", data, "--output", run, "--steps", 1, "--optimizer", "sgd", "--momentum", 0,
            "--weight-decay", 0, "--max-grad-norm", 0, "--schedule", "constant", "--learning-rate", LEARNING_RATE, "--test-samples", 0, "--valid-fraction", 0, "--device", "cpu",
        )
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        wrapped = peft.PeftModel.from_pretrained(load_model(folder), adapter, is_trainable=True).eval()
        loss = next_token_loss(wrapped(torch.tensor([ids])).logits[0], ids)
        loss.backward()
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        step = next(line for line in steps if line["event"] == "step")
        before, after = tensors_of(adapter), tensors_of(run / "adapter")
        if set(before) != set(after):
            raise ValueError(f"keys differ: {sorted(set(before) ^ set(after))}")
        gradients = {key.replace(".default.", "."): parameter.grad for key, parameter in wrapped.named_parameters() if parameter.grad is not None}
        worst, where = abs(step["loss"] - loss.item()) / loss.item(), "the loss"
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for key, gradient in gradients.items():
            found = (before[key] - after[key]) / LEARNING_RATE
            # the precision of a gradient after the subtraction in f32
            rounding = before[key].abs().max().item() * 2e-7 / LEARNING_RATE
            # some gradients are zero except for rounding, such as those of queries with a single key
            error = max(0.0, (found - gradient).abs().max().item() - rounding) / max(gradient.abs().max().item(), 1e-3 * largest)
            if error > worst:
                worst, where = error, key
        # half-precision weights multiply gradients that are rounded to half precision
        is_narrow = any(tensor.dtype != torch.float32 for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
        return worst, 3e-2 if is_narrow else TOLERANCE, f"{len(gradients)} tensors, worst is {where}"

    checks.check(f"{name} step against peft", trained)


def check_new_adapter(checks, name, folder, draw):
    """An adapter with default targets, and one on all linear layers, trained by metal-candle and read by peft."""
    for kind, flags in {"default": [], "all-linear": ["--target-modules", "all-linear", "--rank", 3], "dora": ["--use-dora", "--rank", 2]}.items():
        run = checks.work / f"{name}-new-{kind}"

        def trained(run=run, flags=flags):
            checks.run(
                "train", "--model", folder, "--data", checks.work / f"{name}-data", "--output", run, "--steps", 3, "--learning-rate", 3e-2, "--test-samples", 0,
                "--valid-fraction", 0, "--device", "cpu", *flags,
            )
            wrapped = peft.PeftModel.from_pretrained(load_model(folder), run / "adapter").eval()
            known = {key.replace(".default.", ".").replace(".default", "") for key, _ in wrapped.named_parameters() if "lora_" in key}
            found = set(tensors_of(run / "adapter"))
            if {key.replace("_vector.weight", "_vector") for key in known} != found:
                raise ValueError(f"peft and the file differ in {sorted(found ^ known)}")
            ids = [draw.randrange(500) for _ in range(31)]
            expected_logits = logits_of(wrapped, ids)
            effect = (expected_logits - logits_of(load_model(folder), ids)).abs().max().item()
            if effect < 1e-3:
                raise ValueError(f"training changed no logit by more than {effect}")
            return difference(checks.logits(folder, ids, run / "adapter"), expected_logits), TOLERANCE, f"{len(found)} tensors, effect {effect:.2g}"

        checks.check(f"{name} new adapter {kind}", trained)


def check_adapter(checks, name, folder, seed, draw):
    """A LoRA of PEFT on all linear layers: read, converted, trained, fused."""
    adapter, back, fused = (checks.work / f"{name}-{kind}" for kind in ("adapter", "back", "fused"))
    wrapped = wrap_all_linear(load_model(folder), draw.choice([2, 3, 5]), draw.choice([4, 7]), seed)
    wrapped.save_pretrained(adapter)
    ids = [draw.randrange(500) for _ in range(29)]
    expected_logits = logits_of(wrapped, ids)
    effect = (expected_logits - logits_of(load_model(folder), ids)).abs().max().item()
    checks.check(f"{name} adapter of peft", lambda: (difference(checks.logits(folder, ids, adapter), expected_logits), TOLERANCE, f"effect {effect:.2g}"))

    def converted():
        checks.run("convert", "--model", folder, "--adapter", adapter, "--format", "peft", "--output", back, "--device", "cpu")
        expected, found = tensors_of(adapter), tensors_of(back)
        if set(expected) != set(found) or any(not torch.equal(tensor, found[key]) for key, tensor in expected.items()):
            raise ValueError(f"tensors differ: {sorted(set(expected) ^ set(found))}")
        return difference(logits_of(peft.PeftModel.from_pretrained(load_model(folder), back).eval(), ids), expected_logits), TOLERANCE

    def fuse():
        checks.run("fuse", "--model", folder, "--adapter", adapter, "--output", fused, "--device", "cpu")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(fused, dtype="auto", attn_implementation="eager").eval()
        merged = wrapped.merge_and_unload()
        if theirs.dtype != torch.float32:
            if type(theirs) is type(merged):
                return weights_difference(theirs, merged), 1.0, f"weights, in steps of {theirs.dtype}"
            return difference(logits_of(theirs.float(), ids), logits_of(merged, ids)), 1.0, f"logits in {theirs.dtype}"
        return difference(logits_of(theirs, ids), logits_of(merged, ids)), TOLERANCE

    checks.check(f"{name} adapter of peft converted back", converted)
    check_step(checks, name, folder, adapter, draw)
    check_new_adapter(checks, name, folder, draw)
    checks.check(f"{name} fused", fuse)


# The linear layers of families that name or fuse them differently, for the targets of `adapter_kinds`.
JOINED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
RENAMED = {
    "phi3": {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "(q|k)_proj": "qkv_proj"} | JOINED,
    "glm": JOINED,
    "glm4": JOINED,
    "arcee": {"gate_proj": "up_proj"},
    "jais2": {"gate_proj": "up_proj"},
    "starcoder2": {"gate_proj": "c_fc", "up_proj": "c_fc", "down_proj": "c_proj"},
    "granitemoehybrid": {"gate_proj": "input_linear", "up_proj": "input_linear", "down_proj": "output_linear", "mlp.down_proj": "shared_mlp.output_linear"},
}
KINDS = [
    "qv", "rslora", "patterns", "rslora-patterns", "some-layers", "expression", "full-paths", "excluded", "dora", "dora-rslora", "embeddings", "saved", "bias-all",
    "bias-lora-only", "dora-bias", "tokens",
]


def renamed(family, value):
    """The settings of an adapter with the family's names of linear layers."""
    if isinstance(value, dict):
        return {renamed(family, key): renamed(family, entry) for key, entry in value.items()}
    if isinstance(value, list):
        return list(dict.fromkeys(renamed(family, entry) for entry in value))
    if isinstance(value, str):
        for name in sorted(RENAMED.get(family, {}), key=len, reverse=True):
            value = re.sub(rf"(?<![\w]){re.escape(name)}(?!\w)", RENAMED[family][name], value)
    return value


def check_kinds(checks, name, folder, family, draw):
    """Two kinds of adapters that PEFT writes, with targets by name, path or expression."""
    base = load_model(folder)
    kinds = {kind: settings for kind, settings in adapter_kinds(base.config.get_text_config().num_hidden_layers).items() if kind in KINDS}
    if family == "olmo":
        # its norms have no weights
        del kinds["saved"]
    for kind in draw.sample(sorted(kinds), 2):
        adapter, fused = (checks.work / f"{name}-{kind}{end}" for end in ("", "-fused"))
        wrapped = make_adapter(adapter, folder, renamed(family, kinds[kind]), draw.randrange(10**6))
        ids = [draw.randrange(500) for _ in range(29)]
        expected_logits = logits_of(wrapped, ids)
        effect = (expected_logits - logits_of(base, ids)).abs().max().item()
        checks.check(f"{name} adapter {kind}", lambda: (difference(checks.logits(folder, ids, adapter), expected_logits), TOLERANCE, f"effect {effect:.2g}"))

        def fuse():
            checks.run("fuse", "--model", folder, "--adapter", adapter, "--output", fused, "--device", "cpu", "--dtype", "f32")
            return difference(logits_of(load_model(fused), ids), expected_logits), TOLERANCE

        # merging these changes a tied head differently than the adapter
        if kind not in ("embeddings", "saved"):
            checks.check(f"{name} adapter {kind} fused", fuse)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path)
    parser.add_argument("--seed", type=int, default=None, help="[default: random]")
    parser.add_argument("--models", type=int, default=2, help="models of each family")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family; may be repeated")
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
        for family in arguments.family or FAMILIES:
            for number in range(arguments.models):
                draw = random.Random(f"{seed} {family} {number}")
                name = f"{family}-{number}"
                folder = work / f"model-{name}"
                print(f"model {name}: {write_model(draw, folder, family, draw.randrange(10**6))}", flush=True)
                if reason := refusal(checks, folder):
                    checks.check(f"{name} loads", lambda: (float("inf"), 0.0, reason))
                    continue
                check_logits(checks, name, folder, draw)
                check_generation(checks, name, folder, draw)
                check_adapter(checks, name, folder, seed, draw)
                if family != "gemma3":
                    # PEFT would adapt the vision tower, too
                    check_kinds(checks, name, folder, family, draw)
    print(f"{checks.count} checks, {checks.failures} failed, largest difference of logits among the others {checks.largest:.3g}")
    return 1 if checks.failures or not checks.count else 0


if __name__ == "__main__":
    sys.exit(main())
