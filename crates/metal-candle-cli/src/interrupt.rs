//! Ctrl-C: the first one asks for an end, the second one ends the program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, PoisonError};

static ASKED: AtomicBool = AtomicBool::new(false);

/// What is done before Ctrl-C ends the program at once.
static LAST_WORDS: Mutex<Option<Box<dyn Fn() + Send>>> = Mutex::new(None);

/// What Ctrl-C does instead, if anything.
static DIVERTED: Mutex<Option<Box<dyn Fn() + Send>>> = Mutex::new(None);

static HANDLER: Once = Once::new();

/// Exit code of a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// From now on Ctrl-C calls `last_words` and ends the program as one that is done.
pub(crate) fn end_with(last_words: impl Fn() + Send + 'static) {
    *LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(last_words));
    handle();
}

/// From now on Ctrl-C is noted instead of ending the program.
pub(crate) fn listen() {
    *LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner) = None;
    handle();
}

fn handle() {
    HANDLER.call_once(|| {
        // where there can be no handler Ctrl-C ends the program at once, as it did before
        let _ = ctrlc::set_handler(|| match DIVERTED.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(diverted) => diverted(),
            None => press(),
        });
    });
}

/// From now on Ctrl-C calls `instead`, and [`press`] does what it did.
pub(crate) fn divert(instead: impl Fn() + Send + 'static) {
    *DIVERTED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(instead));
    handle();
}

/// Does what Ctrl-C does.
pub(crate) fn press() {
    let last_words = LAST_WORDS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(last_words) = last_words.as_ref() {
        last_words();
        std::process::exit(0);
    }
    ask();
}

/// Does what Ctrl-C does while it is noted: asks for an end, and the second time ends the program.
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

/// Takes note that what was to be ended has ended.
pub(crate) fn forget() {
    ASKED.store(false, Ordering::SeqCst);
}
