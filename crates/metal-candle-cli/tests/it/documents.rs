//! README, the book and the other documents: marked blocks run, links lead somewhere, messages are those of the sources.
//! `src/document_tests.rs` parses the commands of all shell blocks.

use crate::fixture::Fixture;
use crate::markdown::{Document, documents, root};
use std::fmt::Write;
use std::path::Path;

/// The folder of the program as the first one of PATH.
fn path_with_program() -> std::ffi::OsString {
    let program = Path::new(env!("CARGO_BIN_EXE_metal-candle")).parent().unwrap().to_path_buf();
    let others = std::env::var_os("PATH").unwrap();
    std::env::join_paths(std::iter::once(program).chain(std::env::split_paths(&others))).unwrap()
}

#[cfg(unix)]
#[test]
fn blocks_that_are_marked_run() {
    let documents = documents();
    let mut count = 0;
    for document in &documents {
        let blocks: Vec<_> = document.blocks.iter().filter(|block| block.runs).collect();
        if blocks.is_empty() {
            continue;
        }
        // the blocks of a document share a folder, as for a reader who runs one after the other
        let fixture = Fixture::new();
        for block in blocks {
            assert_eq!(block.language, "sh", "{}", block.place);
            let mut command = fixture.command_named("bash");
            command.env("PATH", path_with_program()).args(["-euo", "pipefail", "-c", &block.text]);
            let output = command.output().unwrap();
            let printed = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}\n{}\n{printed}", block.place, block.text);
            count += 1;
        }
    }
    assert!(count >= 10, "only {count} blocks are run");
}

#[test]
fn links_lead_somewhere() {
    let documents = documents();
    let mut problems = String::new();
    let page = |path: &Path| documents.iter().find(|document| same(&root().join(&document.path), path));
    for document in &documents {
        for (line, target) in document.links() {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let path = if file.is_empty() {
                root().join(&document.path)
            } else {
                root().join(&document.path).parent().unwrap().join(file)
            };
            let place = format!("{}:{line}: `{target}`", document.path.display());
            if !path.exists() {
                writeln!(problems, "{place}: there is no such file").unwrap();
            } else if document.is_page() && !path.canonicalize().unwrap().starts_with(book()) {
                writeln!(problems, "{place}: outside the book").unwrap();
            } else if !anchor.is_empty()
                && !page(&path).is_some_and(|page| page.anchors().iter().any(|name| name == anchor))
            {
                writeln!(problems, "{place}: there is no such heading").unwrap();
            }
        }
    }
    assert!(problems.is_empty(), "\n{problems}");
}

fn book() -> std::path::PathBuf {
    root().join("docs").canonicalize().unwrap()
}

fn same(left: &Path, right: &Path) -> bool {
    left.canonicalize().is_ok_and(|left| right.canonicalize().is_ok_and(|right| left == right))
}

#[test]
fn the_summary_lists_every_page() {
    let documents = documents();
    let summary = documents.iter().find(|document| document.path.ends_with("SUMMARY.md")).unwrap();
    let listed: Vec<String> = summary.links().into_iter().map(|link| link.1).collect();
    for page in documents.iter().filter(|document| document.is_page()) {
        let name = page.path.file_name().unwrap().to_string_lossy();
        assert!(name == "SUMMARY.md" || listed.iter().any(|link| *link == name), "SUMMARY.md does not list `{name}`");
    }
}

#[test]
fn every_rust_block_is_compiled() {
    let library = std::fs::read_to_string(root().join("crates/metal-candle/src/lib.rs")).unwrap();
    for document in documents() {
        let has_rust = document.blocks.iter().any(|block| block.language == "rust");
        let path = document.path.display();
        assert!(
            !has_rust || library.contains(&format!("include_str!(\"../../../{path}\")")),
            "{path} has Rust blocks, but lib.rs does not include it for rustdoc"
        );
        // rustdoc takes a block without a language as Rust, and readers get no colours
        for block in &document.blocks {
            assert!(!block.language.is_empty(), "{}: name the language of this block", block.place);
        }
    }
}

#[test]
fn json_and_toml_blocks_parse() {
    let mut count = 0;
    for document in documents() {
        for block in &document.blocks {
            let error = match block.language.as_str() {
                "json" => serde_json::from_str::<serde_json::Value>(&block.text).err().map(|error| error.to_string()),
                "toml" => toml::from_str::<toml::Table>(&block.text).err().map(|error| error.to_string()),
                _ => continue,
            };
            assert_eq!(error, None, "{}", block.place);
            count += 1;
        }
    }
    assert!(count >= 4, "{count}");
}

#[test]
fn examples_that_documents_name_exist() {
    for document in documents() {
        let text = document.lines.iter().chain(document.blocks.iter().map(|block| &block.text));
        for line in text {
            for rest in line.split("--example ").skip(1) {
                let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let path = |package: &str| root().join(format!("crates/{package}/examples/{name}.rs"));
                let exists = path("metal-candle").exists() || path("metal-candle-server").exists();
                assert!(exists, "{}: there is no example `{name}`", document.path.display());
            }
        }
    }
}

#[test]
fn messages_in_the_book_are_those_of_the_sources() {
    let sources = sources();
    let documents = documents();
    let page = documents.iter().find(|document| document.path.ends_with("troubleshooting.md")).unwrap();
    let rows = page.lines.iter().filter(|line| line.starts_with("| `"));
    let mut count = 0;
    for row in rows {
        let message = Document::code_spans(row).next().unwrap();
        for fragment in message.split("...").map(str::trim).filter(|fragment| fragment.len() > 3) {
            assert!(sources.contains(fragment), "no source has the message `{fragment}` of `{message}`");
            count += 1;
        }
    }
    assert!(count > 30, "{count}");
}

/// All sources of the crates, with string literals that go over several lines joined, and without backticks.
fn sources() -> String {
    fn read(folder: &Path, text: &mut String) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = std::fs::read_to_string(&path).unwrap();
                let mut parts = source.split("\\\n");
                text.push_str(parts.next().unwrap());
                parts.for_each(|part| text.push_str(part.trim_start()));
            }
        }
    }
    let mut text = String::new();
    for name in ["metal-candle", "metal-candle-cli", "metal-candle-server"] {
        read(&root().join("crates").join(name).join("src"), &mut text);
    }
    text.replace('`', "")
}
