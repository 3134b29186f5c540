//! Writes a Modelfile for Ollama: the name of a GGUF file, its chat template, stop strings and sampling defaults.

use super::go_template::GoTemplate;
use super::{ChatTemplate, Tokenizer};
use serde_json::Value;

/// Sampling defaults of a `generation_config.json` and their names in a Modelfile.
const PARAMETERS: [(&str, &str); 5] = [
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("repetition_penalty", "repeat_penalty"),
];

/// A file that configures a GGUF model for Ollama: `ollama create NAME -f Modelfile`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modelfile {
    /// The contents of the file.
    pub text: String,
    /// Why there is no `TEMPLATE`, if there is none. A comment in the file has the same reason.
    pub refused: Option<String>,
}

impl Tokenizer {
    /// Creates a Modelfile for the file `gguf_name` in the same folder.
    ///
    /// The chat template is converted to Ollama's syntax if both render the same text for conversations of one to three turns,
    /// with and without a system message. Tools and reasoning are omitted, and white space around messages is preserved even
    /// if the template removes it. End-of-turn tokens become stop strings. `generation_config`, the model's
    /// `generation_config.json` or null, sets the sampling defaults.
    pub fn modelfile(&self, gguf_name: &str, generation_config: &Value) -> Modelfile {
        let turn = self.end_of_turn_id().and_then(|id| self.id_to_token(id));
        let mut stop: Vec<String> = turn.into_iter().chain(self.eos_token().map(str::to_string)).collect();
        stop.dedup();
        // Ollama adds the BOS token itself if the GGUF file says so
        let bos = self.bos_token().filter(|bos| {
            let ids = self.encode("", true).unwrap_or_default();
            ids.first().is_some_and(|id| self.token_to_id(bos) == Some(*id))
        });
        modelfile(self.chat_template(), bos, &stop, gguf_name, generation_config)
    }
}

fn modelfile(
    template: Option<&ChatTemplate>,
    bos: Option<&str>,
    stop: &[String],
    gguf_name: &str,
    generation_config: &Value,
) -> Modelfile {
    let mut lines = vec![format!("FROM ./{gguf_name}"), String::new()];
    let found = template.ok_or_else(|| "the model has no chat template".to_string());
    let refused = match found.and_then(|template| GoTemplate::of(template, bos)) {
        Ok(template) => {
            lines.push("# Converted from the chat template in the GGUF file, without tools.".to_string());
            if !template.has_system() {
                let note = "# The chat template does not support system messages: they are not passed to the model.";
                lines.push(note.to_string());
            }
            lines.push(format!("TEMPLATE \"\"\"{}\"\"\"", template.source()));
            None
        }
        Err(reason) => {
            // an exception raised by the template may have several lines
            let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
            lines.push(format!("# No TEMPLATE: {reason}."));
            lines.push(
                "# Ollama does not run the Jinja template in the GGUF file. Without TEMPLATE it uses one of its own"
                    .to_string(),
            );
            lines
                .push("# templates if one matches, otherwise it passes only the user's text to the model.".to_string());
            Some(reason)
        }
    };
    lines.push(String::new());
    let stop = stop.iter().filter(|stop| !stop.contains(['"', '\n', '\\']));
    lines.extend(stop.map(|stop| format!("PARAMETER stop \"{stop}\"")));
    if generation_config["do_sample"] == false {
        lines.push("PARAMETER temperature 0".to_string());
    } else {
        let number = |key: &str| generation_config[key].as_number();
        let found = PARAMETERS.iter().filter_map(|(key, name)| Some(format!("PARAMETER {name} {}", number(key)?)));
        lines.extend(found);
    }
    Modelfile { text: lines.join("\n") + "\n", refused }
}
