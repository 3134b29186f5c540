"""Writes the golden numbers of crates/metal-candle/tests/golden with torch, transformers and peft.

    python dev/reference.py [models lora mlx full optimizer training methods text]

The README.md of that folder describes each file. The same versions (versions.json) on the same processor write
the same bytes.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import peft
import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parent.parent / "crates" / "metal-candle" / "tests" / "golden"
MODELS = {
    # Seven query heads share one key/value head; the head is the embedding.
    "gqa-tied": dict(
        hidden_size=56, intermediate_size=72, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1,
        vocab_size=103, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=512, seed=1,
    ),
    # An untied head; config.json with the keys of transformers 4, as for the published Qwen2.5.
    "untied": dict(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=512, seed=2,
    ),
    # Three files and an index; 4 heads of 16 in a model of width 40.
    "sharded": dict(
        hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=101, rope_theta=1e5, rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=512, seed=3,
    ),
}
LENGTHS = [1, 2, 257]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # Lists of numbers on one line.
    text = re.sub(r"\[\n[-+.,\d\seE]+\]", lambda found: re.sub(r"\s+", "", found[0]).replace(",", ", "), text)
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)


def random_ids(vocab_size, length, seed):
    return torch.randint(0, vocab_size, (length,), generator=generator(seed)).tolist()


def relative_error(value, truth):
    """Norm of the difference divided by the norm of the truth; the maximum over all tensors."""
    return max(
        ((value[name].double() - truth[name].double()).norm() / truth[name].double().norm().clamp_min(1e-30)).item()
        for name in truth
    )


def random_model(seed, **sizes):
    """A Qwen2 model whose weights, biases and norms are all far from their usual initial values."""
    config = transformers.Qwen2Config(
        **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=True, attn_implementation="eager"
    )
    model = transformers.Qwen2ForCausalLM(config).float().eval()
    random = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return model


def load_model(name, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(
        ROOT / "models" / name, dtype=dtype, attn_implementation="eager"
    ).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def as_transformers_4(path):
    """Rewrites config.json with the keys of transformers 4, as in the published Qwen2.5 files."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope["rope_theta"]
    config.pop("layer_types", None)
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    config.update(use_sliding_window=False, sliding_window=131072, max_window_layers=2, transformers_version="4.43.1")
    config.update(bos_token_id=95, eos_token_id=95)
    write_json(path, dict(sorted(config.items())))


def greedy(model, count=64):
    """The prompt out of sixty with the most varied greedy continuation, and that continuation.

    Where the best two tokens are less than 0.005 apart somewhere the prompt is not taken: rounding could decide.
    """
    best = None
    # Otherwise the sampling defaults of the folder would add their repetition penalty.
    model.generation_config = transformers.GenerationConfig()
    for seed in range(60):
        prompt = random_ids(model.config.vocab_size, 5 + seed % 8, 1000 + seed)
        settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=None)
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), generation_config=settings
            )[0].tolist()
        top = logits_of(model, out)[len(prompt) - 1 : -1].topk(2, dim=-1)
        continuation = out[len(prompt) :]
        assert len(continuation) == count and top.indices[:, 0].tolist() == continuation
        margin = (top.values[:, 0] - top.values[:, 1]).min().item()
        if margin < 0.005 or {95, 96} & set(continuation):
            continue
        if best is None or len(set(continuation)) > len(set(best["continuation"])):
            best = {"prompt": prompt, "continuation": continuation, "smallest_margin": margin}
    return best


def models():
    for name, sizes in MODELS.items():
        sizes = dict(sizes)
        model = random_model(sizes.pop("seed"), **sizes)
        folder = ROOT / "models" / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size="60KB" if name == "sharded" else "1GB")
        if name == "untied":
            as_transformers_4(folder / "config.json")
            write_json(
                folder / "generation_config.json",
                {"bos_token_id": 95, "pad_token_id": 95, "do_sample": True, "eos_token_id": [96, 95],
                 "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0"},
            )
        model = load_model(name)
        ids = random_ids(sizes["vocab_size"], LENGTHS[-1], 7)
        sequences = [ids[-length:] if length < 3 else ids for length in LENGTHS]
        half, rounded, double = load_model(name, torch.bfloat16), load_model(name, torch.bfloat16).float(), load_model(name).double()
        tensors, cases = {}, []
        for sequence in sequences:
            length = len(sequence)
            logits = logits_of(model, sequence)
            from_rounded = logits_of(rounded, sequence)
            tensors[f"ids.{length}"] = torch.tensor(sequence, dtype=torch.int32)
            tensors[f"logits.{length}"] = logits
            tensors[f"logits_bf16_weights.{length}"] = from_rounded
            top = from_rounded.topk(2, dim=-1)
            in_half = logits_of(half, sequence).float().argmax(-1)
            cases.append({
                "ids": sequence,
                "top1_f32": logits.argmax(-1).tolist(),
                "top1_bf16_weights_f32_arithmetic": top.indices[:, 0].tolist(),
                "margin_bf16_weights_f32_arithmetic": [round(v, 6) for v in (top.values[:, 0] - top.values[:, 1]).tolist()],
                "top1_bf16_weights_bf16_arithmetic": in_half.tolist(),
                "agreement_of_the_two_arithmetics": (in_half == top.indices[:, 0]).float().mean().item(),
                "max_abs_difference_to_f64": (logits.double() - logits_of(double, sequence)).abs().max().item(),
                "logits_standard_deviation": logits.std().item(),
            })
        write_tensors(ROOT / "logits" / f"{name}.safetensors", tensors)
        write_json(ROOT / "logits" / f"{name}.json", {
            "model": f"models/{name}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "cases": cases,
            "greedy": greedy(model),
        })


def batch_of(vocab_size, lengths, seed, masked=0.3):
    """Sequences and their labels for transformers: -100 is masked, position i is predicted by token i - 1."""
    random = generator(seed)
    sequences = [torch.randint(0, vocab_size, (length,), generator=random).tolist() for length in lengths]
    labels = [
        [-100 if torch.rand((), generator=random) < masked else token for token in sequence] for sequence in sequences
    ]
    return {"sequences": sequences, "labels": labels, **flat_targets(sequences, labels)}


def flat_targets(sequences, labels):
    """The same with one entry per token: the target id (0 if there is none) and its weight."""
    targets, weights = [], []
    for row in labels:
        following = row[1:] + [-100]
        targets += [max(token, 0) for token in following]
        weights += [int(token >= 0) for token in following]
    return {"targets": targets, "weights": weights, "num_trained": sum(weights)}


def batch_loss(model, batch, label_smoothing=0.0):
    """Mean loss over the trained tokens, each sequence separately, and the loss of each token."""
    rows = []
    for sequence, labels in zip(batch["sequences"], batch["labels"]):
        logits = model(torch.tensor([sequence])).logits[0]
        following = torch.tensor(labels[1:] + [-100])
        rows.append(cross_entropy(logits, following, ignore_index=-100, reduction="none", label_smoothing=label_smoothing))
    rows = torch.cat(rows)
    return rows.sum() / batch["num_trained"], rows


def padded_loss(model, batch, label_smoothing=0.0):
    """The same in one call, with right padding."""
    width = max(map(len, batch["sequences"]))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in batch["sequences"]])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in batch["sequences"]])
    labels = torch.tensor([l + [-100] * (width - len(l)) for l in batch["labels"]])
    logits = model(ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=label_smoothing)


def gradients(model, batch, key, label_smoothing=0.0):
    model.zero_grad()
    loss, rows = batch_loss(model, batch, label_smoothing)
    assert abs(loss.item() - padded_loss(model, batch, label_smoothing).item()) < 1e-5
    loss.backward()
    found = {key(name): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), rows.detach(), found


def adapter_key(name):
    return name.replace(".default.", ".")


ADAPTERS = {
    "qv": ("gqa-tied", dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
    "all-linear": ("gqa-tied", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "all-linear-rslora": ("untied", dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)),
    # Layer 0 has no update; q_proj of layer 1 has rank 2 and alpha 3, each down_proj rank 5, each o_proj alpha 20.
    "patterns": ("gqa-tied", dict(
        r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"], layers_to_transform=[1, 2], layers_pattern="layers",
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 5}, alpha_pattern={"layers.1.self_attn.q_proj": 3, "o_proj": 20},
    )),
}


def with_adapter(model, settings, seed):
    """The model with an adapter, A and B both random."""
    model.config._name_or_path = model.name_or_path = "golden"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings)).eval()
    random = generator(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * (0.3 if "lora_A" in name else 0.15))
    return wrapped


def save_adapter(wrapped, folder):
    shutil.rmtree(folder, ignore_errors=True)
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def lora():
    for number, (name, (base, settings)) in enumerate(ADAPTERS.items()):
        wrapped = with_adapter(load_model(base), settings, 20 + number)
        save_adapter(wrapped, ROOT / "lora" / name)
        vocab_size = wrapped.config.vocab_size
        batch = batch_of(vocab_size, [23, 5, 40], 30 + number)
        loss, rows, found = gradients(wrapped, batch, adapter_key)
        assert set(found) == set(load_file(ROOT / "lora" / name / "adapter_model.safetensors"))
        ids = random_ids(vocab_size, 33, 40 + number)
        adapted = logits_of(wrapped, ids)
        tensors = {"logits": adapted, "loss_rows": rows, **{f"grad.{key}": grad for key, grad in found.items()}}
        base_logits = logits_of(load_model(base), ids)
        loss64, _, found64 = gradients(wrapped.double(), batch, adapter_key)
        merged = logits_of(wrapped.float().merge_and_unload(), ids)
        tensors["logits_merged"] = merged
        write_tensors(ROOT / "lora" / f"{name}.safetensors", tensors)
        write_json(ROOT / "lora" / f"{name}.json", {
            "model": f"models/{base}", "adapter": f"lora/{name}", "batch": batch, "loss": loss, "logits_ids": ids,
            "loss_f64": loss64, "max_relative_error_of_gradients_to_f64": relative_error(found, found64),
            "max_abs_difference_merged_to_unmerged": (merged - adapted).abs().max().item(),
            "max_abs_effect_of_the_adapter": (adapted - base_logits).abs().max().item(),
        })


def mlx():
    """The adapters qv and all-linear in mlx-lm's format: transposed, with the scale itself."""
    for name, layers, keys in [("qv", 3, ["self_attn.q_proj", "self_attn.v_proj"]), ("all-linear", -1, None)]:
        config = json.loads((ROOT / "lora" / name / "adapter_config.json").read_text())
        tensors = {}
        for key, tensor in load_file(ROOT / "lora" / name / "adapter_model.safetensors").items():
            key = key.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
            tensors[key] = tensor.T
        parameters = {"rank": config["r"], "dropout": 0.0, "scale": config["lora_alpha"] / config["r"]}
        if keys:
            parameters["keys"] = keys
        folder = ROOT / "mlx" / name
        write_tensors(folder / "adapters.safetensors", tensors)
        (folder / "adapter_config.json").write_text(json.dumps(
            {"adapter_path": "adapters", "batch_size": 4, "fine_tune_type": "lora", "learning_rate": 1e-05, "lora_parameters": parameters,
             "model": "models/gqa-tied", "num_layers": layers, "seed": 0, "train": True}, indent=4, sort_keys=True))


def full():
    for name in ["gqa-tied", "untied"]:
        model = load_model(name)
        batch = batch_of(model.config.vocab_size, [23, 5, 40], 50)
        tensors, facts = {}, {"model": f"models/{name}", "batch": batch}
        double = load_model(name).double()
        for label, smoothing in [("plain", 0.0), ("smoothed", 0.1)]:
            if (name, label) == ("untied", "smoothed"):
                continue
            loss, rows, found = gradients(model, batch, str, smoothing)
            loss64, _, found64 = gradients(double, batch, str, smoothing)
            tensors.update({f"{label}.grad.{key}": grad for key, grad in found.items()})
            tensors[f"{label}.loss_rows"] = rows
            facts[label] = {"label_smoothing": smoothing, "loss": loss, "loss_f64": loss64,
                            "max_relative_error_of_gradients_to_f64": relative_error(found, found64)}
        write_tensors(ROOT / "full" / f"{name}.safetensors", tensors)
        write_json(ROOT / "full" / f"{name}.json", facts)


def optimizer():
    import reference_optimizer

    reference_optimizer.write(sys.modules[__name__])


def train(wrapped, batches):
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    torch_optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01, foreach=False, fused=False)
    losses, norms = [], []
    for batch in batches:
        torch_optimizer.zero_grad()
        loss, _ = batch_loss(wrapped, batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        torch_optimizer.step()
        losses.append(loss.item())
    return losses, norms


def training():
    base, settings = ADAPTERS["qv"]
    wrapped = with_adapter(load_model(base), settings, 70)
    random = generator(71)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                bound = 1.0 / math.sqrt(parameter.shape[1])
                parameter.copy_((torch.rand(parameter.shape, generator=random) * 2.0 - 1.0) * bound)
            elif "lora_B" in name:
                parameter.zero_()
    save_adapter(wrapped, ROOT / "training" / "initial")
    start = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    # Three text patterns are repeated, so that the loss falls.
    parts = [batch_of(wrapped.config.vocab_size, [17], 80 + i)["sequences"][0] for i in range(3)]
    batches = []
    for step in range(10):
        noise = generator(90 + step)
        lengths = [[34, 9], [12, 40, 3], [51]][step % 3]
        sequences, labels = [], []
        for i, length in enumerate(lengths):
            sequence = (parts[(step + i) % 3] * 3)[step : step + length]
            sequences.append(sequence)
            masked = torch.rand(length, generator=noise).tolist()
            labels.append([-100 if m < 0.25 else token for m, token in zip(masked, sequence)])
        batches.append({"sequences": sequences, "labels": labels, **flat_targets(sequences, labels)})
    wrapped.train()
    losses, norms = train(wrapped, batches)
    final = {adapter_key(name): p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter.copy_(start[name])
    wrapped.double()
    losses64, norms64 = train(wrapped, batches)
    final64 = {adapter_key(name): p.detach() for name, p in wrapped.named_parameters() if p.requires_grad}
    write_tensors(ROOT / "training" / "final.safetensors", final)
    write_json(ROOT / "training" / "ten_steps.json", {
        "model": f"models/{base}", "adapter": "training/initial", "max_grad_norm": 1.0, "schedule": "constant",
        "optimizer": {"name": "AdamW", "lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        "batches": batches, "losses": losses, "grad_norms": norms, "losses_f64": losses64, "grad_norms_f64": norms64,
        "max_abs_difference_of_final_weights_to_f64": max((final[k].double() - final64[k]).abs().max().item() for k in final),
    })


def methods():
    import reference_methods

    reference_methods.write(sys.modules[__name__])


def text():
    import reference_text

    reference_text.write(ROOT, write_json)


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    parts = {f.__name__: f for f in [models, lora, mlx, full, optimizer, training, methods, text]}
    for name in sys.argv[1:] or parts:
        parts[name]()
    write_json(ROOT / "versions.json", {
        "python": sys.version.split()[0],
        **{m.__name__: m.__version__ for m in [torch, transformers, peft, tokenizers, safetensors, numpy]},
    })


if __name__ == "__main__":
    main()
