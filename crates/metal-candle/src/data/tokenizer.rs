//! [`Tokenizer`] converts text to token ids and back.

use super::chat::ChatTemplate;
use super::side_files::{MAX_TOKENIZER_BYTES, read_json_if_exists, special_token, token_text};
use super::tokenizer_files;
use super::tokenizer_limits::Growth;
use crate::error::{Error, Result};
use crate::files::{create_folder, guard, read_bounded, read_if_exists, write_atomically};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tokenizer from `tokenizer.json`, with the settings of the model folder. Cloning is cheap.
///
/// Truncation and padding settings in the file are ignored.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// Shared, so that changing the chat template of a tokenizer is cheap.
    tokenizer: Arc<tokenizers::Tokenizer>,
    growth: Growth,
    chat_template: Option<ChatTemplate>,
    bos_token: Option<String>,
    /// Whether a BOS token comes before a text; `None` if the folder does not say.
    add_bos_token: Option<bool>,
    eos_token: Option<String>,
    pad_token: Option<String>,
    unk_token: Option<String>,
}

/// Tokens and their byte ranges in the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The start and end of each token in the text, in bytes; equal for a token that is not in the text.
    pub offsets: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. The tokenizer has no chat template and no end-of-text token.
    ///
    /// # Errors
    /// The file cannot be read or is not a tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read_bounded(path, MAX_TOKENIZER_BYTES)?;
        Self::from_parts(path, &bytes, None, &Map::new(), None)
    }

    /// Reads the tokenizer of a model folder: `tokenizer.json`, and if they exist `tokenizer_config.json`,
    /// `special_tokens_map.json`, `added_tokens.json` and `chat_template.jinja`. Tokens that only these files name are
    /// added, with the ids that transformers assigns. Without a `tokenizer.json`, the `vocab.json` and `merges.txt` of
    /// Qwen2 and GPT-2 tokenizers are read.
    ///
    /// # Errors
    /// There is no supported tokenizer, or a file is invalid.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let map = read_json_if_exists(&folder.join("special_tokens_map.json"))?;
        let mut config =
            tokenizer_files::merge_configs(read_json_if_exists(&folder.join("tokenizer_config.json"))?, map.as_ref());
        let path = folder.join("tokenizer.json");
        let (path, bytes) = match read_if_exists(&path, MAX_TOKENIZER_BYTES)? {
            Some(bytes) => (path, bytes),
            None => tokenizer_files::from_vocab_and_merges(folder, &mut config)?,
        };
        let tokenizer = Self::from_parts(&path, &bytes, ChatTemplate::from_folder(folder)?, &config, Some(folder))?;
        // transformers ignores the map if the configuration lists all tokens, but the map may still name special tokens
        let name = |known: Option<String>, name: &str| known.or_else(|| special_token(map.as_ref()?, name));
        Ok(tokenizer.changed(|inner| {
            inner.bos_token = name(inner.bos_token.take(), "bos_token");
            inner.eos_token = name(inner.eos_token.take(), "eos_token");
            inner.pad_token = name(inner.pad_token.take(), "pad_token");
            inner.unk_token = name(inner.unk_token.take(), "unk_token");
        }))
    }

    /// Whether a folder has tokenizer files that [`Tokenizer::from_folder`] reads.
    pub fn is_in_folder(folder: impl AsRef<Path>) -> bool {
        tokenizer_files::has_tokenizer(folder.as_ref())
    }

    pub(super) fn from_parts(
        path: &Path,
        bytes: &[u8],
        chat_template: Option<ChatTemplate>,
        config: &Map<String, Value>,
        folder: Option<&Path>,
    ) -> Result<Self> {
        // the `tokenizers` crate runs the normalizer on added tokens while it reads them, so check its growth first
        let growth = Growth::of(bytes).map_err(|message| Error::format(path, message))?;
        // the crate panics on some damaged normalizers
        let mut tokenizer = guard(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|panic| Error::format(path, format!("the tokenizer cannot be read: {panic}")))?
            .map_err(|e| Error::format(path, e))?;
        // files from other training programs may truncate or pad every text
        tokenizer.with_truncation(None).map_err(|e| Error::format(path, e))?;
        tokenizer.with_padding(None);
        if let Some(folder) = folder {
            tokenizer_files::add_tokens(&mut tokenizer, folder, config)?;
            if tokenizer.get_post_processor().is_none() && !path.ends_with("tokenizer.json") {
                tokenizer_files::set_post_processor(&mut tokenizer, folder, config)?;
            }
        }
        let token = |name: &str| config.get(name).and_then(token_text);
        let inner = Inner {
            path: path.to_path_buf(),
            tokenizer: Arc::new(tokenizer),
            growth,
            chat_template,
            bos_token: token("bos_token"),
            add_bos_token: config.get("add_bos_token").and_then(Value::as_bool),
            eos_token: token("eos_token"),
            pad_token: token("pad_token"),
            unk_token: token("unk_token"),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Replaces the chat template.
    #[must_use]
    pub fn with_chat_template(self, template: Option<ChatTemplate>) -> Self {
        self.changed(|inner| inner.chat_template = template)
    }

    /// Replaces the end-of-text token.
    ///
    /// # Errors
    /// The vocabulary does not have the token.
    pub fn with_eos_token(self, token: impl Into<String>) -> Result<Self> {
        let token = token.into();
        if self.token_to_id(&token).is_none() {
            return Err(Error::argument("eos_token", format!("`{token}` is not in the vocabulary")));
        }
        Ok(self.changed(|inner| inner.eos_token = Some(token)))
    }

    fn changed(self, change: impl FnOnce(&mut Inner)) -> Self {
        let mut inner = Arc::try_unwrap(self.inner).unwrap_or_else(|shared| Inner {
            path: shared.path.clone(),
            tokenizer: Arc::clone(&shared.tokenizer),
            growth: shared.growth,
            chat_template: shared.chat_template.clone(),
            bos_token: shared.bos_token.clone(),
            add_bos_token: shared.add_bos_token,
            eos_token: shared.eos_token.clone(),
            pad_token: shared.pad_token.clone(),
            unk_token: shared.unk_token.clone(),
        });
        change(&mut inner);
        Self { inner: Arc::new(inner) }
    }

    /// Tokenizes `text`. With `add_special`, the tokenizer's special tokens are added around the text, except a BOS token that
    /// the text already starts with.
    ///
    /// # Errors
    /// The tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.inner.growth.check(text.len()).map_err(|message| self.encode_error(message))?;
        let encoding = guard(|| self.inner.tokenizer.encode_fast(text, add_special));
        let encoding = encoding.map_err(|panic| self.encode_error(panic))?.map_err(|e| self.encode_error(e))?;
        let ids = encoding.get_ids();
        Ok(ids[self.num_extra_bos(text, ids, add_special)..].to_vec())
    }

    /// Tokenizes `text` and returns the byte range of each token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str, add_special: bool) -> Result<Encoding> {
        self.inner.growth.check(text.len()).map_err(|message| self.encode_error(message))?;
        let encoding = guard(|| self.inner.tokenizer.encode(text, add_special));
        let encoding = encoding.map_err(|panic| self.encode_error(panic))?.map_err(|e| self.encode_error(e))?;
        let (ids, offsets) = (encoding.get_ids(), encoding.get_offsets());
        let start = self.num_extra_bos(text, ids, add_special);
        Ok(Encoding { ids: ids[start..].to_vec(), offsets: offsets[start..].to_vec() })
    }

    /// The number of tokens to remove from the front, 1 or 0: a BOS token that the folder's `add_bos_token` turns off, or a
    /// second BOS token.
    fn num_extra_bos(&self, text: &str, ids: &[u32], add_special: bool) -> usize {
        let Some(&first) = ids.first().filter(|&&id| add_special && self.is_special(id)) else { return 0 };
        let Some(token) = self.id_to_token(first) else { return 0 };
        let is_off = self.inner.add_bos_token == Some(false) && self.inner.bos_token.as_ref() == Some(&token);
        let is_doubled = ids.get(1) == Some(&first) && text.starts_with(&token);
        usize::from((is_off || is_doubled) && self.encodes_before_text(first))
    }

    /// Whether the tokenizer adds this token before every text.
    fn encodes_before_text(&self, id: u32) -> bool {
        let empty = guard(|| self.inner.tokenizer.encode_fast("", true));
        empty.is_ok_and(|empty| empty.is_ok_and(|encoding| encoding.get_ids().first() == Some(&id)))
    }

    fn encode_error(&self, error: impl std::fmt::Display) -> Error {
        Error::format(&self.inner.path, format!("cannot tokenize the text: {error}"))
    }

    /// Decodes `ids` to text. With `skip_special`, special tokens are skipped; ids outside the vocabulary always are.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let failed = |error: String| Error::format(&self.inner.path, format!("cannot decode the tokens: {error}"));
        let text = guard(|| self.inner.tokenizer.decode(ids, skip_special)).map_err(failed)?;
        text.map_err(|error| failed(error.to_string()))
    }

    /// The id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.tokenizer.token_to_id(token)
    }

    /// The token of an id, as written in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.tokenizer.id_to_token(id)
    }

    /// Whether the token is special: a mark such as `<|im_end|>`, not text.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.tokenizer.get_added_vocabulary();
        added.simple_id_to_token(id).is_some_and(|token| added.is_special_token(&token))
    }

    /// The special tokens, longest first.
    pub(super) fn special_tokens(&self) -> Vec<String> {
        let added = self.inner.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let special = added.values().filter(|token| token.special).map(|token| token.content.clone());
        let mut tokens: Vec<String> = special.filter(|token| !token.is_empty()).collect();
        tokens.sort_by_key(|token| std::cmp::Reverse(token.len()));
        tokens
    }

    /// The number of tokens, including added tokens.
    pub fn vocab_size(&self) -> usize {
        self.inner.tokenizer.get_vocab_size(true)
    }

    /// The chat template, if there is one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.inner.chat_template.as_ref()
    }

    /// The beginning-of-text token, if there is one.
    pub fn bos_token(&self) -> Option<&str> {
        self.inner.bos_token.as_deref()
    }

    /// The end-of-text token, if there is one.
    pub fn eos_token(&self) -> Option<&str> {
        self.inner.eos_token.as_deref()
    }

    /// The padding token, if there is one. This library does not pad.
    pub fn pad_token(&self) -> Option<&str> {
        self.inner.pad_token.as_deref()
    }

    /// The token for unknown text, if there is one. Byte-level tokenizers may name one, but never use it.
    pub fn unk_token(&self) -> Option<&str> {
        self.inner.unk_token.as_deref()
    }

    /// The id of [`Tokenizer::eos_token`].
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.eos_token()?)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and the chat template into a model folder.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let json = self.inner.tokenizer.to_string(true).map_err(|error| Error::format(&self.inner.path, error))?;
        write_atomically(folder.join("tokenizer.json"), |file| file.write_all(json.as_bytes()))?;
        let mut config = Map::new();
        for (name, token) in [
            ("bos_token", self.bos_token()),
            ("eos_token", self.eos_token()),
            ("pad_token", self.pad_token()),
            ("unk_token", self.unk_token()),
        ] {
            if let Some(token) = token {
                config.insert(name.into(), token.into());
            }
        }
        if let Some(add) = self.inner.add_bos_token {
            config.insert("add_bos_token".into(), add.into());
        }
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        let config = format!("{:#}\n", Value::Object(config));
        write_atomically(folder.join("tokenizer_config.json"), |file| file.write_all(config.as_bytes()))?;
        for (name, source) in self.chat_template().map(ChatTemplate::sources).unwrap_or_default() {
            let path = if name == "default" {
                folder.join("chat_template.jinja")
            } else {
                let others = folder.join("additional_chat_templates");
                create_folder(&others)?;
                others.join(format!("{name}.jinja"))
            };
            write_atomically(path, |file| file.write_all(source.as_bytes()))?;
        }
        Ok(())
    }

    /// The file it was read from.
    pub(super) fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The tokenizer of the `tokenizers` crate.
    pub fn raw(&self) -> &tokenizers::Tokenizer {
        &self.inner.tokenizer
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Tokenizer;
    use serde_json::{Value, json};

    /// A tokenizer of words that adds `<s>` before every text.
    fn with_bos(config: &Value) -> Tokenizer {
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
            "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "a": 2}, "unk_token": "<unk>"},
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Tokenizer::from_folder(folder.path()).unwrap()
    }

    #[test]
    fn a_bos_token_is_added_at_most_once() {
        let on = with_bos(&json!({"bos_token": "<s>", "add_bos_token": true}));
        let off = with_bos(&json!({"bos_token": "<s>", "add_bos_token": false}));
        for (text, with, without) in
            [("a", vec![1, 2], vec![2]), ("<s> a", vec![1, 2], vec![1, 2]), ("", vec![1], vec![])]
        {
            assert_eq!(on.encode(text, true).unwrap(), with, "{text}");
            assert_eq!(off.encode(text, true).unwrap(), without, "{text}");
            assert_eq!(on.encode_with_offsets(text, true).unwrap().ids, with, "{text}");
        }
        // two BOS tokens in the text are preserved
        assert_eq!(on.encode("<s> <s> a", true).unwrap(), [1, 1, 2]);
        assert_eq!(with_bos(&json!({})).encode("a", true).unwrap(), [1, 2]);
    }
}
