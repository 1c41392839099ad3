//! How much memory the program may pin.

use kvm_ops_softkvm::PinLimits;

use crate::raw;

const PAGE: u64 = 4096;
/// The layout of `capget` with 64 capabilities (`_LINUX_CAPABILITY_VERSION_3`).
const VERSION: u32 = 0x2008_0522;
const CAP_IPC_LOCK: u32 = 14;

#[repr(C)]
struct CapHeader {
    version: u32,
    /// 0: the calling thread.
    pid: i32,
}

/// Of 32 capabilities.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// RLIMIT_MEMLOCK does not bind who has CAP_IPC_LOCK.
fn may_lock_all() -> bool {
    let mut header = CapHeader {
        version: VERSION,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    let args = [
        (&raw mut header) as u64,
        data.as_mut_ptr() as u64,
        0,
        0,
        0,
        0,
    ];
    // SAFETY: the two are of the version's layout, and live until the call returns.
    let done = unsafe { raw::syscall(libc::SYS_capget, args) };
    done == 0 && data[0].effective >> CAP_IPC_LOCK & 1 != 0
}

fn locked() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is the call's, and lives until it returns.
    let done = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    match limit.rlim_cur {
        _ if done != 0 => u64::MAX,
        libc::RLIM_INFINITY => u64::MAX,
        bytes => bytes / PAGE,
    }
}

pub(crate) fn of_process() -> PinLimits {
    // SAFETY: no memory is passed.
    let total = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    PinLimits {
        total: u64::try_from(total).unwrap_or(u64::MAX),
        locked: if may_lock_all() { u64::MAX } else { locked() },
    }
}
