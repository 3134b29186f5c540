//! Trains adapters and models: [`Trainer`], losses, optimizers, schedules, checkpoints and warnings.

mod checkpoint;
mod config;
mod distributed;
mod epoch;
mod evaluation;
mod gradients;
mod in_place;
mod last_layers;
mod loss;
mod metrics_file;
mod micro_batches;
mod monitor;
mod optimizer;
mod plan;
mod progress;
mod report;
mod run;
mod run_folder;
mod run_settings;
mod samples;
mod scheduler;
mod template_check;
mod trained;
mod trainer;
mod warnings;
mod whole_parameters;

pub use crate::adapters::{CheckpointMetadata, LoRAAdapter, LoRAAdapterConfig, Start, TargetModule};
pub use checkpoint::{load_checkpoint, save_checkpoint};
pub use config::TrainingConfig;
pub use distributed::Group;
pub use evaluation::{Evaluation, evaluate};
pub use gradients::global_norm;
pub use last_layers::LastLayers;
pub use loss::{bits_per_byte, cross_entropy, cross_entropy_rows, perplexity};
pub use monitor::TrainingMonitor;
pub use optimizer::{
    AdafactorConfig, AdamConfig, AdamWConfig, LionConfig, MuonConfig, MuonScale, Optimizer, OptimizerConfig,
    ParameterGroup, ScheduleFreeAdamWConfig, SgdConfig,
};
pub use plan::TrainingPlan;
pub use report::{EvaluationMetrics, StepMetrics, StopReason, TrainingEvent, TrainingMetrics};
pub use scheduler::{DecayShape, LRScheduler};
pub use template_check::template_warning;
pub use trained::{Parameter, Trained};
pub use trainer::Trainer;
pub use warnings::{TrainingWarning, cut_rows_warning, dataset_warnings};
