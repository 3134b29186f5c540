//! The command line: global flags and the list of commands. Each command module defines its own flags.

use crate::commands::bench::BenchArguments;
use crate::commands::chat::ChatArguments;
use crate::commands::convert::ConvertArguments;
use crate::commands::data::DataArguments;
use crate::commands::eval::EvalArguments;
use crate::commands::fuse::FuseArguments;
use crate::commands::generate::GenerateArguments;
use crate::commands::info::InfoArguments;
use crate::commands::logits::LogitsArguments;
use crate::commands::quantize::QuantizeArguments;
use crate::commands::runs::RunsArguments;
#[cfg(feature = "serve")]
use crate::commands::serve::ServeArguments;
use crate::commands::template::TemplateCommandArguments;
use crate::commands::tokenize::{DetokenizeArguments, TokenizeArguments};
use crate::commands::train::{PlanArguments, TrainArguments};
use clap::{Parser, Subcommand, ValueEnum};

/// Fine-tune, run and serve language models on Metal, CUDA or the CPU.
#[derive(Debug, Parser)]
#[command(name = "metal-candle", version = env!("METAL_CANDLE_VERSION"), max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  metal-candle train
  metal-candle generate --adapter runs/001 --prompt \"/// Returns the number of values.\"
  metal-candle train --model Qwen/Qwen2.5-Coder-0.5B-Instruct --data my-data --rank 16
  metal-candle data check my-data/train.jsonl

Results go to standard output, messages and progress to standard error.
Exit codes: 0 success, 1 invalid input, 2 failure of the program or the device.")]
pub(crate) struct Arguments {
    /// Print one JSON object to standard output instead of text.
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,

    /// Print only errors and results.
    #[arg(long, short, global = true, help_heading = "Output")]
    pub(crate) quiet: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fine-tune a model with LoRA or train all of its weights.
    #[command(after_help = "\
Without any flag the built-in model is fine-tuned on its sample data: under two minutes on two CPU cores.

Examples:
  metal-candle train
  metal-candle train --data my-data --steps 300 --rank 16 --target-modules all-linear
  metal-candle train --model ./Qwen2.5-Coder-0.5B --data chats.jsonl --output runs/chats
  metal-candle train --config runs/001/config.toml --learning-rate 5e-4
  metal-candle train --resume runs/001
  metal-candle train --model ./Qwen2.5-Coder-0.5B --data my-data --batch-tokens 16384 --num-devices 2

--data is a JSONL file, which is split randomly, or a folder with train.jsonl and optionally
valid.jsonl and test.jsonl. Rows are chats, prompt and completion, plain text, alpaca or sharegpt.

The run folder contains adapter/ (in PEFT's format; model/ with --full), checkpoints/, config.toml,
metrics.jsonl, run.json, loss.svg and an event file for TensorBoard. Ctrl-C saves a checkpoint and stops
the run. --tui shows a dashboard; `metal-candle runs` lists and compares runs.")]
    Train(Box<TrainArguments>),

    /// Estimate the memory and time of a training run without running it.
    #[command(after_help = "\
Examples:
  metal-candle plan
  metal-candle plan --model ./Qwen2.5-Coder-0.5B --data my-data --memory 8GB
  metal-candle plan --config runs/001/config.toml --full --measure 0

The flags are the same as for `train`. Peak memory is computed from the lengths of the packed rows and listed by part.
If the run does not fit, the plan uses a smaller micro-batch and then checkpoints blocks, as `train` does. The time is
measured on a few micro-batches; no file is written.")]
    Plan(Box<PlanArguments>),

    /// Answer or continue a prompt.
    #[command(after_help = "\
Examples:
  metal-candle generate --prompt \"Returns the length of the string.\"
  metal-candle generate --adapter runs/001 --prompt \"Opens a file.\" --temperature 0.7 --seed 1
  metal-candle generate --model ./model --raw --prompt \"fn main() {\" --max-tokens 64 --stop $'\\n}'
  git diff | metal-candle generate --model ./model --prompt - --json
  metal-candle generate --model ./model --prompts questions.jsonl --json > answers.jsonl
  metal-candle generate --model ./model --tools tools.json --template-var enable_thinking=false --prompt \"What time is it?\"

Each line of a --prompts file is an object with `prompt` or `messages`, and optionally `tools` and
`chat_template_kwargs`. Answers are printed in the order of the lines; with --json, one object per line.")]
    Generate(GenerateArguments),

    /// Chat with a model over several turns.
    #[command(after_help = "\
In the conversation, /help lists the commands. If standard input is not a terminal, each line is a turn.
With --json, each turn prints one JSON object on one line.

Examples:
  metal-candle chat --model Qwen/Qwen2.5-Coder-0.5B-Instruct
  metal-candle chat --model ./model --adapter runs/001 --system \"You answer in one line.\"")]
    Chat(ChatArguments),

    /// Serve a model and its adapters over HTTP, with the APIs of OpenAI, Anthropic and llama.cpp.
    #[cfg(feature = "serve")]
    #[command(after_help = "\
Examples:
  metal-candle serve
  metal-candle serve --model ./Qwen2.5-Coder-0.5B --adapter docs=runs/001 --adapter tests=runs/002
  metal-candle serve --model smollm2.gguf --context 2048 --slots 8 --port 8081
  metal-candle serve --model ./model --host 0.0.0.0 --api-key-file keys.toml --metrics

Clients select the model or an adapter by name. Requests for different adapters share one batch. On the CPU, an
answer does not depend on the other requests in the batch.")]
    Serve(Box<ServeArguments>),

    /// Merge an adapter into the weights of its model.
    #[command(after_help = "\
Example:
  metal-candle fuse --model ./Qwen2.5-Coder-0.5B --adapter runs/001 --output ./merged

The output folder contains config.json, the tokenizer's files and model.safetensors in the model's dtype; other
programs load it like any model. The logits of the merged model are compared with those of model and adapter.")]
    Fuse(FuseArguments),

    /// Convert a model or an adapter to GGUF, safetensors, PEFT or mlx-lm.
    #[command(after_help = "\
Examples:
  metal-candle convert --model ./Qwen2.5-Coder-0.5B --format gguf --output qwen.gguf
  metal-candle convert --model ./smollm2.gguf --format safetensors --output ./smollm2
  metal-candle convert --model ./smollm2.gguf --adapter runs/001 --format gguf --output adapter.gguf
  metal-candle convert --model ./Qwen2.5-Coder-0.5B --adapter runs/001 --format mlx --output ./for-mlx
  metal-candle convert --model ./Qwen2.5-Coder-0.5B --adapter ./from-mlx --format peft --output ./for-peft

Weights keep their types unless --dtype or --quantize is given; quantized weights become f32 in a safetensors file. The
logits of source and result are compared. If types change, both are also compared on text, as in `quantize`.

A GGUF adapter is for `llama-cli --lora` and similar programs. GGUF and mlx-lm store low-rank updates only: adapters
with trained modules, token rows or biases, or with updates of a tied embedding are refused; `fuse` merges them.")]
    Convert(ConvertArguments),

    /// Quantize a model, or a model with a merged adapter, to a GGUF file.
    #[command(after_help = "\
Examples:
  metal-candle quantize --model ./Qwen2.5-Coder-1.5B --type q4_k_m --output qwen-q4_k_m.gguf
  metal-candle quantize --model ./model --adapter runs/001 --type q5_k_m --output tuned.gguf --auto
  metal-candle quantize --model ./model --type iq4_xs --calibration book.txt --output model-iq4_xs.gguf
  metal-candle quantize --model ./model --type q4_k_m --tensor-type ffn_down=q6_k --output model.gguf

Types have the same names and meaning as in llama.cpp. Source and result are compared on text before anything is
written; the figures are printed, stored in the file's metadata and written to NAME.proof.json. With an adapter, the
command fails if too little of its change survives rounding: see --min-survival.")]
    Quantize(Box<QuantizeArguments>),

    /// Measure loss, perplexity and bits per byte on a dataset or a text file.
    #[command(after_help = "\
Examples:
  metal-candle eval --data my-data/test.jsonl --adapter runs/001
  metal-candle eval --model ./model --data book.txt

For a folder, the test split is used, or else the valid split.")]
    Eval(EvalArguments),

    /// Write the logits of token ids to a safetensors file.
    #[command(after_help = "\
Example:
  metal-candle logits --model ./model --ids 1,2,3 --out logits.safetensors

The file contains one f32 tensor `logits` of shape [tokens, vocab].")]
    Logits(LogitsArguments),

    /// List and compare training runs.
    #[command(args_conflicts_with_subcommands = true)]
    #[command(after_help = "\
Examples:
  metal-candle runs
  metal-candle runs --sort valid --html runs.html
  metal-candle runs compare runs/001 runs/002
  metal-candle runs experiments/a experiments/b --json

A run is running, done, stopped (`train --resume` continues it), failed, or killed: its process exited without
writing a final status. Losses are in nats per token; the training loss is the mean of the last ten steps. The page of
--html overlays the curves of all runs; it needs no network.")]
    Runs(RunsArguments),

    /// Print conversations as rendered by a chat template: text, token ids, trained tokens.
    #[command(after_help = "\
Examples:
  metal-candle template chat.json --model ./model --add-generation-prompt
  metal-candle template rows.jsonl --model ./model --template-var enable_thinking=false --json
  echo '[{\"role\": \"user\", \"content\": \"hi\"}]' | metal-candle template --json --chat-template other.jinja

With --json, each row prints one object on one line: `text`, `ids` and `trained`, one boolean per id. For a JSONL file,
each object also has its `line`; a row that cannot be rendered has an `error` instead, and the exit code is 1.
Without --json, trained tokens are printed in brackets.")]
    Template(TemplateCommandArguments),

    /// Print the token ids of a text.
    #[command(after_help = "\
Examples:
  metal-candle tokenize 'fn main() {' --model ./model
  metal-candle tokenize --file book.txt --add-special-tokens=false --json
  metal-candle tokenize 'fn main' | metal-candle detokenize")]
    Tokenize(TokenizeArguments),

    /// Print the text of token ids.
    #[command(after_help = "\
Examples:
  metal-candle detokenize 1,2,3 --model ./model
  metal-candle detokenize --skip-special-tokens '[1, 2, 3]'")]
    Detokenize(DetokenizeArguments),

    /// Check datasets.
    Data(DataArguments),

    /// Show the device, the features of this build, and a model's sizes and memory.
    Info(InfoArguments),

    /// Measure prefill, decode and LoRA training on this machine.
    #[command(after_help = crate::commands::bench::HELP)]
    Bench(BenchArguments),

    /// Print a completion script for a shell, or the man page.
    #[command(after_help = "\
Examples:
  metal-candle completions bash > ~/.local/share/bash-completion/completions/metal-candle
  metal-candle completions man > ~/.local/share/man/man1/metal-candle.1")]
    Completions {
        /// The shell, or `man` for the man page.
        #[arg(value_name = "SHELL")]
        kind: Completions,
    },
}

/// What `completions` prints.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Completions {
    /// A completion script for bash.
    Bash,
    /// A completion script for elvish.
    Elvish,
    /// A completion script for fish.
    Fish,
    /// A completion script for PowerShell.
    Powershell,
    /// A completion script for zsh.
    Zsh,
    /// The man page of all commands.
    Man,
}
