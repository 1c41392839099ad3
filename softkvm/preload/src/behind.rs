//! The functions of libc behind those of ours that wrap them.

use std::ffi::CStr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::c_void;

/// A function of libc that stands behind ours.
pub(crate) struct Behind {
    name: &'static CStr,
    /// The version that programs are linked to, where older ones are there too.
    version: Option<&'static CStr>,
    at: AtomicPtr<c_void>,
}

impl Behind {
    pub(crate) const fn new(name: &'static CStr, version: Option<&'static CStr>) -> Self {
        Self {
            name,
            version,
            at: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Its address. The process ends if libc has none, which the loader would not have linked then.
    pub(crate) fn address(&self) -> *mut c_void {
        let known = self.at.load(Ordering::Acquire);
        if !known.is_null() {
            return known;
        }
        let name = self.name.as_ptr();
        let found = match self.version {
            // SAFETY: both are strings.
            Some(version) => unsafe { libc::dlvsym(libc::RTLD_NEXT, name, version.as_ptr()) },
            // SAFETY: the name is a string.
            None => unsafe { libc::dlsym(libc::RTLD_NEXT, name) },
        };
        if found.is_null() {
            std::process::abort();
        }
        self.at.store(found, Ordering::Release);
        found
    }
}

/// Calls the function of libc of that name.
macro_rules! behind {
    ($name:ident $(@ $version:literal)?, ($($arg:expr),*): fn($($ty:ty),*) -> $ret:ty) => {{
        static BEHIND: $crate::behind::Behind = $crate::behind::Behind::new(
            match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("a name without zeros"),
            },
            $crate::behind::behind!(@version $($version)?),
        );
        // SAFETY: the address is that of libc's function of this name, which has this type; the arguments are the caller's.
        unsafe {
            let function = std::mem::transmute::<*mut libc::c_void, unsafe extern "C-unwind" fn($($ty),*) -> $ret>(BEHIND.address());
            function($($arg),*)
        }
    }};
    (@version) => { None };
    (@version $version:literal) => { Some($version) };
}

pub(crate) use behind;
