"""Tiny models quantized with common tools, shared by `reference_packed.py` and `check_packed.py`."""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import torch
from mlx.utils import tree_map
COMMON = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, tie_word_embeddings=False,
)


def read_mlx(folder):
    """Loads the model and configuration of a folder with mlx-lm."""
    return mlx_lm.utils.load_model(Path(folder))


def write_old_keys(file):
    """Adds the keys of transformers 4, because many models of mlx-lm do not read the keys of transformers 5."""
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            config["rope_scaling"] = rope
    elif rope:
        config |= dict(rope_local_base_freq=rope["sliding_attention"]["rope_theta"], rope_theta=rope["full_attention"]["rope_theta"])
    file.write_text(json.dumps(config))


def write_mlx(folder, model, dtype="bfloat16", predicate=None, **settings):
    """Writes the same files as `mlx_lm.convert -q`, without the tokenizer."""
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        write_old_keys(Path(source) / "config.json")
        read, config = read_mlx(source)
        read.update(tree_map(lambda value: value.astype(getattr(mx, dtype)), read.parameters()))
        sizes = settings.pop("group_size", None), settings.pop("bits", None)
        read, config = mlx_lm.utils.quantize_model(read, config, *sizes, quant_predicate=predicate, **settings)
        mlx_lm.utils.save_model(folder, read)
    mlx_lm.utils.save_config(config, config_path=Path(folder) / "config.json")


def mlx_logits(folder, ids):
    """The logits of mlx-lm with the dequantized weights of a folder, in f32."""
    model, _ = read_mlx(folder)
    is_float = lambda value: mx.issubdtype(value.dtype, mx.floating)
    widen = lambda: model.update(tree_map(lambda value: value.astype(mx.float32) if is_float(value) else value, model.parameters()))
    widen()
    # 4-bit and 8-bit floats become bf16, which represents them exactly; as embeddings they would make all activations bf16
    mlx_lm.utils.dequantize_model(model)
    widen()
    return torch.tensor(model(mx.array([ids]))[0].tolist())
