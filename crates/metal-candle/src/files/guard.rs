//! Turns panics of dependencies that read untrusted input into errors.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Counts the nested guards of a thread, also when a panic unwinds.
struct Scope;

impl Scope {
    fn enter() -> Self {
        DEPTH.with(|depth| depth.set(depth.get() + 1));
        Self
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        DEPTH.with(|depth| depth.set(depth.get() - 1));
    }
}

/// Whether this thread runs inside [`guard`]. A panic hook should then print nothing: the caller gets an error.
pub fn is_guarded() -> bool {
    // a terminating thread has no guards left
    DEPTH.try_with(|depth| depth.get() > 0).unwrap_or(false)
}

/// Runs `work`, which passes untrusted input to a dependency and does not leave the caller's data half changed.
///
/// # Errors
/// `work` panicked; the error is the sanitized panic message.
pub fn guard<T>(work: impl FnOnce() -> T) -> std::result::Result<T, String> {
    let scope = Scope::enter();
    let outcome = catch_unwind(AssertUnwindSafe(work));
    drop(scope);
    outcome.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        super::sanitize(text.unwrap_or("a dependency panicked"))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::{guard, is_guarded};

    #[test]
    fn a_panic_becomes_an_error_and_ends_the_scope() {
        assert_eq!(guard(is_guarded), Ok(true));
        let message = guard(|| guard(|| panic!("no \u{1b}[31m{}", 1)).map(|()| 0)).unwrap();
        assert_eq!(message, Err("no \\u{1b}[31m1".to_string()));
        assert!(!is_guarded());
    }
}
