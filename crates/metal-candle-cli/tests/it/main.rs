//! Tests of the program, run as its users run it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]

mod bench;
mod chat;
mod data;
mod devices;
mod documents;
mod errors;
mod events;
mod exports;
mod fixture;
#[cfg(feature = "hub")]
mod hub;
#[cfg(unix)]
mod interrupted;
#[cfg(feature = "serve")]
mod jobs;
mod kv_cache;
mod levels;
mod markdown;
mod matmul_precision;
mod methods;
mod models;
mod nano;
mod packages;
mod plan;
mod profile;
mod runs;
#[cfg(feature = "hub")]
#[path = "../../../metal-candle/tests/it/stand_in_hub.rs"]
mod stand_in_hub;
mod texts;
mod train;
