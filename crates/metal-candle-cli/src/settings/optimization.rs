//! The optimizer and schedule settings of a run.

use super::TrainSettings;
use super::kinds::{DecayKind, OF_OPTIMIZERS, OF_SCHEDULES, OptimizerKind, Schedule, lora_learning_rate};
use crate::error::UserError;
use anyhow::Result;
use clap::ValueEnum;
use metal_candle::training::{
    AdafactorConfig, AdamConfig, AdamWConfig, DecayShape, LRScheduler, LionConfig, MuonConfig, OptimizerConfig,
    ScheduleFreeAdamWConfig, SgdConfig,
};
use toml::Table;

fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

impl TrainSettings {
    fn optimizer_kind(&self) -> OptimizerKind {
        self.optimizer.unwrap_or(OptimizerKind::AdamW)
    }

    fn schedule_kind(&self) -> Schedule {
        self.schedule.unwrap_or_else(|| self.optimizer_kind().default_schedule())
    }

    /// Removes settings from `table` that have no meaning with this optimizer and schedule.
    pub(super) fn leave_out_optimization(&self, table: &mut Table) {
        let mut leave_out = |names: &[&str], kept: &[&str]| {
            for name in names.iter().filter(|name| !kept.contains(name)) {
                table.remove(*name);
            }
        };
        if let Some(optimizer) = self.optimizer {
            leave_out(&OF_OPTIMIZERS, optimizer.settings());
        }
        if let Some(schedule) = self.schedule {
            leave_out(&OF_SCHEDULES, schedule.settings());
        }
    }

    /// Returns an error for settings that contradict each other.
    pub(super) fn check_optimization(&self) -> Result<()> {
        let refuse = |message: String| Err(UserError::new(message).into());
        if let Some(rate) = self.learning_rate
            && (rate < 0.0 || !rate.is_finite())
        {
            return refuse(format!("`--learning-rate`: expected a number of at least 0, found {rate:e}"));
        }
        let given = self.table()?;
        let (optimizer, schedule) = (self.optimizer_kind(), self.schedule_kind());
        for (names, allowed, with) in [
            (&OF_OPTIMIZERS[..], optimizer.settings(), format!("--optimizer {}", name(&optimizer))),
            (&OF_SCHEDULES[..], schedule.settings(), format!("--schedule {}", name(&schedule))),
        ] {
            let meaningless = names.iter().filter(|name| given.contains_key(**name) && !allowed.contains(*name));
            let flags: Vec<String> = meaningless.map(|name| format!("`--{}`", name.replace('_', "-"))).collect();
            if !flags.is_empty() {
                let verb = if flags.len() == 1 { "has" } else { "have" };
                return refuse(format!("{} {verb} no meaning with `{with}`", flags.join(", ")));
            }
        }
        Ok(())
    }

    /// Fills in the settings that do not depend on the number of steps.
    pub(super) fn complete_optimization(&mut self, is_nano: bool) -> Result<()> {
        let optimizer = *self.optimizer.get_or_insert(OptimizerKind::AdamW);
        let of_adamw = match (self.from_scratch == Some(true), self.full == Some(true), is_nano) {
            (true, _, _) => 1e-3,
            (_, true, _) => 2e-5,
            (_, _, is_nano) => lora_learning_rate(is_nano),
        };
        let learning_rate = *self.learning_rate.get_or_insert(of_adamw * optimizer.rate_to_adamw());
        let schedule = *self.schedule.get_or_insert(optimizer.default_schedule());
        if schedule.settings().contains(&"min_learning_rate") {
            // not rounded: a run of an older version is resumed only with exactly its rates
            let lowest = *self.min_learning_rate.get_or_insert(learning_rate / 10.0);
            if lowest > learning_rate {
                return Err(UserError::new(format!(
                    "`--min-learning-rate` is {lowest:e}: expected at most `--learning-rate`, which is {learning_rate:e}"
                ))
                .into());
            }
        }
        match schedule {
            Schedule::CosineRestarts => drop(self.num_cycles.get_or_insert(3)),
            Schedule::Polynomial => drop(self.power.get_or_insert(2.0)),
            Schedule::WarmupStableDecay => drop(self.decay_shape.get_or_insert(DecayKind::OneMinusSqrt)),
            _ => {}
        }
        self.decay_matrices_only.get_or_insert(false);
        self.complete_optimizer();
        Ok(())
    }

    /// Fills in the settings of the optimizer.
    fn complete_optimizer(&mut self) {
        let config = self.optimizer_config();
        let mut fill = |weight_decay, betas: Option<(f64, f64)>, eps: Option<f64>, momentum: Option<(f64, bool)>| {
            self.weight_decay = Some(weight_decay);
            (self.beta1, self.beta2) = (betas.map(|betas| betas.0), betas.map(|betas| betas.1));
            self.eps = eps;
            (self.momentum, self.nesterov) = (momentum.map(|m| m.0), momentum.map(|m| m.1));
        };
        match config {
            OptimizerConfig::AdamW(c) | OptimizerConfig::AdamW8bit(c) => {
                fill(c.weight_decay, Some((c.beta1, c.beta2)), Some(c.eps), None);
            }
            OptimizerConfig::Adam(c) => fill(c.weight_decay, Some((c.beta1, c.beta2)), Some(c.eps), None),
            OptimizerConfig::ScheduleFreeAdamW(c) => {
                fill(c.weight_decay, Some((c.beta1, c.beta2)), Some(c.eps), None);
            }
            OptimizerConfig::Sgd(c) => fill(c.weight_decay, None, None, Some((c.momentum, c.nesterov))),
            OptimizerConfig::Lion(c) => fill(c.weight_decay, Some((c.beta1, c.beta2)), None, None),
            OptimizerConfig::Adafactor(c) => fill(c.weight_decay, None, None, None),
            OptimizerConfig::Muon(c) => fill(
                c.weight_decay,
                Some((c.adamw.beta1, c.adamw.beta2)),
                Some(c.adamw.eps),
                Some((c.momentum, c.nesterov)),
            ),
            _ => {}
        }
    }

    /// Fills in the settings that depend on the number of steps.
    pub(super) fn complete_schedule_for(&mut self, total_steps: usize) {
        let settings = self.schedule_kind().settings();
        if settings.contains(&"warmup_steps") {
            self.warmup_steps.get_or_insert(total_steps / 20);
        }
        if settings.contains(&"decay_steps") {
            self.decay_steps.get_or_insert(total_steps / 5);
        }
    }

    /// The optimizer with its settings or defaults.
    pub(crate) fn optimizer_config(&self) -> OptimizerConfig {
        let set = |setting: &mut f64, given: Option<f64>| *setting = given.unwrap_or(*setting);
        macro_rules! with {
            ($config:expr, $($field:ident),+) => {{
                let mut config = $config;
                $(set(&mut config.$field, self.$field);)+
                config
            }};
        }
        match self.optimizer_kind() {
            OptimizerKind::AdamW => {
                OptimizerConfig::AdamW(with!(AdamWConfig::default(), beta1, beta2, eps, weight_decay))
            }
            OptimizerKind::AdamW8bit => {
                OptimizerConfig::AdamW8bit(with!(AdamWConfig::default(), beta1, beta2, eps, weight_decay))
            }
            OptimizerKind::Adam => OptimizerConfig::Adam(with!(AdamConfig::default(), beta1, beta2, eps, weight_decay)),
            OptimizerKind::ScheduleFreeAdamW => OptimizerConfig::ScheduleFreeAdamW(with!(
                ScheduleFreeAdamWConfig::default(),
                beta1,
                beta2,
                eps,
                weight_decay
            )),
            OptimizerKind::Sgd => {
                let mut config = with!(SgdConfig::default(), momentum, weight_decay);
                config.nesterov = self.nesterov.unwrap_or(config.nesterov);
                OptimizerConfig::Sgd(config)
            }
            OptimizerKind::Lion => OptimizerConfig::Lion(with!(LionConfig::default(), beta1, beta2, weight_decay)),
            OptimizerKind::Adafactor => OptimizerConfig::Adafactor(with!(AdafactorConfig::default(), weight_decay)),
            OptimizerKind::Muon => {
                let mut config = with!(MuonConfig::default(), momentum, weight_decay);
                config.nesterov = self.nesterov.unwrap_or(config.nesterov);
                config.adamw = with!(config.adamw, beta1, beta2, eps, weight_decay);
                OptimizerConfig::Muon(config)
            }
        }
    }

    /// The schedule of `total_steps` steps. Call [`TrainSettings::complete_for`] first.
    pub(crate) fn scheduler(&self, total_steps: usize) -> LRScheduler {
        let (high, low) = (self.learning_rate.unwrap_or(0.0), self.min_learning_rate.unwrap_or(0.0));
        let warmup_steps = self.warmup_steps.unwrap_or(0);
        match self.schedule_kind() {
            Schedule::Constant => LRScheduler::constant(high),
            Schedule::WarmupConstant => LRScheduler::linear(warmup_steps, total_steps, high, high),
            Schedule::Linear => LRScheduler::linear(warmup_steps, total_steps, high, low),
            Schedule::Cosine => LRScheduler::cosine(total_steps, high, low),
            Schedule::WarmupCosine => LRScheduler::warmup_cosine(warmup_steps, total_steps, high, low),
            Schedule::CosineRestarts => {
                LRScheduler::cosine_restarts(warmup_steps, total_steps, high, low, self.num_cycles.unwrap_or(3))
            }
            Schedule::Polynomial => {
                LRScheduler::polynomial(warmup_steps, total_steps, high, low, self.power.unwrap_or(2.0))
            }
            Schedule::WarmupStableDecay => {
                let decay_steps = self.decay_steps.unwrap_or(total_steps / 5);
                let shape = match self.decay_shape {
                    Some(DecayKind::Linear) => DecayShape::Linear,
                    Some(DecayKind::Cosine) => DecayShape::Cosine,
                    Some(DecayKind::OneMinusSqrt) | None => DecayShape::OneMinusSqrt,
                };
                LRScheduler::warmup_stable_decay(warmup_steps, total_steps, decay_steps, high, low, shape)
            }
            Schedule::InverseSqrt => LRScheduler::inverse_sqrt(warmup_steps, high),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn settings(text: &str) -> TrainSettings {
        TrainSettings::parse(text).unwrap()
    }

    #[test]
    fn settings_without_meaning_are_refused_by_name() {
        for (text, said) in [
            ("momentum = 0.5", "`--momentum` has no meaning with `--optimizer adamw`"),
            (
                "optimizer = \"sgd\"\nbeta1 = 0.5\neps = 1e-6",
                "`--beta1`, `--eps` have no meaning with `--optimizer sgd`",
            ),
            ("optimizer = \"lion\"\neps = 1e-6", "`--eps` has no meaning with `--optimizer lion`"),
            ("optimizer = \"adafactor\"\nbeta2 = 0.9", "`--beta2` has no meaning with `--optimizer adafactor`"),
            ("power = 2.0", "`--power` has no meaning with `--schedule warmup-cosine`"),
            (
                "schedule = \"wsd\"\nnum_cycles = 2",
                "`--num-cycles` has no meaning with `--schedule warmup-stable-decay`",
            ),
            (
                "optimizer = \"schedule-free-adamw\"\nmin_learning_rate = 1e-5",
                "`--min-learning-rate` has no meaning with `--schedule warmup-constant`",
            ),
        ] {
            assert_eq!(settings(text).check_optimization().unwrap_err().to_string(), said);
        }
    }

    #[test]
    fn flags_drop_settings_of_the_file_without_meaning() {
        let file =
            settings("optimizer = \"sgd\"\nmomentum = 0.5\nweight-decay = 0.2\nschedule = \"polynomial\"\npower = 3.0");
        let flags = TrainSettings { optimizer: Some(OptimizerKind::Lion), ..Default::default() };
        let both = flags.over(&file).unwrap();
        assert_eq!((both.momentum, both.weight_decay, both.power), (None, Some(0.2), Some(3.0)));
        let flags = TrainSettings { schedule: Some(Schedule::Linear), ..Default::default() };
        let both = flags.over(&file).unwrap();
        assert_eq!((both.momentum, both.power), (Some(0.5), None));
    }

    #[test]
    fn each_optimizer_uses_all_of_its_settings() {
        for kind in OptimizerKind::value_variants() {
            let mut complete = TrainSettings { optimizer: Some(*kind), ..Default::default() };
            complete.complete_optimization(false).unwrap();
            complete.check_optimization().unwrap();
            let config = complete.optimizer_config();
            assert_eq!(config.name(), name(kind));
            assert_eq!(config, TrainSettings { optimizer: Some(*kind), ..Default::default() }.optimizer_config());
            let table = complete.table().unwrap();
            assert_eq!(table["optimizer"].as_str(), Some(config.name()));
            for setting in kind.settings().iter().chain(&["weight_decay", "learning_rate"]) {
                assert!(table.contains_key(*setting), "{kind:?} {setting}");
            }
            // a setting changes the optimizer
            for setting in kind.settings().iter().filter(|name| **name != "nesterov") {
                let other = settings(&format!("optimizer = \"{}\"\n{setting} = 0.123", config.name()));
                assert_ne!(other.optimizer_config(), config, "{setting}");
            }
        }
    }

    /// Derived settings are not saved, so they must stay what they were when a run started.
    #[test]
    fn derived_rates_stay_the_same() {
        let rates = |text: &str, is_nano| {
            let mut complete = settings(text);
            complete.complete_optimization(is_nano).unwrap();
            [complete.learning_rate, complete.min_learning_rate].map(|rate| rate.unwrap().to_string())
        };
        assert_eq!(rates("", true), ["0.003", "0.00030000000000000003"]);
        assert_eq!(rates("optimizer = \"lion\"", true)[1], "0.00008999999999999999");
    }

    #[test]
    fn each_schedule_uses_its_settings() {
        for schedule in Schedule::value_variants() {
            let mut complete = TrainSettings { schedule: Some(*schedule), ..Default::default() };
            complete.complete_optimization(false).unwrap();
            complete.complete_schedule_for(100);
            complete.check_optimization().unwrap();
            let table = complete.table().unwrap();
            assert!(schedule.settings().iter().all(|setting| table.contains_key(*setting)), "{schedule:?}");
            let rates: Vec<f64> = (0..100).map(|step| complete.scheduler(100).learning_rate(step)).collect();
            let starts_low = schedule.settings().contains(&"warmup_steps");
            assert_eq!(rates[0] < 1e-4, starts_low, "{schedule:?}");
            assert!((rates[5] - 2e-4).abs() < 2e-6, "{schedule:?}");
        }
        let mut restarts = settings("schedule = \"cosine-restarts\"\nnum-cycles = 2\nwarmup-steps = 0");
        restarts.complete_optimization(false).unwrap();
        assert!((restarts.scheduler(100).learning_rate(50) - 2e-4).abs() < 1e-12);
        let mut stable =
            settings("schedule = \"wsd\"\ndecay-steps = 10\ndecay-shape = \"linear\"\nmin-learning-rate = 0.0");
        stable.complete_optimization(false).unwrap();
        stable.complete_schedule_for(100);
        assert!((stable.scheduler(100).learning_rate(90) - 2e-4).abs() < 1e-12);
        assert!((stable.scheduler(100).learning_rate(95) - 1e-4).abs() < 1e-12);
    }
}
