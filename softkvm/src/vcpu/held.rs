//! The registers of a vCPU whose code is not executed here: a guest of SEV. They are kept as user space
//! sets them.

use std::collections::BTreeMap;

use kvm_ops_uapi::state::{Dtable, Regs, Segment, Sregs};
use kvm_ops_uapi::{U16, U32, U64};

use crate::system::lists::MSRS;

pub(crate) struct Held {
    pub(super) mp_state: u32,
    pub(super) regs: Regs,
    pub(super) sregs: Sregs,
    pub(super) msrs: BTreeMap<u32, u64>,
    pub(super) xcr0: u64,
}

impl Held {
    /// The state after power-on (SDM vol. 3, table 11-1).
    pub(super) fn new(mp_state: u32) -> Self {
        let segment = |kind: u8, s: u8| Segment {
            limit: U32::new(0xffff),
            kind,
            present: 1,
            s,
            ..Segment::default()
        };
        let data = segment(3, 1);
        let table = Dtable {
            limit: U16::new(0xffff),
            ..Dtable::default()
        };
        Self {
            mp_state,
            regs: Regs {
                rip: U64::new(0xfff0),
                rflags: U64::new(2),
                ..Regs::default()
            },
            sregs: Sregs {
                cs: Segment {
                    base: U64::new(0xffff_0000),
                    selector: U16::new(0xf000),
                    ..segment(0xb, 1)
                },
                ds: data,
                es: data,
                fs: data,
                gs: data,
                ss: data,
                tr: segment(0xb, 0),
                ldt: segment(2, 0),
                gdt: table,
                idt: table,
                cr0: U64::new(0x6000_0010),
                apic_base: U64::new(0xfee0_0900),
                ..Sregs::default()
            },
            msrs: MSRS.into_iter().collect(),
            xcr0: 1,
        }
    }
}
