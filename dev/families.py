"""Tiny models of every dense family, shared by `reference_families.py` and `check_families.py`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers

# Granite 4 checks its Mamba sizes even where every layer is attention.
NO_MAMBA = dict(mamba_n_heads=4, mamba_expand=2, mamba_d_head="auto", num_local_experts=0)


def build_config(model_type, **keys):
    """The configuration of a causal language model, without special tokens unless `keys` contains them."""
    keys = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None) | keys
    if model_type in ("glm", "glm4") and keys["eos_token_id"] is None:
        # these classes replace null with ids of the released vocabulary
        keys["eos_token_id"] = keys["vocab_size"] - 1
    if model_type == "gemma3":
        keys = dict(
            text_config=dict(model_type="gemma3_text", **keys), tie_word_embeddings=keys.get("tie_word_embeddings", True), mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
            vision_config=dict(
                model_type="siglip_vision_model", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
            ),
        )
    if model_type == "mistral3":
        keys = dict(
            text_config=dict(model_type="mistral", **keys), image_token_index=90,
            vision_config=dict(model_type="pixtral", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4),
        )
    return transformers.AutoConfig.for_model(model_type, **keys)


def randomize(model, seed, std=0.35):
    """Draws all weights so that every feature affects the result: norms away from one, biases away from zero, and matrices with standard
    deviation `std`, or 1.5 times the one that preserves the scale of the input if `std` is None."""
    noise = torch.Generator().manual_seed(seed)
    is_centred = "gemma" in model.config.model_type
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            if name.endswith("bias"):
                parameter.copy_(0.4 * drawn)
            elif "norm" in name:
                # weights of Gemma's norms are added to one
                parameter.copy_(0.3 * drawn + (0.0 if is_centred else 1.0))
            else:
                parameter.copy_((std or 1.5 / parameter.shape[-1] ** 0.5) * drawn)
            # exactly representable in bfloat16, so that a narrow file holds the same model
            parameter.copy_(parameter.bfloat16().float())


def make_model(config, seed, std=0.35):
    config._attn_implementation = "eager"
    auto = transformers.AutoModelForImageTextToText if config.model_type == "mistral3" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    randomize(model, seed, std)
    return model


def wrap_all_linear(model, rank, alpha, seed):
    """The model with a random LoRA on every linear layer of PEFT's "all-linear"; for a multimodal model, only on its text part."""
    exclude = r".*(vision_tower|multi_modal_projector).*" if model.config.model_type in ("gemma3", "mistral3") else None
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear", exclude_modules=exclude)
    wrapped = peft.get_peft_model(model, settings).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.5 / parameter.shape[1] ** 0.5)
    return wrapped


def next_token_loss(logits, ids):
    """Mean cross entropy of each token but the first."""
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))


def greedy_tokens(model, prompt, count):
    """`count` greedy tokens by transformers' own generation, past any end token, and the smallest margin of a selected logit."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )
    lead = min((top[0] - top[1]).item() for top in (logits[0].float().topk(2).values for logits in out.logits))
    return out.sequences[0, len(prompt) :].tolist(), lead
