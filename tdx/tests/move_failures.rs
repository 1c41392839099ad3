//! Each SEAMCALL before, during and after a TD's move within its host fails in every plausible way, one at a time: the guest
//! goes on in one VM, or is lost with the reason, and every page and key is free, in use or listed.
//!
//! `BLESS=1 cargo test -p kvm-ops-tdx --test move_failures` writes the table in docs/migration.md.

mod common;
mod migrate_support;
mod move_support;

use std::collections::{BTreeMap, BTreeSet};

use common::audit::all_accounted;
use common::life::{slot, sum};
use common::plausible::{FOR_EVER, Failure, failures};
use kvm_ops_core::{
    Backend, CpuId, Error, FaultPlan, FreeReport, KeyReleased, Leaked, Privacy, SeamPort, Step,
    VcpuId, VcpuOps, VmOps,
};
use kvm_ops_tdx::Leaf;
use migrate_support::matrix::document;
use migrate_support::{Vcpu, Vm};
use move_support::{FAR, World, created, in_words, run, waiting};

/// A life around a move. Fields are dropped in this order.
struct Life {
    /// The handle of the vCPU at the target.
    new: Option<Vcpu>,
    world: World,
    /// Calls that a kick ends come for ever.
    hangs: bool,
}

type Stage = (&'static str, fn(&mut Life) -> Result<(), String>);

/// The steps in their order. The guest has counted at the source.
const STEPS: [Stage; 9] = [
    ("`vm_init` of the target", |life| {
        let World { to, host, .. } = &mut life.world;
        let begun = to.vm_init();
        told(begun.and_then(|()| to.set_memory_slot(&slot(host))))
    }),
    ("`vcpu_run` at the source", |life| {
        let mut vcpu = life.world.old.take().expect("the source's");
        let counted = counts(&mut vcpu, &life.world, life.hangs);
        life.world.old = Some(vcpu);
        counted
    }),
    ("the move", |life| told(life.world.attempt())),
    ("`vcpu_run` at the target, on another processor", |life| {
        let Life { world, hangs, new } = life;
        if new.is_none() {
            let mut vcpu = world.to.create_vcpu(VcpuId(0)).map_err(in_words)?;
            vcpu.vcpu_load(other_cpu(world)).map_err(in_words)?;
            *new = Some(vcpu);
        }
        let vcpu = new.as_mut().expect("made");
        counts(vcpu, world, *hangs)
    }),
    ("`pre_fault_memory` of the target", |life| {
        told(life.world.to.pre_fault_memory(FAR, 1))
    }),
    ("`set_memory_attributes` of the target", |life| {
        let to = &life.world.to;
        told(to.set_memory_attributes(FAR, 1, Privacy::Shared))
    }),
    ("`inject_nmi` at the target", |life| {
        told(life.new.as_mut().expect("made").inject_nmi())
    }),
    ("end of the source", |life| {
        life.world.old = None;
        let spare = created(&life.world.host);
        end(life, |world| std::mem::replace(&mut world.from, spare))
    }),
    ("end of the target", |life| {
        life.new = None;
        let spare = created(&life.world.host);
        end(life, |world| std::mem::replace(&mut world.to, spare))
    }),
];

/// The step that is the move, and the one after which there is no guest.
const THE_MOVE: usize = 2;
const END_OF_THE_TARGET: usize = 8;

fn told<T>(result: kvm_ops_core::Result<T>) -> Result<(), String> {
    result.map(drop).map_err(in_words)
}

/// A processor that the vCPU is not associated with.
fn other_cpu(world: &World) -> CpuId {
    let here = world.host.0.this_cpu().0;
    CpuId((here + 1) % world.host.0.cpus())
}

/// Runs a vCPU until it has counted; where its entry fails for ever, a kick ends that.
fn counts(vcpu: &mut Vcpu, world: &World, hangs: bool) -> Result<(), String> {
    let (kick, host) = (vcpu.kick_handle(), &world.host);
    std::thread::scope(|scope| {
        if hangs {
            scope.spawn(move || {
                while !host.has_failed() {
                    std::thread::yield_now();
                }
                kick.kick();
            });
        }
        run(vcpu, &world.counted, 3)
    })
}

/// The whole teardown of a VM. A key that is not released is released by a second call, once the calls do not fail any more.
fn end(life: &mut Life, take: impl FnOnce(&mut World) -> Vm) -> Result<(), String> {
    let mut vm = take(&mut life.world);
    let mut said = Ok(());
    let released: KeyReleased = match vm.mmu_release_hkid() {
        Ok(released) => released,
        Err(error) => {
            said = Err(in_words(error));
            life.world.host.heal();
            vm.mmu_release_hkid().expect("nothing fails any more")
        }
    };
    let drained = vm.drain_private(released).map_err(|(error, _)| error);
    let report = vm.vm_free(drained.expect("what fails is leaked"));
    life.world.reports.push(report);
    said
}

impl Life {
    /// A life whose target is not initialised yet.
    fn new() -> Self {
        let mut world = World::new(false);
        let target = created(&world.host);
        world.renew_target(target);
        Self {
            new: None,
            world,
            hangs: false,
        }
    }

    fn up_to(&mut self, begin: usize, end: usize) {
        for (name, step) in &STEPS[begin..end] {
            step(self).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }

    /// Where the guest goes on: it was at the source before the move, and is at the target after it.
    fn runs_at(&mut self, moved: bool) -> String {
        if self.new.is_none() {
            return self.world.runs_at().into();
        }
        let World { counted, old, .. } = &mut self.world;
        let there = self.new.as_mut().map(|vcpu| run(vcpu, counted, 12));
        let here = old.as_mut().map(|vcpu| run(vcpu, counted, 12));
        assert!(here != Some(Ok(())) && moved, "the source gave it away");
        match there {
            Some(Ok(())) => "target".into(),
            _ => "nowhere".into(),
        }
    }

    /// Ends all VMs. Returns what leaked.
    fn end(mut self) -> FreeReport {
        self.new = None;
        let World {
            old,
            from,
            to,
            others,
            mut reports,
            host,
            ..
        } = self.world;
        drop(old);
        host.heal();
        let rest = [from, to].into_iter().chain(others);
        reports.extend(rest.map(common::life::destroy));
        let report = sum(reports);
        all_accounted(&host, &report);
        report
    }
}

/// What a failure leads to: what the step says, where the guest is, and what leaked.
type Outcome = [String; 3];

fn outcome(at: usize, leaf: Leaf, nth: u64, failure: Failure) -> Outcome {
    let (name, step) = STEPS[at];
    let what = format!("{name}: {} {nth}, {}", leaf.name(), failure.name());
    let mut life = Life::new();
    life.up_to(0, at);
    life.hangs = leaf == Leaf::VpEnter && failure.times == FOR_EVER;
    let host = life.world.host.clone();
    host.fail(leaf, nth, failure.times, failure.answer);
    let said = step(&mut life);
    life.hangs = false;
    assert!(host.heal(), "{what}: not called");
    let mut guest = match (at, &said) {
        (END_OF_THE_TARGET, _) => String::from("ended"),
        (_, Ok(())) => {
            if at < THE_MOVE {
                life.up_to(at + 1, THE_MOVE + 1);
            }
            life.runs_at(true)
        }
        (_, Err(_)) => goes_on(&mut life, at, &what),
    };
    if guest == "nowhere" {
        let vm = if at < THE_MOVE {
            &life.world.from
        } else {
            &life.world.to
        };
        let why = vm.explain(Error::Poisoned).to_string();
        assert!(why.contains(leaf.name()), "{what}: {why}");
        guest = String::from("lost");
    }
    let said = said.err().unwrap_or_else(|| "done".into());
    [said, guest, leaks(&life.end(), leaf, &what)]
}

/// The life goes on after a step that failed: the step is taken again, or another target is.
fn goes_on(life: &mut Life, at: usize, what: &str) -> String {
    let (_, step) = STEPS[at];
    if at > THE_MOVE {
        return match life.world.to.step() {
            Step::Poisoned => life.runs_at(true),
            _ => {
                step(life).unwrap_or_else(|error| panic!("{what}: again: {error}"));
                life.runs_at(true)
            }
        };
    }
    if life.world.from.step() == Step::Poisoned {
        let moved = life.world.attempt();
        assert_eq!(moved, Err(Error::Poisoned), "{what}");
        return life.runs_at(false);
    }
    if life.world.to.step() == Step::Poisoned {
        let moved = life.world.attempt();
        assert_eq!(moved, Err(Error::Poisoned), "{what}");
        let another = waiting(&life.world.host);
        life.world.renew_target(another);
    } else {
        step(life).unwrap_or_else(|error| panic!("{what}: again: {error}"));
    }
    life.up_to(at + 1, THE_MOVE + 1);
    life.runs_at(true)
}

fn leaks(report: &FreeReport, leaf: Leaf, what: &str) -> String {
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for leak in &report.leaks {
        assert_eq!(leak.operation, leaf.name(), "{what}: {leak}");
        let kind = match leak.what {
            Leaked::Page(_) => "page",
            Leaked::Key(_) => "KeyID",
            _ => panic!("{what}: {leak}"),
        };
        *kinds.entry(kind).or_default() += 1;
    }
    let all = kinds.into_iter().map(|(kind, count)| match count {
        1 => format!("1 {kind}"),
        count => format!("{count} {kind}s"),
    });
    match Vec::from_iter(all) {
        all if all.is_empty() => "nothing".into(),
        all => all.join(", "),
    }
}

/// The calls of each step, and how many of each.
fn calls() -> Vec<BTreeMap<Leaf, u64>> {
    let mut life = Life::new();
    let mut all = Vec::new();
    for at in 0..STEPS.len() {
        life.world.host.take_log();
        life.up_to(at, at + 1);
        let mut counts = BTreeMap::new();
        for (leaf, _) in life.world.host.take_log() {
            *counts.entry(leaf).or_insert(0) += 1;
        }
        all.push(counts);
    }
    assert!(life.end().is_clean());
    all
}

#[test]
fn whatever_call_fails_around_a_move_the_guest_is_in_one_vm() {
    let mut table = String::from(
        "| step | call | it answers | the step says | the guest | leaked in the end |\n|---|---|---|---|---|---|\n",
    );
    for (at, counts) in calls().into_iter().enumerate() {
        let name = STEPS[at].0;
        if at == THE_MOVE {
            assert!(counts.is_empty(), "{counts:?}");
            table += &format!("| {name} | none | | done | target | nothing |\n");
        }
        for (leaf, of) in counts {
            // What a failure leads to, and the failures that lead there.
            let mut rows: Vec<(Outcome, Vec<String>)> = Vec::new();
            for failure in failures(leaf) {
                let places = BTreeSet::from([1, of.div_ceil(2), of]);
                let outcomes = places
                    .into_iter()
                    .map(|nth| outcome(at, leaf, nth, failure));
                for outcome in BTreeSet::from_iter(outcomes) {
                    match rows.iter_mut().find(|row| row.0 == outcome) {
                        Some((_, names)) => names.push(failure.name()),
                        None => rows.push((outcome, vec![failure.name()])),
                    }
                }
            }
            for ([said, guest, leaked], names) in rows {
                let (call, names) = (leaf.name(), names.join("; "));
                table += &format!(
                    "| {name} | {call} ({of}) | {names} | {said} | {guest} | {leaked} |\n"
                );
            }
        }
    }
    document("td-move-calls", &table);
}

/// Any call would fail, and any page that it takes.
#[test]
fn a_move_makes_no_call_and_takes_no_page() {
    for staged in [false, true] {
        let mut world = World::new(staged);
        let others = [
            FaultPlan::ALLOC,
            FaultPlan::CREATE_VM,
            FaultPlan::CREATE_VCPU,
            FaultPlan::SET_SLOT,
            FaultPlan::DELETE_SLOT,
            FaultPlan::CLOSE,
            FaultPlan::SET_SHARED,
        ];
        let leaves = Leaf::ALL.iter().map(|leaf| *leaf as u64);
        for call in leaves.chain(others) {
            world.host.fail_call(call, Error::NoMemory);
        }
        world.attempt().unwrap();
        assert!(!world.host.heal(), "none of them happened");
        assert_eq!(world.runs_at(), "target");
        world.end(staged);
    }
}
