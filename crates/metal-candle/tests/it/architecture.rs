//! Rules of the code that a machine can check: modules use only those before them, no two files use each other, and files
//! stay short.

use crate::imports::Imports;
use std::path::{Path, PathBuf};

/// The modules of the library, each of which uses only those before it (or itself).
const ORDER: [&str; 10] =
    ["error", "files", "device", "profile", "ops", "models", "adapters", "data", "inference", "training"];

/// Maximum number of lines in a source file.
const MAX_LINES: usize = 600;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn sources(folder: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    rust_files(&workspace().join(folder), &mut files);
    assert!(!files.is_empty(), "no Rust file below {folder}");
    files.sort();
    files
}

/// The modules that `crate::NAME` or `crate::{NAME, ..}` names in a line.
fn named_modules(line: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        let rest = &line[at + "crate::".len()..];
        let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        match rest.strip_prefix('{') {
            Some(group) => names.extend(group.split(',').map(|part| word(part.trim()))),
            None => names.push(word(rest)),
        }
    }
    names
}

#[test]
fn no_module_uses_one_behind_it() {
    let place = |name: &str| ORDER.iter().position(|module| *module == name);
    let mut upward = Vec::new();
    let mut seen = 0;
    for path in sources("crates/metal-candle/src") {
        let inside = path.strip_prefix(workspace().join("crates/metal-candle/src")).unwrap().to_path_buf();
        let first = inside.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_string();
        let Some(own) = place(&first) else { continue };
        for (number, line) in std::fs::read_to_string(&path).unwrap().lines().enumerate() {
            if line.trim_start().starts_with("//") {
                continue;
            }
            for used in named_modules(line) {
                let Some(used_place) = place(&used) else { continue };
                seen += 1;
                let is_sibling = (first.as_str(), used.as_str()) == ("training", "inference");
                if used_place > own || is_sibling {
                    upward.push(format!("{}:{}: {first} uses {used}", inside.display(), number + 1));
                }
            }
        }
    }
    assert!(seen > 100, "only {seen} uses were found: the test does not see them");
    assert!(upward.is_empty(), "{}", upward.join("\n"));
}

/// The root file of each crate of the workspace.
const ROOTS: [&str; 4] = [
    "crates/metal-candle-kernels/src/lib.rs",
    "crates/metal-candle/src/lib.rs",
    "crates/metal-candle-server/src/lib.rs",
    "crates/metal-candle-cli/src/main.rs",
];

#[test]
fn no_files_use_each_other() {
    let root = workspace();
    let mut circles = Vec::new();
    for path in ROOTS {
        let imports = Imports::read(&root.join(path));
        let num_files = imports.files().len();
        let folder = Path::new(path).parent().unwrap().to_string_lossy().into_owned();
        assert_eq!(num_files, sources(&folder).len(), "{path}: files of no module, or modules of no file");
        assert!(imports.num_edges() > num_files, "{path}: the test does not see the imports");
        circles.extend(imports.circles().into_iter().map(|files| imports.describe(&files, &root)));
    }
    assert!(circles.is_empty(), "files that use each other:\n{}", circles.join("\n\n"));
}

#[test]
fn circles_are_found_through_reexports_macros_and_attributes() {
    let found = |upper: &str| {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        std::fs::create_dir(folder.path().join("inner")).unwrap();
        write("lib.rs", "mod inner;\nmod upper;\npub use inner::*;\n");
        write("inner/mod.rs", "mod lower;\npub use lower::Lower as Low;\n");
        write("inner/lower.rs", "use crate::upper;\npub struct Lower;\nfn f() { upper::helper(); }\n");
        write("upper.rs", &format!("pub fn helper() {{}}\n{upper}\n"));
        let imports = Imports::read(&folder.path().join("lib.rs"));
        let circles = imports.circles();
        circles.iter().map(|files| imports.describe(files, folder.path())).collect::<Vec<_>>()
    };
    let expected = ["  inner/lower.rs -> upper.rs: helper\n  upper.rs -> inner/lower.rs: Low"];
    for upper in [
        "use crate::inner::Low;",
        "use super::Low as Other;",
        "use crate::inner::*; fn g(low: Low) {}",
        "fn g() { crate::inner::Low::new(); }",
        "fn g() { println!(\"{}\", crate::inner::Low::NAME); }",
        "struct S { #[arg(default = crate::Low::NAME)] s: u8 }",
    ] {
        assert_eq!(found(upper), expected, "{upper}");
    }
    for upper in ["", "use crate::inner;", "#[cfg(test)] mod tests { use crate::inner::Low; }", "// crate::inner::Low"]
    {
        assert_eq!(found(upper), [""; 0], "{upper}");
    }
}

#[test]
fn files_are_short() {
    let long: Vec<String> = sources("crates")
        .into_iter()
        .filter_map(|path| {
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            (lines > MAX_LINES).then(|| format!("{}: {lines} lines", path.display()))
        })
        .collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines:\n{}", long.join("\n"));
}

#[test]
fn unsafe_code_is_in_the_kernels_only() {
    let is_unsafe =
        |line: &str| line.contains("unsafe {") || line.contains("unsafe fn") || line.contains("unsafe impl");
    for crate_name in ["metal-candle", "metal-candle-cli"] {
        for path in sources(&format!("crates/{crate_name}/src")) {
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(!text.lines().any(is_unsafe), "{}", path.display());
        }
    }
}
