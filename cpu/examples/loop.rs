//! A loop of 21 instructions in 64-bit mode, and how many millions of them a second are executed:
//! `cargo run --release -p kvm-ops-cpu --example loop -- [MILLIONS OF INSTRUCTIONS [PROCESSORS]]`
//!
//! It loads, stores, multiplies, rotates, calls, pushes and pops, and has a branch that depends on its random numbers;
//! everything stays in the caches. With a number of processors, so many run it at the same time, each on a thread and
//! in pages of its own, and it is the time on the clock that counts.

mod common;

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::{Arc, Barrier, RwLock};
use std::time::Instant;

use common::cpu_seconds;
use iced_x86::code_asm::*;
use kvm_ops_cpu::{Access, Bus, CodePages, Cpu, CpuidTable, Frame, Mapping, Segment, Stopped};

const PAGES: usize = 512;
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x8000;
const STACK: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
/// Bytes of data of one processor, and how many of them memory has room for.
const OWN: u64 = 0x2_0000;
const MOST: u64 = 8;

/// Memory at 0.
struct Memory(Box<[UnsafeCell<Page>]>);

/// A processor's way to it.
struct Way(Arc<Memory>);

#[repr(align(4096))]
#[allow(dead_code)] // Guests use it, by pointer.
struct Page([u8; 4096]);

// SAFETY: only processors use it, by atomic accesses.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Bus for Way {
    fn map(&mut self, gpa: u64, _: Access) -> Mapping {
        let cell = self.0.0.get((gpa >> 12) as usize);
        match cell.and_then(|cell| NonNull::new(cell.get().cast())) {
            // SAFETY: the frame lives as long as the bus, is aligned to a page, and only processors use it from now on.
            Some(host) => Mapping::Frame(unsafe { Frame::new(host, true) }),
            None => Mapping::Device,
        }
    }
    fn read(&mut self, _: u64, _: &mut [u8]) -> bool {
        false
    }
    fn write(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }
    fn port_in(&mut self, _: u16, _: u8) -> Option<u32> {
        None
    }
    fn port_out(&mut self, _: u16, _: u8, _: u32) -> Option<()> {
        None
    }
}

fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut again, mut odd, mut function) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.mov(rax, qword_ptr(rbx + rcx * 8))?;
    a.imul_2(rax, rdx)?;
    a.lea(rdx, qword_ptr(rdx + rax * 2 + 0x35))?;
    a.rol(rdx, 13)?;
    a.mov(qword_ptr(rbx + rcx * 8), rdx)?;
    a.call(function)?;
    a.test(dl, 0x10)?;
    a.jne(odd)?;
    a.xor(rsi, rdx)?;
    a.set_label(&mut odd)?;
    a.add(rcx, 1)?;
    a.and(ecx, 0x3fff)?;
    a.sub(rdi, 1)?;
    a.jne(again)?;
    a.hlt()?;
    a.set_label(&mut function)?;
    a.push(rbp)?;
    a.mov(rbp, rdx)?;
    a.shr(rbp, 7)?;
    a.add(rsi, rbp)?;
    a.mov(r8, qword_ptr(rbx + 8))?;
    a.xor(r8, rsi)?;
    a.pop(rbp)?;
    a.ret()?;
    a.assemble(CODE)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let millions = std::env::args().nth(1).map_or(Ok(2000), |n| n.parse())?;
    let mut frames: Vec<[u8; 4096]> = vec![[0; 4096]; PAGES];
    let mut put = |at: u64, bytes: &[u8]| {
        frames.as_flattened_mut()[at as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    // 2 MiB pages, identically.
    put(TABLES, &(TABLES + 0x1003).to_le_bytes());
    put(TABLES + 0x1000, &(TABLES + 0x2003).to_le_bytes());
    put(TABLES + 0x2000, &0x83u64.to_le_bytes());
    put(CODE, &code().map_err(|error| error.to_string())?);
    let pages = frames.into_iter().map(Page);
    let frames = pages.map(UnsafeCell::new).collect();
    let memory = Arc::new(Memory(frames));
    let pages = CodePages::new(PAGES);
    match std::env::args().nth(2) {
        None => alone(processor(&memory, &pages, 0), millions),
        Some(n) => together(&memory, &pages, n.parse()?, millions)?,
    }
    Ok(())
}

/// A processor with its own data and stack.
fn processor(memory: &Arc<Memory>, pages: &Arc<CodePages>, number: u64) -> Cpu {
    let bus = Way(Arc::clone(memory));
    let mut cpu = Cpu::new(Box::new(bus), Arc::clone(pages), CpuidTable::intel());
    let mut r = cpu.registers();
    let flat = |selector, rights| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    };
    r.segments = [flat(0x10, 0xc093); 6];
    r.segments[1] = flat(0x8, 0xa09b);
    (r.cr0, r.cr3, r.cr4, r.efer) = (0x8000_0011, TABLES, 0x20, 0x500);
    r.rip = CODE;
    (r.gpr[2], r.gpr[3], r.gpr[4]) = (1, DATA + number * OWN, STACK + number * 0x1000);
    r.gpr[7] = u64::MAX;
    cpu.set_registers(&r);
    cpu
}

fn alone(mut cpu: Cpu, millions: u64) {
    // The blocks are built and the translations filled before the clock starts.
    cpu.run(1_000_000);
    let start = cpu_seconds();
    let stopped = cpu.run(millions * 1_000_000);
    let seconds = cpu_seconds() - start;
    println!(
        "{millions} million instructions, {seconds:.2} s of processor time, {:.0} M/s, {stopped:?}",
        millions as f64 / seconds
    );
}

/// So many processors, which run as those of a virtual machine do: short runs, and one of them alone when it asks.
fn together(
    memory: &Arc<Memory>,
    pages: &Arc<CodePages>,
    count: u64,
    millions: u64,
) -> Result<(), String> {
    const RUN: u64 = 2_000;
    if !(1..=MOST).contains(&count) {
        return Err(format!("1 to {MOST} processors have room"));
    }
    let turn = RwLock::new(());
    let run = |cpu: &mut Cpu, instructions: u64| {
        let end = cpu.retired() + instructions;
        while cpu.retired() < end {
            let stopped = {
                let _shared = turn.read();
                cpu.run(RUN)
            };
            if stopped == Stopped::Alone {
                let _alone = turn.write();
                cpu.run_alone();
            }
        }
    };
    let start = Barrier::new(count as usize + 1);
    let seconds = std::thread::scope(|scope| {
        for number in 0..count {
            let mut cpu = processor(memory, pages, number);
            cpu.set_parallel(true);
            let (run, start) = (&run, &start);
            scope.spawn(move || {
                run(&mut cpu, 1_000_000);
                start.wait();
                run(&mut cpu, millions * 1_000_000);
                start.wait();
            });
        }
        start.wait();
        let began = Instant::now();
        start.wait();
        began.elapsed().as_secs_f64()
    });
    println!(
        "{count} processors, {millions} million instructions each, {seconds:.2} s, {:.0} M/s together",
        (count * millions) as f64 / seconds
    );
    Ok(())
}
