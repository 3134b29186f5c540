//! Reads and writes `config.json` and `generation_config.json`.

use candle_core::DType;
use metal_candle::models::Model;
use metal_candle::{Error, ModelConfig};
use serde_json::{Value, json};

/// hidden, layers, heads, key/value heads, intermediate, vocabulary, tied, parameters
type Sizes = (&'static str, [usize; 6], bool, usize);

const QWEN_CODER: [Sizes; 6] = [
    ("0.5B", [896, 24, 14, 2, 4864, 151_936], true, 494_032_768),
    ("1.5B", [1536, 28, 12, 2, 8960, 151_936], true, 1_543_714_304),
    ("3B", [2048, 36, 16, 2, 11_008, 151_936], true, 3_085_938_688),
    ("7B", [3584, 28, 28, 4, 18_944, 152_064], false, 7_615_616_512),
    ("14B", [5120, 48, 40, 8, 13_824, 152_064], false, 14_770_033_664),
    ("32B", [5120, 64, 40, 8, 27_648, 152_064], false, 32_763_876_352),
];

fn published(sizes: [usize; 6], tied: bool) -> Value {
    let [hidden, layers, heads, key_heads, intermediate, vocabulary] = sizes;
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151_643,
        "eos_token_id": 151_645, "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02,
        "intermediate_size": intermediate, "max_position_embeddings": 32_768, "max_window_layers": layers,
        "model_type": "qwen2", "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": key_heads, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "sliding_window": 131_072, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0", "use_cache": true, "use_sliding_window": false,
        "vocab_size": vocabulary
    })
}

fn small() -> Value {
    published([64, 3, 4, 2, 96, 300], true)
}

fn parse(value: &Value) -> Result<ModelConfig, Error> {
    ModelConfig::from_json_str(&value.to_string())
}

fn with(changes: Value) -> Value {
    let mut value = small();
    let Value::Object(changes) = changes else { panic!("an object") };
    for (key, change) in changes {
        value[key] = change;
    }
    value
}

fn without(key: &str) -> Value {
    let mut value = small();
    value.as_object_mut().unwrap().remove(key);
    value
}

#[test]
fn parameter_counts_of_qwen_coder() {
    for (name, sizes, tied, parameters) in QWEN_CODER {
        let config = parse(&published(sizes, tied)).unwrap();
        assert_eq!(config.num_parameters(), parameters, "{name}");
        assert_eq!(config.num_bytes(DType::BF16), 2 * parameters, "{name}");
        let summed: usize =
            Model::parameter_shapes(&config).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(summed, parameters, "{name}");
    }
}

#[test]
fn every_key_is_read() {
    let config = parse(&published(QWEN_CODER[3].1, false)).unwrap();
    assert_eq!(config.model_type, "qwen2");
    assert_eq!(config.vocab_size, 152_064);
    assert_eq!(config.hidden_size, 3584);
    assert_eq!(config.intermediate_size, 18_944);
    assert_eq!(config.num_hidden_layers, 28);
    assert_eq!(config.num_attention_heads, 28);
    assert_eq!(config.num_key_value_heads, 4);
    assert_eq!(config.head_dim, 128);
    assert_eq!(config.max_position_embeddings, 32_768);
    assert!((config.rope_theta - 1e6).abs() < 1e-6);
    assert!((config.rms_norm_eps - 1e-6).abs() < 1e-12);
    assert!((config.initializer_range - 0.02).abs() < 1e-12);
    assert!(!config.tie_word_embeddings);
    assert!(config.attention_bias);
    assert_eq!(config.eos_token_ids, [151_645]);
}

#[test]
fn keys_of_transformers_5() {
    let mut value = without("rope_theta");
    value["rope_parameters"] = json!({"rope_theta": 500_000.0, "rope_type": "default"});
    value["layer_types"] = json!(["full_attention", "full_attention", "full_attention"]);
    value["dtype"] = json!("bfloat16");
    value["sliding_window"] = Value::Null;
    value["eos_token_id"] = json!([1, 2]);
    value["head_dim"] = json!(32);
    let config = parse(&value).unwrap();
    assert!((config.rope_theta - 500_000.0).abs() < 1e-9);
    assert_eq!(config.eos_token_ids, [1, 2]);
    assert_eq!(config.head_dim, 32);
    let shapes = Model::parameter_shapes(&config);
    assert!(shapes.contains(&("model.layers.2.self_attn.o_proj.weight".into(), vec![64, 128])));
    assert!(shapes.contains(&("model.layers.0.self_attn.k_proj.bias".into(), vec![64])));
}

#[test]
fn absent_keys_have_the_defaults_of_transformers() {
    let config = parse(&json!({
        "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": null, "intermediate_size": 96, "vocab_size": 300
    }))
    .unwrap();
    assert_eq!(config.num_key_value_heads, 4);
    assert_eq!(config.max_position_embeddings, 32_768);
    assert!((config.rope_theta - 10_000.0).abs() < 1e-9);
    assert!((config.rms_norm_eps - 1e-6).abs() < 1e-12);
    assert!(!config.tie_word_embeddings);
    assert!(config.eos_token_ids.is_empty());
    assert_eq!(Model::parameter_shapes(&config).last().unwrap().0, "lm_head.weight");
}

/// Vocabulary, hidden size, MLP width, layers, heads, key/value heads and head width of a configuration without any
/// key, in transformers 5.24.
const DEFAULT_SIZES: [(&str, [usize; 7]); 27] = [
    ("arcee", [32_000, 2560, 18_432, 32, 32, 32, 80]),
    ("ernie4_5", [103_424, 1024, 3072, 18, 16, 2, 128]),
    ("exaone4", [102_400, 4096, 16_384, 32, 32, 32, 128]),
    ("helium", [48_000, 2560, 7040, 24, 20, 20, 128]),
    ("hunyuan_v1_dense", [290_943, 4096, 11_008, 32, 32, 32, 128]),
    ("jais2", [150_272, 3328, 26_624, 32, 26, 26, 128]),
    ("seed_oss", [155_136, 4096, 27_648, 64, 80, 8, 128]),
    ("qwen2", [151_936, 4096, 22_016, 32, 32, 32, 128]),
    ("qwen3", [151_936, 4096, 22_016, 32, 32, 32, 128]),
    ("llama", [32_000, 4096, 11_008, 32, 32, 32, 128]),
    ("mistral", [32_000, 4096, 14_336, 32, 32, 8, 128]),
    ("ministral", [32_000, 4096, 14_336, 32, 32, 8, 128]),
    ("ministral3", [131_072, 4096, 14_336, 34, 32, 8, 128]),
    ("smollm3", [128_256, 2048, 11_008, 36, 16, 4, 128]),
    ("phi3", [32_064, 3072, 8192, 32, 32, 32, 96]),
    ("olmo", [50_304, 4096, 11_008, 32, 32, 32, 128]),
    ("olmo2", [50_304, 4096, 11_008, 32, 32, 32, 128]),
    ("olmo3", [50_304, 4096, 11_008, 32, 32, 32, 128]),
    ("granite", [32_000, 4096, 11_008, 32, 32, 32, 128]),
    ("stablelm", [50_304, 2560, 6912, 32, 32, 32, 80]),
    ("starcoder2", [49_152, 3072, 12_288, 30, 24, 2, 128]),
    ("gemma", [256_000, 3072, 24_576, 28, 16, 16, 256]),
    ("gemma2", [256_000, 2304, 9216, 26, 8, 4, 256]),
    ("gemma3_text", [262_208, 2304, 9216, 26, 8, 4, 256]),
    ("glm4", [151_552, 4096, 13_696, 40, 32, 2, 128]),
    ("cohere", [256_000, 8192, 22_528, 40, 64, 64, 128]),
    ("cohere2", [256_000, 8192, 22_528, 40, 64, 64, 128]),
];

#[test]
fn absent_sizes_are_those_of_the_family() {
    let sizes = |config: &ModelConfig| {
        let heads = [config.num_attention_heads, config.num_key_value_heads, config.head_dim];
        let widths = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers];
        (widths, heads)
    };
    for (family, [vocab, hidden, inner, layers, heads, kv_heads, head_dim]) in DEFAULT_SIZES {
        let config = parse(&json!({"model_type": family})).unwrap();
        assert_eq!(sizes(&config), ([vocab, hidden, inner, layers], [heads, kv_heads, head_dim]), "{family}");
    }
    // the text model of a published Gemma 3 with 4 billion parameters has no other keys
    let text = json!({
        "hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024
    });
    let config = parse(&json!({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})).unwrap();
    assert_eq!(sizes(&config), ([262_208, 2560, 10_240, 34], [8, 4, 256]));
    assert_eq!(config.num_parameters(), 3_880_263_168);
}

#[test]
fn unknown_keys_are_named() {
    let misspelled = with(json!({"rms_norm_epsilon": 1e-3, "use_slidding_window": true, "num_hidden_layer": 9}));
    let notes = parse(&misspelled).unwrap().notes;
    assert_eq!(notes.len(), 1, "{notes:?}");
    for key in ["rms_norm_epsilon", "use_slidding_window", "num_hidden_layer"] {
        assert!(notes[0].contains(&format!("`{key}`")), "{notes:?}");
    }
    assert!(parse(&with(json!({"misspelled": null, "another": false}))).unwrap().notes.is_empty());
}

#[test]
fn windows_without_an_effect_are_accepted() {
    for changes in [
        json!({"use_sliding_window": true}), // max_window_layers = num_hidden_layers
        json!({"use_sliding_window": true, "max_window_layers": 0}), // window 131072 over 32768 positions
        json!({"use_sliding_window": true, "max_window_layers": 0, "sliding_window": null}),
        json!({"use_sliding_window": false, "max_window_layers": 0, "sliding_window": 16}),
        json!({"rope_scaling": null}),
        json!({"rope_scaling": {"type": "default"}}),
        json!({"quantization_config": null, "use_mrope": false}),
    ] {
        let value = with(changes);
        parse(&value).unwrap_or_else(|error| panic!("{value}: {error}"));
    }
}

#[test]
fn unsupported_values_are_refused_by_key() {
    for (changes, words) in [
        (json!({"model_type": "mamba"}), ["model_type", "mamba"]),
        (json!({"hidden_act": "mish"}), ["hidden_act", "mish"]),
        (
            json!({"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8}),
            ["layer_types", "sliding"],
        ),
        (json!({"rope_scaling": {"type": "unheard", "factor": 4.0}}), ["rope_scaling", "unheard"]),
        (json!({"rope_parameters": {"rope_type": "axial"}}), ["rope_parameters", "axial"]),
        (json!({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}), ["rope_parameters", "layer"]),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), ["rope_parameters", "partial_rotary_factor"]),
        (json!({"quantization_config": {"quant_method": "aqlm", "bits": 4}}), ["quantization_config", "aqlm"]),
        (json!({"quantization": {"bits": 4}}), ["quantization", "quantized"]),
        (json!({"use_mrope": true}), ["use_mrope", "rotary"]),
        (json!({"model_type": "stablelm", "qk_layernorm": true}), ["qk_layernorm", "one tensor per head"]),
        (json!({"model_type": "stablelm", "partial_rotary_factor": 0.2}), ["partial_rotary_factor", "odd number"]),
    ] {
        let error = parse(&with(changes.clone())).expect_err(&changes.to_string());
        assert!(matches!(error, Error::Unsupported(_)), "{changes}: {error:?}");
        let text = error.to_string();
        assert!(text.contains("config.json") && words.iter().all(|word| text.contains(word)), "{changes}: {text}");
    }
    assert!(parse(&with(json!({"model_type": "mamba"}))).unwrap_err().to_string().contains("`qwen2`"));
}

#[test]
fn flat_rotary_settings_are_ignored_if_layers_differ() {
    let gemma = |changes: Value| {
        let mut value = json!({
            "model_type": "gemma3_text", "num_hidden_layers": 6, "hidden_size": 16, "num_attention_heads": 4,
            "intermediate_size": 8, "vocab_size": 32
        });
        value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        parse(&value).unwrap()
    };
    let flat = gemma(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}));
    assert!((flat.rope_theta - 1e6).abs() < 1.0, "{}", flat.rope_theta);
    assert!(flat.notes.iter().any(|note| note.contains("`rope_parameters` has no meaning")), "{:?}", flat.notes);
    for (key, is_read) in [("rope_type", true), ("type", false)] {
        let scaled = gemma(json!({"rope_scaling": {key: "linear", "factor": 8.0}}));
        assert_eq!(scaled.notes.is_empty(), is_read, "{key}: {:?}", scaled.notes);
    }
    let nested = gemma(json!({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}));
    assert!((nested.rope_theta - 5e5).abs() < 1.0 && nested.notes.is_empty(), "{:?}", nested.notes);
}

#[test]
fn granite_4_has_two_keys_for_layer_types() {
    for key in ["layer_types", "layers_block_type"] {
        let granite = |kind: &str| {
            parse(&json!({
                "model_type": "granitemoehybrid", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
                "vocab_size": 32, "num_local_experts": 0, "intermediate_size": 8, key: ["attention", kind]
            }))
        };
        granite("attention").unwrap();
        let refused = granite("mamba").unwrap_err().to_string();
        assert!(refused.contains(&format!("`{key}`: layers of type `mamba`")), "{refused}");
    }
}

#[test]
fn invalid_values_are_named_with_what_was_expected() {
    for (value, words) in [
        (with(json!({"hidden_size": "64"})), ["`hidden_size`", "whole number", "64"]),
        (with(json!({"hidden_size": -1})), ["`hidden_size`", "whole number", "-1"]),
        (with(json!({"hidden_size": 0, "head_dim": 16})), ["`hidden_size`", "expected 1 to", "found 0"]),
        (with(json!({"hidden_size": 66})), ["`hidden_size`", "multiple", "66"]),
        (with(json!({"num_attention_heads": 0})), ["`hidden_size`", "multiple", "0"]),
        (with(json!({"num_key_value_heads": 3})), ["`num_key_value_heads`", "divisor", "3"]),
        (with(json!({"num_key_value_heads": 0})), ["`num_key_value_heads`", "expected 1 to", "0"]),
        (with(json!({"head_dim": 15})), ["`head_dim`", "even", "15"]),
        (with(json!({"model_type": "stablelm", "head_dim": 32})), ["`head_dim`", "`hidden_size /", "32"]),
        (with(json!({"vocab_size": 1e30})), ["`vocab_size`", "whole number", "1e"]),
        (with(json!({"vocab_size": u64::MAX})), ["`vocab_size`", "expected 1 to", "18446744073709551615"]),
        (
            with(json!({"num_hidden_layers": 1_000_000_000_000_u64})),
            ["`num_hidden_layers`", "expected 1 to", "1000000000000"],
        ),
        (
            with(json!({"max_position_embeddings": u64::MAX})),
            ["`max_position_embeddings`", "expected 1 to", "18446744073709551615"],
        ),
        (
            with(json!({"num_attention_heads": 16_000_000, "num_key_value_heads": 16_000_000, "head_dim": 16_000_000})),
            ["head_dim", "expected 1 to", "found"],
        ),
        (with(json!({"rope_theta": 0})), ["`rope_theta`", "expected", "0"]),
        (with(json!({"rope_theta": "big"})), ["`rope_theta`", "a number", "big"]),
        (with(json!({"rope_scaling": 3})), ["`rope_scaling`", "an object", "3"]),
        (with(json!({"rope_scaling": {"type": "linear"}})), ["`factor`", "a number", "no such key"]),
        (with(json!({"rope_scaling": {"type": "linear", "factor": -4.0}})), ["`factor`", "above 0", "-4"]),
        (with(json!({"rms_norm_eps": -1.0})), ["`rms_norm_eps`", "expected", "-1"]),
        (with(json!({"tie_word_embeddings": 1})), ["`tie_word_embeddings`", "`true` or `false`", "1"]),
        (with(json!({"eos_token_id": -2})), ["`eos_token_id`", "token id", "-2"]),
        (with(json!({"eos_token_id": [1, 4_294_967_296_u64]})), ["`eos_token_id`", "token id", "4294967296"]),
        (with(json!({"layer_types": ["full_attention"]})), ["`layer_types`", "3 names", "list of 1"]),
        (with(json!({"model_type": 3})), ["`model_type`", "a string", "3"]),
        (without("model_type"), ["`model_type`", "expected", "no such key"]),
        (with(json!({"vocab_size": null})), ["`vocab_size`", "whole number", "null"]),
        (with(json!({"num_attention_heads": null})), ["`num_attention_heads`", "whole number", "null"]),
    ] {
        let error = parse(&value).expect_err(&value.to_string());
        assert!(matches!(error, Error::Format { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("config.json") && words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    }
    let all_large = json!({
        "vocab_size": 1 << 24, "hidden_size": 1 << 24, "intermediate_size": 1 << 24, "num_hidden_layers": 4096,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 1 << 23
    });
    let text = parse(&with(all_large)).unwrap_err().to_string();
    assert!(text.contains("larger than any memory"), "{text}");
}

/// Transformers refuses these, too.
#[test]
fn a_pattern_of_no_layers_is_refused() {
    for model_type in ["exaone4", "cohere2", "gemma3_text"] {
        let parse = |pattern: Value, changes: Value| {
            let mut value = json!({
                "model_type": model_type, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
                "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 32, "sliding_window_pattern": pattern
            });
            value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            parse(&value)
        };
        for (pattern, found) in [(json!(0), "found `0`"), (json!(null), "found `null`")] {
            let error = parse(pattern.clone(), json!({})).expect_err(model_type).to_string();
            assert!(error.contains("`sliding_window_pattern`") && error.contains(found), "{model_type}: {error}");
            let types = json!({"layer_types": ["sliding_attention", "full_attention"]});
            assert_eq!(parse(pattern, types).unwrap().notes, [""; 0], "{model_type}");
        }
        assert!(parse(json!(2), json!({})).is_ok());
    }
}

#[test]
fn a_base_that_alpha_makes_too_large_is_refused() {
    let hunyuan = |alpha: f64| {
        let rope = json!({"type": "dynamic", "alpha": alpha, "factor": 1.0});
        parse(&json!({
            "model_type": "hunyuan_v1_dense", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
            "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 32, "rope_scaling": rope
        }))
    };
    hunyuan(1000.0).unwrap();
    for alpha in [1e25, 1e300] {
        let error = hunyuan(alpha).expect_err("a base above 1e30").to_string();
        assert!(error.contains("`alpha`") && error.contains("at most 1e30"), "{error}");
    }
}

#[test]
fn a_file_that_is_not_an_object_is_refused() {
    for (text, word) in
        [("", "empty"), ("[1]", "a list of 1"), ("{\"a\":", "EOF"), ("\"x\"", "`\"x\"`"), ("nope", "JSON")]
    {
        let error = ModelConfig::from_json_str(text).unwrap_err().to_string();
        assert!(error.contains(word), "{text}: {error}");
    }
    let deep = "[".repeat(100_000);
    assert!(ModelConfig::from_json_str(&deep).unwrap_err().to_string().contains("recursion"));
}

#[test]
fn generation_config_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, small().to_string()).unwrap();
    let bare = ModelConfig::from_json(&path).unwrap();
    assert_eq!((bare.eos_token_ids.as_slice(), bare.generation.top_k), ([151_645].as_slice(), None));

    let generation = folder.path().join("generation_config.json");
    let text = r#"{"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": true, "eos_token_id": [299, 7, 151643],
        "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.44.0"}"#;
    std::fs::write(&generation, text).unwrap();
    let config = ModelConfig::from_json(folder.path()).unwrap();
    assert_eq!(config.eos_token_ids, [299, 7], "the third id is outside the vocabulary");
    let defaults = &config.generation;
    assert_eq!((defaults.do_sample, defaults.top_k, defaults.min_p), (Some(true), Some(20), None));
    assert_eq!((defaults.temperature, defaults.top_p, defaults.repetition_penalty), (Some(0.7), Some(0.8), Some(1.1)));

    std::fs::write(&generation, r#"{"top_k": "many"}"#).unwrap();
    let config = ModelConfig::from_json(&path).unwrap();
    assert_eq!((config.generation.top_k, config.eos_token_ids.as_slice()), (None, [151_645].as_slice()));
    assert!(config.notes[0].contains("generation_config.json`: `top_k`: expected"), "{:?}", config.notes);
}

#[test]
fn a_file_with_byte_order_mark_and_a_missing_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    assert!(matches!(ModelConfig::from_json(&path).unwrap_err(), Error::Read { path: named, .. } if named == path));
    std::fs::write(&path, format!("\u{feff}{}", small())).unwrap();
    assert_eq!(ModelConfig::from_json(&path).unwrap().hidden_size, 64);
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert!(ModelConfig::from_json(&path).unwrap_err().to_string().contains("UTF-8"));
}

#[test]
fn what_is_written_is_what_was_read() {
    let mut value = published(QWEN_CODER[0].1, true);
    value["eos_token_id"] = json!([7, 9]);
    value["rope_parameters"] = json!({"rope_theta": 12_345.5, "rope_type": "default"});
    value["head_dim"] = json!(32);
    let config = parse(&value).unwrap();
    let text = config.to_json(DType::BF16);
    let again = ModelConfig::from_json_str(&text).unwrap();
    assert_eq!(again, config);
    let written: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(written["torch_dtype"], json!("bfloat16"));
    assert_eq!(written["architectures"], json!(["Qwen2ForCausalLM"]));
    assert_eq!(written["rope_theta"], json!(12_345.5));
    assert_eq!(written["bos_token_id"], json!(151_643), "unused keys are preserved");
    assert_eq!(written["head_dim"], json!(32));
    assert_eq!(serde_json::from_str::<Value>(&config.to_json(DType::F16)).unwrap()["torch_dtype"], json!("float16"));
}
