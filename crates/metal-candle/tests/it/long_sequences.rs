//! Trains on one long sequence, and checks that no `[tokens, tokens]` matrix is allocated.

use metal_candle::models::{Batch, LossOptions, Targets, Trainable};
use metal_candle::ops::{LowRank, LowRankUpdates};
use metal_candle::{Device, Model, ModelConfig};
use std::process::Command;

const TOKENS: usize = 16_384;
/// The environment variable with the work of the child process.
const CHILD: &str = "METAL_CANDLE_TEST_LONG_SEQUENCE";

/// The peak resident memory of this process in bytes, if the operating system reports it.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[test]
#[ignore = "the process whose memory a_long_sequence_trains_without_a_square_of_it measures"]
fn step_of_a_child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let config = r#"{"model_type": "qwen2", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16384,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "initializer_range": 0.2}"#;
    let model = Model::initialize(ModelConfig::from_json_str(config).unwrap(), 1, Device::CPU).unwrap();
    let mut terms = LowRankUpdates::new();
    for (number, linear) in model.linears().iter().enumerate().take(7) {
        let ones =
            |shape: (usize, usize)| candle_core::Tensor::full(0.01_f32, shape, &candle_core::Device::Cpu).unwrap();
        terms.insert(number, LowRank::new(ones((2, linear.in_features)), ones((linear.out_features, 2)), 1.0));
    }
    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| i * i / 3 % 128).collect();
    let mut wanted = ids.clone();
    wanted.rotate_left(1);
    let targets = Targets { ids: wanted, weights: vec![1.0; TOKENS] };
    let step = |tokens: usize, blocks: usize| {
        let options =
            LossOptions { grad_scale: 1.0 / tokens as f32, checkpointed_blocks: blocks, ..LossOptions::default() };
        let (ids, wanted) = (&ids[..tokens], targets.ids[..tokens].to_vec());
        let targets = Targets { ids: wanted, weights: vec![1.0; tokens] };
        model.loss_and_gradients(&Batch::single(ids), &targets, Trainable::low_rank(&terms), options).unwrap()
    };
    // one-time allocations
    step(256, 1);
    let before = peak();
    let (losses, gradients) = step(TOKENS, 1);
    let grown = peak().zip(before).map(|(after, before)| after - before);

    assert!(losses.rows.iter().all(|loss| loss.is_finite()));
    assert_eq!(gradients.iter().count(), 14);
    for gradient in gradients.iter() {
        let squared = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(squared.is_finite() && squared > 0.0, "{squared}");
    }
    // the inputs of the block and of the final norm
    assert_eq!(gradients.saved_bytes, 2 * TOKENS * 64 * 4);
    // the probabilities of one head would need 1 GiB in f32, and half of that in half precision
    assert!(grown.is_none_or(|bytes| bytes < 128 << 20), "{grown:?} bytes");
    // a longer sequence starts with the same losses
    let (short, _) = step(300, 1);
    assert_eq!(short.rows[..256], losses.rows[..256]);
    println!("peak grew by {grown:?} bytes");
}

#[test]
fn a_long_sequence_trains_without_a_square_of_it() {
    // in its own process, because other tests allocate memory too
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "long_sequences::step_of_a_child", "--ignored", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && stdout.contains("peak grew by"), "{stdout}\n{stderr}");
}
