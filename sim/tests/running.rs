//! Running guest programs: exits, operands, halts, interrupts and kicks.

#[allow(dead_code)] // Each test file uses its part.
mod common;

use std::sync::mpsc;
use std::time::Duration;

use common::{vcpu, vm, vm_with};
use kvm_ops_core::guest::{Action, FnProgram, GuestFault, GuestProgram, Outcome, Script};
use kvm_ops_core::{
    Answer, DebugRegs, Error, Events, Exception, Exit, ExitKind, Field, Gpa, Interrupt, Irqchip,
    Level, MpState, Msr, Nmi, Regs, Sregs, VcpuId, VcpuOps, VmPort, Xcrs, cr0,
};

/// Does one action and reports how it ended.
struct Once<F>(F, mpsc::Sender<String>);

impl<F: Fn() -> Action<'static> + Send> GuestProgram for Once<F> {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        if let Outcome::Start { .. } = last {
            return (self.0)();
        }
        self.1.send(format!("{last:?}")).unwrap();
        Action::Shutdown
    }
}

fn outcome_of(action: impl Fn() -> Action<'static> + Send + 'static) -> String {
    let (_host, vm) = vm();
    let (sender, told) = mpsc::channel();
    let mut cpu = vcpu(&vm, Once(action, sender));
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Shutdown));
    told.recv().unwrap()
}

#[test]
fn operands_that_no_processor_takes_fault_and_never_leave() {
    static LONG: [u8; 4097] = [0; 4097];
    let bad = format!("{:?}", Outcome::Fault(GuestFault::BadOperand));
    for len in [0, 4097, usize::MAX] {
        assert_eq!(
            outcome_of(move || Action::Read {
                gpa: Gpa::new(0),
                len
            }),
            bad
        );
    }
    for data in [&[][..], &LONG] {
        assert_eq!(
            outcome_of(move || Action::Write {
                gpa: Gpa::new(0),
                data
            }),
            bad
        );
    }
    for gpa in [1 << 48, (1 << 48) - 1, u64::MAX] {
        assert_eq!(
            outcome_of(move || Action::Read {
                gpa: Gpa::new(gpa),
                len: 2
            }),
            bad
        );
    }
    for size in [0, 3, 5, 8, 255] {
        assert_eq!(outcome_of(move || Action::In { port: 0, size }), bad);
    }
    for data in [&[][..], &[0; 3], &[0; 8]] {
        assert_eq!(outcome_of(move || Action::Out { port: 0, data }), bad);
    }
}

#[test]
fn a_normal_vm_has_nothing_to_share_or_accept() {
    let none = format!("{:?}", Outcome::Fault(GuestFault::NotOffered));
    assert_eq!(
        outcome_of(|| Action::Share {
            gpa: Gpa::new(0),
            pages: 1
        }),
        none
    );
    assert_eq!(
        outcome_of(|| Action::Unshare {
            gpa: Gpa::new(0),
            pages: 1
        }),
        none
    );
    assert_eq!(
        outcome_of(|| Action::Accept {
            gpa: Gpa::new(0),
            level: Level::Size4K
        }),
        none
    );
}

#[test]
fn port_reads_and_hypercalls_bring_the_embedders_answer_to_the_program() {
    let (_host, vm) = vm();
    let (sender, told) = mpsc::channel();
    let mut steps = 0;
    let program = FnProgram(move |last: Outcome<'_>| {
        sender.send(format!("{last:?}")).unwrap();
        steps += 1;
        match steps {
            1 => Action::In {
                port: 0x60,
                size: 2,
            },
            2 => Action::Hypercall {
                nr: 12,
                args: [1, 2, 3, 4],
            },
            _ => Action::Shutdown,
        }
    });
    let mut cpu = vcpu(&vm, program);
    let read = Exit::IoIn {
        port: 0x60,
        size: 2,
        count: 1,
    };
    assert_eq!(cpu.vcpu_run(), Ok(read));
    cpu.exit_data().copy_from_slice(&[0xcd, 0xab]);
    let args = [1, 2, 3, 4, 0, 0];
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Hypercall { nr: 12, args }));
    cpu.answer(Answer::Value(99)).unwrap();
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Shutdown));
    assert_eq!(
        cpu.vcpu_run(),
        Ok(Exit::Shutdown),
        "a vCPU that shut down stays so"
    );
    let told: Vec<String> = told.try_iter().collect();
    assert_eq!(told[1..], ["Data([205, 171])", "Value(99)"]);
}

#[test]
fn without_an_irqchip_a_halt_is_an_exit_until_an_interrupt_is_injected() {
    let (_host, vm) = vm();
    let mut cpu = vcpu(&vm, Script::new().halt().output(1, &[7]));
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Hlt));
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Hlt), "nothing came");
    cpu.enable_irq_window().unwrap();
    assert_eq!(cpu.vcpu_run(), Ok(Exit::IrqWindow));
    cpu.inject_irq(32).unwrap();
    assert_eq!(cpu.inject_irq(33), Err(Error::Exists(Field::Vector, 32)));
    assert!(matches!(cpu.vcpu_run(), Ok(Exit::IoOut { port: 1, .. })));
}

#[test]
fn with_an_irqchip_a_halted_vcpu_waits_for_an_interrupt_from_any_thread() {
    let (_host, vm) = vm_with(Irqchip::Full, 2);
    let (sender, told) = mpsc::channel();
    let program = FnProgram(move |last: Outcome<'_>| match last {
        Outcome::Start { .. } => Action::Halt,
        other => {
            sender.send(format!("{other:?}")).unwrap();
            Action::Shutdown
        }
    });
    let mut cpu = vcpu(&vm, program);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| cpu.vcpu_run().map(|exit| exit.kind()));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!running.is_finished(), "a halted vCPU waits");
        vm.deliver_interrupt(VcpuId(0), 200).unwrap();
        assert_eq!(
            running.join().unwrap(),
            Ok(kvm_ops_core::ExitKind::Shutdown)
        );
    });
    assert_eq!(told.recv().unwrap(), "Interrupt(200)");
    let absent = vm.deliver_interrupt(VcpuId(1), 200);
    assert_eq!(absent, Err(Error::NotFound(Field::Vcpu, 1)));
}

#[test]
fn no_kick_is_lost_whenever_it_comes() {
    let (_host, vm) = vm_with(Irqchip::Full, 1);
    // It neither exits nor halts: only a kick gets it out.
    let mut cpu = vcpu(
        &vm,
        FnProgram(|_: Outcome<'_>| Action::Write {
            gpa: Gpa::new(0),
            data: &[],
        }),
    );
    let kick = cpu.kick_handle();
    let (done, next) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for i in 0..2000u32 {
                if i % 3 == 0 {
                    std::thread::yield_now();
                }
                kick.kick();
                next.recv().unwrap();
            }
        });
        for _ in 0..2000 {
            assert_eq!(cpu.vcpu_run(), Ok(Exit::Interrupted));
            done.send(()).unwrap();
        }
    });
}

#[test]
fn vcpu_numbers_are_used_once_and_below_the_maximum() {
    let (host, vm) = vm_with(Irqchip::None, 2);
    let first = vm.create_vcpu(VcpuId(0)).unwrap();
    assert_eq!(
        vm.create_vcpu(VcpuId(0)).err(),
        Some(Error::Exists(Field::Vcpu, 0))
    );
    assert_eq!(
        vm.create_vcpu(VcpuId(2)).err(),
        Some(Error::Invalid(Field::Vcpu, 2))
    );
    assert_eq!(host.live_vms(), 1);
    vm.close().unwrap();
    assert_eq!(host.live_vms(), 1, "the vCPU still holds it");
    drop(first);
    assert_eq!(host.live_vms(), 0);
}

#[test]
fn every_group_holds_what_is_set_and_goes_back_with_a_reset() {
    let (_host, vm) = vm_with(Irqchip::Full, 1);
    let mut cpu = vcpu(&vm, Script::new());
    let at_start = (cpu.regs().unwrap(), cpu.sregs().unwrap());
    assert_eq!((at_start.0.rip, at_start.0.rflags), (0xfff0, 2));
    assert_eq!(at_start.1.cs.base, 0xffff_0000);
    let regs = Regs {
        rip: 0x1234,
        rax: 9,
        rflags: 0x202,
        ..at_start.0
    };
    let mut sregs = at_start.1;
    (sregs.cr0, sregs.cr4, sregs.efer) = (cr0::PG | cr0::PE, 1 << 5, 1 << 8);
    (sregs.fs.base, sregs.gdt.limit) = (0x5000, 0x27);
    let mut xsave = cpu.xsave().unwrap();
    xsave.as_bytes_mut()[160] = 7;
    let events = Events {
        nmi: Nmi {
            pending: true,
            masked: true,
            injected: false,
        },
        ..Events::default()
    };
    let debug = DebugRegs {
        dr7: 0x402,
        ..DebugRegs::default()
    };
    cpu.set_regs(&regs).unwrap();
    cpu.set_sregs(&sregs).unwrap();
    cpu.set_xsave(&xsave).unwrap();
    cpu.set_events(&events).unwrap();
    cpu.set_debug_regs(&debug).unwrap();
    cpu.set_xcrs(&Xcrs { xcr0: 7 }).unwrap();
    cpu.set_mp_state(MpState::InitReceived).unwrap();
    // EFER.LMA follows.
    sregs.efer |= 1 << 10;
    assert_eq!((cpu.regs(), cpu.sregs()), (Ok(regs), Ok(sregs)));
    assert_eq!((cpu.xsave(), cpu.events()), (Ok(xsave), Ok(events)));
    let rest = (cpu.debug_regs(), cpu.xcrs(), cpu.mp_state());
    let xcrs = Xcrs { xcr0: 7 };
    assert_eq!(rest, (Ok(debug), Ok(xcrs), Ok(MpState::InitReceived)));

    let read = |cpu: &kvm_ops_sim::SimVcpu, index| {
        let mut msr = [Msr::read(index)];
        cpu.msrs(&mut msr).map(|()| msr[0].value)
    };
    cpu.set_msrs(&[Msr::write(0x10, 77), Msr::write(0xc000_0101, 5)])
        .unwrap();
    assert_eq!(
        (read(&cpu, 0x10), cpu.sregs().unwrap().gs.base),
        (Ok(77), 5)
    );
    assert_eq!(
        (read(&cpu, 0xc000_0100), read(&cpu, 0xc000_0080)),
        (Ok(0x5000), Ok(0x500))
    );
    let unknown = Error::Invalid(Field::Msr, 0xdead);
    assert_eq!(read(&cpu, 0xdead), Err(unknown));
    assert_eq!(cpu.set_msrs(&[Msr::write(0xdead, 1)]), Err(unknown));
    let efer = Error::Invalid(Field::Msr, 0xc000_0080);
    assert_eq!(cpu.set_msrs(&[Msr::write(0xc000_0080, 2)]), Err(efer));
    assert_eq!(cpu.set_sregs(&Sregs { efer: 2, ..sregs }), Err(efer));
    let paging = Sregs {
        cr0: cr0::PG,
        ..sregs
    };
    assert_eq!(
        cpu.set_sregs(&paging),
        Err(Error::Invalid(Field::Cr0, cr0::PG))
    );

    cpu.vcpu_reset(true).unwrap();
    assert_eq!(cpu.regs(), Ok(at_start.0));
    assert_eq!(read(&cpu, 0x10), Ok(77), "INIT keeps the TSC");
    cpu.vcpu_reset(false).unwrap();
    assert_eq!((cpu.regs(), cpu.sregs()), (Ok(at_start.0), Ok(at_start.1)));
    assert_eq!(read(&cpu, 0x10), Ok(0));
    assert_eq!(cpu.events(), Ok(Events::default()));
}

#[test]
fn no_event_is_dropped_without_a_word() {
    let (_host, vm) = vm();
    let mut cpu = vcpu(&vm, Script::new().halt().halt().output(1, &[7]));
    // A program has no handlers: an exception is a triple fault.
    let fault = Events::default().with_exception(Exception::new(13, Some(0)));
    let triple = Events {
        triple_fault: true,
        ..Events::default()
    };
    for events in [fault.unwrap(), triple] {
        let (_host, vm) = common::vm();
        let mut cpu = vcpu(&vm, Script::new().output(1, &[7]));
        cpu.set_events(&events).unwrap();
        assert_eq!(cpu.events(), Ok(events));
        assert_eq!(cpu.vcpu_run(), Ok(Exit::Shutdown));
    }
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Hlt));
    // A masked NMI waits; an interrupt ends the halt.
    let mut events = Events::default();
    (events.nmi.pending, events.nmi.masked) = (true, true);
    events.interrupt = Some(Interrupt {
        vector: 32,
        soft: false,
    });
    cpu.set_events(&events).unwrap();
    assert_eq!(cpu.events(), Ok(events));
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Hlt));
    let left = cpu.events().unwrap();
    assert_eq!((left.interrupt, left.nmi.pending), (None, true));
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Hlt), "masked");
    cpu.set_events(&Events {
        nmi: Nmi {
            masked: false,
            ..left.nmi
        },
        ..left
    })
    .unwrap();
    assert!(matches!(cpu.vcpu_run(), Ok(Exit::IoOut { port: 1, .. })));
    cpu.set_events(&fault.unwrap()).unwrap();
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Shutdown));
    let none = Exception::new(32, None);
    let beyond = Events {
        exception: Some(none),
        ..Events::default()
    };
    let refused = Err(Error::Invalid(Field::Vector, 32));
    assert_eq!(cpu.set_events(&beyond), refused);
}

#[test]
fn a_vcpu_that_waits_for_its_start_runs_nothing_until_it_is_runnable() {
    let (_host, vm) = vm_with(Irqchip::Full, 1);
    let mut cpu = vcpu(&vm, Script::new().output(1, &[7]));
    cpu.set_mp_state(MpState::Uninitialized).unwrap();
    cpu.kick_handle().kick();
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Interrupted));
    cpu.set_mp_state(MpState::Halted).unwrap();
    vm.deliver_interrupt(VcpuId(0), 32).unwrap();
    assert!(matches!(cpu.vcpu_run(), Ok(Exit::IoOut { port: 1, .. })));
    // Without an irqchip the embedder keeps this state.
    let (_host, vm) = common::vm();
    let mut cpu = vcpu(&vm, Script::new());
    cpu.set_mp_state(MpState::Runnable).unwrap();
    assert!(cpu.set_mp_state(MpState::Halted).is_err());
}

#[test]
fn only_an_answer_that_fits_the_last_exit_is_taken() {
    let (_host, vm) = vm();
    let mut cpu = vcpu(&vm, Script::new().halt());
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Hlt));
    assert_eq!(cpu.exit_data(), [0; 0]);
    for answer in [Answer::Value(1), Answer::Msr(1), Answer::InjectGp] {
        let refused = Err(Error::Invalid(Field::Answer, ExitKind::Hlt as u64));
        assert_eq!(cpu.answer(answer), refused);
    }
}
