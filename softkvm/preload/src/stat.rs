//! What a program that asks is told of the devices: that they are devices. Their descriptors are files in memory.

use libc::{c_char, c_int, c_uint};

use crate::files;
use crate::raw;
use kvm_ops_softkvm::FileKind;

/// A character device that all may read and write.
const MODE: u32 = libc::S_IFCHR | 0o666;
/// The major number of miscellaneous devices, and KVM's minor number. That of /dev/sev is the system's to choose.
const MISC: u32 = 10;
const KVM_MINOR: u32 = 232;
const SEV_MINOR: u32 = 124;

/// The minor number, if the descriptor is a device of ours.
fn minor(fd: c_int) -> Option<u32> {
    match files::get(fd)?.kind() {
        FileKind::System => Some(KVM_MINOR),
        FileKind::Sev => Some(SEV_MINOR),
        _ => None,
    }
}

macro_rules! fstat {
    ($($name:ident $stat:ty;)*) => {
        $(
            /// # Safety
            /// As libc's function.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(fd: c_int, stat: *mut $stat) -> c_int {
                let args = [fd as u64, stat as u64, 0, 0, 0, 0];
                // SAFETY: the caller's promise.
                let done = unsafe { raw::syscall(libc::SYS_fstat, args) } as c_int;
                if done == 0 && let Some(minor) = minor(fd) {
                    // SAFETY: the call has just filled it.
                    let stat = unsafe { &mut *stat };
                    stat.st_mode = MODE;
                    stat.st_rdev = libc::makedev(MISC, minor);
                    stat.st_size = 0;
                }
                done
            }
        )*
    };
}

fstat! {
    fstat libc::stat;
    fstat64 libc::stat64;
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn statx(
    fd: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    stat: *mut libc::statx,
) -> c_int {
    let args = [
        fd as u64,
        path as u64,
        flags as u64,
        mask.into(),
        stat as u64,
        0,
    ];
    // SAFETY: the caller's promise.
    let done = unsafe { raw::syscall(libc::SYS_statx, args) } as c_int;
    // SAFETY: a path that the call took is null, which newer kernels take for empty, or a string.
    let is_empty = || path.is_null() || unsafe { *path } == 0;
    if done == 0
        && flags & libc::AT_EMPTY_PATH != 0
        && is_empty()
        && let Some(minor) = minor(fd)
    {
        // SAFETY: the call has just filled it.
        let stat = unsafe { &mut *stat };
        stat.stx_mode = MODE as u16;
        (stat.stx_rdev_major, stat.stx_rdev_minor) = (MISC, minor);
        stat.stx_size = 0;
    }
    done
}
