//! The parts of Jinja2 and Python that chat templates use: filters, tests, methods, formats and printing of values.

mod args;
mod filters;
mod format;
mod methods;
mod python;
mod source;
mod strftime;

pub(super) use filters::install;
pub(super) use methods::method;
pub(super) use python::is_namespace;
pub(super) use source::{GENERATION_END, GENERATION_MARKS, GENERATION_START, STORABLE, rewritten};
pub(super) use strftime::strftime_local;
