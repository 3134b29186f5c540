//! An OpenAI-compatible HTTP server for one model and any number of adapters.
//!
//! [`Server::new`] starts the engine, [`Server::serve`] answers requests on a listener, and [`Server::router`] returns the
//! routes for use in your own server.

// `json!` borrows its values
#![allow(clippy::needless_pass_by_value)]

mod adapters;
mod answer;
mod app;
mod auth;
mod body;
mod config;
mod document;
mod engine;
mod error;
mod fields;
mod files;
mod foreign;
mod grammar;
mod ids;
mod jobs;
mod metrics;
mod page;
mod parts;
mod prompt;
mod routes;
mod sampling;
mod served;
mod server;
mod sse;
mod tools;
mod turn;
mod untrusted;

pub use config::{ApiKey, JobsConfig, ServerConfig};
pub use server::Server;
