//! The settings of the fine-tuning methods.

use super::{OF_NEW_ADAPTERS, TrainSettings};
use crate::error::UserError;
use anyhow::Result;
use metal_candle::adapters::{Start, TrainedBiases};
use metal_candle::data::Tokenizer;

impl TrainSettings {
    /// The initialization of a new adapter.
    pub(crate) fn start(&self) -> metal_candle::Result<Start> {
        self.init_lora_weights.as_deref().map_or(Ok(Start::default()), str::parse)
    }

    /// Which biases a new adapter trains.
    pub(crate) fn trained_biases(&self) -> metal_candle::Result<TrainedBiases> {
        self.bias.as_deref().map_or(Ok(TrainedBiases::default()), str::parse)
    }

    /// The ids of the tokens whose rows a new adapter trains.
    pub(crate) fn trainable_token_ids(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let id = |token: &String| {
            let id = token.parse().ok().or_else(|| tokenizer.token_to_id(token));
            let message = || format!("`--trainable-tokens`: `{token}` is neither an id nor in the vocabulary");
            id.ok_or_else(|| UserError::new(message()).into())
        };
        self.trainable_tokens.iter().flatten().map(id).collect()
    }

    /// Returns an error for methods that contradict each other.
    pub(super) fn check_methods(&self) -> Result<()> {
        let refuse = |message: String| Err(UserError::new(message).into());
        let table = self.table()?;
        let is_given = |key: &&str| table.get(*key).is_some_and(|value| value.as_bool() != Some(false));
        let given: Vec<String> =
            OF_NEW_ADAPTERS.into_iter().filter(is_given).map(|key| format!("--{}", key.replace('_', "-"))).collect();
        if self.full == Some(true) && !given.is_empty() {
            return refuse(format!("`--full` trains no adapter: remove `{}`", given.join("`, `")));
        }
        if self.adapter.is_some() && !given.is_empty() {
            return refuse(format!("`--adapter` has its own settings: remove `{}`", given.join("`, `")));
        }
        if self.train_last_layers.is_some() && self.full != Some(true) {
            return refuse("`--train-last-layers` needs `--full`".into());
        }
        if self.train_last_layers.is_some() && self.from_scratch == Some(true) {
            return refuse("`--train-last-layers` freezes the other layers: remove `--from-scratch`".into());
        }
        if let Some(alpha) = self.neftune_noise_alpha.filter(|alpha| !alpha.is_finite() || *alpha < 0.0) {
            return refuse(format!("`--neftune-noise-alpha`: expected a number of at least 0, found {alpha}"));
        }
        if let Some(patterns) = &self.rank_pattern {
            patterns.ranks()?;
        }
        if let Some((pattern, alpha)) =
            self.alpha_pattern.iter().flat_map(|patterns| &patterns.0).find(|(_, alpha)| *alpha <= 0.0)
        {
            return refuse(format!("`--alpha-pattern`: expected a number above 0, found {alpha} for `{pattern}`"));
        }
        self.start()?;
        self.trained_biases()?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::settings::TrainSettings;

    #[test]
    fn patterns_in_files_are_lists_or_tables() {
        let file =
            TrainSettings::parse("rank_pattern = \"q_proj=2\"\n[alpha-pattern]\nv_proj = 3\nq_proj = 4.0\n").unwrap();
        assert_eq!(file.rank_pattern.clone().unwrap().ranks().unwrap(), [("q_proj".to_owned(), 2)]);
        assert_eq!(file.alpha_pattern.clone().unwrap().0, [("q_proj".to_owned(), 4.0), ("v_proj".to_owned(), 3.0)]);
        let text = file.to_toml(&file).unwrap();
        assert_eq!(TrainSettings::parse(&text).unwrap(), file);
    }

    #[test]
    fn methods_that_contradict_each_other_are_refused() {
        let refused = |text: &str, expected: &str| {
            let error = TrainSettings::parse(text).unwrap().check_methods().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        };
        refused("full = true\nuse_dora = true\nmodules_to_save = [\"lm_head\"]", "`--use-dora`, `--modules-to-save`");
        refused("adapter = \"x\"\nrank_pattern = \"q_proj=2\"", "`--rank-pattern`");
        refused("train_last_layers = 2", "needs `--full`");
        refused("init_lora_weights = \"eva\"", "found `eva`");
        refused("bias = \"some\"", "expected `none`, `all` or `lora_only`, found `some`");
        refused("rank_pattern = \"q_proj=2.5\"", "found 2.5 for `q_proj`");
        refused("alpha_pattern = \"q_proj=0\"", "found 0 for `q_proj`");
        refused("neftune_noise_alpha = -1.0", "found -1");
        TrainSettings::parse("full = true\nuse_dora = false\ntrain_last_layers = 1").unwrap().check_methods().unwrap();
    }
}
