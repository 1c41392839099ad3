//! The functions of libc that are ours. Each looks at a descriptor or a path, and makes the system
//! call itself unless it is one of KVM's.

use std::ffi::CStr;
use std::sync::{MutexGuard, PoisonError};

use kvm_ops_softkvm::{File, FileKind};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::ioctl::KVM_RUN;
use kvm_ops_uapi::memory::gmem_flags;
use libc::{c_char, c_int, c_uint, c_ulong, c_void, mode_t, off_t, size_t, ssize_t};

use crate::area::Area;
use crate::caller::Caller;
use crate::own::{self, Own};
use crate::raw::{self, fail};
use crate::{clock, files, lent, log, memory, places, signals};

/// The descriptor of a device that a path names. `None` for other paths.
///
/// # Safety
/// The path is a string, or null.
unsafe fn open_device(path: *const c_char, flags: c_int) -> Option<c_int> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let path = unsafe { CStr::from_ptr(path) };
    let file = clock::own_work(|| files::device(path, flags))?;
    let fd = match raw::memfd() {
        Ok(fd) => fd,
        Err(errno) => return Some(fail(errno)),
    };
    if flags & libc::O_CLOEXEC == 0 {
        raw::keep_on_exec(fd);
    }
    Some(name(fd, file))
}

/// Gives a new descriptor its meaning, or closes it.
fn name(fd: c_int, file: File) -> c_int {
    if files::insert(fd, file) {
        return fd;
    }
    raw::close(fd);
    fail(libc::EMFILE)
}

macro_rules! open {
    ($($name:ident)*) => {
        $(
            /// # Safety
            /// As libc's function.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
                // SAFETY: the caller's promise.
                unsafe { openat(libc::AT_FDCWD, path, flags, mode) }
            }
        )*
    };
}

open! { open open64 }

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn openat(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    // SAFETY: the caller's promise.
    if let Some(fd) = unsafe { open_device(path, flags) } {
        return fd;
    }
    let args = [dir as u64, path as u64, flags as u64, mode.into(), 0, 0];
    // SAFETY: the caller's promise.
    unsafe { raw::syscall(libc::SYS_openat, args) as c_int }
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn openat64(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { openat(dir, path, flags, mode) }
}

/// `open` as glibc's checked headers call it.
///
/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { openat(libc::AT_FDCWD, path, flags, 0) }
}

/// As [`__open_2`].
///
/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { openat(libc::AT_FDCWD, path, flags, 0) }
}

/// Answers an ioctl of a descriptor that is ours.
fn answer(fd: c_int, number: u32, argument: u64) -> Result<c_int, Errno> {
    // In a child the address space is another one.
    let gone = || match own::is_child() {
        true => Errno::EIO,
        false => Errno::EBADF,
    };
    let file = files::get(fd).ok_or_else(gone)?;
    let answer = clock::own_work(|| file.ioctl(&Caller::default(), number, argument));
    log::ioctl(fd, number, argument, &answer);
    match answer {
        Ok(value) => Ok(value as c_int),
        Err(refusal) => Err(refusal.errno()),
    }
}

/// A thread that is cancelled in `KVM_RUN` unwinds from here, where there is nothing to drop.
///
/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn ioctl(
    fd: c_int,
    request: c_ulong,
    argument: *mut c_void,
) -> c_int {
    if !files::is_ours(fd) {
        let args = [fd as u64, request, argument as u64, 0, 0, 0];
        // SAFETY: the caller's promise.
        return unsafe { raw::syscall(libc::SYS_ioctl, args) as c_int };
    }
    // As in the kernel, the number has 32 bits.
    let number = request as u32;
    let runs = number == KVM_RUN.number();
    if runs {
        signals::begin();
    }
    let answer = answer(fd, number, argument as u64);
    if runs {
        signals::end();
    }
    match answer {
        Ok(value) => value,
        Err(errno) => fail(errno.0),
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn close(fd: c_int) -> c_int {
    // Forgotten first: once it is closed, the number may be another thread's.
    files::forget(fd);
    raw::close(fd)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if flags as c_uint & libc::CLOSE_RANGE_CLOEXEC == 0 {
        files::forget_range(first, last);
    }
    let args = [first.into(), last.into(), flags as u64, 0, 0, 0];
    // SAFETY: no memory is passed.
    unsafe { raw::syscall(libc::SYS_close_range, args) as c_int }
}

/// The new number means what the old one does.
fn duplicated(old: c_int, new: c_int) -> c_int {
    match files::get(old) {
        Some(file) if new >= 0 => name(new, file),
        _ => new,
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: no memory is passed.
    let new = unsafe { raw::syscall(libc::SYS_dup, [fd as u64, 0, 0, 0, 0, 0]) as c_int };
    duplicated(fd, new)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    if fd != to {
        files::forget(to);
    }
    // SAFETY: no memory is passed.
    let new = unsafe { raw::syscall(libc::SYS_dup2, [fd as u64, to as u64, 0, 0, 0, 0]) as c_int };
    duplicated(fd, new)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    if fd != to {
        files::forget(to);
    }
    let args = [fd as u64, to as u64, flags as u64, 0, 0, 0];
    // SAFETY: no memory is passed.
    duplicated(fd, unsafe { raw::syscall(libc::SYS_dup3, args) as c_int })
}

macro_rules! fcntl {
    ($($name:ident)*) => {
        $(
            /// # Safety
            /// As libc's function.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
                let args = [fd as u64, command as u64, argument, 0, 0, 0];
                // SAFETY: the caller's promise.
                let done = unsafe { raw::syscall(libc::SYS_fcntl, args) as c_int };
                match command {
                    libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => duplicated(fd, done),
                    _ => done,
                }
            }
        )*
    };
}

fcntl! { fcntl fcntl64 }

macro_rules! fallocate {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            pub(crate) extern "C" fn $name(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
                // The system refuses these in front of every file.
                if let Some(file) = files::get(fd).filter(|_| offset >= 0 && len > 0)
                    && let Err(refusal) = file.check_fallocate(mode, offset, len)
                {
                    return fail(refusal.errno().0);
                }
                let args = [fd as u64, mode as u64, offset as u64, len as u64, 0, 0];
                // SAFETY: no memory is passed.
                unsafe { raw::syscall(libc::SYS_fallocate, args) as c_int }
            }
        )*
    };
}

fallocate! { fallocate fallocate64 }

/// Mappings of guest_memfds.
fn mappings(own: &Own) -> MutexGuard<'_, Vec<(usize, usize)>> {
    own.mappings.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Maps a guest_memfd: the file itself, or, where its pages are private, a file without pages, of
/// which every touch is SIGBUS.
///
/// # Safety
/// As `mmap`.
unsafe fn map_guest_memfd(
    file: &File,
    (address, len): (*mut c_void, size_t),
    (prot, flags): (c_int, c_int),
    (fd, offset): (c_int, off_t),
) -> *mut c_void {
    let is_shared = matches!(
        flags & libc::MAP_TYPE,
        libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE
    );
    if let Err(refusal) = file.check_mmap(is_shared) {
        raw::set_errno(refusal.errno().0);
        return libc::MAP_FAILED;
    }
    let starts_shared = file
        .guest_memfd()
        .is_some_and(|(_, f)| f & gmem_flags::INIT_SHARED != 0);
    let empty = if starts_shared {
        None
    } else {
        raw::memfd().ok()
    };
    let behind = empty.unwrap_or(fd);
    // SAFETY: the caller's promise.
    let at = unsafe { raw::mmap(address, len, prot, flags, behind, offset) };
    if let Some(empty) = empty {
        raw::close(empty);
    }
    if at != libc::MAP_FAILED {
        mappings(own::own()).push((at as usize, len));
    }
    at
}

/// Maps a vCPU's run area: its file, but for the page that all vCPUs of a VM share.
///
/// # Safety
/// As `mmap`.
unsafe fn map_vcpu(
    file: &File,
    (address, len): (*mut c_void, size_t),
    (prot, flags): (c_int, c_int),
    (fd, offset): (c_int, off_t),
) -> *mut c_void {
    // SAFETY: the caller's promise.
    let at = unsafe { raw::mmap(address, len, prot, flags, fd, offset) };
    let area = file.run_area().and_then(|area| Area::of(&**area));
    if at != libc::MAP_FAILED
        && let Some(area) = area
        // SAFETY: the mapping is of the area's file, and new.
        && !unsafe { area.complete(at, len, offset, prot) }
    {
        // SAFETY: as above.
        unsafe { raw::syscall(libc::SYS_munmap, [at as u64, len as u64, 0, 0, 0, 0]) };
        raw::set_errno(libc::ENOMEM);
        return libc::MAP_FAILED;
    }
    at
}

macro_rules! mmap {
    ($($name:ident)*) => {
        $(
            /// # Safety
            /// As libc's function.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(
                address: *mut c_void,
                len: size_t,
                prot: c_int,
                flags: c_int,
                fd: c_int,
                offset: off_t,
            ) -> *mut c_void {
                let address = places::wish(address, len, flags);
                let ours = (flags & libc::MAP_ANONYMOUS == 0).then(|| files::get(fd)).flatten();
                let map = || match ours {
                    Some(file) if file.kind() == FileKind::GuestMemfd => {
                        let (place, how) = ((address, len), (prot, flags));
                        // SAFETY: the caller's promise.
                        unsafe { map_guest_memfd(&file, place, how, (fd, offset)) }
                    }
                    Some(file) if file.kind() == FileKind::Vcpu => {
                        let (place, how) = ((address, len), (prot, flags));
                        // SAFETY: the caller's promise.
                        unsafe { map_vcpu(&file, place, how, (fd, offset)) }
                    }
                    Some(_) => {
                        raw::set_errno(libc::ENODEV);
                        libc::MAP_FAILED
                    }
                    // SAFETY: the caller's promise.
                    _ => unsafe { raw::mmap(address, len, prot, flags, fd, offset) },
                };
                match flags & libc::MAP_FIXED {
                    0 => map(),
                    _ => lent::take_away(address as u64, len as u64, map),
                }
            }
        )*
    };
}

mmap! { mmap mmap64 }

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munmap(address: *mut c_void, len: size_t) -> c_int {
    if let Some(own) = own::found() {
        mappings(own).retain(|(at, _)| *at != address as usize);
    }
    let args = [address as u64, len as u64, 0, 0, 0, 0];
    // SAFETY: the caller's promise.
    let unmap = || unsafe { raw::syscall(libc::SYS_munmap, args) as c_int };
    lent::take_away(address as u64, len as u64, unmap)
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mprotect(address: *mut c_void, len: size_t, prot: c_int) -> c_int {
    let args = [address as u64, len as u64, prot as u64, 0, 0, 0];
    // SAFETY: the caller's promise.
    let protect = || unsafe { raw::syscall(libc::SYS_mprotect, args) as c_int };
    lent::take_away(address as u64, len as u64, protect)
}

/// # Safety
/// As libc's function, whose last argument is there with MREMAP_FIXED alone.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mremap(
    address: *mut c_void,
    len: size_t,
    new_len: size_t,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    let args = [
        address as u64,
        len as u64,
        new_len as u64,
        flags as u64,
        to as u64,
        0,
    ];
    // SAFETY: the caller's promise.
    let remap = || unsafe { raw::syscall(libc::SYS_mremap, args) as *mut c_void };
    let from_old = || lent::take_away(address as u64, len as u64, remap);
    match flags & libc::MREMAP_FIXED {
        0 => from_old(),
        _ => lent::take_away(to as u64, new_len as u64, from_old),
    }
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn madvise(address: *mut c_void, len: size_t, advice: c_int) -> c_int {
    let at = address as usize;
    let is_gmem = |(start, len): &(usize, usize)| (*start..*start + *len).contains(&at);
    let has_gmem = || own::found().is_some_and(|own| mappings(own).iter().any(is_gmem));
    if advice == libc::MADV_COLLAPSE && has_gmem() {
        return fail(libc::EINVAL);
    }
    let args = [address as u64, len as u64, advice as u64, 0, 0, 0];
    // SAFETY: the caller's promise.
    unsafe { raw::syscall(libc::SYS_madvise, args) as c_int }
}

/// Reads a statistics file from an offset, or from its position. `None` for another file.
fn read_stats(
    fd: c_int,
    buffer: *mut c_void,
    len: size_t,
    offset: Option<off_t>,
) -> Option<ssize_t> {
    let file = files::get(fd).filter(|file| file.kind() == FileKind::Stats)?;
    let Ok(offset) = offset.map(u64::try_from).transpose() else {
        return Some(fail(libc::EINVAL) as ssize_t);
    };
    let read = file.read(offset, len).ok()?;
    Some(match memory::write(buffer as u64, &read) {
        Ok(()) => read.len() as ssize_t,
        Err(_) => fail(libc::EFAULT) as ssize_t,
    })
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, len: size_t) -> ssize_t {
    if files::is_ours(fd) {
        let stats = read_stats(fd, buffer, len, None);
        return stats.unwrap_or_else(|| fail(libc::EINVAL) as ssize_t);
    }
    let args = [fd as u64, buffer as u64, len as u64, 0, 0, 0];
    // SAFETY: the caller's promise.
    unsafe { raw::syscall(libc::SYS_read, args) as ssize_t }
}

macro_rules! pread {
    ($($name:ident)*) => {
        $(
            /// # Safety
            /// As libc's function.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(
                fd: c_int,
                buffer: *mut c_void,
                len: size_t,
                offset: off_t,
            ) -> ssize_t {
                if files::is_ours(fd) {
                    let stats = read_stats(fd, buffer, len, Some(offset));
                    return stats.unwrap_or_else(|| fail(libc::ESPIPE) as ssize_t);
                }
                let args = [fd as u64, buffer as u64, len as u64, offset as u64, 0, 0];
                // SAFETY: the caller's promise.
                unsafe { raw::syscall(libc::SYS_pread64, args) as ssize_t }
            }
        )*
    };
}

pread! { pread pread64 }

/// Files have no contents to write or seek in.
macro_rules! refused {
    ($($name:ident ($($arg:ident: $ty:ty),*) -> $ret:ty = $call:ident, $errno:ident;)*) => {
        $(
            /// # Safety
            /// As libc's function.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name(fd: c_int, $($arg: $ty),*) -> $ret {
                if files::is_ours(fd) {
                    return fail(Errno::$errno.0) as $ret;
                }
                let mut args = [fd as u64, 0, 0, 0, 0, 0];
                for (to, from) in args[1..].iter_mut().zip([$($arg as u64),*]) {
                    *to = from;
                }
                // SAFETY: the caller's promise.
                unsafe { raw::syscall(libc::$call, args) as $ret }
            }
        )*
    };
}

refused! {
    write(buffer: *const c_void, len: size_t) -> ssize_t = SYS_write, EINVAL;
    pwrite(buffer: *const c_void, len: size_t, offset: off_t) -> ssize_t = SYS_pwrite64, ESPIPE;
    pwrite64(buffer: *const c_void, len: size_t, offset: off_t) -> ssize_t = SYS_pwrite64, ESPIPE;
    lseek(offset: off_t, whence: c_int) -> off_t = SYS_lseek, ESPIPE;
    lseek64(offset: off_t, whence: c_int) -> off_t = SYS_lseek, ESPIPE;
    ftruncate(len: off_t) -> c_int = SYS_ftruncate, EINVAL;
    ftruncate64(len: off_t) -> c_int = SYS_ftruncate, EINVAL;
    fchmod(mode: c_uint) -> c_int = SYS_fchmod, EINVAL;
}
