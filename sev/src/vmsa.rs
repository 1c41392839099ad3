//! The register state of a vCPU's start, as LAUNCH_UPDATE_VMSA and SNP_LAUNCH_UPDATE measure it: the
//! VM save area (APM vol. 2, appendix B), filled as in KVM (`sev_es_sync_vmsa`).

use alloc::boxed::Box;

use kvm_ops::{Msr, Regs, Segment, Sregs, VcpuOps, cr0};

/// The address at which a VMSA page is measured, independent of its frame (Linux
/// `snp_launch_update_vmsa`).
pub const VMSA_GPA: u64 = 0xffff_ffff_f000;

/// EFER.SVME, which a guest's save area always has.
const EFER_SVME: u64 = 1 << 12;
/// CR4.MCE, which KVM sets for every guest on a host that has it set.
const CR4_MCE: u64 = 1 << 6;
/// IA32_PAT after power-on.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// IA32_PAT.
const IA32_PAT: u32 = 0x277;
/// CR0.ET, which is always set.
const CR0_ET: u64 = 1 << 4;

/// The registers of a vCPU before its launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StartState {
    regs: Regs,
    sregs: Sregs,
    pat: u64,
}

impl StartState {
    /// The registers that a vCPU of the port holds now. A group that the port lacks has its values
    /// of power-on.
    pub(crate) fn of<V: VcpuOps>(vcpu: &V) -> Self {
        let mut pat = [Msr {
            index: IA32_PAT,
            value: PAT_RESET,
        }];
        let pat = match vcpu.msrs(&mut pat) {
            Ok(()) => pat[0].value,
            Err(_) => PAT_RESET,
        };
        Self {
            regs: vcpu.regs().unwrap_or_default(),
            sregs: vcpu.sregs().unwrap_or_default(),
            pat,
        }
    }
}

fn attributes(segment: &Segment) -> u16 {
    let bit = |set: bool, at: u16| u16::from(set) << at;
    u16::from(segment.kind & 0xf)
        | bit(segment.s, 4)
        | u16::from(segment.dpl & 3) << 5
        | bit(segment.present, 7)
        | bit(segment.avl, 8)
        | bit(segment.l, 9)
        | bit(segment.db, 10)
        | bit(segment.g, 11)
}

impl StartState {
    /// The page, with `features` as its SEV_FEATURES.
    pub(crate) fn page(&self, features: u64) -> Box<[u8; 4096]> {
        let sregs = &self.sregs;
        let mut page = Box::new([0_u8; 4096]);
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        for (at, segment) in [
            (0x00, &sregs.es),
            (0x10, &sregs.cs),
            (0x20, &sregs.ss),
            (0x30, &sregs.ds),
            (0x40, &sregs.fs),
            (0x50, &sregs.gs),
            (0x70, &sregs.ldt),
            (0x90, &sregs.tr),
        ] {
            put(at, &segment.selector.to_le_bytes());
            put(at + 2, &attributes(segment).to_le_bytes());
            put(at + 4, &segment.limit.to_le_bytes());
            put(at + 8, &segment.base.to_le_bytes());
        }
        for (at, table) in [(0x60, &sregs.gdt), (0x80, &sregs.idt)] {
            put(at + 4, &u32::from(table.limit).to_le_bytes());
            put(at + 8, &table.base.to_le_bytes());
        }
        let r = &self.regs;
        for (at, value) in [
            (0x0d0, sregs.efer | EFER_SVME),
            (0x148, sregs.cr4 | CR4_MCE),
            (0x150, sregs.cr3),
            // KVM clears CD and NW (KVM_X86_QUIRK_CD_NW_CLEARED).
            (0x158, sregs.cr0 & !(cr0::CD | cr0::NW) | CR0_ET),
            (0x160, 0x400),       // DR7
            (0x168, 0xffff_0ff0), // DR6
            (0x170, r.rflags),
            (0x178, r.rip),
            (0x1d8, r.rsp),
            (0x1f8, r.rax),
            (0x268, self.pat),
            (0x308, r.rcx),
            (0x310, r.rdx),
            (0x318, r.rbx),
            (0x328, r.rbp),
            (0x330, r.rsi),
            (0x338, r.rdi),
            (0x340, r.r8),
            (0x348, r.r9),
            (0x350, r.r10),
            (0x358, r.r11),
            (0x360, r.r12),
            (0x368, r.r13),
            (0x370, r.r14),
            (0x378, r.r15),
            (0x3b0, features),
            (0x3e8, 1), // XCR0: x87
        ] {
            put(at, &u64::to_le_bytes(value));
        }
        put(0x408, &0x1f80_u32.to_le_bytes()); // MXCSR
        put(0x410, &0x37f_u16.to_le_bytes()); // x87 control word
        page
    }
}
