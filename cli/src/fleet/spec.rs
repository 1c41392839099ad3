//! A VM as a fleet file describes it.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use kvm_ops::{Irqchip, Kind};
use kvm_ops_machine::ImageFormat;

use crate::args::HostChoice;
use crate::guests::Guest;

use super::expect::Expect;
use super::problem::At;

/// The payload of a VM.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// A built-in guest, available as machine code and as a guest program.
    BuiltIn(&'static Guest),
    /// An image, which needs a processor: of a real host, or of a normal VM or a TD on the software platform.
    Image {
        path: At<PathBuf>,
        /// The format; detected if not given.
        format: Option<ImageFormat>,
        /// The interrupt controllers; chosen by the format if not given.
        irqchip: Option<Irqchip>,
        /// The kernel that OVMF starts.
        kernel: Option<At<PathBuf>>,
        /// True if a TD may pass RBP in TDG.VP.VMCALL.
        allow_rbp: bool,
        /// The kernel's command line.
        cmdline: Option<String>,
        /// The initial RAM disk.
        initrd: Option<At<PathBuf>>,
    },
}

/// One `[[vm]]` of a fleet file.
#[derive(Clone, Debug)]
pub(crate) struct VmSpec {
    /// The name. If `count` is above 1, a number is appended.
    pub(crate) name: At<String>,
    /// The number of VMs like this.
    pub(crate) count: u32,
    pub(crate) kind: At<Kind>,
    pub(crate) host: HostChoice,
    /// The number of vCPUs.
    pub(crate) vcpus: u32,
    /// The memory in bytes.
    pub(crate) memory: u64,
    /// The payload.
    pub(crate) work: Work,
    /// The time limit of the run.
    pub(crate) timeout: Duration,
    /// The expected result.
    pub(crate) expect: Expect,
    /// True if the VM is left out when no host can hold it.
    pub(crate) optional: bool,
    /// The entry's place in the file.
    pub(crate) span: Range<usize>,
}

impl VmSpec {
    /// The names of the entry's VMs.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> + '_ {
        copies(&self.name.value, self.count)
    }
}

/// The names of `count` VMs with this base name.
pub(super) fn copies(name: &str, count: u32) -> impl Iterator<Item = String> + '_ {
    (0..count).map(move |i| match count {
        1 => name.to_owned(),
        _ => format!("{name}-{i}"),
    })
}
