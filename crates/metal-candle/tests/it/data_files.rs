//! Files and folders of rows: what is wrong with them, how they are split, and what a report says.

use crate::data_tokenizer::TOKENIZER;
use metal_candle::data::{DataReport, Dataset, DatasetOptions, Datasets, Lengths, RoleTokens, Schema, SplitOptions};
use metal_candle::{DataProblem, Error};
use std::fmt::Write;
use std::path::{Path, PathBuf};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

fn problems(path: &Path) -> Vec<(usize, String)> {
    problems_with(path, &DatasetOptions::default())
}

fn problems_with(path: &Path, options: &DatasetOptions) -> Vec<(usize, String)> {
    match Datasets::load(path, &TOKENIZER, options, &SplitOptions::default()) {
        Err(Error::Data { problems }) => {
            problems.into_iter().map(|DataProblem { line, message, .. }| (line, message)).collect()
        }
        other => panic!("expected problems, found {other:?}"),
    }
}

fn texts(count: usize) -> String {
    (0..count).fold(String::new(), |mut lines, number| {
        writeln!(lines, r#"{{"text": "row {number}"}}"#).unwrap();
        lines
    })
}

#[test]
fn all_problems_come_at_once_with_their_lines() {
    let folder = Folder::new();
    let rows: [(&[u8], &str); 17] = [
        (br#"{"text": "fine"}"#, ""),
        (br#"{"text": "open"#, "not valid JSON: EOF while parsing a string (column 14)"),
        (
            br#"{"txt": "a", "b": 1}"#,
            "expected the keys `messages`, `prompt` and `completion`, `text`, `instruction` and `output`, or `conversations`; found `txt`, `b`",
        ),
        (b"[1]", "expected an object, found a list"),
        (br#"{"text": 5}"#, "`text` must be a string, found a number"),
        (
            br#"{"prompt": "a", "completion": null}"#,
            "expected the keys `messages`, `prompt` and `completion`, `text`, `instruction` and `output`, or `conversations`; found `prompt`",
        ),
        (br#"{"messages": "hi"}"#, "`messages` must be a list of messages, found a string"),
        (br#"{"messages": []}"#, "`messages` is an empty list"),
        (
            br#"{"messages": [{"role": "user", "content": 3}]}"#,
            "`messages` entry 1: `content` must be a string, null or a list of parts, found a number",
        ),
        (
            br#"{"messages": [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]}"#,
            "`messages` entry 2: expected the role `system`, `developer`, `user`, `assistant` or `tool`, or its name in sharegpt, found `narrator`",
        ),
        (br#"{"messages": [{"role": "user", "content": "a"}]}"#, "no assistant message is trained"),
        (
            br#"{"messages": [{"role": "user", "content": "a", "train": true}]}"#,
            "message 1: only assistant messages can be trained, found `user`",
        ),
        (
            br#"{"messages": [{"role": "assistant", "content": "a", "train": "yes"}]}"#,
            "`messages` entry 1: `train` must be true or false, found a string",
        ),
        (br#"{"instruction": "a", "output": "b", "history": [["a"]]}"#, "`history` must be a list of pairs of strings"),
        (
            br#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
            "`messages` entry 1: a content part of type `image_url` is not supported, only `text` is",
        ),
        (b"{\"text\": \"\xff\"}", "not UTF-8 from byte 11 of the row on"),
        (br#"{"text": ""}"#, "no token is trained"),
    ];
    let bytes: Vec<u8> = rows.iter().flat_map(|(row, _)| [*row, b"\n"].concat()).collect();
    let path = folder.write("data.jsonl", bytes);
    let wanted: Vec<(usize, String)> =
        (1..).zip(rows).filter(|(_, (_, m))| !m.is_empty()).map(|(line, (_, m))| (line, m.to_string())).collect();
    let found = problems(&path);
    for (found, wanted) in found.iter().zip(&wanted) {
        assert_eq!(found, wanted);
    }
    assert_eq!(found.len(), wanted.len());
    let error = Dataset::from_file(&path, &TOKENIZER, &DatasetOptions::default()).unwrap_err().to_string();
    assert!(error.contains(&format!("{}:2: not valid JSON", path.display())), "{error}");
}

#[test]
fn files_without_rows_are_problems() {
    let folder = Folder::new();
    assert_eq!(problems(&folder.write("a.jsonl", "")), [(0, "the file is empty".into())]);
    assert_eq!(problems(&folder.write("b.jsonl", "\n \n")), [(0, "the file has no rows".into())]);
    assert_eq!(problems(&folder.write("c.json", "[]")), [(0, "the file has no rows".into())]);
    let utf16 = [b"\xff\xfe".as_slice(), b"{\0}\0"].concat();
    assert_eq!(
        problems(&folder.write("d.jsonl", utf16)),
        [(
            0,
            "expected JSON lines in UTF-8, found UTF-16; convert it with `iconv -f UTF-16 -t UTF-8 FILE > NEW.jsonl`"
                .into()
        )]
    );
    let missing = folder.path().join("nothing.jsonl");
    let result = Datasets::load(&missing, &TOKENIZER, &DatasetOptions::default(), &SplitOptions::default());
    assert!(matches!(result, Err(Error::Read { path, .. }) if path == missing));
}

#[test]
fn a_flood_of_problems_is_counted() {
    let folder = Folder::new();
    let found = problems(&folder.write("a.jsonl", "{}\n".repeat(5000)));
    assert_eq!(found.len(), 1001);
    assert_eq!(found[1000], (0, "4000 more rows cannot be used".into()));
}

#[test]
fn oddities_are_noted_and_do_no_harm() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", "\u{feff}{\"text\": \"a b\"}\r\n\n{\"text\": \"c d\"}\r\n \n");
    let options = DatasetOptions { max_tokens: Some(3), truncate: true, ..DatasetOptions::default() };
    let none = SplitOptions { valid_fraction: 0.0, seed: 0 };
    let datasets = Datasets::load(&path, &TOKENIZER, &options, &none).unwrap();
    assert_eq!((datasets.train.len(), datasets.valid), (2, None));
    let lines: Vec<usize> = datasets.train.samples.iter().map(|s| s.source.as_ref().unwrap().line).collect();
    assert_eq!(lines, [1, 3]);
    let notes: Vec<(usize, &str)> = datasets.notes.iter().map(|n| (n.line, n.message.as_str())).collect();
    let wanted = [
        (1, "the file starts with a byte order mark, which is skipped"),
        (1, "lines end with CR LF from here on"),
        (2, "the first of 2 empty lines, skipped"),
        (1, "the first of 2 rows that are truncated to 3 tokens"),
    ];
    assert_eq!(notes, wanted);
}

#[test]
fn a_json_list_reads_as_lines_do() {
    let folder = Folder::new();
    let lines = folder.write("a.jsonl", texts(3));
    let list = folder.write("a.json", format!("[\n{}\n]", texts(3).trim().replace('\n', ",\n")));
    let read = |path: &Path| Dataset::from_file(path, &TOKENIZER, &DatasetOptions::default()).unwrap().samples;
    let (lines, list) = (read(&lines), read(&list));
    assert_eq!(lines.len(), 3);
    for (a, b) in lines.iter().zip(&list) {
        assert_eq!((&a.ids, &a.trained), (&b.ids, &b.trained));
        assert_eq!(a.source.as_ref().unwrap().line + 1, b.source.as_ref().unwrap().line);
    }
}

#[test]
fn a_folder_has_its_files() {
    let folder = Folder::new();
    let load = || {
        Datasets::load(
            folder.path(),
            &TOKENIZER,
            &DatasetOptions::default(),
            &SplitOptions { valid_fraction: 0.25, seed: 1 },
        )
    };
    let error = load().unwrap_err().to_string();
    assert!(error.contains("expected `train.jsonl` or `train.json`, found neither"), "{error}");
    folder.write("train.jsonl", texts(8));
    let datasets = load().unwrap();
    assert_eq!((datasets.train.len(), datasets.valid.unwrap().len(), datasets.test), (6, 2, None));
    folder.write("validation.json", "[{\"text\": \"v\"}]");
    folder.write("test.jsonl", texts(2));
    let datasets = load().unwrap();
    assert_eq!((datasets.train.len(), datasets.valid.unwrap().len(), datasets.test.unwrap().len()), (8, 1, 2));
    folder.write("val.jsonl", texts(1));
    assert!(load().unwrap_err().to_string().contains("found both"));
    // a folder in the place of a file is no absent file
    std::fs::remove_file(folder.path().join("val.jsonl")).unwrap();
    std::fs::remove_file(folder.path().join("test.jsonl")).unwrap();
    std::fs::create_dir(folder.path().join("test.jsonl")).unwrap();
    assert!(load().unwrap_err().to_string().contains("test.jsonl"));
}

#[test]
fn integers_beyond_64_bits_are_problems() {
    let folder = Folder::new();
    let row = |number: &str| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"a\", \"id\": {number}}}, {{\"role\": \"assistant\", \"content\": \"b\"}}]}}\n"
        )
    };
    let path = folder.write("data.jsonl", row("18446744073709551615") + &row("18446744073709551616"));
    let message = "the integer `18446744073709551616` does not fit into 64 bits: write it as a string";
    assert_eq!(problems(&path), [(2, message.to_string())]);
}

#[test]
fn problems_of_all_files_are_in_one_error() {
    let folder = Folder::new();
    folder.write("train.jsonl", "{\n");
    folder.write("valid.jsonl", "{}\n");
    folder.write("test.jsonl", "");
    assert_eq!(problems(folder.path()).len(), 3);
}

#[test]
fn a_seed_splits_the_same_way_each_time() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", texts(100));
    let dataset = Dataset::from_file(&path, &TOKENIZER, &DatasetOptions::default()).unwrap();
    let split = |valid_fraction, seed| dataset.clone().split(&SplitOptions { valid_fraction, seed });
    let lines = |dataset: &Dataset| -> Vec<usize> {
        dataset.samples.iter().map(|sample| sample.source.as_ref().unwrap().line).collect()
    };
    let (train, valid) = split(0.1, 7);
    assert_eq!((train.len(), valid.len()), (90, 10));
    assert_eq!(split(0.1, 7), (train.clone(), valid.clone()));
    assert_ne!(lines(&split(0.1, 8).1), lines(&valid));
    let mut together = [lines(&train), lines(&valid)].concat();
    assert!(lines(&train).is_sorted() && lines(&valid).is_sorted());
    together.sort_unstable();
    assert_eq!(together, (1..=100).collect::<Vec<_>>());
    assert_eq!(split(0.0, 7).1.len(), 0);
    assert_eq!(split(0.001, 7).1.len(), 1);
    let wrong = SplitOptions { valid_fraction: 1.0, seed: 0 };
    let result = Datasets::load(&path, &TOKENIZER, &DatasetOptions::default(), &wrong);
    assert!(matches!(result, Err(Error::Argument { name, .. }) if name == "valid_fraction"));
}

#[test]
fn many_rows_keep_their_order() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", texts(1000));
    let dataset = Dataset::from_file(&path, &TOKENIZER, &DatasetOptions::default()).unwrap();
    for (number, sample) in dataset.samples.iter().enumerate() {
        assert_eq!(TOKENIZER.decode(&sample.ids, true).unwrap(), format!("row {number}"));
    }
    assert_eq!(dataset.len(), 1000);
}

#[test]
fn a_report_counts_what_is_there() {
    let folder = Folder::new();
    let chat = r#"{"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}"#;
    folder.write("train.jsonl", format!("{chat}\n{{\"text\": \"a b\"}}\n{chat}\n{{\"text\": \"a  b \"}}\nbroken\n"));
    folder.write("valid.jsonl", "{\"text\": \"new\"}\n{\"text\": \" a b\"}\n");
    let chatml = crate::data_chat::template("chatml");
    let tokenizer = TOKENIZER.clone().with_chat_template(Some(chatml));
    let report = DataReport::of(folder.path(), &tokenizer, &DatasetOptions::default()).unwrap();
    let train = &report.files[0];
    assert_eq!(report.files.len(), 2);
    assert_eq!(train.rows, 4);
    assert_eq!(train.schemas.clone().into_iter().collect::<Vec<_>>(), [(Schema::Chat, 2), (Schema::Text, 2)]);
    assert_eq!(train.roles["assistant"].trained, 4);
    assert_eq!(train.roles["user"].trained, 0);
    let text_tokens = tokenizer.encode("a b", true).unwrap().len() + tokenizer.encode("a  b ", true).unwrap().len() + 2;
    assert_eq!(train.roles["text"], RoleTokens { tokens: text_tokens, trained: text_tokens });
    assert_eq!(train.tokens, train.roles.values().map(|role| role.tokens).sum::<usize>());
    // the first token of a text has none before it
    assert_eq!(train.trained_tokens, 4 + text_tokens - 2);
    let lines = |d: &metal_candle::data::Duplicates| -> Vec<(usize, usize)> {
        d.listed.iter().map(|d| (d.line, d.first_line)).collect()
    };
    assert_eq!(lines(&train.exact_duplicates), [(3, 1)]);
    assert_eq!(lines(&train.near_duplicates), [(3, 1), (4, 2)]);
    assert_eq!(lines(&report.leakage), [(2, 2)]);
    assert_eq!(report.problems.len(), 1);
    assert_eq!(report.problems[0].line, 5);
    assert_eq!(serde_json::to_value(&report).unwrap()["files"][0]["schemas"]["chat"], 2);
}

#[test]
fn lengths_are_summed_up() {
    let lengths = Lengths::of((1..=100).collect());
    assert_eq!((lengths.min, lengths.max), (1, 100));
    assert_eq!(lengths.percentiles, [(50, 50), (90, 90), (95, 95), (99, 99)]);
    assert!((lengths.mean - 50.5).abs() < 1e-9);
    assert_eq!(lengths.histogram.iter().map(|bar| bar.rows).sum::<usize>(), 100);
    assert_eq!((lengths.histogram[1].from, lengths.histogram[1].to, lengths.histogram[1].rows), (10, 19, 10));
    assert_eq!(Lengths::of(vec![7]).histogram.len(), 1);
    assert_eq!(Lengths::of(vec![]), Lengths::default());
    let wide = Lengths::of(vec![1, usize::MAX]);
    assert_eq!(wide.histogram.iter().map(|bar| bar.rows).sum::<usize>(), 2);
    assert!(wide.histogram.len() <= 20);
}

#[test]
fn a_token_without_an_embedding_is_named_with_its_line() {
    let folder = Folder::new();
    let path = folder.write("train.jsonl", "{\"text\": \"fn\"}\n{\"text\": \"fn struct\"}\n");
    let rows = Dataset::from_file(&path, &TOKENIZER, &DatasetOptions::default()).unwrap();
    let largest = rows.samples[1].ids.iter().copied().max().unwrap();
    let with = |vocab_size: u32| DatasetOptions { vocab_size: Some(vocab_size as usize), ..DatasetOptions::default() };
    assert_eq!(Dataset::from_file(&path, &TOKENIZER, &with(largest + 1)).unwrap().len(), 2);
    let found = problems_with(&path, &with(largest));
    let (line, message) = found.last().unwrap();
    assert!(*line == 2 && message.contains(&format!("id {largest}, outside")), "{found:?}");
}
