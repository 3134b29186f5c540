//! What the fuzz targets run, and the mutator of the bounded run on stable.

mod bodies;
mod mutate;

pub use bodies::*;
pub use mutate::Mutator;

use std::sync::Once;

/// Runs one input under a fuzzer, whose panic hook aborts; a panic that the library turns into an error is none.
pub fn run(body: fn(&[u8]) -> bool, data: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let abort = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !metal_candle::files::is_guarded() {
                abort(panic);
            }
        }));
    });
    body(data);
}
