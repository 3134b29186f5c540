//! Adapters: LoRA and its file formats.
