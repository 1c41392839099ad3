//! vCPUs of a trust domain that execute machine code at the same time, each on its thread: their private memory is one, with
//! atomic instructions, and what the host does to it meanwhile has the same end as in turns.
#![cfg(target_arch = "x86_64")]

mod support;
#[path = "support/td_apic.rs"]
mod td_apic;
#[path = "support/td_kernel.rs"]
mod td_kernel;

use std::time::Duration;

use iced_x86::code_asm::*;
use kvm_ops::{Error, Gpa, Privacy};
use kvm_ops_machine::{ConsoleSink, End, Machine, RunLimits};
use td_apic::*;
use td_kernel::*;

const VCPUS: u32 = 4;

/// Data of the kernels: two counts of vCPUs, and counters: in one line, across two pages, and of 16 bytes.
const READY: u64 = DATA + 0x10;
const DONE: u64 = DATA + 0x18;
const COUNTER: u64 = DATA + 0x80;
const ACROSS: u64 = DATA - 4;
const PAIR: u64 = DATA + 0xc0;

/// The vCPU waits until all have come here.
fn meet(a: &mut CodeAssembler) -> Assembled {
    a.lock().inc(qword_ptr(READY))?;
    wait_for(a, READY, VCPUS as i32)
}

/// Counts for ever.
fn count(a: &mut CodeAssembler) -> Assembled {
    let mut next = a.create_label();
    // A label of the caller may stand here.
    a.nop()?;
    a.set_label(&mut next)?;
    a.lock().inc(qword_ptr(COUNTER))?;
    a.inc(qword_ptr(COUNTER + 8))?;
    a.jmp(next)
}

/// All vCPUs count for ever but the first, which prints an exclamation mark in the middle of that, and spins.
fn all_count(a: &mut CodeAssembler) -> Assembled {
    let mut others = a.create_label();
    let mut stay = a.create_label();
    a.mov(ebx, esi)?;
    meet(a)?;
    a.test(ebx, ebx)?;
    a.jnz(others)?;
    let mut early = a.create_label();
    a.set_label(&mut early)?;
    a.cmp(qword_ptr(COUNTER), 1000)?;
    a.jb(early)?;
    print(a, "!")?;
    a.set_label(&mut stay)?;
    a.jmp(stay)?;
    a.set_label(&mut others)?;
    count(a)
}

/// The end of a kernel whose vCPUs each raised the counter so often. The first vCPU, with 0 in EBX, waits for all, prints the letter
/// if the counter is right, and ends the machine; the others halt.
fn finish(a: &mut CodeAssembler, rounds: u32, letter: char) -> Assembled {
    let mut others = a.create_label();
    a.lock().inc(qword_ptr(DONE))?;
    a.test(ebx, ebx)?;
    a.jnz(others)?;
    wait_for(a, DONE, VCPUS as i32)?;
    a.cmp(qword_ptr(COUNTER), (rounds * VCPUS) as i32)?;
    print_if_equal(a, letter)?;
    end(a)?;
    halt_for_good(a, &mut others)
}

#[test]
fn locked_instructions_on_private_memory_add_up_while_the_host_reads_it() {
    const ROUNDS: u32 = 20_000;
    /// Each of them stops all other vCPUs.
    const SLOW_ROUNDS: u32 = 100;
    let main: Part = |a| {
        a.mov(r8d, esi)?;
        meet(a)?;
        let mut next = a.create_label();
        let mut again = a.create_label();
        let mut slow = a.create_label();
        a.mov(ebp, ROUNDS)?;
        a.set_label(&mut next)?;
        a.lock().inc(qword_ptr(COUNTER))?;
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(PAIR))?;
        a.mov(rdx, qword_ptr(PAIR + 8))?;
        a.lea(rbx, ptr(rax + 1))?;
        a.lea(rcx, ptr(rdx + 1))?;
        a.lock().cmpxchg16b(xmmword_ptr(PAIR))?;
        a.jne(again)?;
        a.dec(ebp)?;
        a.jnz(next)?;
        a.mov(ebp, SLOW_ROUNDS)?;
        a.set_label(&mut slow)?;
        a.lock().add(qword_ptr(ACROSS), 1)?;
        a.dec(ebp)?;
        a.jnz(slow)?;
        a.lock().inc(qword_ptr(DONE))?;
        let mut others = a.create_label();
        a.test(r8d, r8d)?;
        a.jnz(others)?;
        print(a, "!")?;
        wait_for(a, DONE, VCPUS as i32)?;
        for (counter, rounds, yes) in [
            (COUNTER, ROUNDS, 'l'),
            (ACROSS, SLOW_ROUNDS, 'x'),
            (PAIR, ROUNDS, 'p'),
            (PAIR + 8, ROUNDS, 'q'),
        ] {
            a.cmp(qword_ptr(counter), (rounds * VCPUS) as i32)?;
            print_if_equal(a, yes)?;
        }
        end(a)?;
        halt_for_good(a, &mut others)
    };
    for host in hosts() {
        let platform = host.tdx_platform().unwrap();
        let config = config(kernel(main, &[])).vcpus(VCPUS);
        let (report, text) = run_with(&host, config, |exit| {
            if exit.data() == b"!" {
                let page = frame_at(platform, DATA);
                let mut bytes = [0; 4096];
                for _ in 0..50 {
                    platform.read_memory(page, &mut bytes).unwrap();
                }
            }
        });
        assert_eq!(text, "!lxpq.", "{report:?}");
    }
}

#[test]
fn what_the_host_writes_while_all_vcpus_use_it_kills_the_td() {
    for written in [COUNTER, MAIN] {
        let host = at_the_same_time();
        let platform = host.tdx_platform().unwrap();
        let config = config(kernel(all_count, &[])).vcpus(VCPUS);
        let ended = run_with(&host, config, |exit| {
            if exit.data() == b"!" {
                let page = frame_at(platform, written);
                let at = page + written % 4096;
                platform.write_memory(at, &[0; 64]).unwrap();
            }
        });
        td_is_lost(ended, "!");
    }
}

#[test]
fn a_damaged_page_s_other_lines_are_counted_in_to_the_last_round() {
    const ROUNDS: u32 = 3000;
    let main: Part = |a| {
        a.mov(ebx, esi)?;
        let mut wait = a.create_label();
        let mut next = a.create_label();
        a.test(ebx, ebx)?;
        a.jnz(wait)?;
        print(a, "!")?;
        a.set_label(&mut wait)?;
        meet(a)?;
        a.mov(ebp, ROUNDS)?;
        a.set_label(&mut next)?;
        a.lock().inc(qword_ptr(COUNTER))?;
        a.dec(ebp)?;
        a.jnz(next)?;
        finish(a, ROUNDS, 'l')
    };
    let host = at_the_same_time();
    let platform = host.tdx_platform().unwrap();
    let config = config(kernel(main, &[])).vcpus(VCPUS);
    let (report, text) = run_with(&host, config, |exit| {
        if exit.data() == b"!" {
            let line = frame_at(platform, DATA) + 0x800;
            platform.write_memory(line, &[0]).unwrap();
        }
    });
    assert_eq!(text, "!l.", "{report:?}");
}

#[test]
fn a_page_that_is_taken_away_while_all_vcpus_use_it_is_not_used_again_without_acceptance() {
    const PAGE: u32 = 0x50_0000;
    let main: Part = |a| {
        let mut others = a.create_label();
        let mut next = a.create_label();
        let mut early = a.create_label();
        a.mov(ebx, esi)?;
        a.test(ebx, ebx)?;
        a.jnz(others)?;
        a.mov(eax, ACCEPT)?;
        a.mov(ecx, PAGE)?;
        a.tdcall()?;
        a.lock().inc(qword_ptr(READY))?;
        a.set_label(&mut early)?;
        a.cmp(dword_ptr(u64::from(PAGE)), 1000)?;
        a.jb(early)?;
        a.mov(r12, u64::from(PAGE) | SHARED)?;
        a.mov(r13d, 0x1000)?;
        vmcall(a, MAP_GPA)?;
        let mut stay = a.create_label();
        a.set_label(&mut stay)?;
        a.jmp(stay)?;
        a.set_label(&mut others)?;
        wait_for(a, READY, 1)?;
        a.set_label(&mut next)?;
        a.lock().inc(dword_ptr(u64::from(PAGE)))?;
        a.jmp(next)
    };
    // The machine gives a page again to who touches it: this one was not accepted.
    for host in hosts() {
        let config = config(kernel(main, &[])).vcpus(VCPUS);
        let (report, _) = run_with(&host, config, |_| ());
        assert_eq!(report.end, End::Failed(Error::Poisoned), "{report:?}");
        let diagnosis = report.diagnosis().expect("why");
        assert_eq!(
            diagnosis.access,
            Some((Gpa::new(PAGE.into()), Privacy::Private))
        );
    }
}

#[test]
fn a_machine_whose_vcpus_never_leave_ends_at_its_deadline_with_every_page_back() {
    let host = at_the_same_time();
    let config = config(kernel(count, &[])).vcpus(VCPUS);
    let mut machine = Machine::build(&host, config).unwrap();
    let devices = machine.devices(ConsoleSink::discard());
    for _ in 0..3 {
        let limits = RunLimits::none().deadline(Duration::from_millis(100));
        let report = machine.run(&devices, limits).unwrap();
        assert_eq!(report.end, End::Deadline, "{report:?}");
    }
    let freed = machine.destroy();
    assert!(freed.is_clean(), "{freed:?}");
    assert_eq!(host.live_vms(), 0);
}

#[test]
fn timers_of_all_vcpus_follow_the_time_of_the_host() {
    const SLEEPS: u32 = 20;
    const TICKS: u32 = 1_000_000;
    let main: Part = |a| {
        a.mov(ebx, esi)?;
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set(a, TIMER, BY_DEADLINE | u32::from(VECTOR))?;
        a.mov(ebp, SLEEPS)?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        time(a)?;
        a.add(rax, TICKS as i32)?;
        a.mov(r13, rax)?;
        a.mov(r12d, TSC_DEADLINE)?;
        vmcall(a, WRMSR)?;
        halt(a, false)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.cli()?;
        a.dec(ebp)?;
        a.jnz(next)?;
        finish(a, SLEEPS, 't')
    };
    let ticks: Part = |a| {
        handler(a, |a| {
            a.lock().inc(qword_ptr(COUNTER))?;
            end_of_interrupt(a)
        })
    };
    let config = config(kernel(main, &[(VECTOR, ticks)])).vcpus(VCPUS);
    let (report, text) = run_with(&at_the_same_time(), config, |_| ());
    assert_eq!(text, "t.", "{report:?}");
    let slept = Duration::from_nanos(u64::from(SLEEPS * TICKS));
    assert!(report.elapsed >= slept, "{report:?}");
}
