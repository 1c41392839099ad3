//! What a teardown gave back, and what it had to leave with the firmware.

use alloc::vec::Vec;
use core::fmt;

use crate::{Error, Hpa, Tech, VmId};

/// A thing that firmware still owns and that must therefore never be used again.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leaked {
    /// A page of host memory: guest page, Secure-EPT page, or control page.
    Page(Hpa),
    /// A KeyID or ASID.
    Key(u32),
    /// A resource of the operating system: a file descriptor that could not be closed.
    Handle(i64),
    /// A VM with all that it holds, where nobody keeps a finer account.
    Vm(VmId),
}

/// One leak, with the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leak {
    /// What is leaked.
    pub what: Leaked,
    /// The operation that failed: a SEAMCALL leaf, an SP command or a system call.
    pub operation: &'static str,
    /// How it failed, with the firmware's status word where there is one.
    pub error: Error,
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            Leaked::Page(hpa) => write!(f, "page {hpa}")?,
            Leaked::Key(key) => write!(f, "key {key}")?,
            Leaked::Handle(handle) => write!(f, "handle {handle}")?,
            Leaked::Vm(vm) => write!(f, "VM {vm}")?,
        }
        write!(f, " leaked: {}: {}", self.operation, self.error)
    }
}

/// The account that a VM's teardown closes.
#[must_use = "a leak that nobody looks at is a leak that nobody knows of"]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeReport {
    /// Which VM it was.
    pub vm: VmId,
    /// What held it.
    pub tech: Tech,
    /// 4 KiB pages that went back to the host over the VM's life, each usable again. With the leaked
    /// ones they are all that the VM ever took.
    pub pages_freed: u64,
    /// KeyIDs or ASIDs that went back to their pool.
    pub keys_freed: u32,
    /// What did not come back.
    pub leaks: Vec<Leak>,
}

impl FreeReport {
    /// A report of nothing yet.
    pub const fn new(vm: VmId, tech: Tech) -> Self {
        Self {
            vm,
            tech,
            pages_freed: 0,
            keys_freed: 0,
            leaks: Vec::new(),
        }
    }

    /// The report on a VM that is left to firmware whole: one leak that stands for all of it. For
    /// back ends without an account of their own.
    pub fn abandoned(vm: VmId, tech: Tech, error: Error) -> Self {
        let mut report = Self::new(vm, tech);
        report.leaks.push(Leak {
            what: Leaked::Vm(vm),
            operation: "mmu_release_hkid",
            error,
        });
        report
    }

    /// Whether everything came back.
    pub fn is_clean(&self) -> bool {
        self.leaks.is_empty()
    }
}
