//! The register state of a vCPU's start, as LAUNCH_UPDATE_VMSA and SNP_LAUNCH_UPDATE measure it: the
//! VM save area (APM vol. 2, appendix B), filled as in KVM (`sev_es_sync_vmsa`).

use alloc::boxed::Box;

use kvm_ops::{Msr, Regs, Segment, Sregs, VcpuOps, Xcrs, Xsave, cr0};

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

/// Fields of the save area that are those of an XSAVE area: offset there, offset here, length.
const X87_FIELDS: [(usize, usize, usize); 5] = [
    (16, 0x400, 8), // data pointer
    (2, 0x40e, 2),  // status word
    (0, 0x410, 2),  // control word
    (6, 0x412, 2),  // opcode
    (8, 0x418, 8),  // instruction pointer
];
/// The registers of an XSAVE area: offsets of the x87 registers, XMM, and the upper halves of YMM.
const XSAVE_X87: usize = 32;
const XSAVE_XMM: usize = 160;
const XSAVE_YMM: usize = 576;
/// XSTATE_BV: x87, SSE, AVX.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

/// The registers of a vCPU before its launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StartState {
    regs: Regs,
    sregs: Sregs,
    xsave: Xsave,
    xcrs: Xcrs,
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
            xsave: vcpu.xsave().unwrap_or_else(|_| Xsave::initial()),
            xcrs: vcpu.xcrs().unwrap_or_default(),
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
            (0x3e8, self.xcrs.xcr0),
        ] {
            put(at, &u64::to_le_bytes(value));
        }
        self.put_extended(&mut put);
        page
    }

    /// x87, SSE and AVX registers, as far as the area has them. The others are as after power-on.
    fn put_extended(&self, put: &mut impl FnMut(usize, &[u8])) {
        let (area, has) = (self.xsave.as_bytes(), self.xsave.components());
        let initial = Xsave::initial();
        let x87 = if has & X87 != 0 {
            area
        } else {
            initial.as_bytes()
        };
        for (from, to, len) in X87_FIELDS {
            put(to, &x87[from..from + len]);
        }
        put(0x40c, &[x87[4], 0]); // the abridged tag word
        for n in 0..8 {
            let register = &x87[XSAVE_X87 + n * 16..];
            put(0x420 + n * 8, &register[..8]);
            put(0x460 + n * 2, &register[8..10]);
        }
        let sse = if has & (SSE | AVX) != 0 {
            area
        } else {
            initial.as_bytes()
        };
        put(0x408, &sse[24..28]); // MXCSR
        if has & SSE != 0 {
            put(0x470, &area[XSAVE_XMM..XSAVE_XMM + 256]);
        }
        if has & AVX != 0
            && let Some(upper) = area.get(XSAVE_YMM..XSAVE_YMM + 256)
        {
            put(0x570, upper);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An area with another byte at each place.
    fn area(components: u64) -> Xsave {
        let mut area = Xsave::initial();
        let bytes = area.as_bytes_mut();
        for (at, byte) in bytes.iter_mut().enumerate().take(832) {
            *byte = (at % 251) as u8 + 1;
        }
        bytes[512..520].copy_from_slice(&components.to_le_bytes());
        area
    }

    fn page(xsave: Xsave) -> Box<[u8; 4096]> {
        let state = StartState {
            regs: Regs::default(),
            sregs: Sregs::default(),
            xsave,
            xcrs: Xcrs { xcr0: 7 },
            pat: PAT_RESET,
        };
        state.page(0)
    }

    #[test]
    fn extended_registers_have_the_places_of_the_kernels_save_area() {
        let area = area(X87 | SSE | AVX);
        let (from, page) = (area.as_bytes().to_vec(), page(area));
        assert_eq!(page[0x3e8..0x3f0], 7u64.to_le_bytes());
        assert_eq!(page[0x400..0x408], from[16..24]);
        assert_eq!(page[0x408..0x40c], from[24..28]);
        assert_eq!(page[0x40c..0x40e], [from[4], 0]);
        assert_eq!(
            (page[0x40e], page[0x410], page[0x412]),
            (from[2], from[0], from[6])
        );
        for n in 0..8 {
            let register = &from[32 + n * 16..][..10];
            assert_eq!(page[0x420 + n * 8..][..8], register[..8]);
            assert_eq!(page[0x460 + n * 2..][..2], register[8..]);
        }
        assert_eq!(page[0x470..0x570], from[160..416]);
        assert_eq!(page[0x570..0x670], from[576..832]);
    }

    #[test]
    fn what_an_area_does_not_hold_is_as_after_power_on() {
        let fresh = page(Xsave::initial());
        assert_eq!(page(area(0)), fresh);
        assert_eq!(fresh[0x410..0x412], 0x37f_u16.to_le_bytes());
        assert_eq!(fresh[0x408..0x40c], 0x1f80_u32.to_le_bytes());
        assert!(fresh[0x420..].iter().all(|byte| *byte == 0));
    }
}
