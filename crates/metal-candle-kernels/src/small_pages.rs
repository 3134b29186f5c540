//! Prevents large, sparsely used buffers from using huge pages.

/// Asks the operating system to use small pages for `values`, so that only written parts use memory. With huge pages enabled for
/// all memory (Linux), a write would otherwise allocate and clear 2 MB. No effect on other systems.
pub fn prefer_small_pages<T>(values: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = (values.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (values.as_ptr() as usize + size_of_val(values)) / PAGE * PAGE;
        if start < end {
            // SAFETY: the pages are part of the slice, and the advice does not change their contents.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_NOHUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = values;
}
