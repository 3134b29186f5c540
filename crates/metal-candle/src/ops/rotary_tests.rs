//! Tests the frequencies of rotary embeddings against transformers, and tables that depend on the sequence length.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::rotary::{Pairs, RotaryScaling, RotarySpec, RotaryTable};
use super::tests::{random, values};
use candle_core::Device;
use serde_json::Value;

fn golden() -> Vec<Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/rotary.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn spec(case: &Value) -> RotarySpec {
    let rope = &case["rope_parameters"];
    let size = |value: &Value| value.as_u64().unwrap() as usize;
    let number = |name: &str| rope[name].as_f64();
    let factor = number("factor");
    let head_dim = size(&case["head_dim"]);
    let share = number("partial_rotary_factor").unwrap();
    let original = || size(&rope["original_max_position_embeddings"]);
    let list = |name: &str| rope[name].as_array().unwrap().iter().map(|f| f.as_f64().unwrap()).collect();
    let mut dim = (head_dim as f64 * share) as usize;
    let scaling = match rope["rope_type"].as_str().unwrap() {
        "linear" => RotaryScaling::Linear { factor: factor.unwrap() },
        "dynamic" => RotaryScaling::Dynamic { factor: factor.unwrap() },
        "llama3" => RotaryScaling::Llama3 {
            factor: factor.unwrap(),
            low_freq_factor: number("low_freq_factor").unwrap(),
            high_freq_factor: number("high_freq_factor").unwrap(),
            original_max_position_embeddings: original(),
        },
        "yarn" => RotaryScaling::Yarn {
            factor,
            original_max_position_embeddings: original(),
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            mscale: number("mscale"),
            mscale_all_dim: number("mscale_all_dim"),
            attention_factor: number("attention_factor"),
            truncate: rope["truncate"].as_bool().unwrap_or(true),
        },
        "longrope" => RotaryScaling::LongRope {
            short_factor: list("short_factor"),
            long_factor: list("long_factor"),
            factor,
            original_max_position_embeddings: original(),
            attention_factor: number("attention_factor"),
        },
        "proportional" => {
            dim = head_dim;
            let rotated_pairs = (share * head_dim as f64 / 2.0) as usize;
            RotaryScaling::Proportional { factor: factor.unwrap(), rotated_pairs }
        }
        other => panic!("{other}"),
    };
    let max_position_embeddings = size(&case["max_position_embeddings"]);
    RotarySpec { dim, theta: number("rope_theta").unwrap(), scaling, pairs: Pairs::Halves, max_position_embeddings }
}

#[test]
fn frequencies_and_factors_are_those_of_transformers() {
    let cases = golden();
    assert_eq!(cases.len(), 22);
    for case in cases {
        let (spec, length) = (spec(&case), case["length"].as_u64().unwrap() as usize);
        let expected: Vec<f64> = case["frequencies"].as_array().unwrap().iter().map(|f| f.as_f64().unwrap()).collect();
        let found = spec.frequencies(length);
        assert_eq!(found.len(), expected.len(), "{spec:?}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() <= 3e-7 * expected, "{spec:?}: {found} {expected}");
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert!((spec.attention_factor() - factor).abs() < 1e-12, "{spec:?}: {} {factor}", spec.attention_factor());
        // the table contains the cosines and sines of these frequencies, times the factor
        let table = RotaryTable::new(&spec).unwrap();
        let like = random(&[length, 1], 1);
        let positions: Vec<u32> = (0..length as u32).collect();
        let rotation = table.rotation(&positions, &[0, length], &like).unwrap();
        let (cos, sin) = rotation.tables();
        let (cos, sin, last) = (values(cos), values(sin), (length - 1) * expected.len());
        for (i, frequency) in expected.iter().enumerate() {
            let angle = (length - 1) as f64 * frequency;
            assert!((f64::from(cos[last + i]) - factor * angle.cos()).abs() < 1e-5);
            assert!((f64::from(sin[last + i]) - factor * angle.sin()).abs() < 1e-5);
        }
    }
}

#[test]
fn each_sequence_has_the_table_of_its_length() {
    for case in golden()
        .iter()
        .filter(|case| ["dynamic", "longrope"].contains(&case["rope_parameters"]["rope_type"].as_str().unwrap()))
    {
        let spec = spec(case);
        let table = RotaryTable::new(&spec).unwrap();
        let limit = spec.fixed_until().unwrap();
        assert!(table.is_fixed(limit) && !table.is_fixed(limit + 1));
        let like = random(&[1, 1], 1);
        // a whole short sequence, the end of a long one, and one token of a third length
        let (short, long, other) = (0..limit as u32, limit as u32 - 2..limit as u32 + 5, [3 * limit as u32]);
        let rows = |positions: Vec<u32>| {
            let rotation = table.rotation(&positions, &[0, positions.len()], &like).unwrap();
            let (cos, sin) = rotation.tables();
            (values(cos), values(sin))
        };
        let parts = [rows(short.clone().collect()), rows(long.clone().collect()), rows(other.to_vec())];
        let all: Vec<u32> = short.chain(long).chain(other).collect();
        let rotation = table.rotation(&all, &[0, limit, limit + 7, limit + 8], &like).unwrap();
        let (cos, sin) = rotation.tables();
        assert_eq!(values(cos), parts.iter().flat_map(|part| part.0.clone()).collect::<Vec<_>>());
        assert_eq!(values(sin), parts.iter().flat_map(|part| part.1.clone()).collect::<Vec<_>>());
        // position 1 of a short and of a long sequence
        let of_long = rows((0..=limit as u32).collect()).1;
        let half = spec.num_pairs();
        assert_ne!(parts[0].1[half..2 * half], of_long[half..2 * half]);

        let (cos, _) = table.on_device(limit, &Device::Cpu).unwrap();
        assert_eq!(values(&cos), parts[0].0);
        assert!(table.on_device(limit + 1, &Device::Cpu).is_err());
        assert!(table.rotation(&all, &[0, limit], &like).is_err());
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let spec =
        |dim, theta, scaling| RotarySpec { dim, theta, scaling, pairs: Pairs::Halves, max_position_embeddings: 64 };
    let long_rope = RotaryScaling::LongRope {
        short_factor: vec![1.0; 4],
        long_factor: vec![1.0; 8],
        factor: None,
        original_max_position_embeddings: 16,
        attention_factor: None,
    };
    let yarn = RotaryScaling::Yarn {
        factor: Some(2.0),
        original_max_position_embeddings: 16,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: None,
        mscale_all_dim: None,
        attention_factor: None,
        truncate: true,
    };
    for (spec, word) in [
        (spec(0, 1e4, RotaryScaling::Default), "at least one"),
        (spec(8, f64::NAN, RotaryScaling::Default), "theta"),
        (spec(8, 1e4, RotaryScaling::Linear { factor: 0.0 }), "`factor`"),
        (spec(2, 1e4, RotaryScaling::Dynamic { factor: 2.0 }), "at least 3"),
        (spec(7, 1e4, yarn), "even"),
        (spec(8, 1e4, long_rope), "`long_factor`"),
        (spec(8, 1e4, RotaryScaling::Proportional { factor: 1.0, rotated_pairs: 5 }), "at most 4"),
    ] {
        let message = RotaryTable::new(&spec).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    }
}
