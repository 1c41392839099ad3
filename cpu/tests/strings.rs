//! REP MOVS and REP STOS: the pages that the processor copies at once end as elements one after the other do.

mod common;
#[path = "native/random.rs"]
#[allow(dead_code, unreachable_pub)]
mod random;

use common::long_mode::{CODE, machine};
use kvm_ops_cpu::Stopped;
use random::Random;

const MEMORY: u64 = 0x10_0000;
/// Some pages in which strings lie, and what surrounds them.
const START: u64 = 0x4_0000;
const PAGES: u64 = 4;
/// The end of what the page tables map.
const EDGE: u64 = 0x20_0000;
/// Elements after which a repeated instruction counts once more.
const CHUNK: u64 = 4096;

/// REP MOVS or REP STOS with elements of so many bytes, and HLT.
fn code(moves: bool, size: u64) -> Vec<u8> {
    let opcode = match (moves, size) {
        (true, 1) => 0xa4,
        (true, _) => 0xa5,
        (false, 1) => 0xaa,
        (false, _) => 0xab,
    };
    let prefix: &[u8] = match size {
        2 => &[0x66, 0xf3],
        8 => &[0xf3, 0x48],
        _ => &[0xf3],
    };
    [prefix, &[opcode, 0xf4]].concat()
}

/// The same on a copy of memory, element by element.
fn expected(memory: &mut [u8], moves: bool, size: u64, down: bool, r: [u64; 4]) {
    let [value, count, mut from, mut to] = r;
    let place = |at: u64| (at - START) as usize;
    for _ in 0..count {
        let mut element = value.to_le_bytes();
        if moves {
            element[..size as usize]
                .copy_from_slice(&memory[place(from)..place(from) + size as usize]);
        }
        memory[place(to)..place(to) + size as usize].copy_from_slice(&element[..size as usize]);
        let step = if down { size.wrapping_neg() } else { size };
        (from, to) = (from.wrapping_add(step), to.wrapping_add(step));
    }
}

#[test]
fn strings_end_as_their_elements_do_whatever_overlaps() {
    let mut random = Random(5);
    for round in 0..300 {
        let moves = random.below(3) != 0;
        let down = random.below(4) == 0;
        let size = 1 << random.below(4);
        let bytes = PAGES * 4096;
        let count = random.below(bytes / 2 / size);
        // Distances from none to pages; often some bytes.
        let room = bytes - count * size;
        let from = random.below(room);
        let most = 1 << random.below(14);
        let distance = random.below(most);
        let to = match random.below(2) {
            0 => from.saturating_sub(distance),
            _ => (from + distance).min(room),
        };
        let last = if down {
            count.saturating_sub(1) * size
        } else {
            0
        };
        let [from, to] = [from, to].map(|at| START + at + last);
        let (mut cpu, ram) = machine(&code(moves, size), &[0xf4]);
        let mut memory: Vec<u8> = (0..bytes + 8).map(|_| random.next() as u8).collect();
        ram.write(START, &memory);
        let mut r = cpu.registers();
        let value = random.next();
        (r.gpr[0], r.gpr[1], r.gpr[6], r.gpr[7]) = (value, count, from, to);
        r.rflags |= u64::from(down) << 10;
        cpu.set_registers(&r);
        assert_eq!(cpu.run(1000), Stopped::Halted);
        expected(&mut memory, moves, size, down, [value, count, from, to]);
        let mut found = vec![0; memory.len()];
        ram.read(START, &mut found);
        assert!(found == memory, "round {round}");
        let step = if down { size.wrapping_neg() } else { size };
        let moved = count.wrapping_mul(step);
        assert_eq!(cpu.gpr(1), 0, "round {round}");
        assert_eq!(cpu.gpr(7), to.wrapping_add(moved), "round {round}");
        let source = if moves {
            from.wrapping_add(moved)
        } else {
            from
        };
        assert_eq!(cpu.gpr(6), source, "round {round}");
        assert_eq!(
            cpu.retired(),
            1 + count.div_ceil(CHUNK).max(1),
            "round {round}"
        );
    }
}

#[test]
fn a_string_that_leaves_memory_stops_at_the_element_that_faults() {
    for (moves, size, start) in [(true, 8, 1), (true, 1, 5), (false, 4, 2), (false, 8, 3)] {
        let (mut cpu, _) = machine(&code(moves, size), &[0xf4]);
        let mut r = cpu.registers();
        // Two pages of memory, then a device to the end of what is mapped.
        let to = MEMORY - 2 * 4096 - start;
        (r.gpr[1], r.gpr[6], r.gpr[7]) = (u64::MAX, MEMORY / 2, to);
        cpu.set_registers(&r);
        let mut stopped = Stopped::Budget;
        while stopped == Stopped::Budget {
            stopped = cpu.run(1000);
        }
        assert_eq!(stopped, Stopped::Halted);
        let whole = (EDGE - to) / size;
        assert_eq!(cpu.gpr(7), to + whole * size);
        assert_eq!(cpu.gpr(1), u64::MAX - whole);
        assert_eq!(cpu.registers().cr2, EDGE);
        assert_ne!(cpu.rip(), CODE, "in the handler");
    }
}
