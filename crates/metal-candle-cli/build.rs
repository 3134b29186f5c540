//! Passes version, commit and features to the program: `METAL_CANDLE_VERSION`, `METAL_CANDLE_COMMIT`, `METAL_CANDLE_FEATURES`.

use std::path::Path;
use std::process::Command;

const FEATURES: [&str; 5] = ["cuda", "hub", "metal", "nccl", "serve"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let commit = commit().unwrap_or_default();
    let is_enabled = |name: &&str| std::env::var_os(format!("CARGO_FEATURE_{}", name.to_uppercase())).is_some();
    let features: Vec<&str> = FEATURES.into_iter().filter(is_enabled).collect();
    let features = features.join(", ");
    let described = if features.is_empty() { "no features".to_owned() } else { format!("features {features}") };
    let described = if commit.is_empty() { described } else { format!("commit {commit}, {described}") };
    println!("cargo:rustc-env=METAL_CANDLE_COMMIT={commit}");
    println!("cargo:rustc-env=METAL_CANDLE_FEATURES={features}");
    println!("cargo:rustc-env=METAL_CANDLE_VERSION={} ({described})", env!("CARGO_PKG_VERSION"));
}

/// The commit of the checkout, in release builds. Other builds leave it out, so that a commit does not build them again.
fn commit() -> Option<String> {
    let is_checkout = Path::new("../../.git").exists() && !Path::new(".cargo_vcs_info.json").exists();
    if std::env::var("PROFILE").as_deref() != Ok("release") || !is_checkout {
        return None;
    }
    // the log of HEAD changes with each commit and checkout
    for name in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", name])?;
        if Path::new(&path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned()).filter(|text| !text.is_empty())
}
