//! Handles Ctrl-C: the first one requests a stop, the second one exits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, PoisonError};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Called before Ctrl-C exits at once.
static LAST_WORDS: Mutex<Option<Box<dyn Fn() + Send>>> = Mutex::new(None);

/// Called by Ctrl-C instead, if set.
static DIVERTED: Mutex<Option<Box<dyn Fn() + Send>>> = Mutex::new(None);

static HANDLER: Once = Once::new();

/// The exit code after Ctrl-C.
const INTERRUPTED: i32 = 130;

/// From now on, Ctrl-C calls `last_words` and exits with success.
pub(crate) fn end_with(last_words: impl Fn() + Send + 'static) {
    *LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(last_words));
    handle();
}

/// From now on, Ctrl-C is recorded instead of exiting.
pub(crate) fn listen() {
    *LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner) = None;
    handle();
}

fn handle() {
    HANDLER.call_once(|| {
        // if no handler can be set, Ctrl-C still exits at once
        let _ = ctrlc::set_handler(|| match DIVERTED.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(diverted) => diverted(),
            None => press(),
        });
    });
}

/// From now on, Ctrl-C calls `instead`; [`press`] has the previous effect.
pub(crate) fn divert(instead: impl Fn() + Send + 'static) {
    *DIVERTED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(instead));
    handle();
}

/// Has the effect of Ctrl-C.
pub(crate) fn press() {
    let last_words = LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(last_words) = last_words.as_ref() {
        last_words();
        std::process::exit(0);
    }
    ask();
}

/// Has the effect of Ctrl-C after [`listen`]: requests a stop, and exits the second time.
pub(crate) fn ask() {
    if ASKED.swap(true, Ordering::SeqCst) {
        crate::screen::leave();
        std::process::exit(INTERRUPTED);
    }
}

/// Whether Ctrl-C was pressed since [`listen`] or [`forget`].
pub(crate) fn is_asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Clears the request after the stop.
pub(crate) fn forget() {
    ASKED.store(false, Ordering::SeqCst);
}
