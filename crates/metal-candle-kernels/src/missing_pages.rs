//! Replaces pages of a mapped file that no longer exist, because the file was truncated, with zeros.
//!
//! The system raises SIGBUS when such a page is read. The handler maps a page of zeros if the address is in a watched map, and
//! forwards any other SIGBUS to the previous handler. Each new map and each check for lost pages installs the handler again if
//! another part of the program replaced it.

#[cfg(unix)]
pub(crate) use unix::Watch;

#[cfg(unix)]
mod unix {
    use std::mem::MaybeUninit;
    use std::ptr;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

    /// Maximum number of watched maps; a checkpoint has at most about two hundred files.
    const SLOTS: usize = 1024;

    /// The addresses of a map, `start..end`; a start of 0 is a free slot.
    struct Slot {
        is_taken: AtomicBool,
        start: AtomicUsize,
        end: AtomicUsize,
        has_lost_pages: AtomicBool,
    }

    static WATCHED: [Slot; SLOTS] = [const {
        Slot {
            is_taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            has_lost_pages: AtomicBool::new(false),
        }
    }; SLOTS];
    static PAGE: AtomicUsize = AtomicUsize::new(0);
    /// The previous handler and its flags.
    static PREVIOUS: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
    static PREVIOUS_FLAGS: AtomicI32 = AtomicI32::new(0);
    /// Whether the previous handler is running. If it calls this handler in turn, the default action ends the process.
    static IS_FORWARDING: AtomicBool = AtomicBool::new(false);

    /// Watches a map until it is dropped.
    #[derive(Debug)]
    pub(crate) struct Watch(Option<usize>);

    impl Watch {
        pub(crate) fn new(map: &[u8]) -> Self {
            install();
            let start = map.as_ptr() as usize;
            let is_free = |slot: &Slot| !slot.is_taken.swap(true, Ordering::AcqRel);
            let number = if map.is_empty() { None } else { WATCHED.iter().position(is_free) };
            if let Some(number) = number {
                let slot = &WATCHED[number];
                slot.has_lost_pages.store(false, Ordering::Release);
                slot.end.store(start + map.len(), Ordering::Release);
                slot.start.store(start, Ordering::Release);
            }
            Self(number)
        }

        /// Whether a page of the map was missing when it was read.
        pub(crate) fn has_lost_pages(&self) -> bool {
            install();
            self.0.is_some_and(|number| WATCHED[number].has_lost_pages.load(Ordering::Acquire))
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            if let Some(number) = self.0 {
                WATCHED[number].start.store(0, Ordering::Release);
                WATCHED[number].is_taken.store(false, Ordering::Release);
            }
        }
    }

    /// Installs [`on_bus_error`] as the handler of SIGBUS, if it is not installed.
    fn install() {
        static INSTALLING: Mutex<()> = Mutex::new(());

        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
        let handler = handler as usize;
        let Some(current) = action() else { return };
        if current.sa_sigaction == handler {
            return;
        }
        let _guard = INSTALLING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(current) = action().filter(|current| current.sa_sigaction != handler) else { return };
        // SAFETY: the call only returns a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        PAGE.store(usize::try_from(page).unwrap_or(4096), Ordering::Release);
        PREVIOUS_FLAGS.store(current.sa_flags, Ordering::Release);
        PREVIOUS.store(current.sa_sigaction, Ordering::Release);
        // SAFETY: the structure is plain data. The handler makes only async-signal-safe calls, and its state is already stored.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handler;
            // on the thread's signal stack, which std sets up
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
        }
    }

    /// The current SIGBUS action.
    fn action() -> Option<libc::sigaction> {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: the call only fills the structure in, which is plain data.
        unsafe { (libc::sigaction(libc::SIGBUS, ptr::null(), action.as_mut_ptr()) == 0).then(|| action.assume_init()) }
    }

    extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: the system passes a valid `info`, and the address belongs to SIGBUS.
        let address = unsafe { (*info).si_addr() } as usize;
        for slot in &WATCHED {
            let (start, end) = (slot.start.load(Ordering::Acquire), slot.end.load(Ordering::Acquire));
            if start != 0 && (start..end).contains(&address) {
                let page = PAGE.load(Ordering::Acquire);
                let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                slot.has_lost_pages.store(true, Ordering::Release);
                // SAFETY: the page is in a map that its owner only reads, and is unmapped with the map.
                let found = unsafe {
                    libc::mmap((address / page * page) as *mut libc::c_void, page, libc::PROT_READ, flags, -1, 0)
                };
                if found != libc::MAP_FAILED {
                    return;
                }
            }
        }
        let (previous, flags) = (PREVIOUS.load(Ordering::Acquire), PREVIOUS_FLAGS.load(Ordering::Acquire));
        let is_none = matches!(previous, libc::SIG_DFL | libc::SIG_IGN);
        if is_none || IS_FORWARDING.swap(true, Ordering::AcqRel) {
            // the read is repeated without a handler, which ends the process
            // SAFETY: the structure is plain data.
            unsafe {
                let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const action, ptr::null_mut());
            }
            return;
        }
        // SAFETY: the program registered this handler, and it is called as its flags say.
        unsafe {
            if flags & libc::SA_SIGINFO == 0 {
                std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(previous)(signal);
            } else {
                type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                std::mem::transmute::<usize, Handler>(previous)(signal, info, context);
            }
        }
        IS_FORWARDING.store(false, Ordering::Release);
    }

    #[cfg(test)]
    #[allow(clippy::unwrap_used)]
    mod tests {
        use super::*;

        /// A program may install its own handler at any time.
        #[test]
        fn a_handler_installed_later_is_forwarded_to() {
            extern "C" fn other(_: libc::c_int) {}

            install();
            let other: extern "C" fn(libc::c_int) = other;
            let ours = action().unwrap().sa_sigaction;
            let before = (PREVIOUS.load(Ordering::Acquire), PREVIOUS_FLAGS.load(Ordering::Acquire));
            // SAFETY: the handler does nothing.
            unsafe { libc::signal(libc::SIGBUS, other as usize) };
            let watch = Watch::new(&[1]);
            assert_eq!(action().unwrap().sa_sigaction, ours);
            // SAFETY: as above; it is restored at once, because no SIGBUS of another test may occur in between.
            unsafe { libc::signal(libc::SIGBUS, other as usize) };
            assert!(!watch.has_lost_pages());
            assert_eq!(action().unwrap().sa_sigaction, ours);
            assert_eq!(PREVIOUS.load(Ordering::Acquire), other as usize);
            // SAFETY: sends a signal that is handled.
            assert_eq!(unsafe { libc::raise(libc::SIGBUS) }, 0);
            PREVIOUS_FLAGS.store(before.1, Ordering::Release);
            PREVIOUS.store(before.0, Ordering::Release);
        }
    }
}

/// For systems without this signal.
#[cfg(not(unix))]
#[derive(Debug)]
pub(crate) struct Watch;

#[cfg(not(unix))]
impl Watch {
    pub(crate) fn new(_: &[u8]) -> Self {
        Self
    }

    pub(crate) fn has_lost_pages(&self) -> bool {
        false
    }
}
