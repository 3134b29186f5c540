//! Computes scores of `SentencePiece` tokens from the order of the merges.

use super::gguf_vocabulary::{MAX_DIVIDED_BYTES, divisions};
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

/// Computes a score for each of `tokens`, such that merging the pair with the highest-scoring result first has the same
/// result as the merges.
///
/// `tokens` are the texts of mergeable tokens, `None` for the others; `merges` are the pairs in order. Tokens that are
/// merged first get 0, -1, and so on, as in `SentencePiece` files; characters follow.
///
/// # Errors
/// There are no equivalent scores: the merges of a token are not consecutive, or a pair that makes a token is not listed.
pub(super) fn scores_of(tokens: &[Option<&str>], merges: &[(String, String)]) -> Result<Vec<f64>, String> {
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().filter_map(|(id, token)| token.map(|token| (token, id))).collect();
    // marks, bytes and user-defined tokens are matched before merging
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
        // merges of tokens with equal scores may alternate
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

/// Two tokens and the id of their result.
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

/// Checks that merges with equal scores are in the order that a reader derives from the scores: longest first token
/// first, then by id.
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
        // followed by the tokens without merges
        let expected = [0.0, -3.0, -4.0, -1.0, -2.0, 0.0, -5.0];
        assert_eq!(scores(&["a a", "a b", "a ab", "aa b"]).unwrap(), expected);
        // the order of the merges of one token is irrelevant, and pairs with unknown tokens are ignored
        assert_eq!(scores(&["a a", "x y", "a b", "aa b", "a ab"]).unwrap(), expected);
    }

    #[test]
    fn merges_with_equal_scores_may_alternate() {
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
