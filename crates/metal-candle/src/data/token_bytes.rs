//! Returns the bytes of single tokens, for log-probabilities and grammars.

use super::Tokenizer;
use super::stream_decoder::append_bytes;
use tokenizers::{Decoder as _, DecoderWrapper};

impl Tokenizer {
    /// The bytes that a token adds to a text; they may be part of a character.
    ///
    /// `None` if the vocabulary lacks the id, or if the text of a token depends on its neighbors (WordPiece, CTC, word suffixes).
    /// The first token of a text may lose a blank: see [`Tokenizer::drops_first_blank`].
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let added = self.raw().get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| self.id_to_token(id))?;
        let decoder = self.raw().get_decoder()?;
        if let DecoderWrapper::ByteLevel(_) = decoder {
            let mut bytes = Vec::with_capacity(token.len());
            append_bytes(&token, &mut bytes);
            return Some(bytes);
        }
        let mut text = Some(token);
        for step in steps(decoder) {
            let token = text.take()?;
            text = match step {
                DecoderWrapper::ByteFallback(_) => match fallback_byte(&token) {
                    Some(byte) => return Some(vec![byte]),
                    None => Some(token),
                },
                DecoderWrapper::Fuse(_) => return Some(token.into_bytes()),
                // the decoder treats the first token of a text differently
                DecoderWrapper::Metaspace(_) | DecoderWrapper::Replace(_) | DecoderWrapper::Strip(_) => {
                    step.decode_chain(vec!["a".into(), token]).ok()?.into_iter().nth(1)
                }
                _ => None,
            };
        }
        text.map(String::into_bytes)
    }

    /// Whether decoding drops a blank at the start of a text, as SentencePiece does.
    pub fn drops_first_blank(&self) -> bool {
        self.raw().get_decoder().is_some_and(|decoder| decoder.decode(vec!["▁a".into()]).is_ok_and(|text| text == "a"))
    }
}

fn steps(decoder: &DecoderWrapper) -> Vec<&DecoderWrapper> {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().flat_map(steps).collect(),
        decoder => vec![decoder],
    }
}

/// The byte of a token such as `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Tokenizer;
    use serde_json::{Value, json};

    fn tokenizer(decoder: &Value) -> Tokenizer {
        let vocab = ["<unk>", "▁", "▁a", "b", "<0xE2>", "Ġ", "é", "<0x20"];
        let vocab: serde_json::Map<String, Value> =
            vocab.into_iter().zip(0..).map(|(k, v)| (k.into(), json!(v))).collect();
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": decoder,
            "added_tokens": [{"id": 8, "content": "<tool call>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": false}],
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true, "unk_token": "<unk>"},
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        Tokenizer::from_file(path).unwrap()
    }

    #[test]
    fn token_bytes_concatenate_to_the_text() {
        let sentence_piece = tokenizer(&json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}));
        let bytes = |id| sentence_piece.token_bytes(id).unwrap();
        assert_eq!((bytes(1), bytes(2), bytes(3)), (b" ".to_vec(), b" a".to_vec(), b"b".to_vec()));
        assert_eq!((bytes(4), bytes(7), bytes(8)), (vec![0xE2], b"<0x20".to_vec(), b"<tool call>".to_vec()));
        assert!(sentence_piece.drops_first_blank() && sentence_piece.token_bytes(9).is_none());
        let joined: Vec<u8> = [3, 2, 1, 3].into_iter().flat_map(bytes).collect();
        assert_eq!(joined, sentence_piece.decode(&[3, 2, 1, 3], false).unwrap().as_bytes());

        let metaspace =
            tokenizer(&json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}));
        assert_eq!(metaspace.token_bytes(2).unwrap(), b" a");
        assert!(metaspace.drops_first_blank());

        let byte_level = tokenizer(
            &json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        );
        assert_eq!(
            (byte_level.token_bytes(5).unwrap(), byte_level.token_bytes(6).unwrap()),
            (b" ".to_vec(), vec![0xE9])
        );
        assert_eq!(byte_level.token_bytes(8).unwrap(), b"<tool call>");
        assert!(!byte_level.drops_first_blank());

        assert!(tokenizer(&json!({"type": "WordPiece", "prefix": "##", "cleanup": true})).token_bytes(3).is_none());
        assert!(tokenizer(&Value::Null).token_bytes(3).is_none());
    }
}
