//! Drafts the next tokens of a sequence from its own text and a predicted text.

use super::speculation::Speculation;

/// The number of latest drafts whose acceptance is tracked.
const WINDOW: u32 = u32::BITS;
/// Minimum number of accepted drafts among them (30 %) to continue drafting.
const FEWEST_ACCEPTED: u32 = 10;
/// The number of tokens that a sequence generates without drafts if fewer are accepted.
const PAUSE: usize = 64;

/// The number of last tokens with which a sequence with a draft model searches its prediction.
const PREDICTION_NGRAM: usize = 3;

/// The next tokens of a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Draft {
    Tokens(Vec<u32>),
    /// This number of tokens of the draft model.
    ByModel(usize),
}

/// Drafts the tokens of one sequence.
#[derive(Debug, Clone)]
pub(super) struct Drafter {
    max_tokens: usize,
    min_ngram: usize,
    max_ngram: usize,
    /// Whether a draft model drafts after the prediction, instead of earlier text.
    has_model: bool,
    prediction: Vec<u32>,
    /// The index in `prediction` of the next expected token.
    next: usize,
    /// Whether the answer follows the prediction up to `next`.
    is_on_track: bool,
    /// One bit for each of the latest drafted tokens, 1 for an accepted one.
    outcomes: u32,
    num_outcomes: u32,
    /// The number of generated tokens after which it drafts again.
    resumes_at: usize,
    num_accepted: usize,
    num_rejected: usize,
}

impl Drafter {
    /// Creates a drafter for a request; none if speculation is off.
    pub(super) fn new(speculation: Speculation, prediction: &[u32]) -> Option<Self> {
        let (max_tokens, min_ngram, max_ngram, has_model) = match speculation {
            Speculation::Off => return None,
            Speculation::Lookup { max_tokens, min_ngram, max_ngram } => (max_tokens, min_ngram, max_ngram, false),
            Speculation::DraftModel { max_tokens } => (max_tokens, PREDICTION_NGRAM, PREDICTION_NGRAM, true),
        };
        Some(Self {
            max_tokens,
            min_ngram,
            max_ngram,
            has_model,
            prediction: prediction.to_vec(),
            next: 0,
            is_on_track: true,
            outcomes: 0,
            num_outcomes: 0,
            resumes_at: 0,
            num_accepted: 0,
            num_rejected: 0,
        })
    }

    /// Drafts at most `most` tokens after `ids`, of which `generated` were sampled.
    pub(super) fn draft(&mut self, ids: &[u32], generated: usize, most: usize) -> Draft {
        let most = most.min(self.max_tokens);
        if most == 0 || generated < self.resumes_at {
            return Draft::Tokens(Vec::new());
        }
        self.find_track(ids);
        if self.is_on_track && self.next < self.prediction.len() {
            return Draft::Tokens(self.prediction[self.next..].iter().take(most).copied().collect());
        }
        if self.has_model {
            return Draft::ByModel(most);
        }
        let Some(end) = self.latest_match(ids) else { return Draft::Tokens(Vec::new()) };
        // in a repetition, the continuation may include the draft itself
        let period = ids.len() - end;
        Draft::Tokens((0..most).map(|index| ids[end + index % period]).collect())
    }

    /// Searches the prediction for the last tokens, after the answer has diverged from it.
    fn find_track(&mut self, ids: &[u32]) {
        if self.is_on_track {
            return;
        }
        let ends = 1..self.prediction.len();
        let matches = ends.map(|end| (self.match_len(&self.prediction[..end], ids), end));
        let matches = matches.filter(|(len, _)| *len >= self.min_ngram);
        // the longest match; among equal ones the next, else the first
        let best = matches.max_by_key(|&(len, end)| (len, end >= self.next, std::cmp::Reverse(end)));
        if let Some((_, end)) = best {
            (self.next, self.is_on_track) = (end, true);
        }
    }

    /// The position after the longest match of the last tokens in earlier tokens; among equal matches, the latest.
    fn latest_match(&self, ids: &[u32]) -> Option<usize> {
        let mut best = (self.min_ngram - 1, None);
        for end in (1..ids.len()).rev() {
            let len = self.match_len(&ids[..end], ids);
            if len > best.0 {
                best = (len, Some(end));
                if len == self.max_ngram {
                    break;
                }
            }
        }
        best.1
    }

    /// The length of the common suffix of two texts.
    fn match_len(&self, left: &[u32], right: &[u32]) -> usize {
        let pairs = left.iter().rev().zip(right.iter().rev()).take(self.max_ngram);
        pairs.take_while(|(left, right)| left == right).count()
    }

    /// Records a sampled token.
    pub(super) fn observe(&mut self, token: u32) {
        self.is_on_track = self.is_on_track && self.prediction.get(self.next) == Some(&token);
        if self.is_on_track {
            self.next += 1;
        }
    }

    /// Counts drafts of a pass; they count as rejected until they are accepted.
    pub(super) fn count_drafted(&mut self, count: usize) {
        self.num_rejected += count;
    }

    /// Counts the next draft as accepted.
    pub(super) fn count_accepted(&mut self) {
        self.num_accepted += 1;
        self.num_rejected -= 1;
    }

    /// Records the number of accepted drafts of a pass, after `generated` sampled tokens.
    pub(super) fn finish_pass(&mut self, drafted: usize, accepted: usize, generated: usize) {
        for index in 0..drafted {
            self.outcomes = self.outcomes << 1 | u32::from(index < accepted);
        }
        self.num_outcomes = WINDOW.min(self.num_outcomes + drafted as u32);
        if self.num_outcomes == WINDOW && self.outcomes.count_ones() < FEWEST_ACCEPTED {
            self.resumes_at = generated + PAUSE;
            self.num_outcomes = 0;
        }
    }

    /// The numbers of accepted and rejected drafts.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.num_accepted, self.num_rejected)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn drafter(prediction: &[u32]) -> Drafter {
        let speculation = Speculation::Lookup { max_tokens: 4, min_ngram: 2, max_ngram: 3 };
        Drafter::new(speculation, prediction).unwrap()
    }

    fn tokens(drafter: &mut Drafter, ids: &[u32], generated: usize, most: usize) -> Vec<u32> {
        let Draft::Tokens(tokens) = drafter.draft(ids, generated, most) else { panic!("there is no draft model") };
        tokens
    }

    #[test]
    fn the_longest_and_latest_match_is_continued() {
        let mut drafter = drafter(&[]);
        assert_eq!(tokens(&mut drafter, &[1, 2, 3, 4, 5, 9, 2, 3], 0, 9), [4, 5, 9, 2]);
        assert_eq!(tokens(&mut drafter, &[1, 2, 3, 4, 5, 9, 2, 3], 0, 2), [4, 5]);
        // 1 2 3 is longer than the later 2 3
        assert_eq!(tokens(&mut drafter, &[1, 2, 3, 4, 2, 3, 5, 1, 2, 3], 0, 2), [4, 2]);
        // 2 3 occurs twice
        assert_eq!(tokens(&mut drafter, &[2, 3, 4, 2, 3, 5, 7, 2, 3], 0, 2), [5, 7]);
        // a repetition
        assert_eq!(tokens(&mut drafter, &[8, 1, 2, 1, 2], 0, 4), [1, 2, 1, 2]);
        assert_eq!(tokens(&mut drafter, &[8, 6, 6, 6], 0, 4), [6, 6, 6, 6]);
        assert_eq!(tokens(&mut drafter, &[1, 2, 3, 4, 3], 0, 4), [0; 0]);
        assert_eq!(tokens(&mut drafter, &[1], 0, 4), [0; 0]);
        assert_eq!(tokens(&mut drafter, &[1, 1, 1], 0, 0), [0; 0]);
    }

    #[test]
    fn a_prediction_is_followed_and_found_again_after_a_divergence() {
        let mut drafter = drafter(&[10, 11, 12, 13, 14, 15, 11, 12, 16]);
        let mut ids = vec![1, 2];
        let mut next = |ids: &mut Vec<u32>, token: u32| {
            drafter.observe(token);
            ids.push(token);
            tokens(&mut drafter, ids, ids.len() - 2, 3)
        };
        assert_eq!(next(&mut ids, 10), [11, 12, 13]);
        assert_eq!(next(&mut ids, 11), [12, 13, 14]);
        assert_eq!(next(&mut ids, 99), [0; 0]);
        assert_eq!(next(&mut ids, 11), [0; 0]);
        assert_eq!(next(&mut ids, 12), [13, 14, 15]);
        assert_eq!(next(&mut ids, 98), [0; 0]);
        assert_eq!(next(&mut ids, 14), [0; 0]);
        assert_eq!(next(&mut ids, 15), [11, 12, 16]);
        for token in [11, 12] {
            next(&mut ids, token);
        }
        // after the end of the prediction, the answer is searched, in which 12 16 did not occur
        assert_eq!(next(&mut ids, 16), [0; 0]);
    }

    #[test]
    fn rejected_drafts_pause_drafting_for_a_while() {
        let mut drafter = drafter(&[]);
        let ids = [3, 4, 5, 3, 4];
        for pass in 0..8 {
            assert_eq!(tokens(&mut drafter, &ids, pass, 4).len(), 4);
            drafter.count_drafted(4);
            drafter.count_accepted();
            drafter.finish_pass(4, 1, pass);
        }
        assert_eq!(drafter.counts(), (8, 24));
        assert!(tokens(&mut drafter, &ids, 7 + PAUSE - 1, 4).is_empty());
        // another 32 drafts are tried
        for pass in 0..9 {
            assert!(!tokens(&mut drafter, &ids, 7 + PAUSE + pass, 4).is_empty());
            drafter.finish_pass(4, 2, pass);
        }
    }
}
