//! Running TDs with many threads: faults, conversions and removals at once, processors that are
//! shared, vCPUs that move, teardown under a running vCPU.

mod run_support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_ops_core::guest::{Action, FnProgram, GuestFault, GuestProgram, Outcome};
use kvm_ops_core::{
    Answer, CpuId, Error, Exit, ExitKind, Gfn, Gpa, Host, Level, Privacy, SeamPort, SharedMask,
    Step, TdParams, VcpuOps, Vendor, VmOps,
};
use kvm_ops_sim::SimHost;
use kvm_ops_tdx::TdxVm;
use run_support::{Load, MIB, Made, PAGE, Ram, Td, Vcpu, destroy, transcript};
use soft_tdx_module::Platform;

/// A guest that tells its host of memory that it has not accepted.
fn with_ve() -> TdParams {
    TdParams {
        attributes: 0,
        ..TdParams::default()
    }
}

/// Writes to its pages in turn and reads back what it wrote, accepts what it lost, and now and then
/// has a page shared and back. The data that it reads back is its own, or the page was lost in
/// between and is zero; nothing else.
struct Busy {
    /// The first page, of four that are its own.
    first: u64,
    rounds: u64,
    doing: Doing,
    mask: SharedMask,
    data: [u8; 8],
    wrong: &'static AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Doing {
    Write,
    Read,
    Share,
    WriteShared,
    Unshare,
}

impl Busy {
    fn page(&self) -> Gpa {
        Gpa::new(self.first + self.rounds % 4 * PAGE)
    }

    fn action(&mut self) -> Action<'_> {
        let page = self.page();
        match self.doing {
            Doing::Write => {
                self.data = (self.rounds | 1).to_le_bytes();
                let data = &self.data;
                Action::Write { gpa: page, data }
            }
            Doing::Read => Action::Read { gpa: page, len: 8 },
            Doing::Share => Action::Share {
                gpa: page,
                pages: 1,
            },
            Doing::WriteShared => {
                let gpa = Gpa::new(page.get() | self.mask.bits());
                let data = &self.data;
                Action::Write { gpa, data }
            }
            Doing::Unshare => Action::Unshare {
                gpa: page,
                pages: 1,
            },
        }
    }
}

impl GuestProgram for Busy {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        match last {
            Outcome::Start { mask, .. } => self.mask = mask,
            // Lost, to be accepted; what it does is done again afterwards.
            Outcome::Fault(GuestFault::NotAccepted(gpa)) => {
                let gpa = Gpa::new(gpa.get() & !(PAGE - 1));
                let level = Level::Size4K;
                return Action::Accept { gpa, level };
            }
            // A page that is accepted twice, or refused, is tried again unchanged.
            Outcome::Fault(GuestFault::Refused(_)) => {}
            Outcome::Fault(other) => {
                self.wrong.fetch_add(1, Ordering::SeqCst);
                eprintln!("{other}");
                return Action::Shutdown;
            }
            last => {
                if let (Doing::Read, Outcome::Data(data)) = (self.doing, last)
                    && data != self.data
                    && data != [0; 8]
                {
                    self.wrong.fetch_add(1, Ordering::SeqCst);
                }
                // A read that an accept came between is read again.
                let read_again = self.doing == Doing::Read && last == Outcome::Done;
                if !read_again {
                    self.doing = match self.doing {
                        Doing::Write => Doing::Read,
                        Doing::Read if self.rounds % 8 == 3 => Doing::Share,
                        Doing::Share => Doing::WriteShared,
                        Doing::WriteShared => Doing::Unshare,
                        Doing::Read | Doing::Unshare => {
                            self.rounds -= 1;
                            Doing::Write
                        }
                    };
                }
            }
        }
        if self.rounds == 0 {
            return Action::Shutdown;
        }
        self.action()
    }
}

fn static_counter() -> &'static AtomicU64 {
    Box::leak(Box::default())
}

/// Runs a vCPU to its shutdown as an embedder does: grants what the guest asks for, and lets it
/// touch again what was taken from it for a while.
fn run(vm: &TdxVm<SimHost>, vcpu: &mut Vcpu) {
    loop {
        match vcpu.vcpu_run().unwrap() {
            Exit::MapGpaRange { gpa, pages, to } => {
                let errno = match vm.set_memory_attributes(Gfn::containing(gpa), pages, to) {
                    Ok(_) => 0,
                    Err(error) => error.errno() as u64,
                };
                vcpu.answer(Answer::Value(errno)).unwrap();
            }
            Exit::MemoryFault { gpa, access, .. } => {
                let done = vm.set_memory_attributes(Gfn::containing(gpa), 1, access);
                assert!(matches!(done, Ok(_) | Err(Error::Busy)), "{done:?}");
            }
            Exit::Interrupted => {}
            Exit::Shutdown => return,
            other => panic!("{other:?}"),
        }
    }
}

/// Four vCPUs do this many rounds each, on a machine with so many processors.
fn upm_parallel(cpus: usize, rounds: u64) {
    let host = SimHost::builder(Vendor::Intel)
        .tdx(Platform::builder().processors((0..cpus).map(|cpu| cpu % 2)))
        .build()
        .unwrap();
    let Td {
        mut vcpus,
        vm,
        host,
        ram,
    } = Made {
        host,
        vcpus: 4,
        td: with_ve(),
        ..Made::default()
    }
    .td();
    let wrong = static_counter();
    for (i, vcpu) in vcpus.iter_mut().enumerate() {
        let program = Busy {
            // Two vCPUs in one 2 MiB table, two in another.
            first: (i as u64 / 2) * 2 * MIB + (i as u64 % 2) * 16 * PAGE,
            rounds,
            doing: Doing::Write,
            mask: SharedMask::NONE,
            data: [0; 8],
            wrong,
        };
        vcpu.load(Box::new(program));
    }
    let extra = Ram::new(MIB);
    let running = AtomicU64::new(4);
    std::thread::scope(|scope| {
        for vcpu in &mut vcpus {
            scope.spawn(|| {
                run(&vm, vcpu);
                running.fetch_sub(1, Ordering::SeqCst);
            });
        }
        // The host flips attributes, takes memory away, and adds and removes slots.
        let mut turn = 0u64;
        while running.load(Ordering::SeqCst) != 0 {
            turn += 1;
            let area = Gfn::new(turn % 2 * 512);
            let flip = |to| match vm.set_memory_attributes(area, 32, to) {
                Ok(_) | Err(Error::Busy) => {}
                Err(error) => panic!("{error}"),
            };
            match turn % 4 {
                0 => {
                    let slot = extra.slot(1, 0x4000_0000);
                    vm.set_memory_slot(&slot).unwrap();
                    while vm.pre_fault_memory(Gfn::new(0x40000), 4) == Err(Error::Busy) {}
                    while vm.delete_memory_slot(&slot) == Err(Error::Busy) {}
                }
                _ => {
                    flip(Privacy::Shared);
                    flip(Privacy::Private);
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    assert_eq!(wrong.load(Ordering::SeqCst), 0);
    assert_eq!(vm.step(), Step::Runnable);
    let td = Td {
        vcpus,
        vm,
        host,
        ram,
    };
    // Every vCPU used its four pages and converted some, and the host took some away.
    let conversions = 4 * rounds / 8;
    assert!(td.calls("TDG.MEM.PAGE.ACCEPT", "SUCCESS") >= 16 + conversions);
    assert!(td.calls("TDH.MEM.PAGE.REMOVE", "SUCCESS") >= conversions);
    td.destroy();
    drop(extra);
}

#[test]
fn upm_parallel_on_a_processor_for_each_vcpu() {
    upm_parallel(6, 150);
}

#[test]
fn upm_parallel_on_two_processors() {
    upm_parallel(2, 60);
}

/// Reads an address that it cannot have, for ever: it never leaves by itself.
fn spin() -> Box<dyn GuestProgram> {
    Box::new(FnProgram(|_: Outcome<'_>| Action::Read {
        gpa: Gpa::new(u64::MAX),
        len: 1,
    }))
}

#[test]
fn a_guest_that_spins_starves_no_other_on_the_same_processor() {
    let host = SimHost::builder(Vendor::Intel)
        .tdx(Platform::builder().processors([0]))
        .build()
        .unwrap();
    let mut td = Made {
        host,
        vcpus: 3,
        ..Made::default()
    }
    .td();
    let (program, transcript) =
        transcript(kvm_ops_core::guest::Script::new().print(1, "still here"));
    td.vcpus[0].load(spin());
    td.vcpus[1].load(spin());
    td.vcpus[2].load(Box::new(program));
    let kicks: Vec<_> = td.vcpus.iter().map(|vcpu| vcpu.kick_handle()).collect();
    let [a, b, c] = &mut td.vcpus[..] else {
        unreachable!("three vCPUs")
    };
    std::thread::scope(|scope| {
        for spinning in [a, b] {
            scope.spawn(|| assert_eq!(spinning.vcpu_run(), Ok(Exit::Interrupted)));
        }
        while c.vcpu_run().unwrap().kind() == ExitKind::IoOut {}
        kicks[..2].iter().for_each(|kick| kick.kick());
    });
    assert_eq!(transcript.all().len(), 10);
    td.destroy();
}

#[test]
fn teardown_while_a_vcpu_runs_in_another_thread() {
    for delay in [0, 1, 5] {
        let Td {
            mut vcpus,
            mut vm,
            host,
            ram,
        } = Made {
            vcpus: 2,
            ..Made::default()
        }
        .td();
        for vcpu in &mut vcpus {
            vcpu.load(spin());
        }
        let started = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for vcpu in &mut vcpus {
                scope.spawn(|| {
                    started.fetch_add(1, Ordering::SeqCst);
                    let ended = vcpu.vcpu_run().map(|exit| exit.kind());
                    assert_eq!(ended, Err(Error::WrongState(Step::KeyReleased)));
                });
            }
            while started.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(delay));
            let key = vm.mmu_release_hkid().unwrap();
            let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
            assert!(vm.vm_free(drained).is_clean());
        });
        // A handle that outlives the TD.
        assert!(vcpus[0].vcpu_run().is_err());
        drop(vcpus);
        assert_eq!(host.pages().unwrap().frames_out(), 0);
        assert_eq!(host.live_vms(), 0);
        drop(ram);
    }
}

#[test]
fn a_halted_vcpu_notices_the_end_of_its_td() {
    let Td {
        mut vcpus,
        vm,
        host,
        ram,
    } = Made {
        irqchip: kvm_ops_core::Irqchip::Split,
        ..Made::default()
    }
    .td();
    let program = FnProgram(|_: Outcome<'_>| Action::Halt);
    vcpus[0].load(Box::new(program));
    std::thread::scope(|scope| {
        let halted = scope.spawn(|| vcpus[0].vcpu_run().map(|exit| exit.kind()));
        std::thread::sleep(Duration::from_millis(10));
        assert!(destroy(vm).is_clean());
        assert!(matches!(halted.join().unwrap(), Err(Error::WrongState(_))));
    });
    drop((vcpus, host, ram));
}

#[test]
fn a_vcpu_moves_between_threads_and_is_flushed_off_the_old_processor_first() {
    let mut td = Made::default().td();
    let (program, transcript) = transcript(kvm_ops_core::guest::Script::new().print(1, "moves"));
    td.vcpu().load(Box::new(program));
    let flushes = |td: &Td| td.calls("TDH.VP.FLUSH", "SUCCESS");
    assert_eq!(flushes(&td), 0);
    let here = td.host.seam().map(SeamPort::this_cpu);
    for there in [1, 3] {
        let (vcpu, host) = (&mut td.vcpus[0], &td.host);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The test's own thread keeps its processor, so this is another one.
                assert_ne!(host.seam().map(SeamPort::this_cpu), here);
                assert_eq!(vcpu.vcpu_run().unwrap().kind(), ExitKind::IoOut);
                assert_eq!(vcpu.vcpu_run().unwrap().kind(), ExitKind::IoOut);
            });
        });
        assert_eq!(flushes(&td), there, "one for a move, however many runs");
        let back = td.vcpu().vcpu_run().unwrap().kind();
        assert!(matches!(back, ExitKind::IoOut | ExitKind::Shutdown));
        assert_eq!(flushes(&td), there + 1);
    }
    assert_eq!(transcript.all().len(), 5);
    td.destroy();
}

#[test]
fn vcpu_load_decides_the_processor() {
    let mut td = Made::default().td();
    td.vcpu()
        .load(Box::new(kvm_ops_core::guest::Script::new().print(1, "ab")));
    assert!(td.vcpu().vcpu_load(CpuId(99)).is_err());
    let platform = std::sync::Arc::clone(td.host.tdx_platform().unwrap());
    // The machine's pages are taken from its first TDMR upwards.
    let associated = || {
        let mut pages = (0..1024u64).map(|page| (1 << 30) + page * PAGE);
        pages.find_map(|page| platform.vcpu(page)).unwrap().assoc_lp
    };
    for lp in [3, 2] {
        td.vcpu().vcpu_load(CpuId(lp)).unwrap();
        assert_eq!(td.vcpu().vcpu_run().unwrap().kind(), ExitKind::IoOut);
        assert_eq!(associated(), Some(lp as usize));
    }
    td.destroy();
}

#[test]
fn no_removal_waits_for_long_behind_a_guest_that_spins() {
    let mut td = Made::default().td();
    td.vcpu().load(spin());
    let kick = td.vcpu().kick_handle();
    let (vm, vcpu) = (&td.vm, &mut td.vcpus[0]);
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
            stopped.store(true, Ordering::SeqCst);
        });
        let start = Instant::now();
        for _ in 0..20 {
            assert_eq!(vm.pre_fault_memory(Gfn::new(0), 8), Ok(8));
            for to in [Privacy::Shared, Privacy::Private] {
                assert_eq!(vm.set_memory_attributes(Gfn::new(0), 8, to), Ok(8));
            }
        }
        assert!(start.elapsed() < Duration::from_secs(10));
        assert!(
            !stopped.load(Ordering::SeqCst),
            "the guest saw nothing of it"
        );
        kick.kick();
    });
    td.destroy();
}
