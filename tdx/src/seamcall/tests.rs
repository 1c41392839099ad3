use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::vec::Vec;

use kvm_ops::{
    CpuId, Error, FieldCache, Hkid, Hpa, KeyPool, PackageId, Result, SeamPort, SeamRegs,
};

use super::{Calls, Failed, Leaf, regs};
use crate::retry::{Action, LONGEST_WAIT, RULES, Verdict, rule};
use crate::status::{Class, CompletionStatus};

/// A port that answers from a list, then with success.
#[derive(Default)]
struct Script {
    answers: Mutex<Vec<u64>>,
    calls: Mutex<Vec<(CpuId, u64, SeamRegs)>>,
    waits: AtomicU64,
    refuse: Option<Error>,
    fields: FieldCache,
}

impl Script {
    fn of(status: CompletionStatus, times: u32) -> Self {
        let answers = (0..times).map(|_| status.get()).collect();
        Self {
            answers: Mutex::new(answers),
            ..Self::default()
        }
    }

    fn calls(&self) -> Vec<(CpuId, u64, SeamRegs)> {
        self.calls.lock().unwrap().clone()
    }
}

impl SeamPort for Script {
    #[allow(unsafe_code)]
    unsafe fn seamcall(&self, cpu: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64> {
        if let Some(error) = self.refuse {
            return Err(error);
        }
        self.calls.lock().unwrap().push((cpu, rax, *regs));
        // Leaves clear operands on errors: a retry must not take what came back.
        *regs = SeamRegs::default();
        Ok(self.answers.lock().unwrap().pop().unwrap_or(0))
    }

    fn package_of(&self, _: CpuId) -> Option<PackageId> {
        Some(PackageId(0))
    }

    fn cpus(&self) -> u32 {
        1
    }

    fn packages(&self) -> u32 {
        1
    }

    fn this_cpu(&self) -> CpuId {
        CpuId(3)
    }

    fn kick(&self, _: CpuId) {}

    fn relax(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }

    fn fields(&self) -> &FieldCache {
        &self.fields
    }

    fn key_ids(&self) -> &KeyPool {
        unreachable!("no call takes a key")
    }

    fn with_key_id(&self, page: Hpa, _: Option<Hkid>) -> Hpa {
        page
    }
}

fn call(script: &Script, leaf: Leaf) -> super::Outcome {
    let calls = Calls::new(script);
    calls.on(CpuId(7), leaf, regs(0x1000, 0x2000)).map(drop)
}

/// The leaves that a row decides about: those that no earlier row of its class takes.
fn leaves_of(row: usize) -> Vec<Leaf> {
    let wanted = &RULES[row];
    let all = Leaf::ALL.iter().copied().filter(|leaf| {
        let first = RULES.iter().position(|r| {
            r.class == wanted.class && (r.leaves.is_empty() || r.leaves.contains(leaf))
        });
        first == Some(row)
    });
    all.collect()
}

#[test]
fn every_row_is_tried_as_often_as_it_says_and_then_told_as_it_says() {
    for (n, row) in RULES.iter().enumerate() {
        let leaves = leaves_of(n);
        assert!(!leaves.is_empty(), "row {n} can never be used");
        // Waits are real: where there are many leaves, the first and the last do.
        let most = leaves.len() - 1;
        for leaf in [leaves[0], leaves[most]] {
            // Different details, because they must not matter.
            let status = row.class.with(n as u32 + 1);
            let (tries, waits) = match row.action {
                Action::Done => {
                    let script = Script::of(status, 1);
                    assert_eq!(call(&script, leaf), Ok(()), "{row:?}");
                    assert_eq!(script.calls().len(), 1);
                    continue;
                }
                Action::Retry(most) | Action::Resume(most) | Action::Restart(most) => (most, 0),
                Action::BackOff(most) => {
                    let turns = (0..most).map(|k| 1u64 << k.min(LONGEST_WAIT.ilog2()));
                    (most, turns.sum())
                }
                Action::KickAndRetry | Action::GiveUp => (0, 0),
            };
            let script = Script::of(status, tries);
            assert_eq!(call(&script, leaf), Ok(()), "the last try helps: {row:?}");
            assert_eq!(script.calls().len(), tries as usize + 1);
            assert_eq!(script.waits.load(Ordering::Relaxed), waits);

            let script = Script::of(status, tries + 1);
            let failed = call(&script, leaf).unwrap_err();
            assert_eq!(script.calls().len(), tries as usize + 1, "{row:?}");
            let told = match row.verdict {
                Verdict::Busy => Error::Busy,
                Verdict::Again => Error::Again,
                Verdict::Refused | Verdict::Poison => Error::Firmware(status.get()),
            };
            assert_eq!(failed.leaf, leaf);
            assert_eq!(failed.error(), told);
            assert_eq!(failed.leak_error(), Error::Firmware(status.get()));
            assert_eq!(failed.poisons(), row.verdict == Verdict::Poison);
            assert_eq!(failed.wants_kick(), row.action == Action::KickAndRetry);
        }
    }
}

#[test]
fn a_retry_takes_the_operands_anew_and_a_resumption_says_so_in_rcx() {
    for (class, leaf, rcx) in [
        (Class::RND_NO_ENTROPY, Leaf::MngCreate, 0x1000),
        (Class::OPERAND_BUSY, Leaf::MngCreate, 0x1000),
        (Class::INTERRUPTED_RESTARTABLE, Leaf::MemPageDemote, 0x1000),
        (Class::INTERRUPTED_RESUMABLE, Leaf::PhymemCacheWb, 1),
    ] {
        let script = Script::of(class.with(1), 1);
        assert_eq!(call(&script, leaf), Ok(()));
        let calls = script.calls();
        let (cpu, rax, second) = calls[1];
        assert_eq!((cpu, rax), (CpuId(7), leaf.rax()));
        assert_eq!((second.rcx, second.rdx), (rcx, 0x2000), "{class}");
    }
    // After a session that is gone, from the start.
    let script = Script {
        answers: Mutex::new(Vec::from([
            Class::WBCACHE_RESUME_ERROR.with(0).get(),
            Class::INTERRUPTED_RESUMABLE.with(0).get(),
        ])),
        ..Script::default()
    };
    let calls = Calls::new(&script);
    calls.phymem_cache_wb(CpuId(0)).unwrap();
    let rcx: Vec<u64> = script.calls().iter().map(|c| c.2.rcx).collect();
    assert_eq!(rcx, [0, 1, 0]);
}

#[test]
fn bounds_of_different_statuses_do_not_add_up_to_endlessness() {
    let busy = Class::OPERAND_BUSY.with(186).get();
    let dry = Class::RND_NO_ENTROPY.with(0).get();
    let script = Script {
        answers: Mutex::new(
            (0..1000)
                .map(|n| if n % 2 == 0 { busy } else { dry })
                .collect(),
        ),
        ..Script::default()
    };
    let failed = call(&script, Leaf::MngCreate).unwrap_err();
    assert_eq!(failed.error(), Error::Again);
    assert_eq!(
        script.calls().len(),
        21,
        "ten tries of either, then the eleventh"
    );
}

#[test]
fn without_a_row_the_error_bit_decides() {
    for leaf in Leaf::ALL {
        assert_eq!(rule(*leaf, CompletionStatus::new(0)).0, Action::Done);
        assert_eq!(
            rule(*leaf, CompletionStatus::new(0x0000_1234_0000_0001)).0,
            Action::Done
        );
        let unknown = CompletionStatus::new(0xc000_1234_0000_0001);
        let verdict = match leaf.name() {
            // A guest whose writes stay blocked cannot go on.
            "TDH.EXPORT.UNBLOCKW" => Verdict::Poison,
            name if ["TDH.EXPORT.", "TDH.IMPORT.", "TDH.MIG.", "TDH.SERVTD."]
                .iter()
                .any(|group| name.starts_with(group)) =>
            {
                Verdict::Refused
            }
            _ => Verdict::Poison,
        };
        assert_eq!(rule(*leaf, unknown), (Action::GiveUp, verdict), "{leaf:?}");
    }
}

#[test]
fn an_interrupted_leaf_of_a_migration_goes_on_where_its_list_is() {
    // The port returns RCX as 0, where the module would name the entry to go on at.
    for (leaf, rcx, command) in [
        (Leaf::ExportMem, 0, 1),
        (Leaf::ImportMem, 0, 1),
        (Leaf::ExportBlockw, 0, 0),
        (Leaf::ExportRestore, 0, 0),
        (Leaf::ExportStateTd, 0x1000, 1),
        (Leaf::ImportStateVp, 0x1000, 1),
    ] {
        let script = Script::of(Class::INTERRUPTED_RESUMABLE.with(0), 1);
        assert!(call(&script, leaf).is_ok());
        let calls = script.calls();
        assert_eq!(calls.len(), 2, "{leaf:?}");
        let again = calls[1].2;
        assert_eq!((again.rcx, again.r10 >> 63), (rcx, command), "{leaf:?}");
    }
}

#[test]
fn a_port_that_calls_nothing_breaks_nothing() {
    let script = Script {
        refuse: Some(Error::Busy),
        ..Script::default()
    };
    let failed = call(&script, Leaf::VpFlush).unwrap_err();
    let rcx = failed.rcx;
    assert_eq!(
        failed,
        Failed {
            rcx,
            ..Failed::port(Leaf::VpFlush, Error::Busy)
        }
    );
    assert_eq!(rcx, 0x1000, "the operand is kept");
    assert_eq!((failed.error(), failed.poisons()), (Error::Busy, false));
}
