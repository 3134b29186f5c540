//! Low-rank terms: what an adapter adds to a linear layer (LoRA, <https://arxiv.org/abs/2106.09685>, section 4.1).

use candle_core::Tensor;

/// The term `scale * B A x` that is added to the output of one linear layer.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// A: `[rank, in_features]`.
    pub a: Tensor,
    /// B: `[out_features, rank]`.
    pub b: Tensor,
    /// The factor.
    pub scale: f32,
    /// Probability with which an input element of A is dropped in training; ignored elsewhere.
    pub dropout: f32,
}

/// The terms of an adapter by the number of the linear layer they belong to.
#[derive(Debug, Clone, Default)]
pub struct LowRankTerms {
    terms: Vec<Option<LowRank>>,
}

impl LowRankTerms {
    /// No terms.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the term of linear layer `number`.
    pub fn insert(&mut self, number: usize, term: LowRank) {
        if self.terms.len() <= number {
            self.terms.resize_with(number + 1, || None);
        }
        self.terms[number] = Some(term);
    }

    /// The term of linear layer `number`.
    pub fn get(&self, number: usize) -> Option<&LowRank> {
        self.terms.get(number).and_then(Option::as_ref)
    }

    /// The terms with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &LowRank)> {
        self.terms.iter().enumerate().filter_map(|(number, term)| Some((number, term.as_ref()?)))
    }
}
