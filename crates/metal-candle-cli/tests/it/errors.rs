//! Wrong input: the exit code, and what is said.

use crate::fixture::Fixture;

#[test]
fn wrong_input_is_code_1_and_named() {
    let fixture = Fixture::new();
    std::fs::write(fixture.path("empty.jsonl"), "").unwrap();
    std::fs::write(fixture.path("unknown.toml"), "rnak = 3\n").unwrap();
    std::fs::write(fixture.path("broken.toml"), "rank = = 3\n").unwrap();
    std::fs::create_dir(fixture.path("nothing")).unwrap();
    for (words, said) in [
        ("train --steps 1 --epochs 1", "cannot be used with"),
        ("train --model model", "`--data` is missing"),
        ("train --model model --data missing.jsonl", "missing.jsonl"),
        ("train --model model --data empty.jsonl", "the file is empty"),
        ("train --model model --data nothing", "train.jsonl"),
        ("train --model model --data data --config unknown.toml", "rnak"),
        ("train --model model --data data --config broken.toml", "broken.toml"),
        ("train --model model --data data --from-scratch", "`--full`"),
        ("train --model model --data data --full --rank 4", "`--rank`"),
        ("train --model model --data data --rank 0", "rank"),
        ("train --model model --data data --target-modules x_proj", "x_proj"),
        ("train --model model --data data --layers 2", "`--layers`"),
        ("train --model model --data data --steps 0", "`--steps`"),
        ("train --model model --data data --batch-tokens 0", "`--batch-tokens`"),
        ("train --model model --data data --schedule constant --warmup-steps 3", "`--warmup-steps`"),
        ("train --model model --data data --momentum 0.9", "`--momentum` has no meaning with `--optimizer adamw`"),
        (
            "train --model model --data data --optimizer sgd --beta1 0.9",
            "`--beta1` has no meaning with `--optimizer sgd`",
        ),
        ("train --model model --data data --optimizer sgd --momentum 0 --nesterov", "momentum"),
        ("train --model model --data data --power 2", "`--power` has no meaning with `--schedule warmup-cosine`"),
        ("train --model model --data data --schedule wsd --steps 10 --decay-steps 11", "the decay of 11 steps"),
        ("train --model model --data data --lora-plus-ratio 0", "lora_plus_ratio"),
        ("train --model model --data data --full --lora-plus-ratio 4", "`--lora-plus-ratio`"),
        ("train --model model --data data --output data", "`data` is not empty"),
        ("train --model model --data data --adapter missing", "`missing`"),
        ("train --resume missing", "`missing` is not a run folder"),
        ("train --model model --data data --output empty.jsonl", "`empty.jsonl` is a file"),
        ("train --model model --data data --output empty.jsonl/x/y", "`empty.jsonl` is a file"),
        ("train --model model --data data --alpha 0", "`--alpha`"),
        ("train --model model --data data --alpha -2", "`--alpha`"),
        ("train --model model --data data --dropout -0.1", "dropout"),
        ("train --model model --data data --beta2 1.5", "beta2"),
        ("train --model model --data data --learning-rate -1e-3", "`--learning-rate`: expected"),
        ("train --model model --data data --learning-rate --steps 4", "a value is required"),
        ("train --model model --data data --seed -1", "from 0 to 9223372036854775807"),
        ("train --model model --data data --epochs -1", "from 0 to"),
        ("train --model model --data data --steps 9223372036854775808", "`--steps`: expected a whole number"),
        ("train --model model --data data --num-devices 9223372036854775808", "`--num-devices`: expected 1 to 64"),
        (
            "train --model model --data data --gradient-accumulation-steps 9223372036854775807",
            "expected 1 to 1073741824",
        ),
        ("train --model model --data data --batch-tokens 18446744073709551615", "`--batch-tokens`: expected"),
        ("plan --model model --data data --rank 9223372036854775808", "`--rank`: expected"),
        ("train --model model --data data --max-tokens-per-sample 513", "at most 512"),
        ("eval --model model --data data --max-tokens-per-sample 513", "at most 512"),
        ("data check data --model model --max-tokens-per-sample 513", "at most 512"),
        ("generate --model model --prompt x --top-k -1", "from 0 to"),
        ("generate --model ./nowhere --prompt x", "no such file or folder"),
        ("generate --model data/nowhere --prompt x", "no such file or folder"),
        ("generate --model a/b/c --prompt x", "no such file or folder"),
        ("logits --model model --ids 1 --out model/model.safetensors", "belongs to the model"),
        ("logits --model model --ids 1 --out model/config.json", "belongs to the model"),
        ("generate --model model", "--prompt"),
        ("generate --model nowhere --prompt x", "no model `nowhere`"),
        ("generate --model nothing --prompt x", "nothing"),
        ("generate --model model --prompt x --temperature -1", "temperature"),
        ("generate --model model --prompt x --max-tokens 0", "max_tokens"),
        ("generate --model model --prompt x --raw --system y", "--system"),
        ("generate --model model --prompt x --adapter nothing", "nothing"),
        (
            "generate --model model --prompt x --adapter gone",
            "no adapter `gone`: no such file or folder\nhint: --adapter",
        ),
        ("logits --model model --ids 1,x --out o", "invalid value"),
        ("logits --model model --ids 1 --out missing/folder/o", "missing/folder"),
        ("eval --model model", "`--data` is missing"),
        ("fuse --model model --adapter missing --output o", "`missing`"),
        ("data check missing.jsonl --model model", "missing.jsonl"),
        ("sing", "unrecognized subcommand"),
    ] {
        let ran = fixture.run(words);
        assert_eq!(ran.code, 1, "{words}\n{}", ran.stderr);
        assert!(ran.stderr.starts_with("error: "), "{words}\n{}", ran.stderr);
        assert!(ran.stderr.contains(said), "{words}: `{said}` is not in\n{}", ran.stderr);
        assert!(ran.stderr.matches("(os error").count() < 2, "{words}\n{}", ran.stderr);
        assert!(ran.stdout.is_empty(), "{words}\n{}", ran.stdout);
        assert!(!fixture.path("runs").exists(), "{words} began a run");
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_is_read_once_or_refused() {
    let fixture = Fixture::new();
    let rows = std::fs::read_to_string(fixture.path("data/train.jsonl")).unwrap();
    let from_file = fixture.ok("data check data/train.jsonl --model model --rows 1 --json");
    let words = "data check /dev/stdin --model model --rows 1 --json";
    let ran = fixture.run_with(&words.split_whitespace().collect::<Vec<_>>(), &rows);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let rows_of = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap()["rows"].clone();
    assert_eq!(rows_of(&ran.stdout), rows_of(&from_file.stdout));
    assert!(ran.stdout.contains("\"path\":\"/dev/stdin\""), "{}", ran.stdout);
    let words = "train --model model --data /dev/stdin --steps 1";
    let ran = fixture.run_with(&words.split_whitespace().collect::<Vec<_>>(), &rows);
    assert!(ran.code == 1 && ran.stderr.contains("found a pipe or device"), "{}", ran.stderr);
    assert!(!fixture.path("runs").exists());
}

#[test]
fn a_device_that_is_not_there_is_code_2() {
    let fixture = Fixture::new();
    for device in ["metal", "cuda"] {
        if cfg!(feature = "metal") || cfg!(feature = "cuda") {
            return;
        }
        let ran = fixture.run(&format!("info --model model --device {device}"));
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        assert!(
            ran.stderr.contains(&format!("feature `{device}`")) && ran.stderr.contains("\nhint: "),
            "{}",
            ran.stderr
        );
    }
}

#[test]
fn damaged_weights_are_code_1() {
    let fixture = Fixture::new();
    let path = fixture.path("model/model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for damaged in [&bytes[..bytes.len() / 2], &bytes[..4], &[]] {
        std::fs::write(&path, damaged).unwrap();
        let ran = fixture.run("generate --model model --prompt x");
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        assert!(ran.stderr.contains("model.safetensors"), "{}", ran.stderr);
        let ran = fixture.run("info --model model");
        assert_eq!(ran.code, 1, "{}", ran.stdout);
        assert!(ran.stderr.contains("model.safetensors"), "{}", ran.stderr);
    }
    std::fs::remove_file(&path).unwrap();
    assert!(fixture.ok("info --model model").stdout.contains("weights missing"));
    assert_eq!(fixture.ok("info --model model --json").json()["model"]["weights_are_complete"], false);
}
