//! What belongs to the process. A forked child begins with nothing: locks may be held for ever that other threads of its
//! parent had.

use std::collections::BTreeMap;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Mutex, OnceLock};

use kvm_ops_softkvm::{File, Kernel};
use libc::c_int;

use crate::event::Watcher;
use crate::lent::Book;

/// The process' part of everything.
pub(crate) struct Own {
    /// The number of the process.
    pub(crate) id: u32,
    /// The kernel, from the first device that is opened on. `None`: the program's devices are left alone.
    pub(crate) kernel: OnceLock<Option<Kernel>>,
    pub(crate) files: Mutex<BTreeMap<c_int, File>>,
    pub(crate) book: Mutex<Book>,
    /// Mappings of guest_memfds, by their first address: their length.
    pub(crate) mappings: Mutex<Vec<(usize, usize)>>,
    pub(crate) watcher: OnceLock<Option<Watcher>>,
    /// The watcher's thread runs.
    pub(crate) watches: OnceLock<bool>,
    /// Held while a file is open that tells of a number: its own may be that of an eventfd that the program has just closed,
    /// which another thread would take for a file that is no eventfd.
    pub(crate) asking: Mutex<()>,
}

static OWN: AtomicPtr<Own> = AtomicPtr::new(ptr::null_mut());

/// Set in a forked child of a process that had something.
static CHILD: AtomicBool = AtomicBool::new(false);

extern "C" fn forked() {
    CHILD.store(true, Ordering::Release);
    // What the parent had is never dropped here: it is the parent's.
    OWN.store(ptr::null_mut(), Ordering::Release);
}

pub(crate) fn is_child() -> bool {
    CHILD.load(Ordering::Acquire)
}

/// What the process has. `None` as long as it has used none of it.
pub(crate) fn found() -> Option<&'static Own> {
    // SAFETY: null, or from a box that is never freed.
    unsafe { OWN.load(Ordering::Acquire).as_ref() }
}

/// What the process has, which begins now if there was none.
pub(crate) fn own() -> &'static Own {
    static HANDLER: OnceLock<()> = OnceLock::new();
    if let Some(own) = found() {
        return own;
    }
    // SAFETY: the handler stores to two places, and does nothing else. A child inherits it.
    HANDLER.get_or_init(|| unsafe {
        libc::pthread_atfork(None, None, Some(forked));
    });
    let new = Box::into_raw(Box::new(Own {
        id: std::process::id(),
        kernel: OnceLock::new(),
        files: Mutex::default(),
        book: Mutex::default(),
        mappings: Mutex::default(),
        watcher: OnceLock::new(),
        watches: OnceLock::new(),
        asking: Mutex::default(),
    }));
    let null = ptr::null_mut();
    match OWN.compare_exchange(null, new, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: the box is never freed.
        Ok(_) => unsafe { &*new },
        Err(other) => {
            // SAFETY: nothing else has the new one, and the other is never freed.
            unsafe {
                drop(Box::from_raw(new));
                &*other
            }
        }
    }
}
