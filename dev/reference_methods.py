"""Writes the golden numbers of the fine-tuning methods other than plain LoRA; called by reference.py."""

import copy
import json
import math
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# The names of folders and files under golden/methods.
CASES = {
    # q and v have a bias.
    "dora-qv": ("gqa-tied", dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=True)),
    "dora-all": ("untied", dict(r=3, lora_alpha=8, target_modules=EVERY_LINEAR, use_dora=True, use_rslora=True)),
    "dora-embeddings": ("untied", dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "v_proj"], use_dora=True)),
    "embeddings-tied": ("gqa-tied", dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "embeddings": ("untied", dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "head": ("untied", dict(r=2, lora_alpha=4, target_modules=["lm_head"])),
    "saved": ("untied", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "model.norm"])),
    "saved-head-tied": ("gqa-tied", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "saved-embedding-tied": ("gqa-tied", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "saved-in-blocks": ("untied", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["k_proj", "input_layernorm"])),
    # Ranks and alphas by path; a key is a regular expression, and the first match applies: peft sorts them when it saves.
    "patterns-by-path": ("gqa-tied", dict(
        r=4, lora_alpha=8, target_modules=EVERY_LINEAR,
        rank_pattern={"down_proj": 5, r"layers\.0\.mlp.*": 2, r"layers\.[12]\.self_attn\.(q|k)_proj": 3},
        alpha_pattern={r"layers\.1\..*": 3, "up_proj": 12},
    )),
    "some-layers": ("gqa-tied", dict(r=2, lora_alpha=4, target_modules=["o_proj", "up_proj"], layers_to_transform=[0, 2], layers_pattern="layers")),
    # Initializations that subtract part of the weights; the folder contains the difference to them, as converted by peft.
    "pissa": ("gqa-tied", dict(r=4, lora_alpha=8, target_modules=EVERY_LINEAR, init_lora_weights="pissa")),
    "pissa-rslora": ("untied", dict(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa", use_rslora=True)),
    "olora": ("untied", dict(r=3, lora_alpha=6, target_modules=EVERY_LINEAR, init_lora_weights="olora")),
    "olora-patterns": ("gqa-tied", dict(
        r=3, lora_alpha=6, target_modules=["k_proj", "o_proj"], init_lora_weights="olora", rank_pattern={"o_proj": 2}, alpha_pattern={"k_proj": 5},
    )),
    # Token rows, including those of a tied head; biases; embedding and head trained together.
    "tokens-tied": ("gqa-tied", dict(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=[40, 3, 61, 22])),
    "tokens-and-head": ("untied", dict(
        r=2, lora_alpha=4, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [61, 2], "lm_head": [22, 13, 0]}, bias="lora_only"
    )),
    "bias-all": ("gqa-tied", dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], bias="all")),
    "dora-bias": ("gqa-tied", dict(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], bias="lora_only", use_dora=True)),
    "saved-tied": ("gqa-tied", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
}
# Not pissa: torch's singular vectors have an error of 6e-6 in f32, which ten steps amplify to more than 1e-2.
WITH_LOSSES = ["dora-qv", "embeddings-tied", "saved-head-tied", "olora-patterns", "patterns-by-path", "tokens-tied", "bias-all", "dora-bias", "saved-tied"]

# The 16 values of NF4 (QLoRA, https://arxiv.org/abs/2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])


def is_trained(name):
    return "lora_" in name or "modules_to_save" in name


def adapted(reference, base, settings, seed):
    """A model with an adapter initialized by peft, the initial adapter, and the adapter after random changes."""
    model = reference.load_model(base)
    model.config._name_or_path = model.name_or_path = "golden"
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings)).eval()
    start = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    random = reference.generator(seed)
    keeps_start = isinstance(settings.get("init_lora_weights"), str)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=random)
            if "lora_magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1.0 + 0.2 * noise)
            elif "trainable_tokens" in name or name.endswith("bias"):
                parameter.add_(0.2 * noise)
            elif keeps_start:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.3 if "_A" in name else 0.15))
    return wrapped, start


def key(name):
    """The key in a file for the name of a parameter."""
    for part in [".modules_to_save.default", ".default"]:
        name = name.replace(part, "")
    return name + (".weight" if name.endswith(("lora_embedding_A", "lora_embedding_B")) else "")


def file_key(name):
    # peft writes embeddings without `.weight`
    return key(name).removesuffix(".weight") if "lora_embedding" in name else key(name).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def save(reference, wrapped, start, folder):
    if not isinstance(wrapped.peft_config["default"].init_lora_weights, str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference.save_adapter(wrapped, folder)
        return
    # As described in peft's documentation: the initial adapter, saved like a plain one, is subtracted.
    with TemporaryDirectory() as temporary:
        initial = copy.deepcopy(wrapped)
        with torch.no_grad():
            for name, parameter in initial.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        initial.peft_config["default"].init_lora_weights = True
        initial.save_pretrained(Path(temporary) / "start")
        shutil.rmtree(folder, ignore_errors=True)
        wrapped.save_pretrained(folder, path_initial_model_for_weight_conversion=str(Path(temporary) / "start"))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def ten_losses(reference, wrapped, batches, make_optimizer=None):
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = make_optimizer(wrapped) if make_optimizer else torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01, foreach=False, fused=False)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = reference.batch_loss(wrapped, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def write_case(reference, root, number, name, base, settings, batches):
    wrapped, start = adapted(reference, base, settings, 200 + number)
    save(reference, wrapped, start, root / name)
    batch = reference.batch_of(wrapped.config.vocab_size, [23, 5, 40], 230 + number)
    loss, rows, found = reference.gradients(wrapped, batch, file_key)
    ids = reference.random_ids(wrapped.config.vocab_size, 33, 240 + number)
    logits = reference.logits_of(wrapped, ids)
    tensors = {"logits": logits, "loss_rows": rows, **{f"grad.{k}": v for k, v in found.items()}}
    if isinstance(settings.get("init_lora_weights"), str):
        tensors.update({f"start.{file_key(k)}": v for k, v in start.items()})
        tensors.update({f"value.{file_key(k)}": v for k, v in wrapped.named_parameters() if v.requires_grad})
    else:
        missing = set(found) - set(load_file(root / name / "adapter_model.safetensors"))
        assert not missing, missing
    facts = {"model": f"models/{base}", "adapter": f"methods/{name}", "batch": batch, "loss": loss, "logits_ids": ids}
    double = copy.deepcopy(wrapped).double()
    loss64, _, found64 = reference.gradients(double, batch, file_key)
    facts.update(loss_f64=loss64, max_relative_error_of_gradients_to_f64=reference.relative_error(found, found64))
    base_logits = reference.logits_of(reference.load_model(base), ids)
    facts["max_abs_effect_of_the_adapter"] = (logits - base_logits).abs().max().item()
    # merging into a tied embedding would also change the head
    if "modules_to_save" not in settings and name != "embeddings-tied":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors["logits_merged"] = reference.logits_of(copy.deepcopy(wrapped).merge_and_unload(), ids)
        facts["max_abs_difference_merged_to_unmerged"] = (tensors["logits_merged"] - logits).abs().max().item()
    if name in WITH_LOSSES:
        facts["losses"] = ten_losses(reference, copy.deepcopy(wrapped).train(), batches)
    reference.write_tensors(root / f"{name}.safetensors", tensors)
    reference.write_json(root / f"{name}.json", facts)


def nearest_nf4(weight):
    """Rounds each block of 64 to its largest absolute value times the nearest of sixteen numbers."""
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    middles = (NF4[1:] + NF4[:-1]) / 2
    found = NF4[torch.bucketize(blocks / largest.clamp_min(1e-30), middles)] * largest
    return found.flatten()[: len(flat)].view_as(weight)


def nearest_int8(weight):
    largest = weight.abs().amax(1, keepdim=True)
    return (weight * (127.0 / largest)).round() * (largest / 127.0)


def loftq(reference, root):
    """LoftQ (https://arxiv.org/abs/2310.08659, algorithm 1) in the order of peft's loftq_init."""
    weight = reference.load_model("untied").model.layers[1].mlp.down_proj.weight.detach()
    tensors, facts = {"weight": weight}, {"rank": 4, "cases": []}
    for bits, rounded in [(4, nearest_nf4), (8, nearest_int8)]:
        for iterations in [1, 5]:
            residual = weight.clone()
            for _ in range(iterations):
                base = rounded(residual)
                found = _low_rank_decomposition(weight - base, reduced_rank=4)
                residual = weight - found["L"] @ found["R"]
            name = f"{bits}.{iterations}"
            tensors[f"base.{name}"] = base
            tensors[f"change.{name}"] = found["L"] @ found["R"]
            error = lambda w: ((w - weight).norm() / weight.norm()).item()
            facts["cases"].append({"bits": bits, "iterations": iterations, "error": error(base + found["L"] @ found["R"]),
                                   "error_of_rounding": error(rounded(weight))})
    reference.write_tensors(root / "loftq.safetensors", tensors)
    reference.write_json(root / "loftq.json", facts)


def last_layers(reference, root, batches):
    """Ten steps of the last block only, and of all parameters."""
    facts = {"model": "models/gqa-tied", "batches": "training/ten_steps.json"}
    for name, chosen in [("last_layer", lambda n: ".layers.2." in n), ("all", lambda n: True)]:
        model = reference.load_model("gqa-tied").train()
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen(parameter_name))
        facts[name] = ten_losses(reference, model, batches)
    reference.write_json(root / "full.json", facts)


def loraplus(reference, root, batches):
    """Ten steps from training/initial with a rate 16 times as high for B (https://arxiv.org/abs/2402.12354)."""
    model = peft.PeftModel.from_pretrained(reference.load_model("gqa-tied"), reference.ROOT / "training" / "initial", is_trainable=True).train()
    groups = []

    def make(wrapped):
        optimizer = create_loraplus_optimizer(
            wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.01, foreach=False, fused=False
        )
        groups.extend({"lr": g["lr"], "weight_decay": g["weight_decay"], "parameters": len(g["params"])} for g in optimizer.param_groups)
        return optimizer

    losses = ten_losses(reference, model, batches, make)
    reference.write_json(root / "loraplus.json", {"model": "models/gqa-tied", "adapter": "training/initial", "batches": "training/ten_steps.json",
                                                  "lr": 1e-3, "loraplus_lr_ratio": 16, "groups": groups, "losses": losses})


def write(reference):
    root = reference.ROOT / "methods"
    shutil.rmtree(root, ignore_errors=True)
    batches = json.loads((reference.ROOT / "training" / "ten_steps.json").read_text())["batches"]
    for number, (name, (base, settings)) in enumerate(CASES.items()):
        # add new cases at the end, so that the random numbers of the others do not change
        write_case(reference, root, number, name, base, settings, batches)
    loftq(reference, root)
    last_layers(reference, root, batches)
    loraplus(reference, root, batches)
