//! Scores of `SentencePiece` tokens, found from the order of the merges.

use super::gguf_vocabulary::{MAX_DIVIDED_BYTES, divisions};
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

/// A score for each of `tokens`, such that merging the pair that makes the token with the highest score first is what the merges say.
///
/// `tokens` holds the texts of tokens that may be merged, `None` for the others, and `merges` the pairs in their order. Tokens that are
/// merged first have 0, -1, and so on, as in the files of `SentencePiece`; characters follow.
///
/// # Errors
/// No scores say the same: the merges of a token are not in one place, or a pair that makes a token is not listed.
pub(super) fn scores_of(tokens: &[Option<&str>], merges: &[(String, String)]) -> Result<Vec<f64>, String> {
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().filter_map(|(id, token)| token.map(|token| (token, id))).collect();
    // marks, bytes and user-defined tokens are found before anything is merged
    let merges: Vec<Merge<'_>> = merges.iter().filter_map(|(first, second)| Merge::of(&ids, first, second)).collect();
    let listed: HashSet<(&str, &str)> = merges.iter().map(|merge| (merge.first, merge.second)).collect();
    for token in tokens.iter().flatten() {
        if token.len() > MAX_DIVIDED_BYTES {
            return Err(format!("expected tokens of at most {MAX_DIVIDED_BYTES} bytes, found one of {}", token.len()));
        }
        let missing = divisions(token)
            .find(|pair| ids.contains_key(pair.0) && ids.contains_key(pair.1) && !listed.contains(pair));
        if let Some((first, second)) = missing {
            return Err(format!(
                "expected all pairs of tokens that make a third one among the merges, as a GGUF file has scores and no merges; \
                 `{first}` and `{second}` are missing"
            ));
        }
    }
    let ends: HashMap<usize, usize> = merges.iter().enumerate().map(|(at, merge)| (merge.id, at)).collect();
    let mut ranks: HashMap<usize, usize> = HashMap::with_capacity(ends.len());
    let mut start = 0;
    while start < merges.len() {
        // the merges of tokens with equal scores may take turns
        let (mut end, mut at) = (start, start);
        while at <= end {
            end = end.max(ends[&merges[at].id]);
            at += 1;
        }
        let rank = ranks.len();
        check_order(&merges[start..=end])?;
        for merge in &merges[start..=end] {
            ranks.insert(merge.id, rank);
        }
        start = end + 1;
    }
    let mut next = ranks.len();
    let scores = tokens.iter().enumerate().map(|(id, token)| {
        if token.is_none() {
            return 0.0;
        }
        let rank = ranks.get(&id).copied().unwrap_or_else(|| {
            next += 1;
            next - 1
        });
        0.0 - rank as f64
    });
    Ok(scores.collect())
}

/// Two tokens and the id of the one that they make.
struct Merge<'a> {
    first: &'a str,
    second: &'a str,
    id: usize,
}

impl<'a> Merge<'a> {
    fn of(ids: &HashMap<&str, usize>, first: &'a str, second: &'a str) -> Option<Self> {
        let is_known = ids.contains_key(first) && ids.contains_key(second);
        let id = ids.get(format!("{first}{second}").as_str()).filter(|_| is_known)?;
        Some(Self { first, second, id: *id })
    }
}

/// Checks that merges of tokens with equal scores are in the order in which a reader of the scores finds them: those with the longest
/// first token first, then by id.
fn check_order(merges: &[Merge<'_>]) -> Result<(), String> {
    let is_one = merges.iter().all(|merge| merge.id == merges[0].id);
    let is_sorted = merges.is_sorted_by_key(|merge| (Reverse(merge.first.len()), merge.id));
    if is_one || is_sorted {
        return Ok(());
    }
    let token = merges.first().map(|merge| format!("{}{}", merge.first, merge.second)).unwrap_or_default();
    Err(format!(
        "expected the merges that make `{token}` one after another, as a GGUF file has one score for each token and no merges; found \
         others between them"
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::scores_of;

    const TOKENS: [Option<&str>; 7] = [None, Some("a"), Some("b"), Some("ab"), Some("aab"), Some("aa"), Some("x")];

    fn scores(merges: &[&str]) -> Result<Vec<f64>, String> {
        let pair = |merge: &&str| merge.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())).unwrap();
        scores_of(&TOKENS, &merges.iter().map(pair).collect::<Vec<_>>())
    }

    #[test]
    fn tokens_that_are_merged_first_have_the_highest_scores() {
        // tokens that no merge makes follow
        let expected = [0.0, -3.0, -4.0, -1.0, -2.0, 0.0, -5.0];
        assert_eq!(scores(&["a a", "a b", "a ab", "aa b"]).unwrap(), expected);
        // the order of the merges of one token says nothing, and pairs with other tokens are no merges
        assert_eq!(scores(&["a a", "x y", "a b", "aa b", "a ab"]).unwrap(), expected);
    }

    #[test]
    fn merges_of_equal_scores_take_turns() {
        let found = scores(&["a b", "aa b", "a ab", "a a"]).unwrap();
        assert_eq!(found, [0.0, -3.0, -4.0, 0.0, -1.0, -2.0, -5.0]);
        let found = scores(&["a b", "aa b", "a a", "a ab"]);
        assert!(found.is_err(), "{found:?}");
        let found = scores(&["aa b", "a b", "a ab", "a a"]).unwrap();
        assert_eq!(found, [0.0, -3.0, -4.0, 0.0, 0.0, -2.0, -5.0]);
        let message = scores(&["a ab", "a b", "aa b", "a a"]).unwrap_err();
        assert!(message.contains("`aab` one after another"), "{message}");
    }

    #[test]
    fn missing_pairs_are_refused() {
        let message = scores(&["a a", "a b", "a ab"]).unwrap_err();
        assert!(message.contains("`aa` and `b` are missing"), "{message}");
    }
}
