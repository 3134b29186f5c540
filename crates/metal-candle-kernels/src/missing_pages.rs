//! Pages of mapped files that are gone because the file was shortened: they read as zeros instead of ending the process.
//!
//! The system reports a read of such a page by the signal SIGBUS. The handler, installed with the first map, puts a page of
//! zeros in place if the address is in a watched map, and leaves any other SIGBUS to the previous handler.

#[cfg(unix)]
pub(crate) use unix::Watch;

#[cfg(unix)]
mod unix {
    use std::mem::MaybeUninit;
    use std::ptr;
    use std::sync::Once;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    /// Most maps that are watched at a time; the files of a checkpoint are some two hundred at most.
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
    static INSTALL: Once = Once::new();
    /// Written once before the handler is installed.
    static mut PREVIOUS: MaybeUninit<libc::sigaction> = MaybeUninit::uninit();

    /// Watches a map until it is dropped.
    #[derive(Debug)]
    pub(crate) struct Watch(Option<usize>);

    impl Watch {
        pub(crate) fn new(map: &[u8]) -> Self {
            INSTALL.call_once(install);
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

    fn install() {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        PAGE.store(usize::try_from(page).unwrap_or(4096), Ordering::Release);
        // SAFETY: the structures are plain data that the calls fill in; the previous action is stored before the new one can
        // run. The handler makes only calls that are allowed in one.
        unsafe {
            let previous = (&raw mut PREVIOUS).cast::<libc::sigaction>();
            if libc::sigaction(libc::SIGBUS, ptr::null(), previous) != 0 {
                return;
            }
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
            action.sa_sigaction = handler as usize;
            // on the thread's own stack for signals, which std sets up
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
        }
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
                // SAFETY: the page lies in a map that its owner only reads, and is given back with the map.
                let found = unsafe {
                    libc::mmap((address / page * page) as *mut libc::c_void, page, libc::PROT_READ, flags, -1, 0)
                };
                if found != libc::MAP_FAILED {
                    return;
                }
            }
        }
        // SAFETY: written before this handler was installed; the previous handler is called as it asked to be.
        unsafe {
            let previous = &*(&raw const PREVIOUS).cast::<libc::sigaction>();
            match previous.sa_sigaction {
                libc::SIG_DFL | libc::SIG_IGN => {
                    // read again without this handler, which ends the process
                    let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
                    action.sa_sigaction = libc::SIG_DFL;
                    libc::sigaction(signal, &raw const action, ptr::null_mut());
                }
                handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                    std::mem::transmute::<usize, Handler>(handler)(signal, info, context);
                }
                handler => std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler)(signal),
            }
        }
    }
}

/// Where there is no such signal.
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
