//! The splitting regexes for each name in `tokenizer.ggml.pre` of a GGUF file.
//!
//! The regexes are those of the models' `tokenizer.json` files where these are known. llama.cpp rewrites them for its own
//! regex engine.

use serde_json::{Value, json};

/// The step of a `tokenizer.json` that maps bytes to characters.
pub(super) fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false})
}

/// How a byte-level BPE tokenizer splits a text, and the settings that llama.cpp derives from the name of the splitting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PreTokenizer {
    /// Regexes that are applied in sequence; each match and each text between matches becomes one part.
    pub(super) patterns: &'static [&'static str],
    /// Whether a part that is in the vocabulary is one token, without merging.
    pub(super) ignore_merges: bool,
    /// Whether a BOS token is added if the file does not say.
    pub(super) add_bos: bool,
    /// Whether the text is normalized to NFC first, as in the models' `tokenizer.json`; llama.cpp does not normalize.
    pub(super) nfc: bool,
}

const fn plain(patterns: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { patterns, ignore_merges: false, add_bos: false, nfc: false }
}

const fn whole_words(patterns: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { ignore_merges: true, ..plain(patterns) }
}

pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const UFAKZEKA: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const YOUTU: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI_K2: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
const MINICPM5: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const SPARK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##;
/// Letters of the scripts with two cases, as `DeepSeek` LLM lists them; escaped where editors change them.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK_CJK: &str = r"[一-龥ࠀ-一가-퟿]+";
const DEEPSEEK3_CJK: &str = "[一-龥぀-ゟ゠-ヿ]+";
const ASIAN_SCRIPTS: &str = "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+";
const YOUTU_SCRIPTS: &str = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+";
const WORDS: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";

/// What llama.cpp uses for a file without `tokenizer.ggml.pre`.
const DEFAULT: PreTokenizer = plain(&[PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]);

/// The names that llama.cpp knows and their splitting. The first name of an entry is written for unpublished tokenizers.
const KNOWN: &[(&[&str], PreTokenizer)] = &[
    (&["default"], DEFAULT),
    (
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        PreTokenizer { add_bos: true, ..whole_words(&[LLAMA3]) },
    ),
    (&["dbrx", "smaug-bpe", "chatglm-bpe"], plain(&[LLAMA3])),
    (&["glm4", "glm5"], whole_words(&[LLAMA3])),
    (&["qwen2"], PreTokenizer { nfc: true, ..plain(&[QWEN2]) }),
    (
        &["deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        plain(&[QWEN2]),
    ),
    (&["qwen35"], PreTokenizer { nfc: true, ..plain(&[QWEN35]) }),
    (&["ufakzeka"], plain(&[UFAKZEKA])),
    (&["laguna"], plain(&[r"[^\n]+|[\n]+", QWEN2])),
    (&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], plain(&[O200K])),
    (&["granite-embed-multi-97m"], whole_words(&[O200K])),
    (&["tiny_aya", "cohere2moe"], plain(&[r"\d{1,3}(?=(?:\d{3})*\b)", O200K])),
    (&["tekken"], PreTokenizer { add_bos: true, ..whole_words(&[TEKKEN]) }),
    (&["youtu"], whole_words(&[YOUTU_SCRIPTS, YOUTU])),
    (&["kimi-k2"], plain(&[KIMI_K2])),
    (&["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"], plain(&[r"\p{N}", GPT2])),
    (&["command-r"], PreTokenizer { nfc: true, ..plain(&[r"\p{N}", GPT2]) }),
    (
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        plain(&[GPT2]),
    ),
    (&["mpt", "olmo"], PreTokenizer { nfc: true, ..plain(&[GPT2]) }),
    (&["falcon"], plain(&[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"])),
    (
        &["deepseek-llm"],
        plain(&[r"[\r\n]", DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", DEEPSEEK_CJK, r"\p{N}+"]),
    ),
    (&["deepseek-coder"], plain(&[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}"])),
    (&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], plain(&[r"\p{N}{1,3}", DEEPSEEK3_CJK, DEEPSEEK3])),
    (&["spark2_5"], plain(&[r"\p{N}{1,3}", DEEPSEEK3_CJK, SPARK, r"\p{N}"])),
    (&["afmoe"], plain(&[r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", ASIAN_SCRIPTS, DEEPSEEK3])),
    (&["poro-chat", "bloom", "gpt3-finnish"], plain(&[WORDS])),
    (&["viking"], plain(&[WORDS, r"\p{N}"])),
    (&["jais-2"], plain(&[JAIS2])),
    (
        &["chameleon"],
        PreTokenizer {
            add_bos: true,
            ..plain(&[
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                GPT2,
            ])
        },
    ),
    (&["superbpe"], plain(&[r"\p{N}+", r"(?=(\d{3})+(?!\d))"])),
    (&["bailingmoe", "bailingmoe2", "llada-moe"], plain(&[BAILING])),
    (&["seed-coder"], plain(&[SEED_CODER])),
    (&["exaone-moe"], plain(&[EXAONE_MOE])),
    (&["minicpm5"], whole_words(&[r"\p{N}{1,3}", MINICPM5])),
];

/// Regexes that match every character of a text, without gaps between matches.
pub(super) const WHOLE_TEXT: &[&str] = &[GPT2, LLAMA3, QWEN2, QWEN35, O200K, TEKKEN];

impl PreTokenizer {
    /// The known splittings with their names; the preferred name of equal ones first.
    pub(super) fn all() -> impl Iterator<Item = (&'static str, Self)> {
        KNOWN.iter().flat_map(|(names, pre_tokenizer)| names.iter().map(|name| (*name, *pre_tokenizer)))
    }

    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub(super) fn json(self) -> Value {
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut steps: Vec<Value> = self.patterns.iter().map(split).collect();
        steps.push(byte_level());
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    /// The splitting with this name; llama.cpp's default without a name.
    ///
    /// # Errors
    /// The name is unknown; the message lists the known names.
    pub(super) fn named(name: Option<&str>) -> std::result::Result<Self, String> {
        let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(DEFAULT) };
        let found = KNOWN.iter().find(|(names, _)| names.contains(&name));
        found.map(|(_, pre_tokenizer)| *pre_tokenizer).ok_or_else(|| {
            let known: Vec<&str> = KNOWN.iter().flat_map(|(names, _)| *names).copied().collect();
            format!("expected one of {}; found `{name}`", known.join(", "))
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{DEFAULT, KNOWN, PreTokenizer};
    use std::collections::BTreeSet;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, SplitDelimiterBehavior};

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let mut split = PreTokenizedString::from(text);
        for pattern in PreTokenizer::named(Some(name)).unwrap().patterns {
            let pattern = SplitPattern::Regex((*pattern).to_string());
            let step = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
            step.pre_tokenize(&mut split).unwrap();
        }
        let pieces = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        pieces.into_iter().map(|(piece, _, _)| piece.to_string()).filter(|piece| !piece.is_empty()).collect()
    }

    #[test]
    fn every_splitting_preserves_the_text() {
        let text = "Hello, it's  1234567 ÀB'RE\r\n\n\t漢字かな 가나 x²🤗🏽 e\u{301} \u{1}a/b\n/ ";
        let mut seen = BTreeSet::new();
        for name in KNOWN.iter().flat_map(|(names, _)| *names) {
            assert!(seen.insert(name), "{name} is listed twice");
            assert_eq!(pieces(name, text).concat(), text, "{name}");
        }
    }

    #[test]
    fn digits_are_grouped_as_the_name_says() {
        let text = "1234567";
        for (name, expected) in [
            ("llama-bpe", &["123", "456", "7"][..]),
            ("gpt-4o", &["123", "456", "7"]),
            ("qwen2", &["1", "2", "3", "4", "5", "6", "7"]),
            ("smollm", &["1", "2", "3", "4", "5", "6", "7"]),
            ("gpt-2", &["1234567"]),
            ("superbpe", &["1", "234", "567"]),
            ("afmoe", &["1", "234", "567"]),
            ("tiny_aya", &["1", "234", "567"]),
        ] {
            assert_eq!(pieces(name, text), expected, "{name}");
        }
        assert_eq!(pieces("kimi-k2", "漢字abc"), ["漢字", "abc"]);
    }

    #[test]
    fn an_unknown_name_is_refused() {
        assert_eq!(PreTokenizer::named(None), Ok(DEFAULT));
        let message = PreTokenizer::named(Some("qwen9")).unwrap_err();
        assert!(message.contains("found `qwen9`") && message.contains("llama-bpe, "), "{message}");
    }
}
