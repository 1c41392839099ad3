//! Several vCPUs in a trust domain that execute machine code: they start together, send each other interrupts, sleep in
//! one time, and share memory that any of them accepts.
#![cfg(target_arch = "x86_64")]

mod support;
#[path = "support/td_apic.rs"]
mod td_apic;
#[path = "support/td_kernel.rs"]
mod td_kernel;

use iced_x86::code_asm::*;
use kvm_ops::sim::SimHost;
use kvm_ops::{ExitKind, VcpuId, Vendor};
use kvm_ops_machine::{End, Image, RunReport};
use td_apic::*;
use td_kernel::*;

const VCPUS: u32 = 4;

/// Data beside those of the interrupt handlers.
const READY: u64 = DATA + 0x10;
const GO: u64 = DATA + 0x18;
const DONE: u64 = DATA + 0x20;

/// An interrupt command of one vCPU to another is asserted, and has its destination in the upper half.
const ASSERT: u32 = 1 << 14;

/// Leads vCPUs other than the first to `other`. The number is in RSI, and stays in RBX.
fn split(a: &mut CodeAssembler, other: CodeLabel) -> Assembled {
    a.mov(ebx, esi)?;
    set(a, SPURIOUS_VECTOR, ENABLED)?;
    a.test(ebx, ebx)?;
    a.jnz(other)
}

/// Says that this vCPU is ready.
fn ready(a: &mut CodeAssembler) -> Assembled {
    a.lock().inc(qword_ptr(READY))
}

/// The number of the local APIC in EAX.
fn number(a: &mut CodeAssembler) -> Assembled {
    a.mov(r12d, 0x802)?;
    vmcall(a, RDMSR)?;
    a.mov(eax, r11d)
}

/// Sends an interrupt command to the vCPU whose number is in EAX.
fn send(a: &mut CodeAssembler, command: u32) -> Assembled {
    a.mov(r13d, eax)?;
    a.shl(r13, 32)?;
    a.or(r13, (command | ASSERT) as i32)?;
    a.mov(r12d, COMMAND)?;
    vmcall(a, WRMSR)
}

/// Halts and takes what came, for ever.
fn serve(a: &mut CodeAssembler) -> Assembled {
    let mut next = a.create_label();
    a.set_label(&mut next)?;
    halt(a, false)?;
    a.sti()?;
    a.nop()?;
    a.nop()?;
    a.cli()?;
    a.jmp(next)
}

fn run_on(host: &SimHost, image: Image) -> (RunReport, String) {
    let (report, text) = run_with(host, config(image).vcpus(VCPUS), |_| ());
    assert_eq!(report.end, End::Handler, "{text} {report:?}");
    (report, text)
}

/// The instructions of a run in turns, its report and its console.
fn run(image: Image) -> (u64, RunReport, String) {
    let host = SimHost::new(Vendor::Intel);
    let (report, text) = run_on(&host, image);
    (host.instructions(), report, text)
}

/// Runs in turns, and at the same time.
#[track_caller]
fn prints(image: Image, expected: &str) {
    for host in hosts() {
        let (report, text) = run_on(&host, image.clone());
        assert_eq!(text, expected, "{report:?}");
    }
}

#[test]
fn all_vcpus_start_at_the_entry_with_their_number_and_a_stack() {
    // Each waits for the one before it, and prints its number with the page of its stack.
    let main: Part = |a| {
        a.mov(ebx, esi)?;
        let mut waiting = a.create_label();
        let mut turn = a.create_label();
        a.set_label(&mut waiting)?;
        a.cmp(qword_ptr(READY), rbx)?;
        a.je(turn)?;
        a.pause()?;
        a.jmp(waiting)?;
        a.set_label(&mut turn)?;
        a.lea(eax, ptr(rbx + u64::from(b'0') as i32))?;
        a.call(PUTC)?;
        // The top of stack n is n times 16 KiB below that of the first.
        a.mov(eax, 0xffff_c000u32)?;
        a.sub(rax, rsp)?;
        a.shr(rax, 14)?;
        a.cmp(rax, rbx)?;
        print_if_equal(a, 's')?;
        // TDG.VP.INFO: the number of vCPUs in R8, the index in R9.
        a.mov(eax, 1)?;
        a.tdcall()?;
        a.cmp(r8d, VCPUS as i32)?;
        print_if_equal(a, 'n')?;
        a.cmp(r9, rbx)?;
        print_if_equal(a, 'i')?;
        // The local APIC has the same number.
        number(a)?;
        a.cmp(eax, ebx)?;
        print_if_equal(a, 'a')?;
        let mut more = a.create_label();
        a.cmp(ebx, VCPUS as i32 - 1)?;
        a.jne(more)?;
        end(a)?;
        a.set_label(&mut more)?;
        a.lock().inc(qword_ptr(READY))?;
        a.ret()
    };
    prints(kernel(main, &[]), "0snia1snia2snia3snia.");
}

/// Sends the interrupt on to the next vCPU, 1000 times in all.
fn passes_on(a: &mut CodeAssembler) -> Assembled {
    handler(a, |a| {
        end_of_interrupt(a)?;
        a.mov(eax, 1)?;
        a.lock().xadd(qword_ptr(COUNT), rax)?;
        let mut last = a.create_label();
        a.cmp(rax, 999)?;
        a.jae(last)?;
        number(a)?;
        a.inc(eax)?;
        a.and(eax, VCPUS as i32 - 1)?;
        send(a, VECTOR.into())?;
        a.set_label(&mut last)?;
        a.nop()
    })
}

/// A ring of vCPUs, of which one interrupts the next.
fn ring(a: &mut CodeAssembler) -> Assembled {
    let mut other = a.create_label();
    split(a, other)?;
    wait_for(a, READY, VCPUS as i32 - 1)?;
    a.mov(eax, 1)?;
    send(a, VECTOR.into())?;
    let mut next = a.create_label();
    a.set_label(&mut next)?;
    halt(a, false)?;
    a.sti()?;
    a.nop()?;
    a.nop()?;
    a.cli()?;
    // The last of the thousand is taken by vCPU 0.
    a.cmp(qword_ptr(COUNT), 997)?;
    a.jb(next)?;
    wait_for(a, COUNT, 1000)?;
    time(a)?;
    a.mov(rbp, rax)?;
    for shift in [0, 4, 8, 12, 16, 20, 24] {
        a.mov(rax, rbp)?;
        a.shr(rax, shift)?;
        a.and(eax, 15)?;
        a.add(eax, u32::from(b'A') as i32)?;
        a.call(PUTC)?;
    }
    end(a)?;
    a.set_label(&mut other)?;
    ready(a)?;
    serve(a)
}

#[test]
fn a_thousand_interrupts_go_round_four_vcpus_and_runs_are_equal_to_the_instruction() {
    let image = || kernel(ring, &[(VECTOR, passes_on)]);
    let (instructions, report, text) = run(image());
    assert!(text.len() == 8 && text.ends_with('.'), "{text} {report:?}");
    for _ in 0..3 {
        let again = run(image());
        assert_eq!((again.0, &again.2), (instructions, &text));
    }
}

#[test]
fn spinning_vcpus_share_the_time_and_runs_are_equal_to_the_instruction() {
    // Each counts a million; the first prints the time at which the others were done.
    let main: Part = |a| {
        let mut other = a.create_label();
        split(a, other)?;
        let work = |a: &mut CodeAssembler| {
            a.mov(ecx, 200_000)?;
            let mut next = a.create_label();
            a.set_label(&mut next)?;
            a.lock().inc(qword_ptr(COUNT))?;
            a.dec(ecx)?;
            a.jnz(next)
        };
        work(a)?;
        wait_for(a, READY, VCPUS as i32 - 1)?;
        time(a)?;
        a.mov(rbp, rax)?;
        for shift in [0, 4, 8, 12, 16, 20, 24] {
            a.mov(rax, rbp)?;
            a.shr(rax, shift)?;
            a.and(eax, 15)?;
            a.add(eax, u32::from(b'A') as i32)?;
            a.call(PUTC)?;
        }
        a.cmp(qword_ptr(COUNT), 800_000)?;
        print_if_equal(a, 'c')?;
        end(a)?;
        a.set_label(&mut other)?;
        work(a)?;
        ready(a)?;
        serve(a)
    };
    let image = || kernel(main, &[]);
    let (instructions, report, text) = run(image());
    assert!(text.ends_with("c."), "{text} {report:?}");
    for _ in 0..3 {
        let again = run(image());
        assert_eq!((again.0, &again.2), (instructions, &text));
    }
}

#[test]
fn all_sleep_and_wake_in_the_order_of_their_deadlines() {
    // The first sleeps longest; one prints when it wakes.
    let main: Part = |a| {
        a.mov(ebx, esi)?;
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set(a, TIMER, BY_DEADLINE | u32::from(VECTOR))?;
        a.mov(eax, VCPUS)?;
        a.sub(eax, ebx)?;
        a.imul_3(rax, rax, 100_000_000)?;
        a.mov(r12d, TSC_DEADLINE)?;
        a.mov(r13, rax)?;
        vmcall(a, WRMSR)?;
        halt(a, false)?;
        a.lea(eax, ptr(rbx + u64::from(b'0') as i32))?;
        a.call(PUTC)?;
        let mut stay = a.create_label();
        a.test(ebx, ebx)?;
        a.jnz(stay)?;
        end(a)?;
        a.set_label(&mut stay)?;
        a.cli()?;
        halt(a, true)?;
        a.jmp(stay)
    };
    let (instructions, report, text) = run(kernel(main, &[]));
    assert_eq!(text, "3210.", "{report:?}");
    assert!(
        instructions < 1_000_000,
        "{instructions} for 400 million ticks"
    );
}

#[test]
fn destinations_are_one_all_or_all_others() {
    let main: Part = |a| {
        let mut other = a.create_label();
        split(a, other)?;
        wait_for(a, READY, VCPUS as i32 - 1)?;
        // All others.
        set(a, COMMAND, 3 << 18 | ASSERT | u32::from(VECTOR))?;
        wait_for(a, COUNT, 3)?;
        print(a, "o")?;
        // All, by shorthand: its own comes when it takes interrupts.
        set(a, COMMAND, 2 << 18 | ASSERT | u32::from(VECTOR))?;
        a.sti()?;
        wait_for(a, COUNT, 7)?;
        print(a, "a")?;
        // All, by destination.
        a.mov(eax, u32::MAX)?;
        send(a, VECTOR.into())?;
        wait_for(a, COUNT, 11)?;
        print(a, "b")?;
        // Two of the cluster, by logical destination.
        a.mov(eax, 0b1010)?;
        send(a, 1 << 11 | u32::from(VECTOR))?;
        wait_for(a, COUNT, 13)?;
        print(a, "l")?;
        // INIT, SIPI, and a vCPU that is not there: nothing happens.
        for (to, command) in [(1, 5 << 8), (1, 6 << 8 | 0x10), (9, u32::from(VECTOR))] {
            a.mov(eax, to)?;
            send(a, command)?;
        }
        a.mov(eax, 1)?;
        send(a, VECTOR.into())?;
        wait_for(a, COUNT, 14)?;
        print(a, "1")?;
        end(a)?;
        a.set_label(&mut other)?;
        ready(a)?;
        serve(a)
    };
    let counts_up: Part = |a| {
        handler(a, |a| {
            a.lock().inc(qword_ptr(COUNT))?;
            end_of_interrupt(a)
        })
    };
    prints(kernel(main, &[(VECTOR, counts_up)]), "oabl1.");
}

#[test]
fn an_nmi_of_another_vcpu_ends_a_halt_that_takes_no_interrupts() {
    let main: Part = |a| {
        let mut other = a.create_label();
        split(a, other)?;
        wait_for(a, READY, VCPUS as i32 - 1)?;
        // An interrupt does not end it.
        a.mov(eax, 1)?;
        send(a, VECTOR.into())?;
        a.mov(ecx, 100_000)?;
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.dec(ecx)?;
        a.jnz(spin)?;
        a.cmp(qword_ptr(DONE), 0)?;
        print_if_equal(a, 's')?;
        a.mov(eax, 1)?;
        send(a, 4 << 8)?;
        wait_for(a, DONE, 1)?;
        end(a)?;
        a.set_label(&mut other)?;
        ready(a)?;
        halt(a, true)?;
        print(a, "w")?;
        a.lock().inc(qword_ptr(DONE))?;
        serve(a)
    };
    let (_, report, text) = run(kernel(main, &[(NMI, prints_n), (VECTOR, counts)]));
    assert_eq!(text, "snw.", "{report:?}");
}

#[test]
fn an_nmi_reaches_a_vcpu_that_spins_with_interrupts_disabled() {
    let main: Part = |a| {
        let mut other = a.create_label();
        split(a, other)?;
        wait_for(a, READY, VCPUS as i32 - 1)?;
        a.mov(eax, 2)?;
        send(a, 4 << 8)?;
        wait_for(a, DONE, 1)?;
        end(a)?;
        a.set_label(&mut other)?;
        ready(a)?;
        let mut stay = a.create_label();
        a.set_label(&mut stay)?;
        a.jmp(stay)
    };
    let says_so: Part = |a| {
        handler(a, |a| {
            print(a, "n")?;
            a.lock().inc(qword_ptr(DONE))
        })
    };
    prints(kernel(main, &[(NMI, says_so)]), "n.");
}

#[test]
fn each_page_is_accepted_once_whichever_vcpu_comes_first() {
    const FIRST: u32 = 0x40_0000;
    const PAGES: i32 = 64;
    const AGAIN: u64 = DATA + 0x28;
    let main: Part = |a| {
        a.mov(ebx, esi)?;
        a.mov(ebp, FIRST)?;
        let mut next = a.create_label();
        let mut once = a.create_label();
        let mut done = a.create_label();
        let mut others = a.create_label();
        a.set_label(&mut next)?;
        a.mov(eax, ACCEPT)?;
        a.mov(ecx, ebp)?;
        a.tdcall()?;
        a.test(rax, rax)?;
        a.jz(once)?;
        // TDX_PAGE_ALREADY_ACCEPTED; all else would be missed at the end.
        a.shr(rax, 32)?;
        a.cmp(eax, 0x0b0a)?;
        a.jne(next)?;
        a.lock().inc(qword_ptr(AGAIN))?;
        a.jmp(done)?;
        a.set_label(&mut once)?;
        a.lock().inc(qword_ptr(COUNT))?;
        a.set_label(&mut done)?;
        // Any of them may write.
        a.lock().inc(dword_ptr(rbp))?;
        a.add(ebp, 0x1000)?;
        a.cmp(ebp, FIRST as i32 + PAGES * 0x1000)?;
        a.jb(next)?;
        a.lock().inc(qword_ptr(READY))?;
        a.test(ebx, ebx)?;
        a.jnz(others)?;
        wait_for(a, READY, VCPUS as i32)?;
        a.cmp(qword_ptr(COUNT), PAGES)?;
        print_if_equal(a, 'a')?;
        a.cmp(qword_ptr(AGAIN), PAGES * (VCPUS as i32 - 1))?;
        print_if_equal(a, 'o')?;
        a.cmp(dword_ptr(u64::from(FIRST) + 0x1000), VCPUS as i32)?;
        print_if_equal(a, 'w')?;
        end(a)?;
        halt_for_good(a, &mut others)
    };
    prints(kernel(main, &[]), "aow.");
}

#[test]
fn a_translation_does_not_outlive_the_page_in_any_vcpu() {
    const PAGE: u32 = 0x50_0000;
    let main: Part = |a| {
        let mut other = a.create_label();
        split(a, other)?;
        a.mov(eax, ACCEPT)?;
        a.mov(ecx, PAGE)?;
        a.tdcall()?;
        a.mov(qword_ptr(u64::from(PAGE)), 11)?;
        a.mov(qword_ptr(GO), 1)?;
        // All others have read it.
        wait_for(a, READY, 3)?;
        // It becomes shared and private again: another frame.
        a.mov(r12, u64::from(PAGE) | SHARED)?;
        a.mov(r13d, 0x1000)?;
        vmcall(a, MAP_GPA)?;
        a.test(r10, r10)?;
        print_if_equal(a, 's')?;
        a.mov(r12d, PAGE)?;
        a.mov(r13d, 0x1000)?;
        vmcall(a, MAP_GPA)?;
        a.test(r10, r10)?;
        print_if_equal(a, 'p')?;
        a.mov(eax, ACCEPT)?;
        a.mov(ecx, PAGE)?;
        a.tdcall()?;
        a.test(rax, rax)?;
        print_if_equal(a, 'a')?;
        a.mov(qword_ptr(u64::from(PAGE)), 22)?;
        a.mov(qword_ptr(GO), 2)?;
        wait_for(a, DONE, 3)?;
        end(a)?;
        a.set_label(&mut other)?;
        wait_for(a, GO, 1)?;
        a.cmp(qword_ptr(u64::from(PAGE)), 11)?;
        let mut wrong = a.create_label();
        a.jne(wrong)?;
        ready(a)?;
        wait_for(a, GO, 2)?;
        a.cmp(qword_ptr(u64::from(PAGE)), 22)?;
        a.jne(wrong)?;
        a.lock().inc(qword_ptr(DONE))?;
        serve(a)?;
        a.set_label(&mut wrong)?;
        print(a, "?")?;
        end(a)
    };
    for host in hosts() {
        let (report, text) = run_on(&host, kernel(main, &[]));
        assert_eq!(text, "spa.", "{report:?}");
        assert_eq!(report.exits().of(ExitKind::MapGpaRange), 2);
    }
}

#[test]
fn a_host_interrupts_the_vcpu_that_it_means() {
    let main: Part = |a| {
        let mut other = a.create_label();
        split(a, other)?;
        wait_for(a, READY, VCPUS as i32 - 1)?;
        print(a, "!")?;
        wait_for(a, DONE, 1)?;
        end(a)?;
        a.set_label(&mut other)?;
        ready(a)?;
        serve(a)
    };
    let says_which: Part = |a| {
        handler(a, |a| {
            number(a)?;
            a.add(eax, u32::from(b'0') as i32)?;
            a.call(PUTC)?;
            a.lock().inc(qword_ptr(DONE))?;
            end_of_interrupt(a)
        })
    };
    for host in hosts() {
        let image = kernel(main, &[(VECTOR, says_which)]);
        let (report, text) = run_with(&host, config(image).vcpus(VCPUS), |exit| {
            if exit.data() == b"!" {
                let machine = exit.machine();
                machine.deliver_interrupt(VcpuId(2), VECTOR).unwrap();
            }
        });
        // The console gets the exclamation mark after the interrupt was sent, and the other vCPU need not wait for that.
        assert!(["!2.", "2!."].contains(&&*text), "{text} {report:?}");
    }
}
