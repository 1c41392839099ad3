//! Each pair of operations at once, guests running meanwhile; and many TDs that end together.

mod common;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use common::TestHost;
use common::audit::mirror_equals_secure_ept;
use common::life::{create, destroy, slot};
use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use kvm_ops_core::{
    Backend, CpuId, EncParams, Error, Exit, Gfn, Gpa, Host, Level, MemSlot, Privacy, Result,
    SlotId, Step, TdParams, VcpuId, VcpuOps, VmOps, VmParams,
};
use kvm_ops_tdx::{Leaf, TdxVcpu, TdxVm};
use soft_tdx_module::Fault;

type Vm = TdxVm<TestHost>;
type Vcpu = TdxVcpu<TestHost>;

/// The pages that everybody fights for.
const PAGES: u64 = 24;
const ROUNDS: usize = 20;

fn threaded_host() -> TestHost {
    let host =
        TestHost::with(|builder| builder.with(|config| config.guest_steps_per_entry = 1 << 8));
    host.0.threads.store(true, Ordering::SeqCst);
    host
}

/// A guest that accepts and writes the pages in turn, for ever.
struct Toucher(u64);

impl GuestProgram for Toucher {
    fn step(&mut self, _: Outcome<'_>) -> Action<'_> {
        self.0 += 1;
        let gpa = Gpa::new((self.0 / 2 % PAGES) << 12);
        match self.0 % 2 {
            0 => Action::Accept {
                gpa,
                level: Level::Size4K,
            },
            _ => Action::Write { gpa, data: b"mine" },
        }
    }
}

/// A TD with two vCPUs that run touchers. A page that one of them finds unaccepted is a #VE to it: with
/// SEPT_VE_DISABLE, the default, it would be the TD's end.
fn td(host: &TestHost) -> (Vm, Vec<Vcpu>) {
    let td = TdParams {
        attributes: 0,
        ..TdParams::default()
    };
    let params = VmParams {
        enc: EncParams::Td(Box::new(td)),
        ..VmParams::new(2)
    };
    let mut vm = TdxVm::create(host, host.next_vm_id(), &params).unwrap();
    vm.vm_init().unwrap();
    vm.set_memory_slot(&slot(host)).unwrap();
    let vcpus = (0..2)
        .map(|n| {
            let mut vcpu = vm.create_vcpu(VcpuId(n)).unwrap();
            let programs = vcpu.programs().expect("the machine runs programs");
            let toucher = Box::new(Toucher(u64::from(n) * 7));
            programs.load_program(toucher).unwrap();
            vcpu
        })
        .collect();
    vm.vm_finalize().unwrap();
    (vm, vcpus)
}

/// The possible results of an operation that others are in the way of.
fn fine<T>(what: &str, result: Result<T>) {
    match result {
        Ok(_) | Err(Error::Busy | Error::Again | Error::NotFound(..)) => {}
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Runs a vCPU until `stop`; kicks make it look.
fn run(vcpu: &mut Vcpu, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        match vcpu.vcpu_run() {
            Ok(Exit::Interrupted | Exit::MemoryFault { .. }) => {}
            Ok(exit) => panic!("{exit:?}"),
            Err(error) if error.is_transient() => {}
            Err(error) => panic!("vcpu_run: {error}"),
        }
    }
}

type Operation = (&'static str, fn(&TestHost, &Vm, usize));

/// Operations on a running TD, possible at any time.
const OPERATIONS: [Operation; 7] = [
    ("pre_fault_memory", |_, vm, n| {
        let first = Gfn::new(n as u64 % PAGES);
        fine("pre_fault_memory", vm.pre_fault_memory(first, 5));
    }),
    ("set_memory_attributes to shared", |_, vm, n| {
        let first = Gfn::new(n as u64 * 3 % PAGES);
        fine(
            "to shared",
            vm.set_memory_attributes(first, 4, Privacy::Shared),
        );
    }),
    ("set_memory_attributes to private", |_, vm, n| {
        let first = Gfn::new(n as u64 * 5 % PAGES);
        fine(
            "to private",
            vm.set_memory_attributes(first, 6, Privacy::Private),
        );
    }),
    ("flush_private_tlb", |_, vm, _| {
        fine("flush_private_tlb", vm.flush_private_tlb());
    }),
    ("delete and set a slot", |host, vm, _| {
        fine("delete_memory_slot", vm.delete_memory_slot(&slot(host)));
        fine("set_memory_slot", vm.set_memory_slot(&slot(host)));
    }),
    ("set and delete another slot", |host, vm, _| {
        let far = MemSlot::new(SlotId(7), Gpa::new(1 << 40), host.memory());
        fine("set_memory_slot", vm.set_memory_slot(&far));
        fine("pre_fault", vm.pre_fault_memory(Gfn::new(1 << 28), 1));
        fine("delete_memory_slot", vm.delete_memory_slot(&far));
    }),
    ("disable_virtualization_cpu", |_, vm, n| {
        let cpu = CpuId(n as u32 % 4);
        fine(
            "disable_virtualization_cpu",
            vm.disable_virtualization_cpu(cpu),
        );
    }),
];

/// Two operations at once, `ROUNDS` times, while both vCPUs run.
fn race(a: Operation, b: Operation, transient: u16) {
    let host = threaded_host();
    let (vm, mut vcpus) = td(&host);
    let fault = Fault::Transient {
        seed: 1,
        per_mille: transient,
    };
    host.platform().inject(fault);
    let (stop, start) = (AtomicBool::new(false), Barrier::new(2));
    std::thread::scope(|scope| {
        let kicks: Vec<_> = vcpus.iter().map(|vcpu| vcpu.kick_handle()).collect();
        for vcpu in &mut vcpus {
            scope.spawn(|| run(vcpu, &stop));
        }
        let workers = [a, b].map(|(_, operation)| {
            let (host, vm, start) = (&host, &vm, &start);
            scope.spawn(move || {
                while !host.called(Leaf::VpEnter) {
                    std::thread::yield_now();
                }
                start.wait();
                (0..ROUNDS).for_each(|n| operation(host, vm, n));
            })
        });
        for worker in workers {
            worker.join().expect("the operation is fine");
        }
        stop.store(true, Ordering::SeqCst);
        kicks.iter().for_each(|kick| kick.kick());
    });
    host.platform().inject(Fault::Transient {
        seed: 0,
        per_mille: 0,
    });
    let context = format!("{} with {}", a.0, b.0);
    assert_eq!(vm.step(), Step::Runnable, "{context}");
    mirror_equals_secure_ept(&host, &vm);
    let report = destroy(vm);
    assert!(report.is_clean(), "{context}: {report:?}");
    drop(vcpus);
    assert_eq!(host.live(), 0, "{context}");
}

#[test]
fn any_two_operations_at_once_leave_the_mirror_true_and_nothing_behind() {
    for (n, a) in OPERATIONS.into_iter().enumerate() {
        for b in OPERATIONS.into_iter().skip(n) {
            race(a, b, 0);
        }
    }
}

#[test]
fn so_they_do_on_a_machine_where_calls_fail_now_and_then() {
    for (n, a) in OPERATIONS.into_iter().enumerate() {
        race(a, OPERATIONS[(n + 1) % OPERATIONS.len()], 30);
    }
}

#[test]
fn a_td_ends_under_its_running_vcpus() {
    for _ in 0..10 {
        let host = threaded_host();
        let (vm, mut vcpus) = td(&host);
        let running = Barrier::new(3);
        let report = std::thread::scope(|scope| {
            for vcpu in &mut vcpus {
                scope.spawn(|| {
                    running.wait();
                    loop {
                        match vcpu.vcpu_run() {
                            Ok(_) => {}
                            Err(Error::WrongState(step)) => {
                                assert!(step >= Step::KeyReleased, "{step}");
                                break;
                            }
                            Err(error) if error.is_transient() => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
            running.wait();
            std::thread::yield_now();
            destroy(vm)
        });
        assert!(report.is_clean(), "{report:?}");
        drop(vcpus);
        assert_eq!(host.live(), 0);
    }
}

#[test]
fn many_tds_live_and_end_side_by_side() {
    let host = threaded_host();
    for transient in [0, 50] {
        host.platform().inject(Fault::Transient {
            seed: 3,
            per_mille: transient,
        });
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..6).for_each(|_| live(&host)));
            }
        });
        assert_eq!(host.live(), 0);
        assert_eq!(host.key_pool().leaked(), 0);
    }
}

/// A short life; every step is repeated while the answer asks for it.
fn live(host: &TestHost) {
    fn again<T>(mut step: impl FnMut() -> Result<T>) -> T {
        loop {
            match step() {
                Ok(done) => return done,
                Err(error) => assert!(error.is_transient(), "{error}"),
            }
        }
    }
    let mut vm = create(host);
    again(|| vm.vm_init());
    vm.set_memory_slot(&slot(host)).unwrap();
    again(|| vm.create_vcpu(VcpuId(0)).map(drop));
    again(|| vm.vm_finalize());
    for first in [0, 0x400, 0x800] {
        again(|| vm.pre_fault_memory(Gfn::new(first), 1));
    }
    again(|| vm.set_memory_attributes(Gfn::new(0x400), 1, Privacy::Shared));
    let key = again(|| vm.mmu_release_hkid());
    let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
    let report = vm.vm_free(drained);
    assert!(report.is_clean(), "{report:?}");
}
