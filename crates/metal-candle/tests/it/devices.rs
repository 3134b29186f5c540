//! Compares every device with the golden numbers: `on_each_device!` runs a test on the CPU and, with the feature, on
//! Metal or CUDA.

use super::decoder::{Tensors, batch_of, golden, json, max_difference, terms, values};
use super::inference_scheduler::{Collected, Script};
use candle_core::{DType, Tensor};
use metal_candle::data::{Dataset, Sample};
use metal_candle::inference::{GenerationConfig, Generator, Piece, Request, SamplingConfig, Scheduler};
use metal_candle::models::{Batch, GradientOf, KVCache, KVCacheConfig, LossOptions, Model, Rows, Targets, Trainable};
use metal_candle::training::{AdamWConfig, LRScheduler, LoRAAdapter, TargetModule, Trainer, TrainingConfig};
use metal_candle::{Device, ModelConfig, ModelLoader};

macro_rules! on_each_device {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn cpu() {
                super::$name(metal_candle::Device::CPU);
            }

            #[cfg(feature = "metal")]
            #[test]
            fn metal() {
                super::$name(metal_candle::Device::metal().unwrap());
            }

            #[cfg(feature = "cuda")]
            #[test]
            fn cuda() {
                super::$name(metal_candle::Device::cuda(0).unwrap());
            }
        }
    )+};
}

on_each_device! {
    logits_match_transformers,
    lora_gradients_match_peft,
    all_gradients_match_torch,
    ten_training_losses_match_peft,
    cached_generation_matches_the_cpu,
    generated_tokens_match_the_cpu,
    scheduled_tokens_match_the_cpu,
    steps_with_every_head_size_match_the_cpu,
    gradients_with_every_head_size_match_the_cpu,
    logits_that_are_no_numbers_are_an_error,
    the_built_in_model_trains_and_generates,
    the_built_in_model_agrees_with_the_cpu_in_each_type,
}

fn load(name: &str, device: Device, dtype: DType) -> Model {
    ModelLoader::new().with_device(device).with_dtype(dtype).load(golden(name)).unwrap()
}

/// The maximum difference, relative to the spread of the expected values.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    max_difference(found, expected) / largest
}

fn logits_match_transformers(device: Device) {
    for name in super::decoder::MODELS {
        let (cases, tensors) =
            (json(&format!("logits/{name}.json")), Tensors::open(&format!("logits/{name}.safetensors")));
        // half precision: the error after three blocks with activations of 11 and 8 bits
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 1e-1)] {
            let model = load(&format!("models/{name}"), device, dtype);
            assert_eq!(model.device(), device);
            for case in &cases["cases"].as_array().unwrap()[..2] {
                let batch = Batch::single(&super::decoder::ids(&case["ids"]));
                let logits = model.forward(&batch, None, None, Rows::All).unwrap();
                let expected = tensors.values(&format!("logits.{}", batch.num_tokens()));
                let difference = relative(&values(&logits), &expected);
                assert!(difference < tolerance, "{name} {dtype:?}: {difference}");
            }
        }
    }
}

fn lora_gradients_match_peft(device: Device) {
    for name in ["qv", "all-linear-rslora"] {
        let case = json(&format!("lora/{name}.json"));
        let tensors = Tensors::open(&format!("lora/{name}.safetensors"));
        let model = load(case["model"].as_str().unwrap(), device, DType::F32);
        let terms = terms(&model, &format!("lora/{name}"));
        let (batch, targets) = batch_of(&case["batch"]);
        let trained: f32 = targets.weights.iter().sum();
        let options = LossOptions { grad_scale: 1.0 / trained, ..LossOptions::default() };
        let (losses, gradients) =
            model.loss_and_gradients(&batch, &targets, Trainable::low_rank(&terms), options).unwrap();
        assert!(max_difference(&losses.rows, &tensors.values("loss_rows")) < 1e-4);
        for (number, _) in terms.iter() {
            for (of, letter) in [(GradientOf::A(number), "A"), (GradientOf::B(number), "B")] {
                let found = gradients.get(of).unwrap();
                let key = format!("grad.base_model.model.{}.lora_{letter}.weight", model.linears()[number].path);
                let error = relative(&values(found), &tensors.values(&key));
                assert!(error < 1e-4, "{name} {key}: {error}");
            }
        }
    }
}

fn all_gradients_match_torch(device: Device) {
    let case = json("full/untied.json");
    let tensors = Tensors::open("full/untied.safetensors");
    let model = load("models/untied", device, DType::F32);
    let (batch, targets) = batch_of(&case["batch"]);
    let trained: f32 = targets.weights.iter().sum();
    let options = LossOptions { grad_scale: 1.0 / trained, ..LossOptions::default() };
    let (_, gradients) = model.loss_and_gradients(&batch, &targets, Trainable::all(), options).unwrap();
    for ((name, _), found) in model.parameters().iter().zip(&gradients.parameters) {
        let expected = tensors.values(&format!("plain.grad.{name}"));
        let difference = max_difference(&values(found.as_ref().unwrap()), &expected);
        let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(difference < 1e-4 * largest.max(1e-2), "{name}: {difference} of {largest}");
    }
}

/// The dataset of the golden run, and its batches.
fn golden_run() -> (Dataset, Vec<Vec<usize>>) {
    let case = json("training/ten_steps.json");
    let (mut samples, mut batches) = (Vec::new(), Vec::new());
    for batch in case["batches"].as_array().unwrap() {
        let (mut numbers, mut at) = (Vec::new(), 0);
        for sequence in batch["sequences"].as_array().unwrap() {
            let ids = super::decoder::ids(sequence);
            let weights = batch["weights"].as_array().unwrap();
            let mut trained = vec![false; ids.len()];
            for i in 1..ids.len() {
                trained[i] = weights[at + i - 1].as_f64().unwrap() > 0.0;
            }
            at += ids.len();
            if trained.contains(&true) {
                numbers.push(samples.len());
                samples.push(Sample { ids, trained, source: None });
            }
        }
        batches.push(numbers);
    }
    (Dataset::from_samples(samples), batches)
}

fn ten_training_losses_match_peft(device: Device) {
    let case = json("training/ten_steps.json");
    let model = load("models/gqa-tied", device, DType::F32);
    let adapter = LoRAAdapter::load(&model, golden("training/initial")).unwrap();
    let config = TrainingConfig {
        num_epochs: 1,
        lr_scheduler: LRScheduler::constant(1e-2),
        optimizer_config: AdamWConfig { weight_decay: 0.01, ..AdamWConfig::default() },
        max_grad_norm: Some(1.0),
    };
    let (dataset, batches) = golden_run();
    let trainer = Trainer::new(adapter, config).unwrap().with_batches(batches);
    let metrics = trainer.train(&dataset).unwrap();
    let expected: Vec<f64> = case["losses"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    let found: Vec<f64> = metrics.steps.iter().map(|step| step.loss).collect();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-4, "{found} instead of {expected}");
    }
}

/// The greedy tokens after a prompt, decoded one at a time with the cache.
fn continuation(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let config = model.config();
    let sizes = KVCacheConfig {
        max_seq_len: 64,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        batch_size: 1,
    };
    let mut cache = KVCache::new(sizes, &model.device()).unwrap();
    let (mut next, mut found) = (prompt.to_vec(), Vec::new());
    while found.len() < count {
        let mut batch = Batch::new();
        batch.push(&next, cache.len(0), 0);
        let logits = values(&model.forward(&batch, None, Some(&mut cache), Rows::Last).unwrap());
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        next = vec![u32::try_from(best).unwrap()];
        found.push(next[0]);
    }
    found
}

fn cached_generation_matches_the_cpu(device: Device) {
    let model = load("models/sharded", device, DType::F32);
    let greedy = &json("logits/sharded.json")["greedy"];
    let expected = super::decoder::ids(&greedy["continuation"]);
    assert_eq!(continuation(&model, &super::decoder::ids(&greedy["prompt"]), 12), expected[..12]);
}

/// With the generator, which lets a device with kernels sample the tokens: greedily and randomly, with and without an
/// adapter, alone and in a large batch.
fn generated_tokens_match_the_cpu(device: Device) {
    let name = "models/gqa-tied";
    let (model, cpu) = (load(name, device, DType::F32), load(name, Device::CPU, DType::F32));
    let prompts: Vec<Vec<u32>> = (0..11).map(|i| (0..=i).map(|j| (i * 7 + j * 3) % 90).collect()).collect();
    let samplings = [
        SamplingConfig::greedy(),
        SamplingConfig::default().with_seed(1),
        SamplingConfig::default().with_temperature(0.7).with_top_k(5).with_seed(2),
        SamplingConfig::default().with_top_p(0.6).with_seed(3),
        SamplingConfig::default().with_temperature(1.3).with_min_p(0.2).with_top_p(0.9).with_top_k(20).with_seed(4),
        SamplingConfig::greedy().with_repetition_penalty(1.3),
    ];
    let adapter = |model: &Model| Some(terms(model, "lora/all-linear"));
    for with_adapter in [false, true] {
        let mut generators = [&model, &cpu].map(|model| {
            let mut generator = Generator::new(model.clone());
            generator.set_adapter(adapter(model).filter(|_| with_adapter));
            generator
        });
        for sampling in &samplings {
            let config = GenerationConfig { ignore_eos: true, ..GenerationConfig::default() };
            let config = GenerationConfig { sampling: sampling.clone(), ..config };
            // they end one after another
            let configs: Vec<_> = (0..11).map(|i| config.clone().with_max_tokens(2 + 5 * i % 12)).collect();
            let [found, expected] = generators.each_mut().map(|generator| {
                let mut all = generator.generate_batch(prompts.clone(), &configs).unwrap();
                all.push(generator.generate(prompts[4].clone(), &configs[5]).unwrap());
                all
            });
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.tokens, expected.tokens, "{sampling:?}, adapter: {with_adapter}");
                for (a, b) in found.log_probabilities.iter().zip(&expected.log_probabilities) {
                    assert!((a - b).abs() < 1e-3, "{a} instead of {b}");
                }
            }
        }
    }
}

/// Sequences that only the CPU can sample, several samples of a prompt and two adapters, together with sequences that
/// the device decodes. They end one after another.
fn scheduled_tokens_match_the_cpu(device: Device) {
    let name = "models/gqa-tied";
    let models = [load(name, device, DType::F32), load(name, Device::CPU, DType::F32)];
    for with_adapters in [false, true] {
        let [found, expected] = models.each_ref().map(|model| {
            let mut scheduler = Scheduler::new(model.clone());
            let adapter = scheduler.add_adapter(&terms(model, "lora/all-linear")).unwrap();
            for i in 0..8u32 {
                let prompt: Vec<u32> = (0..3 + i).map(|j| (i * 7 + j * 3) % 90).collect();
                let config = GenerationConfig { ignore_eos: true, ..GenerationConfig::default() };
                let config = config.with_max_tokens(4 + i as usize);
                let sampling = if i % 2 == 0 {
                    SamplingConfig::greedy()
                } else {
                    SamplingConfig::default().with_top_p(0.8).with_seed(u64::from(i))
                };
                let request = Request::new(prompt, config.with_sampling(sampling));
                let request = request.with_adapter(Some(adapter).filter(|_| with_adapters && i % 3 == 0));
                let request = match i {
                    2 => request.with_mask(Script::new(&[&[1, 2, 3], &[4], &[5, 6]])),
                    3 => request.with_num_samples(3),
                    4 => request.with_num_top_log_probabilities(3),
                    _ => request,
                };
                scheduler.admit(request).unwrap();
            }
            Collected::run(&mut scheduler)
        });
        assert!(found.errors.is_empty());
        assert_eq!(found.pieces.len(), 10);
        for (id, expected) in expected.pieces {
            for (found, expected) in found.pieces[&id].iter().zip(&expected) {
                assert_eq!(found.token, expected.token, "sequence {id}, adapters: {with_adapters}");
                let top = |piece: &Piece| piece.top_log_probabilities.iter().map(|top| top.token).collect::<Vec<_>>();
                assert_eq!(top(found), top(expected));
                let difference = (found.log_probability - expected.log_probability).abs();
                assert!(difference < 1e-3, "{difference}");
            }
            assert_eq!(found.pieces[&id].len(), expected.len());
        }
    }
}

/// Head sizes that use different kernels or register counts.
fn head_dims(device: Device) -> &'static [usize] {
    if device.is_cuda() { &[8, 32, 40, 64, 72, 96, 128] } else { &[8, 64, 128] }
}

/// Weights are smaller in wider models, so that rounding errors do not grow. Rounding the weights changes
/// log-probabilities by at most 0.007 in f16 and 0.08 in bf16, and gradients by 0.4 % and 4 %.
fn config_with_heads(head_dim: usize) -> ModelConfig {
    let config = serde_json::json!({
        "model_type": "qwen2", "hidden_size": 4 * head_dim,
        // whole tiles of the fused kernels, or not
        "intermediate_size": if head_dim.is_multiple_of(16) { 128 } else { 96 }, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "initializer_range": 1.5 / (4.0 * head_dim as f64).sqrt(), "tie_word_embeddings": false
    });
    ModelConfig::from_json_str(&config.to_string()).unwrap()
}

/// Decoding kernels are compiled for the type, the head size and the number of rows, and their register counts differ.
/// Each combination runs, and must assign the CPU's log-probabilities to its tokens.
fn steps_with_every_head_size_match_the_cpu(device: Device) {
    let prompts: Vec<Vec<u32>> = (0..9u32).map(|i| (0..40 + i).map(|j| (i * 7 + j * 3) % 60).collect()).collect();
    let mut failures = Vec::new();
    for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::F16, 3e-2), (DType::BF16, 2e-1)] {
        for &head_dim in head_dims(device) {
            let config = config_with_heads(head_dim);
            let model = Model::repeated_pattern(config.clone(), 3, dtype, device).unwrap();
            let cpu = Model::repeated_pattern(config, 3, dtype, Device::CPU).unwrap();
            for rows in [1, 2, 4, 9] {
                let greedy = GenerationConfig { ignore_eos: true, ..GenerationConfig::default() };
                let greedy = GenerationConfig { sampling: SamplingConfig::greedy(), ..greedy }.with_max_tokens(4);
                let configs = vec![greedy; rows];
                let all = Generator::new(model.clone()).generate_batch(prompts[..rows].to_vec(), &configs).unwrap();
                for (found, prompt) in all.iter().zip(&prompts) {
                    let sequence = [&prompt[..], &found.tokens].concat();
                    let logits = cpu.forward(&Batch::single(&sequence), None, None, Rows::All).unwrap();
                    let logits: Vec<Vec<f32>> = logits.to_dtype(DType::F32).unwrap().to_vec2().unwrap();
                    for (i, (&token, found)) in found.tokens.iter().zip(&found.log_probabilities).enumerate() {
                        let logits = &logits[prompt.len() + i - 1];
                        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
                        let expected = logits[token as usize] - sum.ln();
                        let what = format!("{dtype:?}, heads of {head_dim}, {rows} rows, token {i}");
                        let is_close = (found - expected).abs() < tolerance;
                        failures.extend((!is_close).then(|| format!("{what}: {found} instead of {expected}")));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// A training step runs for each head size and type: all weights in f32, and an adapter in each type.
fn gradients_with_every_head_size_match_the_cpu(device: Device) {
    let sequences: Vec<Vec<u32>> = (0..3u32).map(|i| (0..60 + 9 * i).map(|j| (i * 7 + j * 3) % 60).collect()).collect();
    let (mut batch, mut targets) = (Batch::new(), Targets { ids: Vec::new(), weights: Vec::new() });
    for (slot, sequence) in sequences.iter().enumerate() {
        batch.push(sequence, 0, slot);
        targets.ids.extend(sequence[1..].iter().chain([&0]));
        targets.weights.extend((0..sequence.len()).map(|i| if i + 1 < sequence.len() { 1.0 } else { 0.0 }));
    }
    let mut failures = Vec::new();
    let types = [(DType::F32, 1e-3), (DType::F16, 2e-2), (DType::BF16, 1e-1)];
    for ((dtype, tolerance), rank) in types.into_iter().flat_map(|of| [(of, 4), (of, 8)]) {
        for &head_dim in head_dims(device) {
            let run = |device: Device| {
                let model = Model::repeated_pattern(config_with_heads(head_dim), 3, dtype, device).unwrap();
                let adapter = LoRAAdapter::builder(&model).with_rank(rank);
                let adapter = adapter.with_target_modules([TargetModule::AllLinear]).build().unwrap();
                let count = adapter.num_parameters();
                let values: Vec<f32> = (0..count).map(|i| ((i * 37 % 101) as f32 / 101.0 - 0.5) * 0.1).collect();
                let parameters = Tensor::from_vec(values, adapter.parameters().shape(), &device.candle()).unwrap();
                let terms = adapter.with_parameters(parameters).unwrap().low_rank_updates().unwrap();
                let options = LossOptions { grad_scale: 1.0 / 180.0, ..LossOptions::default() };
                let gradients = |trainable| model.loss_and_gradients(&batch, &targets, trainable, options).unwrap().1;
                let of_terms = gradients(Trainable::low_rank(&terms));
                let numbers = terms.iter().map(|(number, _)| number);
                let mut all: Vec<Tensor> = numbers
                    .flat_map(|number| [GradientOf::A(number), GradientOf::B(number)])
                    .map(|of| of_terms.get(of).unwrap().clone())
                    .collect();
                if dtype == DType::F32 {
                    all.extend(gradients(Trainable::all()).parameters.into_iter().flatten());
                }
                all.iter().map(self::values).collect::<Vec<_>>()
            };
            let (found, expected) = (run(device), run(Device::CPU));
            assert_eq!(found.len(), expected.len());
            for (number, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
                let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
                let difference = difference / norm(&mut expected.iter().copied()).max(1e-6);
                let what = format!("{dtype:?}, rank {rank}, heads of {head_dim}, gradient {number}");
                let is_close = difference < tolerance;
                failures.extend((!is_close).then(|| format!("{what}: {difference} of the norm")));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// A weight that is NaN makes all logits of a row invalid.
fn logits_that_are_no_numbers_are_an_error(device: Device) {
    let model = load("models/gqa-tied", device, DType::F32);
    let norm = Tensor::full(f32::NAN, model.config().hidden_size, &device.candle()).unwrap();
    let broken = model.with_parameters([("model.norm.weight".to_string(), norm)].into()).unwrap();
    let error = Generator::new(broken).generate(vec![1u32, 2], &GenerationConfig::default()).unwrap_err();
    assert!(error.to_string().contains("NaN"), "{error}");
}

fn the_built_in_model_trains_and_generates(device: Device) {
    let nano = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/nano");
    let model = ModelLoader::new().with_device(device).with_dtype(DType::F32).load(&nano).unwrap();
    let adapter = LoRAAdapter::builder(&model).with_rank(4).with_seed(7).build().unwrap();
    let config = TrainingConfig {
        num_epochs: 1,
        lr_scheduler: LRScheduler::constant(1e-2),
        optimizer_config: AdamWConfig::default(),
        max_grad_norm: Some(1.0),
    };
    let ids: Vec<u32> = (0..40).map(|i| (i * 71 + 5) % 3000).collect();
    let sample = Sample { trained: vec![true; ids.len()], ids: ids.clone(), source: None };
    let trainer = Trainer::new(adapter, config).unwrap().with_max_steps(3);
    let metrics = trainer.train(&Dataset::from_samples(vec![sample])).unwrap();
    assert!(metrics.steps[2].loss < metrics.steps[0].loss, "the loss falls on one sample");
    let cpu = ModelLoader::new().with_dtype(DType::F32).load(&nano).unwrap();
    let difference = relative(
        &values(&model.forward(&Batch::single(&ids), None, None, Rows::Last).unwrap()),
        &values(&cpu.forward(&Batch::single(&ids), None, None, Rows::Last).unwrap()),
    );
    assert!(difference < 1e-4, "{difference}");
    assert_eq!(continuation(&model, &ids, 4), continuation(&cpu, &ids, 4));
}

/// Logits and losses of the same rounded weights: the CPU uses f32, another device the type of the weights.
fn the_built_in_model_agrees_with_the_cpu_in_each_type(device: Device) {
    let nano = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/nano");
    let ids: Vec<u32> = (0..60).map(|i| (i * 71 + 5) % 3000).collect();
    let mut wanted: Vec<u32> = ids[1..].to_vec();
    wanted.push(0);
    let targets = Targets { ids: wanted, weights: vec![1.0; ids.len()] };
    for (dtype, of_logits, of_losses) in [(DType::F32, 1e-4, 1e-4), (DType::F16, 2e-2, 2e-2), (DType::BF16, 1e-1, 1e-1)]
    {
        let found = [device, Device::CPU].map(|device| {
            let model = ModelLoader::new().with_device(device).with_dtype(dtype).load(&nano).unwrap();
            let batch = Batch::single(&ids);
            let logits = values(&model.forward(&batch, None, None, Rows::All).unwrap());
            (logits, model.loss(&batch, &targets, None, 0.0).unwrap().rows)
        });
        let [(logits, losses), (cpu_logits, cpu_losses)] = found;
        let logits = relative(&logits, &cpu_logits);
        let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
        let of_mean = (mean(&losses) - mean(&cpu_losses)).abs();
        println!("{device} {dtype:?}: logits {logits:.1e} of the largest, mean loss {of_mean:.1e}");
        assert!(logits < of_logits && of_mean < of_losses, "{dtype:?}: {logits} {of_mean}");
    }
}
