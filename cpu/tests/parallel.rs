//! Processors of one machine that run at the same time, each on its own thread.

mod common;

use std::sync::{Arc, Barrier, RwLock};

use common::Ram;
use common::long_mode::{CODE, memory, processor};
use iced_x86::code_asm::*;
use kvm_ops_cpu::{CodePages, Stopped};

/// Instructions of a run, after which another processor may be alone.
const RUN: u64 = 500;
/// Runs after which a test has failed.
const MOST_RUNS: u64 = 2_000_000;

const DATA: u64 = 0x2_0000;
const RESULTS: u64 = 0x4_0000;
/// The tables of `long_mode` map 2 MiB at once; these map single pages.
const PAGE_TABLE: u64 = 0x1_3000;

/// What the processors of these tests find in RBP: DATA.
fn assemble(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64 bits");
    code(&mut a).expect("valid instructions");
    a.assemble(CODE).expect("labels are set")
}

/// Runs `count` processors from [`CODE`] until all of them halt. RBX is a processor's number, RBP is [`DATA`], and
/// RDI the number of rounds.
fn run(ram: &Arc<Ram>, count: u64, rounds: u64) {
    let pages = CodePages::new(256);
    let (turn, start) = (RwLock::new(()), Barrier::new(count as usize));
    std::thread::scope(|scope| {
        for number in 0..count {
            let mut cpu = processor(ram, &pages);
            cpu.set_parallel(true);
            cpu.set_gpr(3, number);
            cpu.set_gpr(4, cpu.gpr(4) - number * 0x400);
            cpu.set_gpr(5, DATA);
            cpu.set_gpr(7, rounds);
            let (turn, start) = (&turn, &start);
            scope.spawn(move || {
                start.wait();
                for _ in 0..MOST_RUNS {
                    let stopped = {
                        let _shared = turn.read().expect("no panic");
                        cpu.run(RUN)
                    };
                    let stopped = match stopped {
                        Stopped::Alone => {
                            let _alone = turn.write().expect("no panic");
                            cpu.run_alone()
                        }
                        stopped => stopped,
                    };
                    match stopped {
                        Stopped::Halted => return,
                        Stopped::Budget => {}
                        Stopped::Paused => std::thread::yield_now(),
                        other => panic!("{number}: {other:?} at {:#x}", cpu.rip()),
                    }
                }
                panic!("{number} does not end: {:#x?}", cpu.registers());
            });
        }
    });
}

/// A loop of RDI rounds, then HLT.
fn rounds(
    a: &mut CodeAssembler,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    // The body may begin with a label of its own.
    a.nop()?;
    body(a)?;
    a.dec(rdi)?;
    a.jne(again)?;
    a.hlt()
}

/// Increments the two counters at DATA + 64 and DATA + 128, which needs a lock.
fn in_the_lock(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for at in [64, 128] {
        a.mov(rax, qword_ptr(rbp + at))?;
        a.add(rax, 1)?;
        a.mov(qword_ptr(rbp + at), rax)?;
    }
    Ok(())
}

type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;

#[test]
fn the_sum_of_what_many_processors_add_is_exact() {
    const CPUS: u64 = 4;
    const ROUNDS: u64 = 2000;
    // The name, the loop's body, the place of the sum, and what a round adds there.
    let ways: [(&str, Body, u64, u64); 11] = [
        ("lock inc", |a| a.lock().inc(dword_ptr(rbp)), 0, 1),
        (
            "lock add of a byte",
            |a| a.lock().add(byte_ptr(rbp + 1), 1),
            0,
            0,
        ),
        (
            "lock xadd",
            |a| {
                a.mov(eax, 3)?;
                a.lock().xadd(qword_ptr(rbp), rax)
            },
            0,
            3,
        ),
        (
            "lock adc and sbb keep the carry of a round",
            |a| {
                a.stc()?;
                a.lock().adc(qword_ptr(rbp), 6)?;
                a.stc()?;
                a.lock().sbb(qword_ptr(rbp), 1)
            },
            0,
            5,
        ),
        (
            "lock cmpxchg",
            |a| {
                let mut again = a.create_label();
                a.mov(rax, qword_ptr(rbp))?;
                a.set_label(&mut again)?;
                a.lea(rcx, qword_ptr(rax + 1))?;
                a.lock().cmpxchg(qword_ptr(rbp), rcx)?;
                a.jne(again)
            },
            0,
            1,
        ),
        (
            "lock cmpxchg8b",
            |a| {
                let mut again = a.create_label();
                a.mov(r8, rbx)?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.set_label(&mut again)?;
                a.mov(ebx, eax)?;
                a.add(ebx, 1)?;
                a.mov(ecx, edx)?;
                a.lock().cmpxchg8b(qword_ptr(rbp))?;
                a.jne(again)?;
                a.mov(rbx, r8)
            },
            0,
            1,
        ),
        (
            "lock cmpxchg16b",
            |a| {
                let mut again = a.create_label();
                a.mov(r8, rbx)?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.set_label(&mut again)?;
                a.lea(rbx, qword_ptr(rax + 1))?;
                // The upper half always is three times the lower one.
                a.lea(rcx, qword_ptr(rdx + 3))?;
                a.lock().cmpxchg16b(xmmword_ptr(rbp))?;
                a.jne(again)?;
                a.mov(rbx, r8)
            },
            8,
            3,
        ),
        (
            "lock add across cache lines",
            |a| a.lock().add(qword_ptr(rbp + 61), 1),
            61,
            1,
        ),
        (
            "lock add across pages",
            |a| a.lock().add(qword_ptr(rbp + 0xffe), 1),
            0xffe,
            1,
        ),
        (
            "a lock by xchg",
            |a| {
                let (mut again, mut free) = (a.create_label(), a.create_label());
                a.set_label(&mut again)?;
                a.mov(eax, 1)?;
                a.xchg(dword_ptr(rbp), eax)?;
                a.test(eax, eax)?;
                a.je(free)?;
                a.pause()?;
                a.jmp(again)?;
                a.set_label(&mut free)?;
                in_the_lock(a)?;
                a.mov(dword_ptr(rbp), 0)
            },
            128,
            1,
        ),
        (
            "a lock by lock bts",
            |a| {
                let (mut again, mut free) = (a.create_label(), a.create_label());
                a.set_label(&mut again)?;
                a.lock().bts(dword_ptr(rbp), 40)?;
                a.jae(free)?;
                a.pause()?;
                a.jmp(again)?;
                a.set_label(&mut free)?;
                in_the_lock(a)?;
                a.lock().btr(dword_ptr(rbp), 40)
            },
            64,
            1,
        ),
    ];
    for (name, body, at, step) in ways {
        let code = assemble(|a| rounds(a, body));
        let ram = memory(&code, &[0xf4]);
        run(&ram, CPUS, ROUNDS);
        let mut sum = [0; 8];
        ram.read(DATA + at, &mut sum);
        let expected = match step {
            // A byte: the sum is what is left of it.
            0 => ((CPUS * ROUNDS) & 0xff) << 8,
            _ => CPUS * ROUNDS * step,
        };
        assert_eq!(u64::from_le_bytes(sum), expected, "{name}");
    }
}

/// All processors are in the same round: each counts itself in at DATA, and waits for the rest. RSI counts rounds.
fn meet(a: &mut CodeAssembler, cpus: i32) -> Result<(), IcedError> {
    let (mut wait, mut met) = (a.create_label(), a.create_label());
    a.add(rsi, cpus)?;
    a.lock().inc(qword_ptr(rbp))?;
    a.set_label(&mut wait)?;
    a.cmp(qword_ptr(rbp), rsi)?;
    a.jae(met)?;
    a.pause()?;
    a.jmp(wait)?;
    a.set_label(&mut met)
}

/// Each of two processors stores to its own place, then loads the other's. What they load goes to RESULTS.
fn store_then_load(barrier: Body, count: u64) -> Vec<[u8; 2]> {
    let code = assemble(|a| {
        // R8: the other one's number.
        a.mov(r8, rbx)?;
        a.xor(r8, 1)?;
        a.mov(r9d, (DATA + 0x1000) as u32)?;
        a.mov(r10d, RESULTS as u32)?;
        a.xor(esi, esi)?;
        rounds(a, |a| {
            meet(a, 2)?;
            a.mov(byte_ptr(r9 + rbx), 1)?;
            barrier(a)?;
            a.mov(al, byte_ptr(r9 + r8))?;
            a.mov(byte_ptr(r10 + rbx), al)?;
            a.add(r9, 2)?;
            a.add(r10, 2)
        })
    });
    let ram = memory(&code, &[0xf4]);
    run(&ram, 2, count);
    let mut results = vec![0; 2 * count as usize];
    ram.read(RESULTS, &mut results);
    results
        .chunks_exact(2)
        .map(|pair| [pair[0], pair[1]])
        .collect()
}

#[test]
fn a_load_passes_an_earlier_store_only_without_a_barrier_between_them() {
    const ROUNDS: u64 = 3000;
    let barriers: [(&str, Body); 4] = [
        ("mfence", |a| a.mfence()),
        ("lock or", |a| a.lock().or(dword_ptr(rsp - 64), 0)),
        ("xchg", |a| a.xchg(qword_ptr(rsp - 64), rax)),
        ("cpuid", |a| {
            a.mov(r11, rbx)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.mov(rbx, r11)
        }),
    ];
    for (name, barrier) in barriers {
        let results = store_then_load(barrier, ROUNDS);
        let passed = results.iter().filter(|pair| **pair == [0, 0]).count();
        assert_eq!(passed, 0, "{name}: of {ROUNDS}");
    }
    // x86 allows it here, and each load gives one of the two values.
    let results = store_then_load(|_| Ok(()), ROUNDS);
    assert!(results.iter().flatten().all(|value| *value <= 1));
}

#[test]
fn stores_are_seen_in_order_and_loads_are_done_in_order() {
    const ROUNDS: u64 = 20_000;
    // The writer counts up at two places; a reader that looks at the second one first never finds the first one
    // behind it. The places are of different sizes, and one of them is written by a string instruction.
    let code = assemble(|a| {
        let (mut reader, mut fine) = (a.create_label(), a.create_label());
        a.test(ebx, ebx)?;
        a.jne(reader)?;
        a.xor(eax, eax)?;
        a.mov(rdx, rdi)?;
        let mut write = a.create_label();
        a.set_label(&mut write)?;
        a.inc(rax)?;
        a.lea(rdi, qword_ptr(rbp + 0x100))?;
        a.mov(ecx, 1)?;
        a.rep().stosq()?;
        a.mov(dword_ptr(rbp + 0x200), eax)?;
        a.dec(rdx)?;
        a.jne(write)?;
        a.hlt()?;
        a.set_label(&mut reader)?;
        a.xor(r8d, r8d)?;
        let mut read = a.create_label();
        a.set_label(&mut read)?;
        a.mov(eax, dword_ptr(rbp + 0x200))?;
        a.mov(rcx, qword_ptr(rbp + 0x100))?;
        a.cmp(rcx, rax)?;
        a.jae(fine)?;
        a.lock().inc(qword_ptr(rbp + 0x300))?;
        a.set_label(&mut fine)?;
        a.cmp(rax, rdi)?;
        a.jb(read)?;
        a.hlt()
    });
    let ram = memory(&code, &[0xf4]);
    run(&ram, 3, ROUNDS);
    assert_eq!(ram.read_u64(DATA + 0x100), ROUNDS);
    assert_eq!(ram.read_u64(DATA + 0x300), 0, "loads out of order");
}

#[test]
fn code_that_another_processor_wrote_is_executed_after_an_instruction_that_serializes() {
    const ROUNDS: u64 = 300;
    const FUNCTION: u64 = 0x5_0000;
    // Processor 0 writes the immediate of MOV EAX, says so and waits. The other ones wait, execute CPUID or IRETQ,
    // call the function and compare.
    for iret_too in [false, true] {
        let code = assemble(|a| {
            let (mut others, mut again, mut wrong) =
                (a.create_label(), a.create_label(), a.create_label());
            a.mov(r9d, FUNCTION as u32)?;
            a.xor(r8d, r8d)?;
            a.xor(esi, esi)?;
            a.mov(r12, rbx)?;
            a.set_label(&mut again)?;
            a.inc(r8)?;
            a.test(r12d, r12d)?;
            a.jne(others)?;
            a.mov(dword_ptr(r9 + 1), r8d)?;
            a.set_label(&mut others)?;
            meet(a, 3)?;
            if iret_too {
                let mut after = a.create_label();
                a.mov(rax, rsp)?;
                a.push(0x10)?;
                a.push(rax)?;
                a.pushfq()?;
                a.push(8)?;
                a.lea(rcx, qword_ptr(after))?;
                a.push(rcx)?;
                a.iretq()?;
                a.set_label(&mut after)?;
                a.nop()?;
            } else {
                a.xor(eax, eax)?;
                a.cpuid()?;
            }
            a.call(r9)?;
            a.cmp(eax, r8d)?;
            a.jne(wrong)?;
            meet(a, 3)?;
            a.dec(rdi)?;
            a.jne(again)?;
            a.hlt()?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        // The handler of #UD never returns: the test would not end. It notes what was executed instead.
        let handler = assemble(|a| {
            a.mov(qword_ptr(rbp + 0x400), r8)?;
            a.hlt()
        });
        let ram = memory(&code, &handler);
        ram.write(FUNCTION, &[0xb8, 0, 0, 0, 0, 0xc3]);
        run(&ram, 3, ROUNDS);
        assert_eq!(ram.read_u64(DATA + 0x400), 0, "old code in that round");
        assert_eq!(ram.read_u64(DATA), 6 * ROUNDS);
    }
}

#[test]
fn accessed_and_dirty_bits_never_bring_an_entry_back_that_was_taken_away() {
    const ROUNDS: u64 = 300;
    const PAGE: u64 = 0x6_0000;
    let entry = PAGE_TABLE + (PAGE >> 12) * 8;
    let code = assemble(|a| {
        let (mut toucher, mut again, mut look, mut kept) = (
            a.create_label(),
            a.create_label(),
            a.create_label(),
            a.create_label(),
        );
        a.mov(r9d, entry as u32)?;
        a.mov(r10d, PAGE as u32)?;
        a.test(ebx, ebx)?;
        a.jne(toucher)?;
        a.set_label(&mut again)?;
        // Present and writable, neither accessed nor dirty.
        a.mov(eax, PAGE as u32 | 3)?;
        a.mov(qword_ptr(r9), rax)?;
        a.mov(ecx, 40)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.dec(ecx)?;
        a.jne(wait)?;
        a.xor(eax, eax)?;
        a.xchg(qword_ptr(r9), rax)?;
        a.mov(ecx, 40)?;
        a.set_label(&mut look)?;
        a.cmp(qword_ptr(r9), 0)?;
        a.je(kept)?;
        a.lock().inc(qword_ptr(rbp + 0x100))?;
        a.set_label(&mut kept)?;
        a.dec(ecx)?;
        a.jne(look)?;
        a.dec(rdi)?;
        a.jne(again)?;
        a.mov(eax, PAGE as u32 | 3)?;
        a.mov(qword_ptr(r9), rax)?;
        a.mov(dword_ptr(rbp), 1)?;
        a.hlt()?;
        a.set_label(&mut toucher)?;
        a.invlpg(ptr(r10))?;
        a.mov(byte_ptr(r10), al)?;
        a.cmp(dword_ptr(rbp), 0)?;
        a.je(toucher)?;
        a.hlt()
    });
    // A page fault: once more.
    let handler = assemble(|a| {
        a.add(rsp, 8)?;
        a.iretq()
    });
    let ram = memory(&code, &handler);
    for page in 0..256 {
        ram.write_u64(PAGE_TABLE + page * 8, page << 12 | 3);
    }
    ram.write_u64(0x1_2000, PAGE_TABLE | 3);
    run(&ram, 3, ROUNDS);
    assert_eq!(ram.read_u64(DATA + 0x100), 0, "an entry came back");
}
