//! Decoding one token at a time.

use super::Tokenizer;
use crate::error::Result;
use tokenizers::DecoderWrapper;

/// Most tokens that are held back while their text is not complete.
const MAX_PENDING: usize = 16;

/// Turns tokens into text as they come, never half a character.
///
/// A character may be spread over several tokens; its bytes are held back until it is whole, or cannot become one (then `U+FFFD`
/// takes their place, as in [`Tokenizer::decode`]). All pieces together are the text of all tokens.
///
/// ```no_run
/// # fn main() -> metal_candle::Result<()> {
/// let tokenizer = metal_candle::data::Tokenizer::from_folder("model")?;
/// let mut decoder = tokenizer.stream_decoder(true);
/// for id in tokenizer.encode("naïve 🦀", false)? {
///     if let Some(piece) = decoder.push(id)? {
///         print!("{piece}");
///     }
/// }
/// if let Some(piece) = decoder.flush()? {
///     print!("{piece}");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    /// Tokens are bytes: those that are not yet a character.
    Bytes(Vec<u8>),
    /// Tokens whose text depends on those before: the last ones, and how many of them are already told.
    Window { ids: Vec<u32>, told: usize },
}

impl Tokenizer {
    /// A decoder that takes one token at a time.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(self.clone(), skip_special)
    }
}

impl StreamDecoder {
    /// A decoder at the beginning of a text.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let state = empty_state(&tokenizer);
        Self { tokenizer, skip_special, state }
    }

    /// Adds a token and returns the text that is now complete, if any.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let added = self.tokenizer.raw().get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| self.tokenizer.id_to_token(id));
        let Some(token) = token.filter(|token| !(self.skip_special && added.is_special_token(token))) else {
            return Ok(None);
        };
        match &mut self.state {
            State::Bytes(bytes) => {
                append_bytes(&token, bytes);
                Ok(some_text(take_characters(bytes)))
            }
            State::Window { ids, .. } => {
                ids.push(id);
                self.take_window(false)
            }
        }
    }

    /// The text that was held back, if any; the decoder is then at the beginning of a text.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn flush(&mut self) -> Result<Option<String>> {
        let text = match &mut self.state {
            State::Bytes(bytes) => some_text(String::from_utf8_lossy(bytes).into_owned()),
            State::Window { .. } => self.take_window(true)?,
        };
        self.state = empty_state(&self.tokenizer);
        Ok(text)
    }

    fn take_window(&mut self, all: bool) -> Result<Option<String>> {
        let State::Window { ids, told } = &mut self.state else { return Ok(None) };
        let before = self.tokenizer.decode(&ids[..*told], self.skip_special)?;
        let text = self.tokenizer.decode(ids, self.skip_special)?;
        let is_held_back = text.ends_with(char::REPLACEMENT_CHARACTER) && ids.len() - *told < MAX_PENDING;
        if is_held_back && !all {
            return Ok(None);
        }
        let common = before.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        let start = (0..=common).rev().find(|&start| text.is_char_boundary(start)).unwrap_or(0);
        let piece = text[start..].to_string();
        // the tokens told last are kept: whether a space comes before the next one depends on them
        ids.drain(..*told);
        *told = ids.len();
        Ok(some_text(piece))
    }
}

fn empty_state(tokenizer: &Tokenizer) -> State {
    match tokenizer.raw().get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => State::Bytes(Vec::new()),
        _ => State::Window { ids: Vec::new(), told: 0 },
    }
}

fn some_text(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// Adds the bytes of a byte-level token; one that is not spelled in bytes stands for its own text.
pub(super) fn append_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for c in token.chars() {
        let Some(byte) = byte_of(c) else {
            bytes.truncate(start);
            bytes.extend_from_slice(token.as_bytes());
            return;
        };
        bytes.push(byte);
    }
}

/// The byte that a character of a byte-level vocabulary stands for: printable Latin-1 for itself, the characters
/// from U+0100 on for the other 68 bytes in order (GPT-2's table).
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Takes all complete characters from the front, and a replacement character for each part that can be none.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                let Some(invalid) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[invalid..];
            }
        }
    }
    let taken = bytes.len() - rest.len();
    bytes.drain(..taken);
    text
}
