//! Warnings of a run: where they come in its events, and whether a model knows its chat template.

use crate::golden;
use crate::training_trainer::{adapter, config, dataset};
use candle_core::Tensor;
use metal_candle::data::{Dataset, DatasetOptions, Tokenizer};
use metal_candle::training::{Trainer, TrainingEvent, TrainingWarning, template_warning};
use metal_candle::{Device, Model, ModelLoader};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

fn nano(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/nano").join(name)
}

#[test]
fn a_model_knows_its_template_or_not() {
    let model = ModelLoader::new().load(nano("")).unwrap();
    let tokenizer = Tokenizer::from_folder(nano("")).unwrap();
    let rows = Dataset::from_file(nano("data/valid.jsonl"), &tokenizer, &DatasetOptions::default()).unwrap();
    let warning = |model: &Model, rows: &Dataset| template_warning(model, None, &tokenizer, rows).unwrap();
    // it was trained on conversations
    assert_eq!(warning(&model, &rows), None);

    // random weights guess
    let random = Model::initialize(model.config().clone(), 1, Device::CPU).unwrap();
    let Some(TrainingWarning::UnknownTemplate { marks, loss, chance, is_untrained }) = warning(&random, &rows) else {
        panic!("random weights know the template");
    };
    assert_eq!(marks, ["<|im_start|>", "<|im_end|>"]);
    assert!((chance - 4096_f64.ln()).abs() < 1e-9 && (loss - chance).abs() < 1.0, "{loss} {chance}");
    assert!(!is_untrained);

    // the marks are what tokens are that were never trained: as their neighbours, which are no part of any text
    let start = tokenizer.token_to_id("<|im_start|>").unwrap() as usize;
    let unused = tokenizer.token_to_id("<|quad_end|>").unwrap() as usize;
    let mut tensors: HashMap<String, Tensor> = crate::golden::parameters_of(&model).into_iter().collect();
    let embedding = &tensors["model.embed_tokens.weight"];
    let mut parts: Vec<Tensor> = vec![embedding.narrow(0, 0, start).unwrap()];
    parts.extend((0..2).map(|_| embedding.narrow(0, unused, 1).unwrap()));
    parts.push(embedding.narrow(0, start + 2, 4096 - start - 2).unwrap());
    let embedding = Tensor::cat(&parts, 0).unwrap();
    tensors.insert("model.embed_tokens.weight".into(), embedding);
    let untrained = Model::from_tensors(model.config().clone(), tensors, Device::CPU).unwrap();
    let found = warning(&untrained, &rows).unwrap();
    assert!(matches!(&found, TrainingWarning::UnknownTemplate { is_untrained: true, .. }), "{found:?}");
    assert!(found.to_string().contains("`<|im_start|>`") && found.to_string().contains("embeddings"), "{found}");

    // plain text has no marks
    let mut text = rows;
    for row in &mut text.samples {
        row.ids.retain(|&id| !tokenizer.is_special(id));
    }
    assert_eq!(warning(&untrained, &text), None);
    assert_eq!(warning(&untrained, &Dataset::default()), None);
}

#[test]
fn warnings_are_events_and_change_nothing() {
    let model = golden::model("models/gqa-tied");
    let vocab_size = model.config().vocab_size as u32;
    let rows = dataset(24, vocab_size);
    let events = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&events);
    let found = TrainingWarning::CutRows { cut: 1, rows: 2, max_tokens: 3 };
    let watched = Trainer::new(adapter(&model), config(1, 1e-3))
        .unwrap()
        .with_batch_tokens(64)
        .with_warning(found.clone())
        .with_evaluation(rows.clone(), 0)
        .with_callback(move |event| {
            shared.lock().unwrap().push(event.clone());
            ControlFlow::Continue(())
        });
    let metrics = watched.train(&rows).unwrap();
    let events = events.lock().unwrap();
    assert!(matches!(events[0], TrainingEvent::Started { .. }));
    assert_eq!(events[1], TrainingEvent::Warning { step: 0, warning: found });
    let leaked = TrainingWarning::LeakedRows { leaked: 24, rows: 24 };
    assert_eq!(events[2], TrainingEvent::Warning { step: 0, warning: leaked });
    let plain = Trainer::new(adapter(&model), config(1, 1e-3)).unwrap().with_batch_tokens(64);
    assert_eq!(plain.train(&rows).unwrap().final_loss(), metrics.final_loss());
}
