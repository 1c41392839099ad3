//! Instructions that read a descriptor, with every type, DPL, presence and size that it can have.

use super::Case;
use crate::machine::{DATA, ELSEWHERE, STACK, TESTED, tested};

/// Name, code, and where the selector goes.
const INSTRUCTIONS: &[(&str, &[u8], Place)] = &[
    ("mov ds, ax", &[0x8e, 0xd8], Place::Rax),
    ("mov ss, ax", &[0x8e, 0xd0], Place::Rax),
    ("mov gs, ax", &[0x8e, 0xe8], Place::Rax),
    ("lar ecx, ax", &[0x0f, 0x02, 0xc8], Place::Rax),
    ("lsl ecx, ax", &[0x0f, 0x03, 0xc8], Place::Rax),
    ("verr ax", &[0x0f, 0x00, 0xe0], Place::Rax),
    ("verw ax", &[0x0f, 0x00, 0xe8], Place::Rax),
    ("lldt ax", &[0x0f, 0x00, 0xd0], Place::Rax),
    ("ltr ax", &[0x0f, 0x00, 0xd8], Place::Rax),
    ("jmp far [rbx]", &[0x48, 0xff, 0x2b], Place::Pointer),
    ("call far [rbx]", &[0x48, 0xff, 0x1b], Place::Pointer),
    ("retfq", &[0x48, 0xcb], Place::Stack),
    ("iretq", &[0x48, 0xcf], Place::Frame),
];

#[derive(Clone, Copy)]
enum Place {
    Rax,
    /// A far pointer of 10 bytes at RBX.
    Pointer,
    /// Return address, and stack of an outer level.
    Stack,
    /// Return address, flags and stack.
    Frame,
}

/// Bits 55:52 of the descriptor: none, D, L, both.
const LEVELS: [u8; 2] = [0, 3];
const SIZES: [u64; 4] = [0, 4, 2, 6];

pub(crate) fn all() -> impl Iterator<Item = Case> {
    LEVELS.into_iter().flat_map(|cpl| {
        INSTRUCTIONS.iter().flat_map(move |instruction| {
            SIZES.into_iter().flat_map(move |size| {
                (0..256u64).flat_map(move |access| {
                    LEVELS.map(|rpl| case(instruction, cpl, rpl, access, size))
                })
            })
        })
    })
}

fn case(
    &(name, code, place): &(&str, &[u8], Place),
    cpl: u8,
    rpl: u8,
    access: u64,
    size: u64,
) -> Case {
    let selector = u64::from(TESTED) | u64::from(rpl);
    // 64 KiB from 0; for a gate: selector 0 and an offset below 64 KiB.
    let descriptor = 0xffff | access << 40 | size << 52;
    let name = format!("{name}, access byte {access:#04x}, size {size}, RPL {rpl}, CPL {cpl}");
    let case = Case::new(name, code)
        .cpl(cpl)
        .words(tested(), &[descriptor, 0]);
    let outer = [STACK - 0x100, if rpl == 3 { 0x23 } else { 0x10 }];
    match place {
        Place::Rax => case.gpr(0, selector),
        Place::Pointer => case.gpr(3, DATA).words(DATA, &[ELSEWHERE, selector]),
        Place::Stack => on_stack(case, &[ELSEWHERE, selector, outer[0], outer[1]]),
        Place::Frame => on_stack(case, &[ELSEWHERE, selector, 2, outer[0], outer[1]]),
    }
}

/// Pushes the words, the last one first, before the instruction: it begins with `lea rsp, [rsp - bytes]`.
fn on_stack(mut case: Case, words: &[u64]) -> Case {
    let bytes = words.len() as u8 * 8;
    let mut code = vec![0x48, 0x8d, 0x64, 0x24, bytes.wrapping_neg()];
    code.append(&mut case.code);
    case.code = code;
    case.words(STACK - u64::from(bytes), words)
}
