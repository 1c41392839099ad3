//! Trust domains: the software TDX module below the ports.

mod apic;
mod cpuid;
mod cpus;
mod host;
mod processor;
mod program;
mod regs;
mod seam;
mod vcpus;

pub(crate) use apic::HostApic;
pub(crate) use host::{hand_over, port, vm_closed};
pub use seam::SoftSeam;
pub(crate) use soft_tdx_module::PlatformBuilder as Setup;

use std::sync::Arc;

use kvm_ops::{Hpa, Result};
use soft_tdx_module::{Platform, Range, Tdmr};

use crate::BuildError;
use crate::frames::Frames;
use crate::pages::{HostMemory, SoftPages, no_memory_at};

/// Guest operations between two timer interrupts, of a machine that is not built otherwise. A kick
/// that another guest on the same processor took is noticed after that many.
const STEPS_PER_ENTRY: u32 = 1 << 14;

pub(crate) fn default_setup() -> Setup {
    Platform::builder().guest_steps_per_entry(STEPS_PER_ENTRY)
}

/// A software TDX machine that is up.
#[derive(Debug)]
pub(crate) struct Tdx {
    platform: Arc<Platform>,
    seam: SoftSeam,
    pages: SoftPages,
    /// Those that execute machine code.
    vcpus: Arc<vcpus::Vcpus>,
}

impl Tdx {
    /// Builds the machine, with the features of the processor, and brings its module up.
    pub(crate) fn up(setup: Setup) -> Result<Self, BuildError> {
        let platform = Arc::new(
            setup
                .with(cpuid::cut)
                .build()
                .map_err(BuildError::machine)?,
        );
        platform.bring_up().map_err(BuildError::firmware)?;
        let tdmrs = &platform.config().tdmrs;
        let frames = Frames::new(tdmrs.iter().flat_map(usable));
        let vcpus = Arc::<vcpus::Vcpus>::default();
        Ok(Self {
            seam: SoftSeam::new(Arc::clone(&platform), Arc::clone(&vcpus)),
            pages: SoftPages::new(frames, Memory(Arc::clone(&platform))),
            platform,
            vcpus,
        })
    }

    /// As [`up`](Self::up); `None`, and a log entry, if the machine does not come up.
    pub(crate) fn up_or_log(setup: Setup) -> Option<Self> {
        Self::up(setup).map_err(BuildError::log).ok()
    }

    /// The machine of a host that is not built otherwise.
    pub(crate) fn up_default() -> Option<Self> {
        Self::up_or_log(default_setup())
    }

    pub(crate) fn seam(&self) -> &SoftSeam {
        &self.seam
    }

    pub(crate) fn pages(&self) -> &SoftPages {
        &self.pages
    }
}

/// The frames between the reserved areas of a TDMR.
fn usable(tdmr: &Tdmr) -> Vec<std::ops::Range<u64>> {
    let Range { base, .. } = tdmr.range;
    let mut from = base;
    let mut ranges = Vec::new();
    for reserved in &tdmr.reserved {
        ranges.push(from..base.saturating_add(reserved.base));
        from = base.saturating_add(reserved.end());
    }
    ranges.push(from..tdmr.range.end());
    ranges
        .into_iter()
        .map(|r| r.start.div_ceil(4096)..r.end / 4096)
        .filter(|r| r.start < r.end)
        .collect()
}

struct Memory(Arc<Platform>);

impl HostMemory for Memory {
    fn write(&self, at: Hpa, data: &[u8]) -> Result<()> {
        let refused = |_| no_memory_at(at);
        self.0.write_memory(at.get(), data).map_err(refused)
    }

    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()> {
        let refused = |_| no_memory_at(at);
        self.0.read_memory(at.get(), data).map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use kvm_ops::{Host, Tech, Vendor, VmParams};

    use super::*;
    use crate::SimHost;

    #[test]
    fn a_lazy_machine_has_normal_vms_without_its_module() {
        let setup = SimHost::default_tdx().memory(0);
        assert!(
            SimHost::builder(Vendor::Intel)
                .tdx(setup.clone())
                .build()
                .is_err()
        );
        let host = SimHost::builder(Vendor::Intel).tdx(setup).build_lazy();
        assert!(host.create_vm(Tech::Vmx, &VmParams::new(1)).is_ok());
        let module = format!("{:?}", host.machine.tdx);
        assert!(module.contains("uninit"), "{module}");
        assert!(host.create_vm(Tech::Tdx, &VmParams::new(1)).is_err());
    }

    #[test]
    fn a_lazy_machine_has_the_module_that_was_given() {
        let setup = SimHost::default_tdx().processors([0, 1, 2]);
        let host = SimHost::builder(Vendor::Intel).tdx(setup).build_lazy();
        assert_eq!(host.tdx_platform().map(|it| it.config().packages), Some(3));
    }

    #[test]
    fn frames_keep_out_of_the_reserved_areas_of_a_tdmr() {
        const GIB: u64 = 1 << 30;
        let mut tdmr = Tdmr::with_pamt_at(Range::new(GIB, GIB), 2 * GIB);
        assert_eq!(usable(&tdmr), vec![0x4_0000..0x8_0000; 1]);
        tdmr.reserved = vec![
            Range::new(0, 0x3000),
            Range::new(0x10_0000, 0x20_0000),
            Range::new(GIB - 0x1000, 0x1000),
        ];
        assert_eq!(usable(&tdmr), [0x4_0003..0x4_0100, 0x4_0300..0x7_ffff]);
    }
}
