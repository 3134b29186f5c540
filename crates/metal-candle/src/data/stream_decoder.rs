//! Decodes a stream of tokens to text.

use super::Tokenizer;
use crate::error::Result;
use tokenizers::DecoderWrapper;

/// Maximum number of tokens that are buffered while their text is incomplete.
const MAX_PENDING: usize = 16;

/// Decodes one token at a time and never returns half a character.
///
/// A character may span several tokens; its bytes are buffered until it is complete or invalid (then `U+FFFD` replaces
/// them, as in [`Tokenizer::decode`]). The concatenated chunks are the text of all tokens.
///
/// ```no_run
/// # fn main() -> metal_candle::Result<()> {
/// let tokenizer = metal_candle::data::Tokenizer::from_folder("model")?;
/// let mut decoder = tokenizer.stream_decoder(true);
/// for id in tokenizer.encode("naïve 🦀", false)? {
///     if let Some(chunk) = decoder.push(id)? {
///         print!("{chunk}");
///     }
/// }
/// if let Some(chunk) = decoder.flush()? {
///     print!("{chunk}");
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
    /// Byte-level tokens: the bytes of an incomplete character.
    Bytes(Vec<u8>),
    /// Tokens whose text depends on the previous tokens: the last tokens, and the number of them whose text was returned.
    Window { ids: Vec<u32>, returned: usize },
}

impl Tokenizer {
    /// A decoder of one token at a time.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(self.clone(), skip_special)
    }
}

impl StreamDecoder {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let state = empty_state(&tokenizer);
        Self { tokenizer, skip_special, state }
    }

    /// Adds a token and returns the completed text, if any.
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

    /// Returns the text that was buffered, if any, and resets the decoder to the start of a text.
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
        let State::Window { ids, returned } = &mut self.state else { return Ok(None) };
        let before = self.tokenizer.decode(&ids[..*returned], self.skip_special)?;
        let text = self.tokenizer.decode(ids, self.skip_special)?;
        let is_held_back = text.ends_with(char::REPLACEMENT_CHARACTER) && ids.len() - *returned < MAX_PENDING;
        if is_held_back && !all {
            return Ok(None);
        }
        let common = before.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        let start = (0..=common).rev().find(|&start| text.is_char_boundary(start)).unwrap_or(0);
        let piece = text[start..].to_string();
        // keep the last tokens: they determine whether a space precedes the next token
        ids.drain(..*returned);
        *returned = ids.len();
        Ok(some_text(piece))
    }
}

fn empty_state(tokenizer: &Tokenizer) -> State {
    match tokenizer.raw().get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => State::Bytes(Vec::new()),
        _ => State::Window { ids: Vec::new(), returned: 0 },
    }
}

fn some_text(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// Appends the bytes of a byte-level token; other tokens are appended as text.
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

/// The byte of a character in a byte-level vocabulary: printable Latin-1 characters are themselves, the characters from
/// U+0100 on are the other 68 bytes in order (GPT-2's table).
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Removes all complete characters from the front, with a replacement character for each invalid part.
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
