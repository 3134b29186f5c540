//! The building blocks of a layer. Each part is one file with its tensors, forward pass, saved state, backward pass,
//! decode step and memory.

pub(super) mod attention;
pub(super) mod feed_forward;
pub(super) mod gated_mlp;
pub(super) mod input;
pub(super) mod inputs;
pub(super) mod linear;
pub(super) mod norm;
pub(super) mod pass;
pub(super) mod plain_mlp;
pub(super) mod step;
pub(super) mod sublayer;
