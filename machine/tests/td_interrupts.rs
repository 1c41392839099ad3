//! Interrupts of trust domains: the timer and the registers of the local APIC that are the host's, posted interrupts, and
//! halts, by small kernels on the software platform.
#![cfg(target_arch = "x86_64")]

mod support;
#[path = "support/td_apic.rs"]
mod td_apic;
#[path = "support/td_kernel.rs"]
mod td_kernel;

use iced_x86::code_asm::*;
use kvm_ops::sim::SimHost;
use kvm_ops::{VcpuId, Vendor};
use kvm_ops_machine::{ConsoleSink, End, ExitContext, Image, Inside, Machine};
use support::{Until, limits};
use td_apic::*;
use td_kernel::*;

#[track_caller]
fn prints(image: Image, expected: &str) {
    let (report, text) = run_with(&SimHost::new(Vendor::Intel), config(image), |_| ());
    assert_eq!(text, expected, "{report:?}");
    assert_eq!(report.end, End::Handler, "{report:?}");
}

#[test]
fn a_one_shot_timer_interrupts_once_at_its_instruction() {
    let main: Part = |a| {
        input_clock(a)?;
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set(a, DIVIDE, BY_1)?;
        set(a, TIMER, VECTOR.into())?;
        time(a)?;
        a.mov(rbx, rax)?;
        set(a, INITIAL_COUNT, 1000)?;
        a.sti()?;
        let mut waiting = a.create_label();
        a.set_label(&mut waiting)?;
        a.cmp(qword_ptr(COUNT), 0)?;
        a.je(waiting)?;
        // Between the times are 1000 ticks of the input clock, and the few instructions that read them.
        a.mov(rax, qword_ptr(WHEN))?;
        a.sub(rax, rbx)?;
        a.imul_3(rbp, rbp, 1000)?;
        a.sub(rax, rbp)?;
        print_if_below(a, 64, 'o')?;
        // It does not come again.
        a.mov(ecx, 200_000)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.cmp(qword_ptr(COUNT), 1)?;
        print_if_equal(a, '1')?;
        end(a)
    };
    prints(kernel(main, &[(VECTOR, counts)]), "o1.");
}

#[test]
fn a_periodic_timer_ticks_as_often_as_its_period_fits() {
    let main: Part = |a| {
        input_clock(a)?;
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set(a, DIVIDE, BY_1)?;
        set(a, TIMER, PERIODIC | u32::from(VECTOR))?;
        time(a)?;
        a.mov(rbx, rax)?;
        set(a, INITIAL_COUNT, 500)?;
        a.sti()?;
        // Ten and a half periods.
        a.imul_3(rbp, rbp, 5250)?;
        a.add(rbx, rbp)?;
        let mut waiting = a.create_label();
        a.set_label(&mut waiting)?;
        time(a)?;
        a.cmp(rax, rbx)?;
        a.jb(waiting)?;
        a.cmp(qword_ptr(COUNT), 10)?;
        print_if_equal(a, 'p')?;
        // The count that is left is below half of a period.
        a.mov(r12d, CURRENT_COUNT)?;
        vmcall(a, RDMSR)?;
        a.mov(rax, r11)?;
        print_if_below(a, 251, 'c')?;
        // A masked timer does not interrupt.
        set(a, TIMER, 1 << 16 | PERIODIC | u32::from(VECTOR))?;
        a.mov(qword_ptr(COUNT), 0)?;
        a.mov(ecx, 200_000)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.cmp(qword_ptr(COUNT), 0)?;
        print_if_equal(a, 'm')?;
        end(a)
    };
    prints(kernel(main, &[(VECTOR, counts)]), "pcm.");
}

/// Sleeps a million ticks of the TSC, with interrupts disabled until the halt is over, as Linux does.
fn sleeps(a: &mut CodeAssembler) -> Assembled {
    set(a, SPURIOUS_VECTOR, ENABLED)?;
    set(a, TIMER, BY_DEADLINE | u32::from(VECTOR))?;
    time(a)?;
    a.lea(rbx, ptr(rax + 1_000_000))?;
    a.mov(r12d, TSC_DEADLINE)?;
    a.mov(r13, rbx)?;
    vmcall(a, WRMSR)?;
    halt(a, false)?;
    a.cmp(qword_ptr(COUNT), 0)?;
    print_if_equal(a, 'h')?;
    a.sti()?;
    a.nop()?;
    a.nop()?;
    a.cli()?;
    a.cmp(qword_ptr(COUNT), 1)?;
    print_if_equal(a, 'w')?;
    a.mov(rax, qword_ptr(WHEN))?;
    a.sub(rax, rbx)?;
    print_if_below(a, 1000, 't')?;
    a.mov(r12d, TSC_DEADLINE)?;
    vmcall(a, RDMSR)?;
    a.test(r11, r11)?;
    print_if_equal(a, '0')?;
    end(a)
}

#[test]
fn a_halt_ends_at_the_deadline_and_time_passes_without_instructions() {
    let host = SimHost::new(Vendor::Intel);
    let (report, text) = run_with(&host, config(kernel(sleeps, &[(VECTOR, counts)])), |_| ());
    assert_eq!(text, "hwt0.", "{report:?}");
    assert!(host.instructions() < 10_000, "{}", host.instructions());
}

#[test]
fn a_halt_ends_at_once_if_an_interrupt_waits_in_the_virtual_apic_page() {
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set_own(a, SELF_INTERRUPT, VECTOR.into())?;
        halt(a, false)?;
        print(a, "h")?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.cli()?;
        end(a)
    };
    prints(kernel(main, &[(VECTOR, prints_i)]), "hi.");
}

#[test]
fn an_nmi_by_command_comes_where_interrupts_are_disabled() {
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        print(a, "1")?;
        set(a, COMMAND, NMI_TO_SELF)?;
        print(a, "2")?;
        end(a)
    };
    prints(kernel(main, &[(NMI, prints_n)]), "1n2.");
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set_own(a, TASK_PRIORITY, 0x40)?;
        a.sti()?;
        // One by the guest itself, one by the host.
        set_own(a, SELF_INTERRUPT, VECTOR.into())?;
        a.nop()?;
        set(a, COMMAND, 1 << 18 | 0x4f)?;
        a.nop()?;
        print(a, "m")?;
        set(a, COMMAND, 1 << 18 | 0x50)?;
        a.nop()?;
        print(a, "u")?;
        set_own(a, TASK_PRIORITY, 0)?;
        a.nop()?;
        end(a)
    };
    let prints_f: Part = |a| {
        handler(a, |a| {
            print(a, "f")?;
            end_of_interrupt(a)
        })
    };
    let prints_5: Part = |a| {
        handler(a, |a| {
            print(a, "5")?;
            end_of_interrupt(a)
        })
    };
    let handlers = [
        (VECTOR, prints_i as Part),
        (0x4f, prints_f),
        (0x50, prints_5),
    ];
    prints(kernel(main, &handlers), "m5ufi.");
}

#[test]
fn registers_of_the_virtual_apic_page_are_not_the_hosts() {
    let main: Part = |a| {
        for (function, register) in [
            (RDMSR, TASK_PRIORITY),
            (RDMSR, 0x80a),
            (RDMSR, 0x810),
            (RDMSR, 0x827),
            (WRMSR, TASK_PRIORITY),
            (WRMSR, END_OF_INTERRUPT),
            // There are no such registers.
            (RDMSR, 0x804),
            (WRMSR, 0x803),
            (RDMSR, 0x8ff),
        ] {
            a.mov(r12d, register)?;
            a.xor(r13d, r13d)?;
            vmcall(a, function)?;
            a.mov(rax, REFUSED)?;
            a.cmp(r10, rax)?;
            print_if_equal(a, 'r')?;
        }
        // The base says x2APIC mode, and stays.
        a.mov(r12d, 0x1b)?;
        vmcall(a, RDMSR)?;
        a.mov(rax, 0xfee0_0d00u64)?;
        a.cmp(r11, rax)?;
        print_if_equal(a, 'b')?;
        a.mov(r12d, 0x1b)?;
        a.mov(r13, 0xfee0_0900u64)?;
        vmcall(a, WRMSR)?;
        a.mov(rax, REFUSED)?;
        a.cmp(r10, rax)?;
        print_if_equal(a, 'r')?;
        end(a)
    };
    prints(kernel(main, &[]), "rrrrrrrrrbr.");
}

/// Lets the host act, then takes what it posted.
fn interrupted_by_the_host(a: &mut CodeAssembler) -> Assembled {
    set(a, SPURIOUS_VECTOR, ENABLED)?;
    a.sti()?;
    print(a, "!")?;
    a.nop()?;
    a.cli()?;
    a.mov(al, byte_ptr(COUNT))?;
    a.add(al, u32::from(b'0') as i32)?;
    a.call(PUTC)?;
    end(a)
}

/// Does something when the guest prints an exclamation mark.
fn at_mark(mut act: impl FnMut(&dyn Inside) + Send) -> impl FnMut(&mut ExitContext<'_>) + Send {
    move |exit| {
        if exit.data() == b"!" {
            act(exit.machine());
        }
    }
}

#[test]
fn a_host_posts_no_exception() {
    // Each of them has a handler that counts, as has the first vector that can be posted.
    let vectors: Vec<(u8, Part)> = [2, 3, 8, 13, 14, 16, 20, 30, 31]
        .map(|vector| (vector, counts as Part))
        .into();
    let post = |vectors: std::ops::RangeInclusive<u8>| {
        at_mark(move |machine| {
            for vector in vectors.clone() {
                // Vectors below 16 are refused on the host's side already.
                let posted = machine.deliver_interrupt(VcpuId(0), vector);
                assert_eq!(posted.is_ok(), vector >= 16, "{vector}");
            }
        })
    };
    let image = || kernel(interrupted_by_the_host, &vectors);
    let host = SimHost::new(Vendor::Intel);
    let (report, text) = run_with(&host, config(image()), post(0..=30));
    assert_eq!(text, "!0.", "{report:?}");
    let (report, text) = run_with(&host, config(image()), post(0..=31));
    assert_eq!(text, "!1.", "{report:?}");
}

#[test]
fn a_disabled_local_apic_drops_interrupts() {
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, 0xff)?;
        a.sti()?;
        print(a, "!")?;
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        a.nop()?;
        print(a, "d")?;
        print(a, "!")?;
        a.nop()?;
        end(a)
    };
    let post = at_mark(|machine| machine.deliver_interrupt(VcpuId(0), VECTOR).unwrap());
    let image = kernel(main, &[(VECTOR, prints_i)]);
    let (report, text) = run_with(&SimHost::new(Vendor::Intel), config(image), post);
    assert_eq!(text, "!d!i.", "{report:?}");
}

#[test]
fn an_interrupt_waits_for_the_end_of_a_ve_handler() {
    // The host posts while the handler of #VE asks it for the access, with interrupts disabled by the gate.
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        a.mov(edx, 0x3f8)?;
        a.mov(al, u32::from(b'!'))?;
        a.sti()?;
        a.out(dx, al)?;
        a.nop()?;
        a.cli()?;
        end(a)
    };
    let post = at_mark(|machine| machine.deliver_interrupt(VcpuId(0), VECTOR).unwrap());
    let image = kernel(main, &[(VE, port_handler), (VECTOR, prints_i)]);
    let (report, text) = run_with(&SimHost::new(Vendor::Intel), config(image), post);
    assert_eq!(text, "!i.", "{report:?}");
}

#[test]
fn an_interrupt_waits_for_the_handler_of_the_ve_that_an_msr_caused() {
    // The interrupt is due already when the instruction behind STI causes #VE. Were it taken in front of the handler, which
    // fetches the information, a #VE of its own would be a double fault.
    let ve: Part = |a| {
        handler(a, |a| {
            a.mov(eax, VEINFO_GET)?;
            a.tdcall()?;
            a.add(qword_ptr(rsp + 8 * SAVED.len() as i32), r10)?;
            print(a, "v")
        })
    };
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set_own(a, SELF_INTERRUPT, VECTOR.into())?;
        a.mov(ecx, COMMAND)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.sti()?;
        a.wrmsr()?;
        a.nop()?;
        a.cli()?;
        end(a)
    };
    prints(kernel(main, &[(VE, ve), (VECTOR, prints_i)]), "vi.");
}

#[test]
fn an_interrupt_handler_that_causes_ve_inside_of_a_ve_handler_is_served() {
    // The #VE handler fetches its information, lets interrupts in, and prints; the interrupt's handler uses a port too.
    let ve: Part = |a| {
        handler(a, |a| {
            a.mov(eax, VEINFO_GET)?;
            a.tdcall()?;
            a.add(qword_ptr(rsp + 8 * SAVED.len() as i32), r10)?;
            a.sti()?;
            a.nop()?;
            a.cli()?;
            print(a, "v")
        })
    };
    let interrupt: Part = |a| {
        handler(a, |a| {
            end_of_interrupt(a)?;
            print(a, "(")?;
            a.mov(edx, 0x80)?;
            a.out(dx, al)?;
            print(a, ")")
        })
    };
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set_own(a, SELF_INTERRUPT, VECTOR.into())?;
        a.mov(edx, 0x80)?;
        a.out(dx, al)?;
        end(a)
    };
    prints(kernel(main, &[(VE, ve), (VECTOR, interrupt)]), "(v)v.");
}

/// Halts until 200 interrupts came, and marks each round for the host.
fn takes_200(a: &mut CodeAssembler) -> Assembled {
    set(a, SPURIOUS_VECTOR, ENABLED)?;
    let mut next = a.create_label();
    a.set_label(&mut next)?;
    print(a, "!")?;
    halt(a, false)?;
    a.sti()?;
    a.nop()?;
    a.nop()?;
    a.cli()?;
    a.cmp(qword_ptr(COUNT), 200)?;
    a.jb(next)?;
    end(a)
}

#[test]
fn no_posted_interrupt_is_lost_whenever_it_comes() {
    // Another thread posts 200 vectors, one after the other, while the vCPU halts, wakes and takes them. One that is
    // lost would leave the guest halted until the deadline.
    let handlers: Vec<(u8, Part)> = (32..=231).map(|vector| (vector, counts as Part)).collect();
    let (host, console) = (SimHost::new(Vendor::Intel), ConsoleSink::capture());
    let mut machine = Machine::build(&host, config(kernel(takes_200, &handlers))).unwrap();
    let until = Until::new(machine.devices(console.clone()), console.clone(), ".");
    let (report, ()) = machine
        .run_while(&until, limits(), |parts| {
            while console.text().is_empty() && !parts.is_ending() {
                std::thread::yield_now();
            }
            let mut random = 1u64;
            for vector in 32..=231 {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                for _ in 0..random >> 52 {
                    std::hint::spin_loop();
                }
                parts.deliver_interrupt(VcpuId(0), vector).unwrap();
            }
        })
        .unwrap();
    assert_eq!(report.end, End::Handler, "{report:?}");
    assert!(machine.destroy().is_clean());
}

#[test]
fn runs_with_timers_and_halts_are_equal_to_the_instruction() {
    // A hundred sleeps of different lengths; between them code that is longer than a turn.
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        set(a, TIMER, BY_DEADLINE | u32::from(VECTOR))?;
        a.mov(ebp, 100)?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        time(a)?;
        a.imul_3(rbx, rbp, 7777)?;
        a.add(rbx, rax)?;
        a.mov(r12d, TSC_DEADLINE)?;
        a.mov(r13, rbx)?;
        vmcall(a, WRMSR)?;
        halt(a, false)?;
        a.sti()?;
        a.mov(ecx, 15_000)?;
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.dec(ecx)?;
        a.jnz(spin)?;
        a.cli()?;
        a.dec(ebp)?;
        a.jnz(next)?;
        time(a)?;
        a.mov(rbp, rax)?;
        for shift in [0, 4, 8, 12, 16, 20, 24] {
            a.mov(rax, rbp)?;
            a.shr(rax, shift)?;
            a.and(eax, 15)?;
            a.add(eax, u32::from(b'A') as i32)?;
            a.call(PUTC)?;
        }
        a.cmp(qword_ptr(COUNT), 100)?;
        print_if_equal(a, 'c')?;
        end(a)
    };
    let run = || {
        let host = SimHost::new(Vendor::Intel);
        let (report, text) = run_with(&host, config(kernel(main, &[(VECTOR, counts)])), |_| ());
        assert!(text.ends_with("c."), "{text} {report:?}");
        (host.instructions(), text, report.exits())
    };
    let first = run();
    assert!(first.0 > 3_000_000, "{first:?}");
    for _ in 0..3 {
        assert_eq!(first, run());
    }
}

#[test]
fn vcpu_state_details_say_whether_the_guests_priority_lets_an_interrupt_through() {
    const VCPU_STATE_DETAILS: u64 = 0x9120_0003_0000_0100;
    let main: Part = |a| {
        set(a, SPURIOUS_VECTOR, ENABLED)?;
        print(a, "!")?;
        set_own(a, SELF_INTERRUPT, VECTOR.into())?;
        print(a, "!")?;
        set_own(a, TASK_PRIORITY, 0x40)?;
        print(a, "!")?;
        set_own(a, TASK_PRIORITY, 0)?;
        a.sti()?;
        a.nop()?;
        a.cli()?;
        end(a)
    };
    // The interrupt is in service: one of its class waits for its end.
    let in_service: Part = |a| {
        handler(a, |a| {
            print(a, "!")?;
            set_own(a, SELF_INTERRUPT, 0x4f)?;
            print(a, "!")?;
            end_of_interrupt(a)?;
            print(a, "!")
        })
    };
    let handlers = [(VECTOR, in_service), (0x4f, counts as Part)];
    let host = SimHost::new(Vendor::Intel);
    let platform = host.tdx_platform().unwrap();
    let end = platform.config().memory_bytes;
    let details = || {
        let of_page = |page| platform.processor_state(page, VCPU_STATE_DETAILS);
        (0..end).step_by(4096).find_map(of_page).unwrap()
    };
    let mut seen = Vec::new();
    let look = |exit: &mut ExitContext<'_>| {
        if exit.data() == b"!" {
            seen.push(details());
        }
    };
    let (report, _) = run_with(&host, config(kernel(main, &handlers)), look);
    assert_eq!(seen, [0, 1, 0, 0, 0, 1], "{report:?}");
}
