//! Moves of TDs under threads, and in random histories with failures: one owner at every moment, and
//! in the end everything is accounted for.

mod common;
mod run_support;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::audit::{all_accounted, mirror_equals_secure_ept};
use common::life::{self, create, runnable};
use common::{Injected, TestHost};
use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use kvm_ops_core::moves::{MoveToken, StagingTable};
use kvm_ops_core::{
    Backend, Error, Exit, Gfn, Gpa, Host, Level, Privacy, Result, Step, VcpuId, VcpuOps, VmOps,
    VmParams,
};
use kvm_ops_tdx::status::Class;
use kvm_ops_tdx::{Leaf, TdxVm};
use proptest::prelude::*;
use run_support::{Load, Made, Td};

/// Counts in one private page, reads each count back, and tells every 16th by a port. All of its state
/// but the page is in its registers.
struct Counter {
    count: u32,
    doing: Doing,
    bytes: [u8; 4],
    wrong: Arc<AtomicU64>,
}

#[derive(Clone, Copy)]
enum Doing {
    Accept,
    Write,
    Read,
    Tell,
}

const HEAD: Gpa = Gpa::new(0x5000);

impl GuestProgram for Counter {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        self.doing = match (self.doing, last) {
            (_, Outcome::Start { .. }) => Doing::Accept,
            (Doing::Accept | Doing::Tell, _) => {
                self.count += 1;
                self.bytes = self.count.to_le_bytes();
                Doing::Write
            }
            (Doing::Write, _) => Doing::Read,
            (Doing::Read, Outcome::Data(data)) => {
                if data != self.bytes {
                    self.wrong.fetch_add(1, Ordering::SeqCst);
                }
                if self.count.is_multiple_of(16) {
                    Doing::Tell
                } else {
                    self.count += 1;
                    self.bytes = self.count.to_le_bytes();
                    Doing::Write
                }
            }
            (Doing::Read, _) => {
                self.wrong.fetch_add(1, Ordering::SeqCst);
                Doing::Read
            }
        };
        let data = &self.bytes;
        match self.doing {
            Doing::Accept => Action::Accept {
                gpa: HEAD,
                level: Level::Size4K,
            },
            Doing::Write => Action::Write { gpa: HEAD, data },
            Doing::Read => Action::Read { gpa: HEAD, len: 4 },
            Doing::Tell => Action::Out { port: 0x80, data },
        }
    }
}

/// Runs until the vCPU is another VM's. Each count that it tells is 16 more than the last.
fn count(vcpu: &mut run_support::Vcpu, told: &AtomicU64) -> Error {
    loop {
        match vcpu.vcpu_run() {
            Ok(Exit::IoOut { .. }) => {
                let count = u32::from_le_bytes(vcpu.exit_data().try_into().unwrap());
                let last = told.swap(count.into(), Ordering::SeqCst);
                assert_eq!(u64::from(count), last + 16);
            }
            Ok(Exit::Interrupted) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => return error,
        }
    }
}

#[test]
fn a_guest_that_counts_loses_no_count_while_its_td_moves_on() {
    let Td {
        mut vcpus,
        mut vm,
        host,
        ram,
    } = Made::default().td();
    let (told, wrong) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
    let mut vcpu = vcpus.pop().unwrap();
    vcpu.load(Box::new(Counter {
        count: 0,
        doing: Doing::Accept,
        bytes: [0; 4],
        wrong: Arc::clone(&wrong),
    }));
    let mut gone = Vec::new();
    for _ in 0..12 {
        let mut to = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(1)).unwrap();
        to.vm_init().unwrap();
        to.set_memory_slot(&ram.slot(0, 0)).unwrap();
        let before = told.load(Ordering::SeqCst);
        thread::scope(|scope| {
            let runner = scope.spawn(|| count(&mut vcpu, &told));
            while told.load(Ordering::SeqCst) < before + 64 {
                thread::yield_now();
            }
            while let Err(error) = TdxVm::move_context(&mut vm, &mut to) {
                assert_eq!(error, Error::Busy);
            }
            assert_eq!(runner.join().unwrap(), Error::Poisoned);
        });
        vcpu = to.create_vcpu(VcpuId(0)).unwrap();
        gone.push(std::mem::replace(&mut vm, to));
    }
    assert_eq!(wrong.load(Ordering::SeqCst), 0);
    drop(vcpu);
    gone.push(vm);
    for vm in gone {
        assert!(run_support::destroy(vm).is_clean());
    }
    assert_eq!(host.pages().unwrap().frames_out(), 0);
}

#[test]
fn a_running_guest_is_staged_and_taken_back_and_runs_on() {
    let Td {
        mut vcpus,
        mut vm,
        host,
        ram,
    } = Made::default().td();
    let (told, wrong) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
    vcpus[0].load(Box::new(Counter {
        count: 0,
        doing: Doing::Accept,
        bytes: [0; 4],
        wrong: Arc::clone(&wrong),
    }));
    let (table, over) = (Arc::new(StagingTable::new()), AtomicBool::new(false));
    thread::scope(|scope| {
        let vcpu = &mut vcpus[0];
        let (told, over) = (&told, &over);
        scope.spawn(move || {
            while !over.load(Ordering::SeqCst) {
                // Staged now and then, it goes on when that is over.
                assert_eq!(count_or_stop(vcpu, told, over), Error::Poisoned);
            }
        });
        for round in 1..=20u64 {
            while told.load(Ordering::SeqCst) < 32 * round {
                thread::yield_now();
            }
            vm.local_send(&table, &mut numbered(round), &mut |_| Ok(()))
                .unwrap();
            thread::sleep(Duration::from_micros(200));
            vm.local_cancel().unwrap();
        }
        over.store(true, Ordering::SeqCst);
        vm.local_send(&table, &mut numbered(99), &mut |_| Ok(()))
            .unwrap();
    });
    assert_eq!(wrong.load(Ordering::SeqCst), 0);
    drop(vcpus);
    assert!(run_support::destroy(vm).is_clean());
    assert!(table.is_empty());
    assert_eq!(host.pages().unwrap().frames_out(), 0);
    drop(ram);
}

/// As [`count`], and pretends to have met a poisoned VM when the test is over.
fn count_or_stop(vcpu: &mut run_support::Vcpu, told: &AtomicU64, over: &AtomicBool) -> Error {
    match over.load(Ordering::SeqCst) {
        true => Error::Poisoned,
        false => count(vcpu, told),
    }
}

fn numbered(number: u64) -> impl FnMut(&mut [u8]) -> Result<()> {
    move |out| {
        out.iter_mut()
            .zip(number.to_le_bytes().iter().cycle())
            .for_each(|(to, from)| *to = *from);
        Ok(())
    }
}

/// A VM whose TD is not used yet.
fn waiting(host: &TestHost) -> TdxVm<TestHost> {
    let mut vm = create(host);
    vm.vm_init().unwrap();
    vm
}

#[test]
fn moves_of_three_threads_in_a_ring_end_and_leave_one_owner_each() {
    let host = TestHost::new();
    host.0.threads.store(true, Ordering::Relaxed);
    let vms: Vec<_> = (0..3)
        .map(|_| runnable(&host))
        .chain((0..2).map(|_| waiting(&host)))
        .map(Mutex::new)
        .collect();
    let tdrs: BTreeSet<_> = vms.iter().map(|vm| vm.lock().unwrap().tdr()).collect();
    let moved: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..3usize)
            .map(|n| {
                let vms = &vms;
                scope.spawn(move || {
                    let pass = |i: usize| {
                        let (to, from) = (&vms[(i + n) % 5], &vms[(i * 3 + 1) % 5]);
                        let (Ok(mut to), Ok(mut from)) = (to.try_lock(), from.try_lock()) else {
                            return false;
                        };
                        TdxVm::move_context(&mut from, &mut to).is_ok()
                    };
                    (0..3_000).filter(|i| pass(*i)).count()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    // Three TDs, two VMs to go to, and no way back to a VM that gave its TD away.
    assert!(moved <= 2, "{moved}");
    let vms: Vec<_> = vms.into_iter().map(|vm| vm.into_inner().unwrap()).collect();
    let after: BTreeSet<_> = vms.iter().map(TdxVm::tdr).collect();
    assert_eq!(after, tdrs, "each TD has one VM");
    let reports = vms.into_iter().map(life::destroy);
    all_accounted(&host, &life::sum(reports));
}

#[test]
fn one_of_many_receivers_gets_it_and_a_source_that_goes_loses_nothing_twice() {
    for round in 0..24u64 {
        let host = TestHost::new();
        host.0.threads.store(true, Ordering::Relaxed);
        let table = Arc::new(StagingTable::new());
        let mut source = runnable(&host);
        let mut token = None;
        source
            .local_send(&table, &mut numbered(round + 1), &mut |made| {
                token = Some(*made);
                Ok(())
            })
            .unwrap();
        let token = token.unwrap();
        let mut targets: Vec<_> = (0..3).map(|_| waiting(&host)).collect();
        let goes = round % 2 == 1;
        let (report, got) = thread::scope(|scope| {
            let table = &table;
            let receivers: Vec<_> = targets
                .iter_mut()
                .map(|vm| {
                    scope.spawn(move || {
                        let received = vm.local_receive(table, &token, &mut |_| Ok(()));
                        usize::from(received.is_ok())
                    })
                })
                .collect();
            let report = goes.then(|| life::destroy(source_of(&mut source, &host)));
            let got = receivers.into_iter().map(|t| t.join().unwrap());
            (report, got.sum::<usize>())
        });
        assert!(got == 1 || goes && got == 0, "{got} receivers");
        let reports = targets.into_iter().chain([source]).map(life::destroy);
        let mut all = life::sum(reports);
        if let Some(report) = report {
            all = life::sum([all, report]);
        }
        assert!(table.is_empty());
        all_accounted(&host, &all);
        assert!(all.is_clean());
    }
}

/// Takes the VM out for its teardown, and leaves a fresh one.
fn source_of(vm: &mut TdxVm<TestHost>, host: &TestHost) -> TdxVm<TestHost> {
    std::mem::replace(vm, create(host))
}

/// An act of a history on one of four VMs.
#[derive(Clone, Copy, Debug)]
enum Act {
    Send,
    Cancel,
    Receive(usize),
    ReceiveUndelivered(usize),
    MoveTo(usize),
    Replace,
    Touch(u64),
    Share(u64),
    FailNext(usize, bool),
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Send),
        1 => Just(Act::Cancel),
        4 => (0..4usize).prop_map(Act::Receive),
        1 => (0..4usize).prop_map(Act::ReceiveUndelivered),
        4 => (0..4usize).prop_map(Act::MoveTo),
        3 => Just(Act::Replace),
        4 => (0..64u64).prop_map(Act::Touch),
        2 => (0..64u64).prop_map(Act::Share),
        2 => (0..Leaf::ALL.len(), any::<bool>()).prop_map(|(leaf, fatal)| Act::FailNext(leaf, fatal)),
    ]
}

/// A new VM, as far as the failures let it come. What it leaves behind is in its report.
fn new_vm(host: &TestHost, launch: bool) -> TdxVm<TestHost> {
    let mut vm = create(host);
    let _ = vm.vm_init().and_then(|()| {
        vm.set_memory_slot(&life::slot(host))?;
        if launch {
            vm.create_vcpu(VcpuId(0)).map(drop)?;
            vm.vm_finalize()?;
        }
        Ok(())
    });
    vm
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done in whatever order, and whatever SEAMCALL fails: each TD that the module knows
    /// has one VM, whose mirror is the TD's Secure-EPT; and in the end all is freed or listed.
    #[test]
    fn one_owner_at_every_moment(history in proptest::collection::vec((0..4usize, any_act()), 1..36)) {
        let host = TestHost::new();
        let table = Arc::new(StagingTable::new());
        let mut vms: Vec<_> = (0..4).map(|n| new_vm(&host, n == 0)).collect();
        let mut tokens: Vec<MoveToken> = Vec::new();
        let mut reports = Vec::new();
        for (n, (at, act)) in history.into_iter().enumerate() {
            match act {
                Act::Send => {
                    let mut keep = |made: &MoveToken| { tokens.push(*made); Ok(()) };
                    let _ = vms[at].local_send(&table, &mut numbered(n as u64 + 1), &mut keep);
                }
                Act::Cancel => { let _ = vms[at].local_cancel(); }
                Act::Receive(n) | Act::ReceiveUndelivered(n) if !tokens.is_empty() => {
                    let token = tokens[n % tokens.len()];
                    let fails = matches!(act, Act::ReceiveUndelivered(_));
                    let before = (vms[at].tdr(), vms[at].step());
                    let received = vms[at].local_receive(&table, &token, &mut |_| match fails {
                        true => Err(Error::Busy),
                        false => Ok(()),
                    });
                    if received.is_err() {
                        prop_assert_eq!((vms[at].tdr(), vms[at].step()), before);
                    }
                }
                Act::MoveTo(to) if to != at => {
                    let [from, to] = vms.get_disjoint_mut([at, to]).unwrap();
                    let before = (from.tdr(), to.tdr(), from.step(), to.step());
                    if TdxVm::move_context(from, to).is_err() {
                        prop_assert_eq!((from.tdr(), to.tdr(), from.step(), to.step()), before);
                    } else {
                        prop_assert_eq!((from.tdr(), to.tdr()), (before.1, before.0));
                    }
                }
                Act::Replace => {
                    let new = new_vm(&host, n % 2 == 0);
                    let old = std::mem::replace(&mut vms[at], new);
                    reports.push(life::destroy(old));
                }
                Act::Touch(gfn) => { let _ = vms[at].pre_fault_memory(Gfn::new(gfn * 37), 3); }
                Act::Share(gfn) => {
                    let _ = vms[at].set_memory_attributes(Gfn::new(gfn * 37), 2, Privacy::Shared);
                }
                Act::FailNext(leaf, fatal) => {
                    let status = if fatal { Class::TD_FATAL.with(0) } else { Class::OPERAND_BUSY.with(1) };
                    host.fail(Leaf::ALL[leaf], 1, 1, Injected::Status(status.get()));
                }
                _ => {}
            }
            let tdrs: Vec<_> = vms.iter().filter_map(TdxVm::tdr).collect();
            let distinct: BTreeSet<_> = tdrs.iter().collect();
            prop_assert_eq!(tdrs.len(), distinct.len(), "a TD with two VMs");
            for vm in vms.iter().filter(|vm| vm.step() == Step::Runnable) {
                mirror_equals_secure_ept(&host, vm);
            }
        }
        host.heal();
        reports.extend(vms.into_iter().map(life::destroy));
        prop_assert!(table.is_empty());
        all_accounted(&host, &life::sum(reports));
        prop_assert_eq!(host.key_pool().leaked(), host.key_pool().in_use());
    }
}
