//! RDMSR and WRMSR of an encrypted guest.

use kvm_ops::{Result, Tech};
use kvm_ops_cpu::{Exception, Exit as CpuExit};

use super::exits::{GP, MSR, RAX, RCX, RDX};
use crate::processor::{Next, Processor};

/// SEV_ES_GHCB and SEV_STATUS, which no host intercepts.
const GHCB: u32 = 0xc001_0130;
const STATUS: u32 = 0xc001_0131;

/// MSRs with a place in the save area, which KVM lets such a guest use (Linux `sev_es_init_vmcb`).
const OWN: [u32; 13] = [
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0x277,       // PAT
    0xc000_0080, // EFER
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0100, // FS_BASE
    0xc000_0101, // GS_BASE
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
];

const LOW: u64 = 0xffff_ffff;

impl Processor {
    pub(super) fn msr(&mut self, exit: CpuExit, write: bool) -> Result<Next> {
        let index = self.cpu.gpr(RCX) as u32;
        let protected = self.vm.has_vmsas();
        let done = match (index, write) {
            (GHCB, false) if protected => Some(Some(self.vm.sev.vcpu(self.id).ghcb)),
            (GHCB, true) if protected => {
                let value = self.written();
                self.vm.sev.change_vcpu(self.id, |vcpu| vcpu.ghcb = value);
                Some(None)
            }
            (STATUS, false) => Some(Some(self.status())),
            (STATUS, true) => None,
            _ if protected && !OWN.contains(&index) => return Ok(self.vc(&exit, MSR)),
            _ if !protected && self.watches_msrs() => {
                let vm = std::sync::Arc::clone(&self.vm);
                let _turn = vm.turns.take_to_execute();
                return Ok(self.msr_access(exit));
            }
            (_, false) => self.cpu.read_msr(index).map(Some),
            (_, true) => {
                let value = self.written();
                self.cpu.write_msr(index, value).map(|()| None)
            }
        };
        let Some(read) = done else {
            return Ok(self.raise(Exception::with_code(GP, 0)));
        };
        if let Some(value) = read {
            self.cpu.set_gpr(RAX, value & LOW);
            self.cpu.set_gpr(RDX, value >> 32);
        }
        self.cpu.skip(&exit);
        Ok(Next::Again)
    }

    fn written(&self) -> u64 {
        self.cpu.gpr(RDX) << 32 | self.cpu.gpr(RAX) & LOW
    }

    /// SEV_STATUS: what is on, and from bit 3 on the features of the save area.
    fn status(&self) -> u64 {
        const SEV: u64 = 1;
        const ES: u64 = 1 << 1;
        const SNP: u64 = 1 << 2;
        let kind = match self.vm.tech {
            Tech::SevSnp => SEV | ES | SNP,
            Tech::SevEs => SEV | ES,
            _ => SEV,
        };
        let loaded = self.sev.as_ref().and_then(|side| side.loaded.as_ref());
        let features = loaded.map_or(0, |loaded| loaded.features());
        kind | features >> 1 << 3
    }
}
