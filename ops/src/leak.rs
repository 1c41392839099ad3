//! The report of a teardown: the things given back, and the things left with the firmware.

use alloc::vec::Vec;
use core::fmt;

use crate::{Error, Hpa, Result, Tech, VmId};

/// A thing that firmware still owns and that must therefore never be used again.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leaked {
    /// A 4 KiB page of host memory: guest page, Secure-EPT page, or control page.
    Page(Hpa),
    /// A KeyID or ASID.
    Key(u32),
    /// A resource of the operating system: a file descriptor that could not be closed.
    Handle(i64),
    /// A VM with all that it holds, from a back end that keeps no finer account.
    Vm(VmId),
}

/// One leak, with the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leak {
    /// The thing that is leaked.
    pub what: Leaked,
    /// The operation that failed: a SEAMCALL leaf, an SP command or a system call.
    pub operation: &'static str,
    /// The error, with the firmware's status word where there is one.
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

/// The report of a VM's teardown.
#[must_use = "an unread report hides leaks"]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeReport {
    /// The number of the VM.
    pub vm: VmId,
    /// The technology that held it.
    pub tech: Tech,
    /// 4 KiB pages that went back to the host over the VM's life, each usable again. With the leaked
    /// ones they are all that the VM ever took.
    pub pages_freed: u64,
    /// KeyIDs or ASIDs that went back to their pool.
    pub keys_freed: u32,
    /// The things that did not come back.
    pub leaks: Vec<Leak>,
}

impl FreeReport {
    /// An empty report.
    pub const fn new(vm: VmId, tech: Tech) -> Self {
        Self {
            vm,
            tech,
            pages_freed: 0,
            keys_freed: 0,
            leaks: Vec::new(),
        }
    }

    /// The report of a VM that is left to firmware as a whole: one leak for all of it. For back ends
    /// that keep no account.
    pub fn abandoned(vm: VmId, tech: Tech, error: Error) -> Self {
        let mut report = Self::new(vm, tech);
        report.leaks.push(Leak {
            what: Leaked::Vm(vm),
            operation: "mmu_release_hkid",
            error,
        });
        report
    }

    /// Records the end of the VM below: an error is a leak of the VM as a whole.
    pub fn close_vm(&mut self, closed: Result<()>) {
        if let Err(error) = closed {
            self.leaks.push(Leak {
                what: Leaked::Vm(self.vm),
                operation: "close VM",
                error,
            });
        }
    }

    /// The 4 KiB pages among the leaks.
    pub fn pages_leaked(&self) -> u64 {
        let pages = self.leaks.iter();
        pages
            .filter(|leak| matches!(leak.what, Leaked::Page(_)))
            .count() as u64
    }

    /// True if everything came back.
    pub fn is_clean(&self) -> bool {
        self.leaks.is_empty()
    }
}
