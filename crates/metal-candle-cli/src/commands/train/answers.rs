//! Generates answers before and after training, and compares them with the expected answers.

use crate::input::is_stream;
use crate::sampling::with_end_of_turn;
use anyhow::Result;
use metal_candle::data::{Dataset, Message, Sample, Source, Tokenizer};
use metal_candle::files::BoundedLines;
use metal_candle::inference::{GenerationConfig, Generator};
use serde_json::Value;

/// Maximum size of a row, in bytes.
const MAX_ROW_BYTES: usize = 64 << 20;
/// Longest generated answer, in tokens.
pub(super) const MAX_SAMPLE_TOKENS: usize = 64;

/// A prompt and the expected answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    source: Option<Source>,
}

/// The generated answer to a [`Question`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) is_right: bool,
}

impl Question {
    /// The last trained turn of a sample as a question; none if nothing precedes it, as in plain text.
    pub(super) fn of(sample: &Sample) -> Option<Self> {
        let end = sample.trained.iter().rposition(|&trained| trained)? + 1;
        let start = sample.trained[..end].iter().rposition(|&trained| !trained)? + 1;
        (start > 1).then(|| Self {
            prompt: sample.ids[..start].to_vec(),
            answer: sample.ids[start..end].to_vec(),
            source: sample.source.clone(),
        })
    }

    /// The first `count` questions of a dataset.
    pub(super) fn first(dataset: &Dataset, count: usize) -> Vec<Self> {
        dataset.samples.iter().filter_map(Self::of).take(count).collect()
    }

    /// A sample to show: the first question, or the first half of a plain text.
    pub(super) fn to_show(dataset: &Dataset) -> Option<Self> {
        dataset.samples.iter().find_map(Self::of).or_else(|| {
            let ids = &dataset.samples.iter().find(|sample| sample.ids.len() >= 4)?.ids;
            let (prompt, answer) = ids.split_at((ids.len() / 2).min(MAX_SAMPLE_TOKENS));
            Some(Self { prompt: prompt.to_vec(), answer: answer.to_vec(), source: None })
        })
    }

    /// The question, as in the file.
    pub(super) fn asked(&self) -> Option<String> {
        let Source { path, line } = self.source.as_ref()?;
        // a pipe cannot be read again
        if is_stream(path) {
            return None;
        }
        let mut lines = BoundedLines::open(path.as_path(), MAX_ROW_BYTES).ok()?;
        for _ in 1..*line {
            lines.next_line().ok()??;
        }
        let row = lines.next_line().ok()??;
        let row: Value = serde_json::from_slice(row.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(row)).ok()?;
        if let Some(prompt) = row["prompt"].as_str() {
            return Some(prompt.to_owned());
        }
        let messages: Vec<Message> = serde_json::from_value(row.get("messages")?.clone()).ok()?;
        let asked = messages.iter().rfind(|message| message.role() == "user")?;
        Some(asked.text())
    }

    /// The question, or else the whole prompt, without special tokens.
    pub(super) fn prompt_text(&self, tokenizer: &Tokenizer) -> metal_candle::Result<String> {
        self.asked().map_or_else(|| tokenizer.decode(&self.prompt, true), Ok)
    }

    /// The expected answer as text, without special tokens.
    pub(super) fn answer_text(&self, tokenizer: &Tokenizer) -> metal_candle::Result<String> {
        tokenizer.decode(&self.answer[..self.answer.len().min(MAX_SAMPLE_TOKENS)], true)
    }
}

/// Greedy answers to all questions, as one batch.
pub(super) fn answer(generator: &mut Generator, tokenizer: &Tokenizer, questions: &[Question]) -> Result<Vec<Answer>> {
    let context = generator.model().config().max_sequence_length();
    let mut answers = Vec::with_capacity(questions.len());
    // a right answer is as long as the expected one, so stop there
    let configs: Vec<_> = questions
        .iter()
        .map(|question| {
            let most = context.saturating_sub(question.prompt.len()).max(1);
            let config = GenerationConfig::default().with_max_tokens((question.answer.len() + 1).clamp(1, most));
            with_end_of_turn(config, Some(tokenizer))
        })
        .collect();
    let prompts = questions.iter().map(|question| question.prompt.clone());
    for (question, generation) in questions.iter().zip(generator.generate_batch(prompts, &configs)?) {
        let wanted = tokenizer.decode(&question.answer, true)?;
        answers.push(Answer { is_right: generation.text.trim() == wanted.trim(), text: generation.text });
    }
    Ok(answers)
}

/// The generated answer to one question, not limited to the length of the expected answer.
pub(super) fn show(generator: &mut Generator, question: &Question) -> metal_candle::Result<String> {
    let context = generator.model().config().max_sequence_length();
    let most = context.saturating_sub(question.prompt.len()).clamp(1, MAX_SAMPLE_TOKENS);
    let config = with_end_of_turn(GenerationConfig::default().with_max_tokens(most), generator.tokenizer());
    Ok(generator.generate(question.prompt.clone(), &config)?.text)
}

#[cfg(test)]
mod tests {
    use super::Question;
    use metal_candle::data::Sample;

    fn sample(ids: &[u32], trained: &[u8]) -> Sample {
        Sample { ids: ids.to_vec(), trained: trained.iter().map(|&t| t == 1).collect(), source: None }
    }

    #[test]
    fn the_last_trained_turn_is_the_answer() {
        let question = Question::of(&sample(&[1, 2, 3, 4, 5, 6, 7], &[0, 0, 1, 0, 1, 1, 0]));
        assert_eq!(question, Some(Question { prompt: vec![1, 2, 3, 4], answer: vec![5, 6], source: None }));
        assert_eq!(Question::of(&sample(&[1, 2, 3], &[0, 1, 1])), None);
        assert_eq!(Question::of(&sample(&[1, 2, 3], &[1, 1, 1])), None);
        assert_eq!(Question::of(&sample(&[1, 2, 3], &[0, 0, 0])), None);
    }
}
