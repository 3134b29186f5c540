//! Tests training steps that train parts of a model, and with recomputed blocks.

use crate::golden;
use candle_core::{DType, Device, Tensor};
use metal_candle::Model;
use metal_candle::data::Random;
use metal_candle::models::{Batch, GradientOf, Gradients, LossOptions, Parameters, Targets, Trainable};
use metal_candle::ops::{LowRank, LowRankUpdates};
use std::collections::HashMap;

fn tensor(random: &mut Random, shape: (usize, usize)) -> Tensor {
    let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| (random.next_f32() - 0.5) * 0.4).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A low-rank update for each of the layers with these ids.
fn terms(model: &Model, numbers: &[usize]) -> LowRankUpdates {
    let mut random = Random::new(7);
    let mut terms = LowRankUpdates::new();
    for &number in numbers {
        let linear = &model.linears()[number];
        let a = tensor(&mut random, (3, linear.in_features));
        let b = tensor(&mut random, (linear.out_features, 3));
        terms.insert(number, LowRank { dropout: 0.2, ..LowRank::new(a, b, 0.7) });
    }
    terms
}

fn batch() -> (Batch, Targets) {
    let sequences: [Vec<u32>; 2] = [(0..19).map(|i| i * 7 % 90).collect(), (0..11).map(|i| i * 5 % 90).collect()];
    let batch = Batch::from_sequences(&sequences);
    let ids: Vec<u32> = batch.ids().iter().map(|id| (id + 3) % 90).collect();
    let weights = (0..ids.len()).map(|i| if i % 4 == 1 { 0.0 } else { 1.0 }).collect();
    (batch, Targets { ids, weights })
}

fn step(model: &Model, trainable: Trainable, checkpointed_blocks: usize) -> (f64, Gradients) {
    let (batch, targets) = batch();
    let options =
        LossOptions { dropout_seed: 3, neftune_noise_alpha: 2.0, checkpointed_blocks, ..LossOptions::default() };
    let (losses, gradients) = model.loss_and_gradients(&batch, &targets, trainable, options).unwrap();
    (losses.rows.iter().map(|&loss| f64::from(loss)).sum(), gradients)
}

fn bits(gradients: &Gradients) -> Vec<Vec<u32>> {
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    gradients.iter().map(|tensor| values(tensor).iter().map(|value| value.to_bits()).collect()).collect()
}

#[test]
fn recomputed_blocks_have_the_same_gradients() {
    let model = golden::model("models/gqa-tied");
    let numbers: Vec<usize> = (0..model.linears().len()).collect();
    let terms = terms(&model, &numbers);
    for trainable in [Trainable::low_rank(&terms), Trainable::all()] {
        let (loss, kept) = step(&model, trainable, 0);
        let mut before = kept.saved_bytes;
        for blocks in [1, 2, 3, 9] {
            let (again, recomputed) = step(&model, trainable, blocks);
            assert_eq!(loss.to_bits(), again.to_bits());
            assert_eq!(bits(&kept), bits(&recomputed), "{blocks} blocks");
            assert!(recomputed.saved_bytes < before || blocks == 9, "{} {before}", recomputed.saved_bytes);
            before = recomputed.saved_bytes;
        }
    }
}

/// A step along the gradient of each tensor changes the loss by the squared norm of the gradient.
#[test]
fn gradients_of_parts_match_finite_differences() {
    for name in ["models/gqa-tied", "models/untied"] {
        let model = golden::model(name);
        let (embedding, head) = (model.linears().len() - 2, model.linears().len() - 1);
        let terms = terms(&model, &[embedding, head, 4]);
        let places: Vec<usize> = (0..model.parameters().len())
            .filter(|&place| {
                let name = &model.parameters()[place].0;
                ["embed_tokens", "lm_head", "layers.1.", "model.norm"].iter().any(|part| name.contains(part))
            })
            .collect();
        let trainable = Trainable { low_rank: Some(&terms), parameters: Parameters::Of(&places) };
        let (_, gradients) = step(&model, trainable, 1);
        assert_eq!(gradients.parameters.iter().flatten().count(), places.len());
        assert_eq!(gradients.low_rank.iter().flatten().count(), 3);

        let check = |gradient: &Tensor, what: &str, moved: &dyn Fn(&Tensor) -> f64| {
            let squared = f64::from(gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            if squared < 1e-6 {
                // a key bias shifts all scores of a query equally, so its gradient is 0
                assert!(what.contains("k_proj.bias"), "{name} {what}");
                return;
            }
            let size = 2e-3 / squared.sqrt();
            let change = |sign: f64| moved(&gradient.affine(sign * size, 0.0).unwrap());
            let slope = (change(1.0) - change(-1.0)) / (2.0 * size);
            assert!((slope / squared - 1.0).abs() < 2e-2, "{name} {what}: {slope} instead of {squared}");
        };
        for number in [embedding, head, 4] {
            for of in [GradientOf::A(number), GradientOf::B(number)] {
                check(gradients.get(of).unwrap(), &format!("{of:?}"), &|change| {
                    let mut moved = terms.clone();
                    let mut term = terms.get(number).unwrap().clone();
                    let matrix = if matches!(of, GradientOf::A(_)) { &mut term.a } else { &mut term.b };
                    *matrix = (&*matrix + change).unwrap();
                    moved.insert(number, term);
                    step(&model, Trainable { low_rank: Some(&moved), ..trainable }, 0).0
                });
            }
        }
        for &place in &places {
            let (parameter, value) = &model.parameters()[place];
            check(gradients.get(GradientOf::Parameter(place)).unwrap(), parameter, &|change| {
                let replaced = HashMap::from([(parameter.clone(), (value.tensor().unwrap() + change).unwrap())]);
                step(&model.with_parameters(replaced).unwrap(), trainable, 0).0
            });
        }
    }
}

#[test]
fn only_the_head_needs_no_block() {
    let model = golden::model("models/untied");
    let terms = terms(&model, &[model.linears().len() - 1]);
    let (_, gradients) = step(&model, Trainable::low_rank(&terms), 0);
    assert_eq!(gradients.iter().count(), 2);
    // 22 trained rows of the stream before the final norm
    assert_eq!(gradients.saved_bytes, 22 * 32 * 4);
}

#[test]
fn replaced_parameters_are_used_and_checked() {
    let model = golden::model("models/gqa-tied");
    let logits = |model: &Model| {
        let logits = model.forward(&Batch::single(&[1, 2, 3]), None, None, metal_candle::models::Rows::Last).unwrap();
        logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let head = model.parameters()[0].1.tensor().unwrap().affine(2.0, 0.0).unwrap();
    let untied = model.with_parameters(HashMap::from([("lm_head.weight".into(), head)])).unwrap();
    assert!(!untied.config().tie_word_embeddings);
    for (double, single) in logits(&untied).iter().zip(logits(&model)) {
        assert!((double - 2.0 * single).abs() < 1e-4 * (1.0 + single.abs()), "{double} {single}");
    }
    let wrong = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
    let replaced = [("model.norm.weight".to_string(), wrong.clone()), ("model.other".to_string(), wrong)];
    let message = model.with_parameters(HashMap::from(replaced)).unwrap_err().to_string();
    assert!(message.contains("`model.norm.weight`: expected shape [56], found [2, 2]"), "{message}");
    assert!(message.contains("`model.other` is not part of the model"), "{message}");
}
