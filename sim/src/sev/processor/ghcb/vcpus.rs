//! Application processors: AP creation of an SNP guest, the jump table of a SEV-ES guest.

use std::sync::atomic::Ordering;

use kvm_ops::{Level, PAGE_SIZE, Result, VcpuId};
use kvm_ops_cpu::Exit as CpuExit;

use super::Malformed;
use super::page::RAX;
use crate::processor::{Next, Processor};
use crate::sev::guest::Creation;

impl Processor {
    /// SNP AP Creation: another vCPU runs from a save area that the guest made, or stops. SW_EXITINFO1
    /// has the operation and the number of the APIC, RAX the features of the save area.
    pub(super) fn create_vcpu(&mut self, exit: CpuExit, info1: u64, vmsa: u64) -> Result<Next> {
        const ON_INIT: u32 = 0;
        const NOW: u32 = 1;
        const DESTROY: u32 = 2;
        let id = VcpuId((info1 >> 32) as u32);
        let features = self.ghcb()?.get(RAX);
        let own = self.side()?.loaded.as_ref().map(|loaded| loaded.features());
        // A page at the start of 2 MiB would be taken for a large page in use (AMD erratum 1415).
        let fits = vmsa.is_multiple_of(PAGE_SIZE) && !vmsa.is_multiple_of(Level::Size2M.bytes());
        let creation = match info1 as u32 {
            DESTROY => Creation::Destroy,
            operation @ (ON_INIT | NOW) if fits && features == own => Creation::Run {
                vmsa,
                now: operation == NOW,
            },
            _ => return self.malformed(exit, Malformed::Input),
        };
        let wake = {
            let vcpus = self.vm.vcpus();
            vcpus.get(&id).map(|mailbox| mailbox.wake.clone())
        };
        let Some(wake) = wake else {
            return self.malformed(exit, Malformed::Input);
        };
        self.vm
            .sev
            .change_vcpu(id, |vcpu| vcpu.next = Some(creation));
        wake.nudge();
        self.vm.turns.rise(id.0);
        self.took(exit, 0)
    }

    /// The address of the table where application processors of a SEV-ES guest start.
    pub(super) fn jump_table(&mut self, exit: CpuExit, info1: u64, info2: u64) -> Result<Next> {
        let table = self.vm.sev.jump_table();
        match info1 {
            0 => {
                table.store(info2, Ordering::Relaxed);
                self.took(exit, 0)
            }
            1 => {
                let at = table.load(Ordering::Relaxed);
                self.took(exit, at)
            }
            _ => self.malformed(exit, Malformed::Input),
        }
    }
}
