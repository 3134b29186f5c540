//! Training: losses, optimizer, schedules, checkpoints and the trainer.

mod checkpoint;
mod config;
mod evaluation;
mod gradients;
mod in_place;
mod last_layers;
mod loss;
mod metrics_file;
mod optimizer;
mod progress;
mod report;
mod run;
mod run_folder;
mod scheduler;
mod trained;
mod trainer;

pub use crate::adapters::{CheckpointMetadata, LoRAAdapter, LoRAAdapterConfig, Start, TargetModule};
pub use checkpoint::{load_checkpoint, save_checkpoint};
pub use config::TrainingConfig;
pub use evaluation::{Evaluation, evaluate};
pub use gradients::global_norm;
pub use last_layers::LastLayers;
pub use loss::{bits_per_byte, cross_entropy, cross_entropy_rows, perplexity};
pub use optimizer::{
    AdafactorConfig, AdamConfig, AdamWConfig, LionConfig, MuonConfig, MuonScale, Optimizer, OptimizerConfig,
    ParameterGroup, ScheduleFreeAdamWConfig, SgdConfig,
};
pub use report::{EvaluationMetrics, StepMetrics, StopReason, TrainingEvent, TrainingMetrics};
pub use scheduler::{DecayShape, LRScheduler};
pub use trained::{Parameter, Trained};
pub use trainer::Trainer;
