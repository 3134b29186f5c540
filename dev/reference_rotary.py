"""Writes crates/metal-candle/tests/golden/rotary.json: the frequencies of transformers' rotary embeddings.

Usage: python dev/reference_rotary.py   (transformers and torch; written with transformers 5.24)
"""

import json
from pathlib import Path
from types import SimpleNamespace

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OUTPUT = Path(__file__).parent.parent / "crates/metal-candle/tests/golden/rotary.json"

# name, head size, rotated share, theta, max_position_embeddings, lengths, parameters
CASES = [
    ("linear", 16, 1.0, 1e4, 64, [10], {"factor": 4.0}),
    ("dynamic", 16, 1.0, 1e4, 16, [10, 16, 17, 40], {"factor": 2.5}),
    ("llama3", 64, 1.0, 5e5, 131072, [10],
     {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    ("llama3", 16, 1.0, 1e4, 64, [10],
     {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}),
    ("yarn", 64, 1.0, 1e6, 131072, [10], {"factor": 4.0, "original_max_position_embeddings": 32768}),
    ("yarn", 64, 1.0, 150000.0, 131072, [10],
     {"factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}),
    ("yarn", 64, 1.0, 1e4, 163840, [10],
     {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0}),
    ("yarn", 16, 0.5, 1e4, 800, [10], {"factor": None, "original_max_position_embeddings": 400}),
    ("yarn", 16, 1.0, 1e4, 800, [10],
     {"factor": 2.0, "original_max_position_embeddings": 400, "attention_factor": 0.9}),
    ("longrope", 16, 0.5, 1e4, 64, [16, 17],
     {"factor": None, "original_max_position_embeddings": 16,
      "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.0, 3.0, 7.5, 20.0]}),
    ("longrope", 8, 1.0, 1e4, 64, [4, 40],
     {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.5,
      "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.0, 3.0, 7.5, 20.0]}),
    # 7 of 14 elements, so 4 pairs
    ("linear", 14, 0.5, 1e4, 64, [10], {"factor": 4.0}),
    ("dynamic", 14, 0.5, 1e4, 16, [10, 40], {"factor": 2.5}),
    ("longrope", 14, 0.5, 1e4, 64, [16],
     {"factor": 4.0, "original_max_position_embeddings": 32, "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.0, 3.0, 7.5, 20.0]}),
    ("proportional", 16, 0.25, 1e6, 64, [10], {"factor": 1.0}),
    ("proportional", 32, 0.5, 1e4, 64, [10], {"factor": 8.0}),
]


class Config(SimpleNamespace):
    def standardize_rope_params(self):
        pass


def main():
    cases = []
    for kind, head_dim, share, theta, max_positions, lengths, parameters in CASES:
        rope = {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": share, **parameters}
        config = Config(head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4,
                        max_position_embeddings=max_positions, rope_parameters=rope)
        for length in lengths:
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
            cases.append({"head_dim": head_dim, "max_position_embeddings": max_positions, "length": length,
                          "rope_parameters": rope, "frequencies": frequencies.double().tolist(),
                          "attention_factor": factor})
    OUTPUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


main()
