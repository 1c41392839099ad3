//! Each call that a move within a host makes fails, at each place where it is made, with each plausible error, as a call and
//! by token.
//!
//! `BLESS=1 cargo test -p kvm-ops-sev --test move_failures` writes the table in docs/migration.md.

mod common;
mod swap_support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};

use common::*;
use kvm_ops_core::guest::Action;
use kvm_ops_core::moves::{MoveToken, StagingTable};
use kvm_ops_core::{
    Backend, Error, Exit, Fault, FaultPlan, Field, Gpa, Host, InjectedHost, Result, Step, Tech,
    VcpuId, VcpuOps, VmOps, VmParams,
};
use kvm_ops_sev::{SevVcpu, SevVm};
use kvm_ops_sim::SimHost;
use soft_amd_sp::Command;
use swap_support::leaves_by;

type Machine = InjectedHost<SimHost>;

const ERRORS: [Error; 3] = [Error::Busy, Error::NoMemory, Error::Invalid(Field::Vcpu, 0)];

/// The calls that a move makes.
const CALLS: [(&str, u64); 2] = [
    ("bind_asid", FaultPlan::BIND_ASID),
    ("take_guest", FaultPlan::TAKE_GUEST),
];

/// Those that it does not make, beside the commands.
const OTHERS: [u64; 10] = [
    FaultPlan::ALLOC,
    FaultPlan::RMPUPDATE,
    FaultPlan::PSMASH,
    FaultPlan::CREATE_VM,
    FaultPlan::CREATE_VCPU,
    FaultPlan::SET_SLOT,
    FaultPlan::DELETE_SLOT,
    FaultPlan::CLOSE,
    FaultPlan::SET_SHARED,
    FaultPlan::MAP_ENCRYPTED,
];

/// Leaves by port 0x80, reads what it was measured with, and leaves by port 0x81.
fn actions() -> Vec<Action<'static>> {
    let out = |port| Action::Out { port, data: &[1] };
    let gpa = Gpa::new(C | RAM);
    vec![out(0x80), Action::Read { gpa, len: 4 }, out(0x81)]
}

/// Two VMs of one machine, the first with a guest that left by port 0x80.
struct Pair {
    from: SevVm<Machine>,
    to: SevVm<Machine>,
    old: SevVcpu<Machine>,
    new: SevVcpu<Machine>,
    log: Arc<Mutex<Vec<String>>>,
    table: Arc<StagingTable>,
    token: Option<MoveToken>,
    staged: bool,
    plan: Arc<FaultPlan>,
    host: Machine,
    _ram: Ram,
}

impl Pair {
    fn new(tech: Tech, staged: bool) -> Self {
        let plan = Arc::new(FaultPlan::new());
        let host = InjectedHost::new(common::host(1), Arc::clone(&plan));
        let ram = Ram::new(1 << 20);
        let vm = || {
            let params = VmParams::new(1);
            let mut vm = SevVm::create(&host, host.next_vm_id(), tech, &params).unwrap();
            vm.vm_init().unwrap();
            vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
            let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
            (vm, vcpu)
        };
        let ((mut from, mut old), (to, new)) = (vm(), vm());
        from.add_initial_page(&measured(RAM, &page(0x5a))).unwrap();
        from.vm_finalize().unwrap();
        let (probe, log) = Probe::new(actions());
        load(&mut old, probe);
        assert!(matches!(old.vcpu_run(), Ok(Exit::IoOut { port: 0x80, .. })));
        Self {
            from,
            to,
            old,
            new,
            log,
            table: Arc::default(),
            token: None,
            staged,
            plan,
            host,
            _ram: ram,
        }
    }

    /// The move; of one by token, what is left of it.
    fn attempt(&mut self) -> Result<()> {
        let Self {
            from,
            to,
            table,
            token,
            ..
        } = self;
        if !self.staged {
            return SevVm::move_context(from, to);
        }
        if token.is_none() {
            let mut random = |out: &mut [u8]| {
                out.fill(7);
                Ok(())
            };
            from.local_send(table, &mut random, &mut |made| {
                *token = Some(*made);
                Ok(())
            })?;
        }
        let token = token.as_ref().expect("it was delivered");
        to.local_receive(table, token, &mut |_| Ok(())).map(drop)
    }

    /// The side at which the guest goes on, with its memory.
    fn runs_at(&mut self) -> String {
        let here = leaves_by(&mut self.old, 0x81);
        if self.to.tech() == Tech::Sev && self.to.step() == Step::Runnable {
            // The embedder carries the registers.
            let (probe, log) = Probe::new(actions()[1..].to_vec());
            load(&mut self.new, probe);
            self.log = log;
        }
        let there = leaves_by(&mut self.new, 0x81);
        let side = match (here, there) {
            (true, false) => "source",
            (false, true) => "target",
            (true, true) => panic!("it runs at both sides"),
            (false, false) => panic!("it runs nowhere"),
        };
        let log = self.log.lock().unwrap();
        assert_eq!(log.last().unwrap(), "Data([90, 90, 90, 90])");
        side.into()
    }
}

/// A move whose nth call failed so: nothing moved, and the error is the port's. `None` if not that many are made.
fn failed(tech: Tech, staged: bool, call: u64, nth: u64, error: Error) -> Option<Pair> {
    let what = format!("{tech} {call:#x} {nth} {error} {staged}");
    let mut pair = Pair::new(tech, staged);
    let before = (pair.from.identity(), pair.from.asid(), pair.to.asid());
    pair.plan.arm(Fault::nth(nth).of(call).error(error));
    let answered = pair.attempt();
    if !pair.plan.disarm() {
        assert_eq!(answered, Ok(()), "{what}");
        return None;
    }
    assert_eq!(answered, Err(error), "{what}");
    let after = (pair.from.identity(), pair.from.asid(), pair.to.asid());
    assert_eq!(after, before, "{what}");
    assert_eq!(pair.to.step(), Step::Initialized, "{what}");
    assert_eq!(pair.table.len(), usize::from(staged), "{what}");
    Some(pair)
}

/// The host tries again.
fn tries_again(mut pair: Pair) -> String {
    pair.attempt().unwrap();
    let side = pair.runs_at();
    drop((pair.old, pair.new));
    free_clean(pair.from);
    free_clean(pair.to);
    nothing_left(pair.host.inner());
    side
}

/// The host ends the target, and takes the token back.
fn ends_the_target(mut pair: Pair) -> String {
    if pair.staged {
        pair.from.local_cancel().unwrap();
    }
    let side = pair.runs_at();
    drop((pair.old, pair.new));
    free_clean(pair.to);
    free_clean(pair.from);
    nothing_left(pair.host.inner());
    side
}

/// The host ends the source, and the guest with it: the target never runs.
fn ends_the_source(mut pair: Pair) {
    drop(pair.old);
    free_clean(pair.from);
    if let Some(token) = pair.token {
        let traded = pair.to.local_receive(&pair.table, &token, &mut |_| Ok(()));
        assert!(matches!(traded, Err(Error::NotFound(..))), "{traded:?}");
    }
    assert!(pair.new.vcpu_run().is_err());
    drop(pair.new);
    free_clean(pair.to);
    nothing_left(pair.host.inner());
}

/// Where the guest goes on when the move is tried again, and when it is not.
fn outcome(tech: Tech, staged: bool, call: u64, nth: u64) -> Option<[String; 2]> {
    let outcomes = ERRORS.map(|error| {
        let failed = || failed(tech, staged, call, nth, error);
        let again = tries_again(failed()?);
        ends_the_source(failed()?);
        Some([again, ends_the_target(failed()?)])
    });
    // One rule for all errors: they are not interpreted.
    assert!(outcomes.windows(2).all(|pair| pair[0] == pair[1]));
    outcomes[0].clone()
}

fn rows(staged: bool) -> Vec<String> {
    let how = if staged { "by token" } else { "as a call" };
    let mut rows = Vec::new();
    for (name, call) in CALLS {
        for nth in 1.. {
            let mut seen: BTreeMap<[String; 2], Vec<&str>> = BTreeMap::new();
            for (tech, guest) in TECHS.into_iter().zip(["SEV", "SEV-ES", "SNP"]) {
                if let Some(outcome) = outcome(tech, staged, call, nth) {
                    seen.entry(outcome).or_default().push(guest);
                }
            }
            if seen.is_empty() {
                break;
            }
            for ([again, not], guests) in seen {
                let guests = guests.join(", ");
                rows.push(format!(
                    "| {guests} | {how} | `{name}` {nth} | {again} | {not} |"
                ));
            }
        }
    }
    rows
}

#[test]
fn whatever_call_fails_the_guest_runs_on_exactly_one_side_and_the_books_add_up() {
    let mut table = String::from(
        "| guest | moves | fails | tried again, the guest runs at | with the target torn down instead |\n|---|---|---|---|---|\n",
    );
    for row in [false, true].map(rows).concat() {
        writeln!(table, "{row}").unwrap();
    }
    swap_support::compare_table("sev-move-failures", &table);
}

/// Faults from the given call on, so that undoing the move fails, too.
#[test]
fn a_source_that_cannot_have_its_asid_again_is_lost_and_both_can_be_torn_down() {
    let bind = |nth| Fault::nth(nth).of(FaultPlan::BIND_ASID).times(u64::MAX);
    for (tech, staged) in TECHS.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        let take = || Fault::nth(1).of(FaultPlan::TAKE_GUEST);
        for faults in [
            vec![bind(2)],
            vec![take(), bind(2)],
            vec![take(), bind(3)],
            vec![take(), bind(4)],
        ] {
            let what = format!("{tech} {staged} {faults:?}");
            let mut pair = Pair::new(tech, staged);
            for fault in faults {
                pair.plan.arm(fault.error(Error::NoMemory));
            }
            assert_eq!(pair.attempt(), Err(Error::NoMemory), "{what}");
            pair.plan.disarm();
            assert!(pair.plan.happened() >= 2, "{what}");
            assert_eq!(pair.from.step(), Step::Poisoned, "{what}");
            assert_eq!(pair.old.vcpu_run(), Err(Error::Poisoned), "{what}");
            assert!(pair.new.vcpu_run().is_err(), "{what}");
            assert_eq!(pair.attempt(), Err(Error::Poisoned), "{what}");
            drop((pair.old, pair.new));
            free_clean(pair.to);
            free_clean(pair.from);
            nothing_left(pair.host.inner());
        }
    }
}

/// Any other call would fail.
#[test]
fn a_move_makes_no_other_call() {
    for (tech, staged) in TECHS.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        let mut pair = Pair::new(tech, staged);
        let commands = Command::ALL.iter().map(|command| *command as u64);
        for call in commands.chain(OTHERS) {
            pair.plan.arm(Fault::every(1).of(call));
        }
        pair.attempt().unwrap();
        pair.plan.disarm();
        assert_eq!(pair.plan.happened(), 0);
        assert_eq!(pair.runs_at(), "target", "{tech}");
    }
}
