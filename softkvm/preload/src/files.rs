//! Which descriptors are ours, and what they stand for.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{MutexGuard, PoisonError};

use kvm_ops::sim::SimHost;
use kvm_ops::{Host, Vendor};
use kvm_ops_softkvm::{Device, Faults, File, Kernel, Process};
use libc::c_int;
use soft_amd_sp::Platform;

use crate::caller::Caller;
use crate::own::own;
use crate::{cpuid, record};

/// Numbers from here on are not given out.
const LIMIT: usize = 1 << 16;

/// A bit for each descriptor that is ours, or was the parent's. Read without a lock by every call of the program.
static OURS: [AtomicU64; LIMIT / 64] = [const { AtomicU64::new(0) }; LIMIT / 64];

fn place(fd: c_int) -> Option<(&'static AtomicU64, u64)> {
    let fd = usize::try_from(fd).ok().filter(|fd| *fd < LIMIT)?;
    Some((&OURS[fd / 64], 1 << (fd % 64)))
}

pub(crate) fn is_ours(fd: c_int) -> bool {
    place(fd).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
}

fn lock() -> MutexGuard<'static, BTreeMap<c_int, File>> {
    own().files.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn get(fd: c_int) -> Option<File> {
    is_ours(fd).then(|| lock().get(&fd).cloned()).flatten()
}

/// Gives a descriptor its meaning. False for a number that is too large.
pub(crate) fn insert(fd: c_int, file: File) -> bool {
    let Some((word, bit)) = place(fd) else {
        return false;
    };
    // What the number stood for was closed past us, and may be the last of its VM: not under the lock.
    let old = lock().insert(fd, file);
    word.fetch_or(bit, Ordering::AcqRel);
    drop(old);
    true
}

/// The number is closed, or about to be.
pub(crate) fn forget(fd: c_int) {
    let Some((word, bit)) = place(fd) else {
        return;
    };
    if word.fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
        let old = lock().remove(&fd);
        drop(old);
    }
}

/// [`forget`] for every number of a range.
pub(crate) fn forget_range(first: u32, last: u32) {
    for fd in first..=last.min(LIMIT as u32 - 1) {
        forget(fd as c_int);
    }
}

/// The kernel that the environment asks for. `None`: the program's `/dev/kvm` is left alone.
fn kernel() -> Option<&'static Kernel> {
    let kernel = own().kernel.get_or_init(|| {
        let host = match std::env::var("KVM_OPS_WITH").ok()?.as_str() {
            "amd" => amd()?,
            "intel" => SimHost::new(Vendor::Intel),
            _ => return None,
        };
        let kernel = match record::out() {
            Some(out) => record::or_exit(Kernel::recording(host, faults(), out)),
            None => Kernel::with_faults(host, faults()),
        };
        cpuid::take_over(kernel.encryption_leaf());
        Some(kernel)
    });
    kernel.as_ref()
}

/// The plan of faults that the environment names. One that cannot be used ends the program, which would go on as if there were
/// none.
fn faults() -> Faults {
    let Some(path) = std::env::var_os("KVM_OPS_INJECT") else {
        return Faults::default();
    };
    let text = std::fs::read_to_string(&path).map_err(|error| error.to_string());
    let faults = text.and_then(|text| Faults::parse(&text).map_err(|error| error.to_string()));
    faults.unwrap_or_else(|error| {
        eprintln!("KVM_OPS_INJECT: {}: {error}", path.display());
        std::process::exit(2);
    })
}

/// Takes a range of the program's memory from its guests.
pub(crate) fn invalidate(address: u64, bytes: u64) {
    if let Some(kernel) = kernel() {
        kernel.invalidate(Caller::default().address_space(), address, bytes);
    }
}

/// Commands of `KVM_MEMORY_ENCRYPT_OP` are TDX's, not SEV's.
pub(crate) fn is_intel() -> bool {
    if let Some(player) = record::player() {
        return player.is_intel();
    }
    kernel().is_some_and(|kernel| kernel.host().vendor() == Vendor::Intel)
}

/// Bytes of the AMD machine, which holds what its guests encrypt: as much as they ask for. It costs what is written.
const MEMORY: u64 = 8 << 30;

/// An AMD machine. Programs choose a guest's policy by whether the real machine has SMT, so the
/// platform has it too or not.
fn amd() -> Option<SimHost> {
    let control = std::fs::read_to_string("/sys/devices/system/cpu/smt/control");
    let smt = control.is_ok_and(|control| control.trim() == "on");
    let mut platform = Platform::builder().smt(smt).memory(MEMORY);
    if let Ok(seed) = std::env::var("KVM_OPS_SEED") {
        platform = platform.seed(seed.parse().ok()?);
    }
    SimHost::builder(Vendor::Amd).sev(platform).build().ok()
}

/// The device that a path names, opened with these flags.
pub(crate) fn device(path: &CStr, flags: c_int) -> Option<File> {
    let reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
    let device = match path.to_bytes() {
        b"/dev/kvm" => Device::Kvm,
        b"/dev/sev" => Device::Sev,
        _ => return None,
    };
    if let Some(player) = record::player() {
        return player.open(device);
    }
    match device {
        Device::Kvm => kernel().map(Kernel::open_kvm),
        Device::Sev if reads => kernel().and_then(Kernel::open_sev_for_reading),
        Device::Sev => kernel().and_then(Kernel::open_sev),
    }
}
