//! Interrupts, NMIs, the interrupt shadow, single steps and start-up.

mod common;

use common::Ram;
use common::long_mode::{CODE, HANDLER, IDT, STACK, machine};
use kvm_ops_cpu::{Cause, Stopped};

/// RIP that the handler's frame returns to; the frame of the first delivery is below STACK.
fn returned_to(ram: &Ram) -> u64 {
    ram.read_u64(STACK - 40)
}

#[test]
fn an_interrupt_waits_for_the_instruction_after_sti() {
    // sti; inc eax; inc eax; hlt
    let (mut cpu, ram) = machine(&[0xfb, 0xff, 0xc0, 0xff, 0xc0, 0xf4], &[0xf4]);
    cpu.interrupt(0x30);
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!((cpu.gpr(0), returned_to(&ram)), (1, CODE + 3));
}

#[test]
fn an_interrupt_waits_for_the_instruction_after_mov_ss() {
    // sti; nop; mov ss, ebx; inc eax; inc eax; hlt
    let code = [0xfb, 0x90, 0x8e, 0xd3, 0xff, 0xc0, 0xff, 0xc0, 0xf4];
    let (mut cpu, ram) = machine(&code, &[0xf4]);
    cpu.set_gpr(3, 0x10);
    assert_eq!(cpu.run(3), Stopped::Budget);
    cpu.interrupt(0x30);
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!((cpu.gpr(0), returned_to(&ram)), (1, CODE + 6));
}

#[test]
fn a_second_nmi_waits_for_iret() {
    // nop; nop; hlt. Handler: inc eax; nop; iretq
    let (mut cpu, _) = machine(&[0x90, 0x90, 0xf4], &[0xff, 0xc0, 0x90, 0x48, 0xcf]);
    cpu.nmi();
    assert_eq!(cpu.run(1), Stopped::Budget);
    cpu.nmi();
    assert_eq!(cpu.run(1), Stopped::Budget);
    assert_eq!(cpu.gpr(0), 1, "blocked inside of the handler");
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!(cpu.gpr(0), 2);
}

#[test]
fn of_nmis_that_come_together_two_are_taken_and_while_one_is_handled_one_waits() {
    for (before, inside, taken) in [
        (1, 0, 1),
        (2, 0, 2),
        (3, 0, 2),
        (1, 2, 2),
        (2, 2, 2),
        (3, 1, 2),
    ] {
        // nop; hlt. Handler: inc eax; nop; iretq
        let (mut cpu, _) = machine(&[0x90, 0xf4], &[0xff, 0xc0, 0x90, 0x48, 0xcf]);
        (0..before).for_each(|_| cpu.nmi());
        assert_eq!(cpu.run(1), Stopped::Budget);
        (0..inside).for_each(|_| cpu.nmi());
        assert_eq!(cpu.run(100), Stopped::Halted);
        assert_eq!(cpu.gpr(0), taken, "{before} before, {inside} inside");
    }
}

#[test]
fn a_host_that_waits_for_the_nmi_window_is_told_right_after_iret() {
    // inc ebx; inc ebx; hlt. Handler: inc eax; iretq
    let (mut cpu, _) = machine(&[0xff, 0xc3, 0xff, 0xc3, 0xf4], &[0xff, 0xc0, 0x48, 0xcf]);
    cpu.nmi();
    assert_eq!(cpu.run(1), Stopped::Budget, "the delivery");
    cpu.controls_mut().nmi_window = true;
    let window = |stopped| match stopped {
        Stopped::Exit(exit) => {
            assert_eq!((exit.cause, exit.len), (Cause::NmiWindow, 0));
            assert_eq!(exit.vmx().map(|exit| exit.reason), Some(8));
            assert_eq!(exit.svm(0), None);
        }
        other => panic!("{other:?}"),
    };
    window(cpu.run(100));
    assert_eq!((cpu.rip(), cpu.gpr(0), cpu.gpr(3)), (CODE, 1, 0));
    // Asked again, it leaves again before the same instruction, until the NMI is there.
    window(cpu.run(100));
    assert_eq!(cpu.rip(), CODE);
    assert_eq!(cpu.inject(kvm_ops_cpu::Event::nmi()), None);
    window(cpu.run(100));
    assert_eq!((cpu.rip(), cpu.gpr(0), cpu.gpr(3)), (CODE, 2, 0));
    cpu.controls_mut().nmi_window = false;
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!(cpu.gpr(3), 2);
    // Out of HLT, in which the processor stays if nothing is injected.
    cpu.controls_mut().nmi_window = true;
    window(cpu.run(100));
    cpu.controls_mut().nmi_window = false;
    assert_eq!(cpu.run(100), Stopped::Halted);
}

#[test]
fn the_nmi_window_is_shut_in_a_shadow_and_the_processors_own_nmi_goes_first() {
    // sti; inc ebx; hlt. Handler: inc eax; hlt
    let (mut cpu, _) = machine(&[0xfb, 0xff, 0xc3, 0xf4], &[0xff, 0xc0, 0xf4]);
    assert_eq!(cpu.run(1), Stopped::Budget);
    cpu.controls_mut().nmi_window = true;
    assert!(matches!(cpu.run(100), Stopped::Exit(exit) if exit.cause == Cause::NmiWindow));
    assert_eq!((cpu.rip(), cpu.gpr(3)), (CODE + 3, 1), "after the shadow");
    cpu.nmi();
    assert_eq!(cpu.run(100), Stopped::Halted, "in the handler");
    assert_eq!(cpu.gpr(0), 1);
}

#[test]
fn an_nmi_that_waits_is_taken_between_iret_and_the_next_instruction() {
    // inc ebx, a hundred times; hlt. Handler: inc eax; nop; iretq
    let mut code = [0xff, 0xc3].repeat(100);
    code.push(0xf4);
    let (mut cpu, ram) = machine(&code, &[0xff, 0xc0, 0x90, 0x48, 0xcf]);
    cpu.nmi();
    assert_eq!(cpu.run(2), Stopped::Budget);
    cpu.nmi();
    assert_eq!(cpu.run(1_000), Stopped::Halted);
    assert_eq!((cpu.gpr(0), cpu.gpr(3)), (2, 100));
    // The last frame is that of the second delivery.
    assert_eq!(returned_to(&ram), CODE);
}

#[test]
fn a_halted_processor_goes_on_after_an_interrupt() {
    // sti; hlt; inc ebx; cli; hlt. Handler: inc eax; iretq
    let code = [0xfb, 0xf4, 0xff, 0xc3, 0xfa, 0xf4];
    let (mut cpu, _) = machine(&code, &[0xff, 0xc0, 0x48, 0xcf]);
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!((cpu.gpr(0), cpu.gpr(3)), (0, 0));
    cpu.interrupt(0x31);
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!((cpu.gpr(0), cpu.gpr(3)), (1, 1));
}

#[test]
fn tf_traps_after_each_instruction() {
    // pushfq; or qword [rsp], 100H; popfq; inc ebx; hlt; inc ebx;
    // pushfq; and qword [rsp], ~100H; popfq; hlt
    let code = [
        0x9c, 0x48, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0xff, 0xc3, 0xf4, 0xff, 0xc3, 0x9c, 0x48,
        0x81, 0x24, 0x24, 0xff, 0xfe, 0xff, 0xff, 0x9d, 0xf4,
    ];
    // Handler: inc eax; iretq
    let (mut cpu, _) = machine(&code, &[0xff, 0xc0, 0x48, 0xcf]);
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!(cpu.rip(), CODE + code.len() as u64);
    // INC, HLT (which the trap ends), INC, PUSHFQ, AND, and POPFQ, which began with TF set.
    assert_eq!((cpu.gpr(3), cpu.gpr(0)), (2, 6));
    assert_ne!(cpu.registers().dr6 & 1 << 14, 0);
}

#[test]
fn int_n_pushes_the_next_instruction_and_a_fault_its_own() {
    // int 21H / ud2; handlers halt.
    for (code, offset) in [([0xcd, 0x21], 2), ([0x0f, 0x0b], 0)] {
        let (mut cpu, ram) = machine(&code, &[0xf4]);
        assert_eq!(cpu.run(100), Stopped::Halted);
        assert_eq!(returned_to(&ram), CODE + offset);
    }
}

#[test]
fn a_fault_in_the_handler_of_a_double_fault_is_a_shutdown() {
    let (mut cpu, ram) = machine(&[0x0f, 0x0b], &[0xf4]);
    // #UD leads to #GP (no code segment), that to #DF, whose gate is as bad.
    for vector in [6, 8, 13] {
        ram.write_u64(IDT + vector * 16, HANDLER | 0x40 << 16 | 0x8e << 40);
    }
    let Stopped::Exit(exit) = cpu.run(100) else {
        panic!("no exit")
    };
    assert_eq!(exit.cause, Cause::TripleFault);
    assert_eq!(exit.svm(0).map(|s| s.code), Some(0x7f));
}

#[test]
fn after_init_the_boot_processor_starts_over_and_others_wait_for_a_start_up_interrupt() {
    // mov ax, cs; hlt in real mode
    let code = [0x8c, 0xc8, 0xf4];
    for id in [0, 1] {
        let (mut cpu, ram) = machine(&[0xf4], &[0xf4]);
        ram.write(0x5000, &code);
        cpu.set_apic_id(id);
        cpu.init();
        let registers = cpu.registers();
        let start = registers.segments[1].base + registers.rip;
        assert_eq!(start, 0xffff_fff0);
        assert_eq!(cpu.activity().waiting, id != 0);
        cpu.start(5);
        if id != 0 {
            assert_eq!(cpu.run(10), Stopped::Halted);
            assert_eq!(cpu.gpr(0), 0x500);
        }
        assert_eq!(cpu.registers().segments[1].base == 0x5000, id != 0);
    }
}

#[test]
fn an_interrupt_sent_in_the_first_half_of_an_instruction_gives_the_turn_away_behind_the_second() {
    // inc eax; inc eax; hlt
    let (mut cpu, _) = machine(&[0xff, 0xc0, 0xff, 0xc0, 0xf4], &[0xf4]);
    // INIT to all but this one, by the command register.
    cpu.write_apic_page(0x300, &0x000c_4500_u32.to_le_bytes());
    assert_eq!(cpu.finish_instruction(), Stopped::Budget);
    assert_eq!(cpu.gpr(0), 1);
    assert_eq!(cpu.run(100), Stopped::Paused);
    assert_eq!(cpu.gpr(0), 1);
    assert_eq!(cpu.run(100), Stopped::Halted);
    assert_eq!(cpu.gpr(0), 2);
}
