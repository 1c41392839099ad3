//! Running guest programs: exits, operands, halts, interrupts and kicks.

#[allow(dead_code)] // Each test file uses its part.
mod common;

use std::sync::mpsc;
use std::time::Duration;

use common::{vcpu, vm, vm_with};
use kvm_ops_core::guest::{Action, FnProgram, GuestFault, GuestProgram, Outcome, Script};
use kvm_ops_core::{Error, Exit, Field, Gpa, Irqchip, Level, VcpuId, VcpuOps, VmPort};

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
    match cpu.vcpu_run().unwrap() {
        Exit::IoIn {
            port: 0x60,
            size: 2,
            data,
        } => data.copy_from_slice(&[0xcd, 0xab]),
        other => panic!("{other:?}"),
    }
    match cpu.vcpu_run().unwrap() {
        Exit::Hypercall {
            nr: 12,
            args: [1, 2, 3, 4, 0, 0],
            ret,
        } => *ret = 99,
        other => panic!("{other:?}"),
    }
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
    assert_eq!(cpu.inject_irq(33), Err(Error::Exists(Field::Vector, 33)));
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
    let nobody = vm.deliver_interrupt(VcpuId(1), 200);
    assert_eq!(nobody, Err(Error::NotFound(Field::Vcpu, 1)));
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
fn registers_hold_what_is_set_and_go_back_with_a_reset() {
    let (_host, vm) = vm();
    let mut cpu = vcpu(&vm, Script::new());
    let at_start = cpu.get_regs().unwrap();
    assert_eq!((at_start.rip, at_start.rflags), (0xfff0, 2));
    let regs = kvm_ops_core::Regs {
        rip: 0x1234,
        rax: 9,
        rflags: 0x202,
        ..at_start
    };
    cpu.set_regs(&regs).unwrap();
    assert_eq!(cpu.get_regs(), Ok(regs));
    assert_eq!(cpu.get_if_flag(), Ok(true));
    cpu.set_msr(0x10, 77).unwrap();
    assert_eq!(cpu.get_msr(0x10), Ok(77));
    assert_eq!(cpu.get_msr(0xdead), Err(Error::Invalid(Field::Msr, 0xdead)));
    assert_eq!(cpu.set_efer(1 << 1), Err(Error::Invalid(Field::Msr, 2)));
    cpu.vcpu_reset(true).unwrap();
    assert_eq!(cpu.get_regs(), Ok(at_start));
    assert_eq!(cpu.get_msr(0x10), Ok(77), "INIT keeps the TSC");
    cpu.vcpu_reset(false).unwrap();
    assert_eq!(cpu.get_msr(0x10), Ok(0));
}
