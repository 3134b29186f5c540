//! A published crate holds every file that it includes; `--version` describes the build.

use crate::fixture::Fixture;
use crate::markdown::root;
use std::path::Path;

#[test]
fn files_that_a_crate_includes_are_in_its_folder() {
    let mut count = 0;
    for package in std::fs::read_dir(root().join("crates")).unwrap() {
        let package = package.unwrap().path().canonicalize().unwrap();
        visit(&package.join("src"), &mut |path, text| {
            // rustdoc's tests run in a checkout only
            for line in text.lines().filter(|line| !line.trim_start().starts_with("#[doc")) {
                for start in ["include_str!(\"", "include_bytes!(\"", "include_bytes!(concat!(\""] {
                    let Some((_, rest)) = line.split_once(start) else { continue };
                    let included = path.parent().unwrap().join(rest.split('"').next().unwrap());
                    let included = included.canonicalize().unwrap_or_else(|e| panic!("{}: {e}", included.display()));
                    assert!(
                        included.starts_with(&package),
                        "{} includes {} of another folder",
                        path.display(),
                        included.display()
                    );
                    count += 1;
                }
            }
        });
    }
    assert!(count > 10, "{count}");
}

fn visit(folder: &Path, look: &mut impl FnMut(&Path, &str)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            visit(&path, look);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            look(&path, &std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn the_version_names_the_features() {
    let fixture = Fixture::new();
    let printed = fixture.ok("--version").stdout;
    let start = format!("metal-candle {} (", env!("CARGO_PKG_VERSION"));
    assert!(printed.starts_with(&start) && printed.trim_end().ends_with(')'), "{printed}");
    let info = fixture.ok("info --json").json();
    let features = info["features"].as_array().unwrap();
    assert_eq!(features.iter().any(|name| name == "hub"), cfg!(feature = "hub"), "{info}");
    for name in features {
        assert!(printed.contains(name.as_str().unwrap()), "{printed}");
    }
}

#[test]
fn completions_and_the_man_page_know_all_commands() {
    let fixture = Fixture::new();
    for kind in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = fixture.ok(&format!("completions {kind}")).stdout;
        assert!(script.contains("quantize") && script.contains("stochastic-rounding"), "{kind}");
    }
    let page = fixture.ok("completions man").stdout;
    // roff writes a hyphen as `\-`
    let plain = page.replace("\\-", "-");
    assert!(plain.contains(".TH metal-candle 1"), "{}", &page[..400]);
    for part in ["METAL-CANDLE TRAIN", "METAL-CANDLE RUNS COMPARE", "--stochastic-rounding", "--api-key-file"] {
        assert!(plain.contains(part), "{part}");
    }
}
