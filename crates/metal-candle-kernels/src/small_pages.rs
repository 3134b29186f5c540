//! Keeps large buffers of which little is used from taking whole huge pages.

/// Asks the operating system to back `values` by small pages, so that only what is written takes memory. Where huge pages are
/// on for all memory (Linux), a write takes and clears 2 MB otherwise. Elsewhere this does nothing.
pub fn prefer_small_pages<T>(values: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = (values.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (values.as_ptr() as usize + size_of_val(values)) / PAGE * PAGE;
        if start < end {
            // SAFETY: the pages are part of the slice, and the advice does not change what they hold.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_NOHUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = values;
}
