//! `convert` and `quantize` of models, GGUF adapters, and exports that would lose an adapter.

use crate::fixture::Fixture;
use candle_core::{DType, Tensor};
use metal_candle::Device;
use metal_candle::files::GgufFile;
use metal_candle::models::{SafetensorsFile, write_safetensors};
use serde_json::Value;

/// Makes all matrices of a PEFT folder smaller or larger.
fn scale_adapter(fixture: &Fixture, folder: &str, factor: f64) {
    let path = fixture.path(folder).join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    let tensors: Vec<(String, Tensor)> = file
        .entries()
        .iter()
        .map(|entry| (entry.name.clone(), (file.float_tensor(&entry.name, DType::F32).unwrap() * factor).unwrap()))
        .collect();
    drop(file);
    write_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
}

fn trained() -> Fixture {
    let fixture = Fixture::new();
    fixture.ok("train --model model --data data --steps 4 --learning-rate 1e-2 --target-modules all-linear --output run --quiet");
    fixture
}

#[test]
fn a_model_becomes_a_gguf_file_and_a_folder_again() {
    let fixture = Fixture::new();
    let json = fixture.ok("convert --model model --format gguf --output m.gguf --json").json();
    assert_eq!(json["max_logit_difference"], 0.0);
    let words = "--raw --temperature 0 --max-tokens 8 --prompt fn --json";
    let text = |model: &str| fixture.ok(&format!("generate --model {model} {words}")).json()["tokens"].clone();
    assert_eq!(text("m.gguf"), text("model"));
    let ids = |model: &str| fixture.ok(&format!("tokenize --model {model} --json let_x=1;")).stdout;
    assert_eq!(ids("m.gguf"), ids("model"));
    let template = |model: &str| {
        let rows = fixture.path("data/test.jsonl");
        fixture.ok(&format!("template {} --model {model} --json", rows.display())).stdout
    };
    assert_eq!(template("m.gguf"), template("model"));
    let modelfile = fixture.text("m.Modelfile");
    assert!(modelfile.starts_with("FROM ./m.gguf\n") && modelfile.contains("TEMPLATE"), "{modelfile}");

    fixture.ok("convert --model m.gguf --format safetensors --output back");
    assert_eq!(fixture.read("back/model.safetensors"), fixture.read("model/model.safetensors"));
    assert_eq!(template("back"), template("model"));
    let json =
        fixture.ok("convert --model model --format gguf --split-max-size 60KB --output parts.gguf --json").json();
    let first = json["files"][0].as_str().unwrap().to_owned();
    assert!(json["files"].as_array().unwrap().len() > 1 && first.contains("parts-00001-of-0000"), "{json}");
    assert_eq!(text(&first), text("model"));

    // other types are measured
    for (format, output, report) in [("gguf", "low.gguf", "low.proof.json"), ("safetensors", "low", "low/proof.json")] {
        let words = format!("convert --model model --dtype bf16 --format {format} --output {output} --json");
        let json = fixture.ok(&words).json();
        assert!(json["proof"]["mean_kl"].as_f64().unwrap() > 0.0, "{json}");
        let found: Value = serde_json::from_str(&fixture.text(report)).unwrap();
        assert_eq!(found, json["proof"]);
    }
    let json = fixture.ok("convert --model model --format gguf --proof data --output p.gguf --json").json();
    assert_eq!(json["proof"]["mean_kl"], 0.0, "{json}");
    let ran = fixture.run("convert --model model --adapter m.gguf --format peft --proof data --output p");
    assert!(ran.stderr.contains("`--proof` needs a model"), "{}", ran.stderr);

    for (words, parts) in [
        (
            "convert --model model --format gguf --output m.gguf",
            &["m.gguf", "already exists", "nothing is overwritten"][..],
        ),
        ("convert --model model --format gguf --output folder", &["expected a name that ends in `.gguf`"]),
        ("convert --model model --format peft --output folder", &["needs `--adapter`"]),
        ("convert --model model --format mlx --output mlx --split-max-size 1MB", &["`--split-max-size` needs a model"]),
        ("convert --model model --format gguf --output x.gguf --split-max-size 1XB", &["expected a size such as"]),
    ] {
        let ran = fixture.run(words);
        assert!(ran.code != 0 && parts.iter().all(|part| ran.stderr.contains(part)), "{words}\n{}", ran.stderr);
    }
    assert!(!fixture.path("x.gguf").exists() && !fixture.path("mlx").exists());
}

#[test]
fn a_model_is_quantized_for_mlx() {
    let fixture = Fixture::new();
    let mut last = f64::INFINITY;
    for kind in ["4bit", "8bit"] {
        let words = format!("convert --model model --format mlx --mlx-type {kind} --mlx-group-size 32 --output {kind}");
        let ran = fixture.ok(&format!("{words} --json"));
        let kl = ran.json()["proof"]["mean_kl"].as_f64().unwrap();
        assert!(kl > 0.0 && kl < last, "{kl} {last}");
        last = kl;
        // rows of 48 weights
        assert!(ran.stderr.contains("such as `model.layers.0.mlp.down_proj.weight`"), "{}", ran.stderr);
        let report: Value = serde_json::from_str(&fixture.text(&format!("{kind}/proof.json"))).unwrap();
        assert_eq!(report, ran.json()["proof"]);
        fixture.ok(&format!("generate --model {kind} --raw --temperature 0 --max-tokens 4 --prompt fn"));
    }
    for (words, part) in [
        ("--format gguf --mlx-type 4bit --output x.gguf", "`--mlx-type` needs `--format mlx`"),
        ("--format mlx --mlx-type 4bit --output x", "expected matrices whose rows are a multiple of 64"),
        ("--format mlx --mlx-type 7bit --output x", "expected one of 2bit, 3bit"),
        ("--format mlx --mlx-type mxfp4 --mlx-group-size 64 --output x", "expected 32 for `mxfp4`, found 64"),
        ("--format mlx --mlx-type 4bit --quantize q4_0 --output x", "cannot be used with"),
    ] {
        let ran = fixture.run(&format!("convert --model model {words}"));
        assert!(ran.code == 1 && ran.stderr.contains(part), "{words}\n{}", ran.stderr);
    }
    assert!(!fixture.path("x").exists());
}

#[test]
fn quantizing_is_measured() {
    let fixture = Fixture::new();
    let mut last = 0.0;
    for kind in ["q8_0", "q5_1", "q4_0"] {
        let json = fixture.ok(&format!("quantize --model model --type {kind} --output {kind}.gguf --json")).json();
        let kl = json["proof"]["mean_kl"].as_f64().unwrap();
        assert!(kl > last && json["max_logit_difference"] == 0.0, "{json}");
        last = kl;
        let file = GgufFile::open(fixture.path(&format!("{kind}.gguf"))).unwrap();
        let line: Value = serde_json::from_str(file.text("metal_candle.proof").unwrap().unwrap()).unwrap();
        assert_eq!(line["mean_kl"], json["proof"]["mean_kl"]);
        let report: Value = serde_json::from_str(&fixture.text(&format!("{kind}.proof.json"))).unwrap();
        assert_eq!(report, json["proof"]);
        assert!(file.types().iter().any(|found| found == kind), "{:?}", file.types());
    }
    // the same while loading
    let words = "--raw --temperature 0 --max-tokens 8 --prompt fn --json";
    let loaded = fixture.ok(&format!("generate --model model --quantize q4_0 {words}")).json();
    let file = fixture.ok(&format!("generate --model q4_0.gguf {words}")).json();
    assert_eq!(loaded["tokens"], file["tokens"]);

    let words = "quantize --model model --type q4_0 --calibration data --save-imatrix i.gguf --tensor-type ffn_up=q8_0";
    fixture.ok(&format!("{words} --output a.gguf"));
    fixture.ok("quantize --model model --type q4_0 --imatrix i.gguf --tensor-type ffn_up=q8_0 --output b.gguf");
    let blocks = |name: &str| {
        let file = GgufFile::open(fixture.path(name)).unwrap();
        file.tensors().map(|tensor| (tensor.name.clone(), tensor.ggml_type)).collect::<Vec<_>>()
    };
    assert_eq!(blocks("a.gguf"), blocks("b.gguf"));
    assert!(blocks("a.gguf").contains(&("blk.1.ffn_up.weight".into(), 8)));

    for (words, part) in [
        ("quantize --model model --type q4_9 --output x.gguf", "expected one of f32, f16, bf16, q8_0"),
        ("quantize --model model --type q4_0 --output x.bin", "expected a name that ends in `.gguf`"),
        ("quantize --model model --type q4_0 --tensor-type down --output x.gguf", "expected PATTERN=TYPE"),
        ("quantize --model model --type q4_0 --tensor-type (=q8_0 --output x.gguf", "expected a regular expression"),
        ("quantize --model model --type q4_0 --tensor-type ffn=q6_k --output x.gguf", "expected rows of blocks of 256"),
        (
            "quantize --model model --type q4_0 --imatrix q8_0.gguf --output x.gguf",
            "expected the importance of at least one",
        ),
        ("quantize --model model --type q4_0 --min-survival 2 --output x.gguf", "expected a share from 0 to 1"),
        ("quantize --model model --type q4_0 --proof none.txt --output x.gguf", "none.txt"),
        ("train --model model --data data --full --quantize q4_0 --output x", "`--quantize` needs an adapter"),
    ] {
        let ran = fixture.run(words);
        assert!(ran.code != 0 && ran.stderr.contains(part), "{words}\n{}", ran.stderr);
        assert!(!fixture.path("x.gguf").exists(), "{words}");
    }
}

#[test]
fn an_adapter_trains_on_weights_quantized_while_loading() {
    let fixture = Fixture::new();
    let ran = fixture.ok("train --model model --quantize q8_0 --data data --steps 2 --output run");
    assert!(ran.stderr.contains(" parameters, q8_0, on "), "{}", ran.stderr);
    fixture.ok("quantize --model model --type q8_0 --output q.gguf");
    fixture.ok("train --model q.gguf --data data --steps 2 --output other --quiet");
    let adapter = |run: &str| fixture.read(&format!("{run}/adapter/adapter_model.safetensors"));
    assert_eq!(adapter("run"), adapter("other"));
}

#[test]
fn what_rounding_would_lose_is_refused() {
    let fixture = trained();
    let adapter = "run/adapter";
    let json = fixture.ok("fuse --model model --adapter run --output merged --json").json();
    assert!(json["proof"]["min_survival"].as_f64().unwrap() > 0.999, "{json}");
    assert!(json["proof"]["text"].as_str().unwrap().contains("validation rows"), "{json}");

    scale_adapter(&fixture, adapter, 0.03);
    for (words, part) in [
        ("fuse --model model --dtype bf16 --adapter run --output bf16", "stochastic-rounding"),
        ("quantize --model model --type q4_0 --adapter run --output lost.gguf", "--auto"),
    ] {
        let ran = fixture.run(words);
        assert_eq!(ran.code, 1, "{words}\n{}", ran.stderr);
        assert!(ran.stderr.contains("less than 0.9 of the adapter"), "{}", ran.stderr);
        assert!(ran.stderr.contains("nothing was written") && ran.stderr.contains(part), "{}", ran.stderr);
    }
    assert!(!fixture.path("bf16").exists() && !fixture.path("lost.gguf").exists());
    fixture.ok("fuse --model model --dtype bf16 --adapter run --output low --min-survival 0");
    let json = fixture.ok("fuse --model model --dtype bf16 --adapter run --output auto --auto --json").json();
    assert!(json["dtype"] != "bf16" && json["proof"]["min_survival"].as_f64().unwrap() >= 0.9, "{json}");
    let ran = fixture.ok("quantize --model model --type q4_0 --adapter run --output auto.gguf --auto --json");
    // one line per round: `14 of 14 weights would lose ... (only 0.46 of `NAME` survives): using q5_1 for 14`
    let rounds: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("survives")).collect();
    let share = |line: &str| line.split("(only ").nth(1)?.split(" of `model.layers.").next()?.parse::<f64>().ok();
    assert!(!rounds.is_empty() && rounds.iter().all(|line| share(line).is_some_and(|share| share < 0.9)), "{rounds:?}");
    let json = ran.json();
    assert!(json["proof"]["min_survival"].as_f64().unwrap() >= 0.9, "{json}");
    let types = GgufFile::open(fixture.path("auto.gguf")).unwrap().types();
    assert!(types.iter().any(|kind| kind != "q4_0"), "{types:?}");
}

#[test]
fn adapters_go_to_gguf_and_back() {
    let fixture = trained();
    fixture.ok("convert --model model --format gguf --output m.gguf");
    let json = fixture.ok("convert --model model --adapter run --format gguf --output a.gguf --json").json();
    assert!(json["max_logit_difference"].as_f64().unwrap() < 1e-5, "{json}");
    let words = "--raw --temperature 0 --max-tokens 8 --prompt fn --json";
    let with = |model: &str, adapter: &str| {
        fixture.ok(&format!("generate --model {model} --adapter {adapter} {words}")).json()["tokens"].clone()
    };
    assert_eq!(with("m.gguf", "a.gguf"), with("model", "run"));
    fixture.ok("convert --model m.gguf --adapter a.gguf --format peft --output peft");
    assert_eq!(with("model", "peft"), with("model", "run"));
    let causes = [("model", "due to the order of additions"), ("q8.gguf", "rounds activations to 8 bits")];
    fixture.ok("quantize --model model --type q8_0 --output q8.gguf");
    for (model, cause) in causes {
        let ran = fixture.ok(&format!("fuse --model {model} --adapter run --output fused-{model}"));
        // this machine may have no products of 8-bit integers
        let is_f32 = Device::cpu_levels().unwrap().iter().all(|level| ["baseline", "neon"].contains(level));
        let cause = if is_f32 { causes[0].1 } else { cause };
        assert!(ran.stderr.contains(cause), "{}", ran.stderr);
    }
    let ran = fixture.run("generate --model a.gguf --prompt x");
    assert!(ran.stderr.contains("expected a model, found a file of type `adapter`"), "{}", ran.stderr);
}

#[test]
fn the_template_of_a_run_goes_into_the_file() {
    let fixture = Fixture::new();
    fixture.ok("convert --model model --format gguf --output m.gguf");
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}[assistant] ";
    std::fs::write(fixture.path("other.jinja"), template).unwrap();
    fixture.ok("train --model m.gguf --data data --steps 2 --chat-template other.jinja --output run --quiet");
    for model in ["m.gguf", "model"] {
        let words = format!("quantize --model {model} --adapter run --type q8_0 --min-survival 0 --output");
        fixture.ok(&format!("{words} {model}-tuned.gguf"));
        let file = GgufFile::open(fixture.path(&format!("{model}-tuned.gguf"))).unwrap();
        assert_eq!(file.text("tokenizer.chat_template").unwrap(), Some(template), "{model}");
    }
}
