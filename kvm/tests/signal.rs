//! The kick never takes a signal that the application handles. The only test of its binary,
//! because signal handlers belong to the process.

mod common;

use std::mem::zeroed;
use std::ptr;

use common::{Memory, real_mode_vm};
use kvm_ops_core::{Exit, Irqchip, VcpuOps};

extern "C" fn of_the_application(_: libc::c_int) {}

fn set(signal: libc::c_int, handler: libc::sighandler_t) {
    // SAFETY: a zeroed `sigaction` is valid, and the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler;
        assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
    }
}

fn get(signal: libc::c_int) -> libc::sighandler_t {
    // SAFETY: the call writes the present action.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        assert_eq!(libc::sigaction(signal, ptr::null(), &mut action), 0);
        action.sa_sigaction
    }
}

#[test]
fn signals_that_the_application_handles_or_ignores_are_left_alone() {
    let Some(host) = common::host() else { return };
    let mine = of_the_application as extern "C" fn(libc::c_int) as libc::sighandler_t;
    let (first, second) = (libc::SIGRTMIN(), libc::SIGRTMIN() + 1);
    set(first, mine);
    set(second, libc::SIG_IGN);
    let memory = Memory::new(4);
    let kicked = || {
        let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xeb, 0xfe], Irqchip::None);
        let handle = vcpu.kick_handle();
        let runner = std::thread::spawn(move || {
            assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        handle.kick();
        runner.join().unwrap();
    };
    kicked();
    assert_eq!((get(first), get(second)), (mine, libc::SIG_IGN));
    assert_ne!(get(libc::SIGRTMIN() + 2), libc::SIG_DFL);

    // An application that takes the signal afterwards keeps it: later vCPUs use another.
    set(libc::SIGRTMIN() + 2, mine);
    kicked();
    assert_eq!(get(libc::SIGRTMIN() + 2), mine);
    assert_ne!(get(libc::SIGRTMIN() + 3), libc::SIG_DFL);

    // And if it takes all of them, there is an error that says so.
    for signal in libc::SIGRTMIN()..=libc::SIGRTMAX() {
        set(signal, mine);
    }
    let vm = common::vm(&host, 1, Irqchip::None);
    let error = kvm_ops_core::VmPort::create_vcpu(&vm, kvm_ops_core::VcpuId(0)).unwrap_err();
    assert!(error.to_string().contains("real-time signal"), "{error}");
}
