//! Qwen2 and Qwen2.5 (`model_type` `qwen2`): <https://arxiv.org/abs/2412.15115>, section 2.

use crate::models::ModelConfig;

/// Name and shape of every tensor of a checkpoint, layer by layer.
pub(crate) fn parameters(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let mut list = vec![("model.embed_tokens.weight".to_string(), vec![config.vocab_size, hidden])];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: Vec<usize>| list.push((format!("model.layers.{layer}.{name}"), shape));
        for (name, features) in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)] {
            add(&format!("self_attn.{name}.weight"), vec![features, hidden]);
            if config.attention_bias {
                add(&format!("self_attn.{name}.bias"), vec![features]);
            }
        }
        add("self_attn.o_proj.weight", vec![hidden, queries]);
        add("mlp.gate_proj.weight", vec![intermediate, hidden]);
        add("mlp.up_proj.weight", vec![intermediate, hidden]);
        add("mlp.down_proj.weight", vec![hidden, intermediate]);
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
    }
    list.push(("model.norm.weight".to_string(), vec![hidden]));
    if !config.tie_word_embeddings {
        list.push(("lm_head.weight".to_string(), vec![config.vocab_size, hidden]));
    }
    list
}
