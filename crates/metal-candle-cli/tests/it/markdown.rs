//! Fenced blocks, code spans, headings and links of the project's Markdown documents.

use std::path::{Path, PathBuf};

/// A fenced block.
pub struct Block {
    /// `file:line` of the fence.
    pub place: String,
    /// The first word of the info string.
    pub language: String,
    pub text: String,
    /// Whether the line before it is `<!-- run -->`, so that a test runs it.
    pub runs: bool,
}

/// A document without its fenced blocks, and these.
pub struct Document {
    pub path: PathBuf,
    /// The lines outside fences; lines inside are empty.
    pub lines: Vec<String>,
    pub blocks: Vec<Block>,
}

/// The folder of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The documents of the repository: those of the root, of the book and of some folders.
pub fn documents() -> Vec<Document> {
    let mut paths = Vec::new();
    for folder in ["", "docs", "assets/nano", "dev/nano", "fuzz"] {
        let entries = std::fs::read_dir(root().join(folder)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let extension = |name: &String| Path::new(name).extension().is_some_and(|extension| extension == "md");
        paths.extend(names.filter(extension).map(|name| Path::new(folder).join(name)));
    }
    paths.sort();
    assert!(paths.len() > 20, "{paths:?}");
    paths.into_iter().map(Document::read).collect()
}

impl Document {
    fn read(path: PathBuf) -> Self {
        let text = std::fs::read_to_string(root().join(&path)).unwrap();
        let (mut lines, mut blocks): (Vec<String>, Vec<Block>) = Default::default();
        let (mut is_inside, mut before) = (false, "");
        for (index, line) in text.lines().enumerate() {
            let info = line.trim_start().strip_prefix("```");
            match info {
                Some(info) if !is_inside => blocks.push(Block {
                    place: format!("{}:{}", path.display(), index + 1),
                    language: info.split([',', ' ']).next().unwrap().to_owned(),
                    text: String::new(),
                    runs: before.trim() == "<!-- run -->",
                }),
                None if is_inside => {
                    let block = blocks.last_mut().unwrap();
                    block.text.push_str(line);
                    block.text.push('\n');
                }
                _ => {}
            }
            is_inside ^= info.is_some();
            lines.push(if is_inside || info.is_some() { String::new() } else { line.to_owned() });
            before = line;
        }
        assert!(!is_inside, "{}: a block is not closed", path.display());
        Self { path, lines, blocks }
    }

    /// Whether it is a page of the book.
    pub fn is_page(&self) -> bool {
        self.path.starts_with("docs")
    }

    /// The code spans of a line, `` `such` ``.
    pub fn code_spans(line: &str) -> impl Iterator<Item = &str> {
        line.split('`').skip(1).step_by(2)
    }

    /// The targets of its links and images, with their lines.
    pub fn links(&self) -> Vec<(usize, String)> {
        let mut links = Vec::new();
        for (index, line) in self.lines.iter().enumerate() {
            let without_code: String = line.split('`').step_by(2).collect();
            for rest in without_code.split("](").skip(1) {
                links.push((index + 1, rest.split(')').next().unwrap().to_owned()));
            }
            for rest in without_code.split("src=\"").skip(1) {
                links.push((index + 1, rest.split('"').next().unwrap().to_owned()));
            }
        }
        links
    }

    /// The anchors of its headings, as GitHub and mdbook make them.
    pub fn anchors(&self) -> Vec<String> {
        let headings = self.lines.iter().filter(|line| line.starts_with('#'));
        let slug = |heading: &String| {
            let text = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        };
        headings.map(slug).collect()
    }
}
