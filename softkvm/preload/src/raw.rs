//! System calls themselves: the names of libc are ours here.

use libc::{c_int, c_long, c_void, off_t, size_t};

pub(crate) fn errno() -> c_int {
    // SAFETY: libc's pointer to the thread's errno is valid.
    unsafe { *libc::__errno_location() }
}

pub(crate) fn set_errno(number: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = number }
}

/// Fails as a function of libc does.
pub(crate) fn fail(number: c_int) -> c_int {
    set_errno(number);
    -1
}

/// Makes a system call with up to six arguments; errno is as libc sets it.
///
/// # Safety
/// The arguments are valid for the call.
pub(crate) unsafe fn syscall(number: c_long, args: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the caller's promise.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

/// The same for a call in which the thread may be cancelled: the handler of that signal unwinds it.
///
/// # Safety
/// The arguments are valid for the call, and no caller in this library has anything to drop.
pub(crate) unsafe fn syscall_that_unwinds(number: c_long, args: [u64; 4]) -> i64 {
    unsafe extern "C-unwind" {
        fn syscall(number: c_long, ...) -> c_long;
    }
    let [a, b, c, d] = args;
    // SAFETY: the caller's promise.
    unsafe { syscall(number, a, b, c, d) }
}

pub(crate) fn close(fd: c_int) -> c_int {
    // SAFETY: closing touches no memory; a number that is not open is EBADF.
    unsafe { syscall(libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]) as c_int }
}

/// A file in memory, with no name in any directory.
pub(crate) fn memfd() -> Result<c_int, c_int> {
    let name = c"kvm-ops";
    let args = [
        name.as_ptr() as u64,
        u64::from(libc::MFD_CLOEXEC),
        0,
        0,
        0,
        0,
    ];
    // SAFETY: the name is a string.
    let fd = unsafe { syscall(libc::SYS_memfd_create, args) } as c_int;
    if fd < 0 { Err(errno()) } else { Ok(fd) }
}

pub(crate) fn set_len(fd: c_int, len: u64) -> bool {
    // SAFETY: no memory is passed.
    unsafe { syscall(libc::SYS_ftruncate, [fd as u64, len, 0, 0, 0, 0]) == 0 }
}

/// `dup3` onto a number that is ours.
pub(crate) fn dup_onto(fd: c_int, number: c_int) -> bool {
    let args = [fd as u64, number as u64, libc::O_CLOEXEC as u64, 0, 0, 0];
    // SAFETY: no memory is passed.
    unsafe { syscall(libc::SYS_dup3, args) >= 0 }
}

/// True if a write to the descriptor does not wait.
pub(crate) fn is_writable(fd: c_int) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one structure is there, and lives through the call.
    let ready = unsafe { syscall(libc::SYS_poll, [&raw mut poll as u64, 1, 0, 0, 0, 0]) };
    ready == 1 && poll.revents & libc::POLLOUT != 0
}

/// Lets a descriptor live through `execve`.
pub(crate) fn keep_on_exec(fd: c_int) {
    let args = [fd as u64, libc::F_SETFD as u64, 0, 0, 0, 0];
    // SAFETY: no memory is passed.
    unsafe { syscall(libc::SYS_fcntl, args) };
}

/// # Safety
/// As `mmap`.
pub(crate) unsafe fn mmap(
    address: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let args = [
        address as u64,
        len as u64,
        prot as u64,
        flags as u64,
        fd as u64,
        offset as u64,
    ];
    // SAFETY: the caller's promise.
    unsafe { syscall(libc::SYS_mmap, args) as *mut c_void }
}
