//! Ctrl-C: the first one asks for an end, the second one ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Exit code of a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// From now on Ctrl-C is noted instead of ending the program.
pub(crate) fn listen() {
    // where there can be no handler Ctrl-C ends the program at once, as it did before
    let _ = ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(INTERRUPTED);
        }
    });
}

/// Whether Ctrl-C was pressed since [`listen`] or [`forget`].
pub(crate) fn is_asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Takes note that what was to be ended has ended.
pub(crate) fn forget() {
    ASKED.store(false, Ordering::SeqCst);
}
