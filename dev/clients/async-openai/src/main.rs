//! Checks `async-openai`: every response must have the crate's types, and the `code` of an error must be a string.

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::{ApiErrorResponse, OpenAIError};
use async_openai::types::chat::{
    ChatCompletionMessageToolCalls, CreateChatCompletionRequest, FinishReason, FunctionType, Role,
};
use async_openai::types::completions::CreateCompletionRequest;
use async_openai::types::embeddings::CreateEmbeddingRequest;
use async_openai::types::files::{CreateFileRequest, FileInput, FilePurpose};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::error::Error;
use std::process::ExitCode;

type Outcome = Result<(), Box<dyn Error>>;

/// Fails a check unless a condition is true.
macro_rules! ensure {
    ($condition:expr, $($found:tt)*) => {
        if !$condition {
            return Err(format!("{} is false: {}", stringify!($condition), format!($($found)*)).into());
        }
    };
}

struct Checks {
    client: Client<OpenAIConfig>,
    root: String,
    model: String,
}

/// A request of the crate's type from the fields of `base` and `more`.
fn request<T: DeserializeOwned>(mut base: Value, more: Value) -> Result<T, serde_json::Error> {
    if let (Value::Object(base), Value::Object(more)) = (&mut base, more) {
        base.extend(more);
    }
    serde_json::from_value(base)
}

/// The error in the server's response.
fn api_error<T>(result: Result<T, OpenAIError>) -> Result<ApiErrorResponse, Box<dyn Error>> {
    match result {
        Ok(_) => Err("expected an error, found a response".into()),
        Err(OpenAIError::ApiError(error)) => Ok(error),
        Err(other) => Err(format!("expected an error of the server, found {other}").into()),
    }
}

impl Checks {
    fn chat(&self, more: Value) -> Result<CreateChatCompletionRequest, serde_json::Error> {
        let messages = json!([{"role": "user", "content": "Write a Rust function that adds two numbers."}]);
        request(
            json!({"model": self.model, "messages": messages, "temperature": 0.0, "max_completion_tokens": 40}),
            more,
        )
    }

    fn tools(&self) -> Result<CreateChatCompletionRequest, serde_json::Error> {
        let parameters = json!({
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
            "required": ["a", "b"],
            "additionalProperties": false,
        });
        let tool = json!({"type": "function", "function": {"name": "add", "parameters": parameters, "strict": true}});
        let more = json!({"tools": [tool], "tool_choice": "required", "parallel_tool_calls": false, "max_completion_tokens": 200});
        self.chat(more)
    }

    async fn stream_equals_plain_answer(&self) -> Outcome {
        for more in [json!({}), json!({"n": 3, "seed": 5, "temperature": 0.9, "logprobs": true, "top_logprobs": 2})] {
            let plain = self.client.chat().create(self.chat(more.clone())?).await?;
            let mut asked = self.chat(more)?;
            asked.stream_options = serde_json::from_value(json!({"include_usage": true}))?;
            let mut stream = self.client.chat().create_stream(asked).await?;
            let mut texts = vec![String::new(); plain.choices.len()];
            let mut logprobs = vec![Vec::new(); plain.choices.len()];
            let mut roles = vec![None; plain.choices.len()];
            let mut finishes = vec![None; plain.choices.len()];
            let mut usage = None;
            while let Some(chunk) = stream.next().await {
                let chunk = chunk?;
                usage = chunk.usage.or(usage);
                for choice in chunk.choices {
                    let index = choice.index as usize;
                    texts[index].push_str(&choice.delta.content.unwrap_or_default());
                    roles[index] = choice.delta.role.or(roles[index]);
                    finishes[index] = choice.finish_reason.or(finishes[index]);
                    logprobs[index].extend(choice.logprobs.and_then(|logprobs| logprobs.content).unwrap_or_default());
                }
            }
            for (index, choice) in plain.choices.iter().enumerate() {
                ensure!(choice.index as usize == index, "{choice:?}");
                ensure!(choice.message.content.as_ref() == Some(&texts[index]), "{choice:?}, {:?}", texts[index]);
                ensure!(choice.finish_reason == finishes[index], "{choice:?}, {:?}", finishes[index]);
                ensure!(roles[index] == Some(Role::Assistant), "{roles:?}");
                let of_plain = choice.logprobs.clone().and_then(|logprobs| logprobs.content).unwrap_or_default();
                ensure!(of_plain == logprobs[index], "{of_plain:?}, {:?}", logprobs[index]);
            }
            let totals = [plain.usage, usage].map(|usage| usage.map(|usage| usage.total_tokens));
            ensure!(totals[0].is_some() && totals[0] == totals[1], "{totals:?}");
        }
        Ok(())
    }

    async fn tool_calls(&self) -> Outcome {
        let plain = self.client.chat().create(self.tools()?).await?;
        let choice = &plain.choices[0];
        ensure!(choice.finish_reason == Some(FinishReason::ToolCalls), "{choice:?}");
        let calls = choice.message.tool_calls.as_deref().unwrap_or_default();
        let [ChatCompletionMessageToolCalls::Function(call)] = calls else {
            return Err(format!("expected one call, found {calls:?}").into());
        };
        ensure!(call.function.name == "add" && !call.id.is_empty(), "{call:?}");
        let arguments: Value = serde_json::from_str(&call.function.arguments)?;
        ensure!(arguments["a"].is_i64() && (arguments["b"] == "x" || arguments["b"] == "y"), "{arguments}");
        let mut stream = self.client.chat().create_stream(self.tools()?).await?;
        let (mut name, mut text, mut ids, mut finish) = (String::new(), String::new(), 0, None);
        while let Some(chunk) = stream.next().await {
            for choice in chunk?.choices {
                finish = choice.finish_reason.or(finish);
                for part in choice.delta.tool_calls.unwrap_or_default() {
                    ensure!(part.index == 0, "{part:?}");
                    if part.id.is_some() {
                        ensure!(matches!(part.r#type, Some(FunctionType::Function)), "{part:?}");
                        ids += 1;
                    }
                    let function = part.function.unwrap_or_default();
                    name.push_str(&function.name.unwrap_or_default());
                    text.push_str(&function.arguments.unwrap_or_default());
                }
            }
        }
        ensure!((name.as_str(), &text, ids) == ("add", &call.function.arguments, 1), "{name}, {text}, {ids} ids");
        ensure!(finish == Some(FinishReason::ToolCalls), "{finish:?}");
        Ok(())
    }

    async fn completions(&self) -> Outcome {
        let base = json!({"model": self.model, "prompt": "fn add(a: i32", "temperature": 0.0, "max_tokens": 12, "logprobs": 2});
        let asked = |more| request::<CreateCompletionRequest>(base.clone(), more);
        let plain = self.client.completions().create(asked(json!({}))?).await?;
        let lists = plain.choices[0].logprobs.as_ref().ok_or("no log-probabilities")?;
        ensure!(lists.tokens.concat() == plain.choices[0].text, "{:?}", plain.choices[0]);
        let mut stream = self.client.completions().create_stream(asked(json!({}))?).await?;
        let mut text = String::new();
        while let Some(chunk) = stream.next().await {
            chunk?.choices.iter().for_each(|choice| text.push_str(&choice.text));
        }
        ensure!(text == plain.choices[0].text, "{text:?}, {:?}", plain.choices[0].text);
        let several =
            self.client.completions().create(asked(json!({"prompt": ["fn add(a: i32", "fn main() {"]}))?).await?;
        ensure!(several.choices.len() == 2 && several.choices[0].text == text, "{several:?}");
        Ok(())
    }

    async fn embeddings(&self) -> Outcome {
        let asked = |format| {
            let base = json!({"model": self.model, "input": ["one", "two"], "encoding_format": format});
            request::<CreateEmbeddingRequest>(base, json!({}))
        };
        let plain = self.client.embeddings().create(asked("float")?).await?;
        ensure!(plain.data.len() == 2 && plain.usage.prompt_tokens > 0, "{:?}", plain.usage);
        let packed = self.client.embeddings().create_base64(asked("base64")?).await?;
        ensure!(packed.data.len() == 2, "{} embeddings", packed.data.len());
        for (plain, packed) in plain.data.iter().zip(packed.data) {
            let packed: Vec<f32> = packed.embedding.into();
            ensure!(plain.embedding == packed, "{} numbers, {} in base64", plain.embedding.len(), packed.len());
        }
        Ok(())
    }

    async fn models(&self) -> Outcome {
        let listed = self.client.models().list().await?;
        ensure!(listed.data.iter().any(|model| model.id == self.model), "{listed:?}");
        let one = self.client.models().retrieve(&self.model).await?;
        ensure!(one.id == self.model && one.object == "model", "{one:?}");
        Ok(())
    }

    async fn files(&self) -> Outcome {
        let text = "{\"prompt\": \"fn a()\", \"completion\": \" {}\"}\n".repeat(3);
        let file = FileInput::from_vec_u8("rows.jsonl".into(), text.clone().into_bytes());
        let created = self
            .client
            .files()
            .create(CreateFileRequest { file, purpose: FilePurpose::FineTune, expires_after: None })
            .await?;
        ensure!(created.filename == "rows.jsonl" && created.bytes == Some(text.len() as u32), "{created:?}");
        let listed = self.client.files().list().await?;
        ensure!(listed.data.iter().any(|file| file.id == created.id), "{listed:?}");
        ensure!(self.client.files().retrieve(&created.id).await?.id == created.id, "{created:?}");
        ensure!(self.client.files().content(&created.id).await? == text.as_bytes(), "the content differs");
        ensure!(self.client.files().delete(&created.id).await?.deleted, "{created:?}");
        let error = api_error(self.client.files().retrieve(&created.id).await)?;
        ensure!(error.status_code == 404, "{error}");
        Ok(())
    }

    async fn errors(&self) -> Outcome {
        let long = json!([{"role": "user", "content": "word ".repeat(20_000)}]);
        for (more, status, code, param) in [
            (json!({"model": "gpt-9"}), 404, Some("model_not_found"), Some("model")),
            (json!({"temperature": 3.0}), 400, None, Some("temperature")),
            (json!({"messages": long}), 400, Some("context_length_exceeded"), Some("messages")),
        ] {
            let plain = api_error(self.client.chat().create(self.chat(more.clone())?).await)?;
            let streamed = match self.client.chat().create_stream(self.chat(more)?).await {
                // the crate may return the error of the connection with the first chunk
                Ok(mut stream) => api_error(stream.next().await.ok_or("an empty stream")?)?,
                Err(error) => api_error(Err::<(), _>(error))?,
            };
            for error in [plain, streamed] {
                ensure!(error.status_code == status, "{error}");
                ensure!(
                    error.api_error.code.as_deref() == code && error.api_error.param.as_deref() == param,
                    "{error}"
                );
                ensure!(error.api_error.r#type.is_some() && !error.api_error.message.is_empty(), "{error}");
            }
        }
        let config = OpenAIConfig::new().with_api_base(format!("{}/v1", self.root)).with_api_key("wrong");
        let error = api_error(Client::with_config(config).models().list().await)?;
        ensure!(error.status_code == 401 && error.api_error.code.as_deref() == Some("invalid_api_key"), "{error}");
        Ok(())
    }
}

fn report(name: &str, outcome: Outcome) -> bool {
    match &outcome {
        Ok(()) => println!("ok       async-openai: {name}"),
        Err(error) => println!("FAILED   async-openai: {name}: {error}"),
    }
    outcome.is_ok()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let root = std::env::var("SERVER_ROOT")?;
    let key = std::env::var("SERVER_KEY")?;
    let model = std::env::var("SERVER_MODEL").unwrap_or_else(|_| "nano".into());
    let config = OpenAIConfig::new().with_api_base(format!("{root}/v1")).with_api_key(key);
    let checks = Checks { client: Client::with_config(config), root, model };
    let passed = [
        report("a stream equals the plain answer", checks.stream_equals_plain_answer().await),
        report("tool calls", checks.tool_calls().await),
        report("completions", checks.completions().await),
        report("embeddings", checks.embeddings().await),
        report("models", checks.models().await),
        report("files", checks.files().await),
        report("errors", checks.errors().await),
    ];
    let failed = passed.iter().filter(|passed| !**passed).count();
    println!("async-openai: {} passed, {failed} failed, 0 skipped", passed.len() - failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
