//! The server over real connections, with the built-in model.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::result_large_err)]

mod adapters;
mod answers;
mod limits;
mod prefix_storage;
mod running;
