//! INT through gates of every type, presence and DPL, with and without a stack of their own.

use super::Case;
use crate::machine::{HANDLERS, gate};

const VECTOR: u64 = 0x30;

pub(crate) fn all() -> impl Iterator<Item = Case> {
    [0u8, 3].into_iter().flat_map(|cpl| {
        // Kernel code, user code, data, none, outside of the table.
        [0x08u64, 0x1b, 0x10, 0, 0x58]
            .into_iter()
            .flat_map(move |selector| {
                // A stack of the task state segment, one that is there, one that is not.
                [0u64, 1, 2].into_iter().flat_map(move |stack| {
                    (0..256u64).map(move |access| case(cpl, selector, stack, access))
                })
            })
    })
}

fn case(cpl: u8, selector: u64, stack: u64, access: u64) -> Case {
    let name = format!(
        "int 30h, access byte {access:#04x}, selector {selector:#x}, IST {stack}, CPL {cpl}"
    );
    let low = (HANDLERS + VECTOR * 16) | selector << 16 | stack << 32 | access << 40;
    Case::new(name, &[0xcd, VECTOR as u8])
        .cpl(cpl)
        .words(gate(VECTOR), &[low, 0])
}
