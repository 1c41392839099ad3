//! Kicks are never lost, whenever they come.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::{Memory, real_mode_vm};
use kvm_ops_core::{Exit, Irqchip, Kick, VcpuOps, VmPort};

/// Longer than any scheduling delay: a kick that takes so long is lost.
const LOST: Duration = Duration::from_secs(20);

/// The result of a thread that runs a vCPU until it is kicked.
fn join<T>(runner: JoinHandle<T>) -> T {
    let start = Instant::now();
    while !runner.is_finished() {
        assert!(start.elapsed() < LOST, "the kick is lost");
        thread::sleep(Duration::from_micros(100));
    }
    runner.join().unwrap()
}

/// A small generator, so that the moments differ and a failure can be run again.
struct Moments(u64);

impl Moments {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1);
        (self.0 >> 33) % below
    }

    /// Passes some time: none, a few instructions, or about as long as an entry takes.
    fn wait(&mut self) {
        let start = Instant::now();
        let nanos = self.next(30_000).saturating_sub(5_000);
        while start.elapsed() < Duration::from_nanos(nanos) {
            std::hint::spin_loop();
        }
    }
}

/// Kicks a running guest again and again at random moments, and waits each time until the vCPU
/// answered. Kicks that come while the vCPU is in the guest, outside of it, on its way in and on
/// its way out are all among them.
fn every_kick_is_answered(code: &[u8], irqchip: Irqchip, kicks: u64, seed: u64) {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, code, irqchip);
    let handle = vcpu.kick_handle();
    let answered = Arc::new(AtomicU64::new(0));
    let answers = answered.clone();
    let runner = thread::spawn(move || {
        let mut moments = Moments(seed ^ 0x5555);
        let mut exits = 0_u64;
        while answers.load(Ordering::SeqCst) < kicks {
            match vcpu.vcpu_run().unwrap() {
                Exit::Interrupted => {
                    answers.fetch_add(1, Ordering::SeqCst);
                }
                Exit::IoOut { .. } | Exit::Hlt => exits += 1,
                exit => panic!("{exit:?}"),
            }
            moments.wait();
        }
        exits
    });
    let mut moments = Moments(seed);
    for kick in 0..kicks {
        moments.wait();
        let seen = answered.load(Ordering::SeqCst);
        assert!(seen >= kick, "kick {kick}: only {seen} answers");
        handle.kick();
        let start = Instant::now();
        // A signal that comes late answers once more; what counts is one answer after each kick.
        while answered.load(Ordering::SeqCst) <= seen && !runner.is_finished() {
            assert!(start.elapsed() < LOST, "kick {kick} is lost");
            thread::yield_now();
        }
    }
    join(runner);
}

#[test]
fn thousands_of_kicks_of_a_guest_that_never_exits_are_all_answered() {
    // jmp $
    every_kick_is_answered(&[0xeb, 0xfe], Irqchip::None, 2000, 1);
}

#[test]
fn thousands_of_kicks_of_a_guest_that_always_exits_are_all_answered() {
    // out 0x10, al; jmp back
    every_kick_is_answered(&[0xe6, 0x10, 0xeb, 0xfc], Irqchip::None, 1500, 2);
}

#[test]
fn thousands_of_kicks_of_a_guest_that_sleeps_in_the_kernel_are_all_answered() {
    // hlt; jmp back: with local APICs in the kernel, HLT is no exit and KVM_RUN sleeps
    every_kick_is_answered(&[0xf4, 0xeb, 0xfd], Irqchip::Full, 1500, 3);
}

#[test]
fn a_kick_before_the_run_ends_it_at_once_and_counts_once() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xe6, 0x10, 0xf4], Irqchip::None);
    let handle = vcpu.kick_handle();
    handle.kick();
    handle.kick();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoOut { .. }));
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
}

#[test]
fn a_kick_loses_no_port_read_that_the_embedder_filled_in() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    // in al, 0x10; hlt
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xe4, 0x10, 0xf4], Irqchip::None);
    let handle = vcpu.kick_handle();
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoIn { .. }));
    vcpu.exit_data()[0] = 0x42;
    handle.kick();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
    assert_eq!(vcpu.regs().unwrap().rax & 0xff, 0x42);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
}

#[test]
fn kicks_race_the_end_of_vcpus_and_their_threads() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let (send, receive) = mpsc::channel::<Arc<dyn Kick>>();
    // Kicks whatever it is sent, for as long as the vCPU lives and longer.
    let kicker = thread::spawn(move || {
        for handle in receive {
            for _ in 0..50 {
                handle.kick();
            }
        }
    });
    for _ in 0..300 {
        let (vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xeb, 0xfe], Irqchip::None);
        let handle = vcpu.kick_handle();
        let runner = thread::spawn(move || {
            assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
        });
        send.send(handle).unwrap();
        join(runner);
        vm.close().unwrap();
    }
    drop(send);
    kicker.join().unwrap();
}

#[test]
fn a_vcpu_can_move_between_threads_and_each_is_kicked() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xeb, 0xfe], Irqchip::None);
    let handle = vcpu.kick_handle();
    for _ in 0..20 {
        let runner = thread::spawn(move || {
            assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
            vcpu
        });
        handle.kick();
        vcpu = join(runner);
    }
}

#[test]
fn a_thread_that_blocks_every_signal_is_kicked_all_the_same() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xeb, 0xfe], Irqchip::None);
    let handle = vcpu.kick_handle();
    let (send, receive) = mpsc::channel();
    let runner = thread::spawn(move || {
        // SAFETY: both calls write and read a set of this thread's stack.
        unsafe {
            let mut all = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        }
        send.send(()).unwrap();
        assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
    });
    receive.recv().unwrap();
    // Long enough to be inside the guest.
    thread::sleep(Duration::from_millis(20));
    handle.kick();
    join(runner);
}
