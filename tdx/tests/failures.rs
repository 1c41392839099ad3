//! Every call of every step of a life fails in every plausible way, one at a time; what follows is
//! checked against the module's own tables and written down in docs/tdx-failures.md.
//!
//! `BLESS=1 cargo test -p kvm-ops-tdx --test failures` rewrites the document.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use common::audit::{all_accounted, mirror_equals_secure_ept};
use common::life::initial_page;
use common::plausible::{FOR_EVER, Failure, failures};
use common::{Injected, TestHost};
use kvm_ops_core::{
    Backend, CpuId, Drained, Error, Field, FreeReport, Gfn, Gpa, Host, Hpa, InitialPageKind,
    KeyReleased, Leak, Leaked, MemSlot, Privacy, Result, SlotId, Step, VcpuId, VcpuOps, VmOps,
    VmParams,
};
use kvm_ops_tdx::status::Class;
use kvm_ops_tdx::{Leaf, TdxVcpu, TdxVm};

type Vm = TdxVm<TestHost>;

/// A life between two of its steps.
struct Life {
    host: TestHost,
    vm: Option<Vm>,
    vcpu: Option<TdxVcpu<TestHost>>,
    released: Option<KeyReleased>,
    drained: Option<Drained>,
    report: Option<FreeReport>,
}

type Stage = (&'static str, fn(&mut Life) -> Result<()>);

/// The steps, in order.
const STEPS: [Stage; 12] = [
    ("vm_init", |l| l.vm().vm_init()),
    ("create_vcpu", |l| {
        l.set_slots()?;
        l.vcpu = Some(l.vm().create_vcpu(VcpuId(0))?);
        Ok(())
    }),
    ("add_initial_page", |l| {
        l.vm()
            .add_initial_page(&initial_page(0x1000, InitialPageKind::Measured))
    }),
    ("vm_finalize", |l| l.vm().vm_finalize()),
    ("pre_fault_memory", |l| {
        // One at a time: of several, the count of those done comes before the reason.
        for n in 0..3 {
            l.vm().pre_fault_memory(Gfn::new(FAR.get() + n), 1)?;
        }
        Ok(())
    }),
    ("set_memory_attributes", |l| {
        l.vm()
            .set_memory_attributes(FAR, 2, Privacy::Shared)
            .map(drop)
    }),
    ("delete_memory_slot", |l| {
        let slot = l.slots()[1];
        l.vm().delete_memory_slot(&slot)
    }),
    ("disable_virtualization_cpu", |l| {
        let cpu = l.cpu();
        l.vm().disable_virtualization_cpu(cpu)
    }),
    ("inject_nmi", |l| l.vcpu().inject_nmi()),
    ("mmu_release_hkid", |l| {
        l.released = Some(l.vm().mmu_release_hkid()?);
        Ok(())
    }),
    ("drain_private", |l| {
        let released = l.released.take().expect("the key is released");
        match l.vm().drain_private(released) {
            Ok(drained) => {
                l.drained = Some(drained);
                Ok(())
            }
            Err((error, released)) => {
                l.released = Some(released);
                Err(error)
            }
        }
    }),
    ("vm_free", |l| {
        let drained = l.drained.take().expect("the TD is drained");
        l.report = l.vm.take().map(|vm| vm.vm_free(drained));
        Ok(())
    }),
];

/// The frames that are mapped and removed: in the second slot, far from the first page.
const FAR: Gfn = Gfn::new(0x10_0000 >> 2);

impl Life {
    fn new() -> Self {
        let host = TestHost::new();
        let vm = TdxVm::create(&host, host.next_vm_id(), &VmParams::new(2)).expect("create");
        Self {
            host,
            vm: Some(vm),
            vcpu: None,
            released: None,
            drained: None,
            report: None,
        }
    }

    fn vm(&mut self) -> &mut Vm {
        self.vm.as_mut().expect("the VM lives")
    }

    fn vcpu(&mut self) -> &mut TdxVcpu<TestHost> {
        self.vcpu.as_mut().expect("a vCPU")
    }

    /// Two slots beside each other. The second shows the memory of the first, which no test reads.
    fn slots(&self) -> [MemSlot; 2] {
        let memory = self.host.memory();
        [0, 1].map(|n| MemSlot::new(SlotId(n), Gpa::new(u64::from(n) << 30), memory))
    }

    fn set_slots(&mut self) -> Result<()> {
        for slot in self.slots() {
            self.vm().set_memory_slot(&slot)?;
        }
        Ok(())
    }

    /// The processor of this thread, where the vCPU is.
    fn cpu(&self) -> CpuId {
        use kvm_ops_core::SeamPort;
        self.host.0.this_cpu()
    }

    /// Takes the steps up to `end`, which must succeed.
    fn up_to(&mut self, begin: usize, end: usize) {
        for (name, step) in &STEPS[begin..end] {
            step(self).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }

    /// Ends the life from wherever it is.
    fn end(&mut self) -> FreeReport {
        if let Some(report) = self.report.take() {
            return report;
        }
        let vm = self.vm.take().expect("the VM lives");
        match (self.drained.take(), self.released.take()) {
            (Some(drained), _) => vm.vm_free(drained),
            (None, Some(released)) => {
                let mut vm = vm;
                let drained = vm.drain_private(released).expect("the token is the VM's");
                vm.vm_free(drained)
            }
            (None, None) => common::life::destroy(vm),
        }
    }
}

/// The consequences of a failure, in words.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Outcome {
    answered: String,
    then: &'static str,
    left: String,
}

/// The error without the numbers of this run.
fn in_words(error: &Error) -> String {
    match error {
        Error::Busy => "`Busy`".into(),
        Error::Again => "`Again`".into(),
        Error::Firmware(_) => "`Firmware(status)`".into(),
        Error::Invalid(Field::Cpu, _) => "the port's error".into(),
        other => format!("`{other}`"),
    }
}

/// Returns whether the error fits the status: it names the status, or asks for another try.
fn names(error: &Error, answer: Injected) -> bool {
    match (error, answer) {
        (Error::Firmware(word), Injected::Status(status)) => *word == status,
        (Error::Busy, Injected::Status(status)) => {
            [Class::OPERAND_BUSY, Class::PREVIOUS_TLB_EPOCH_BUSY]
                .iter()
                .any(|class| class.with(status as u32).get() == status)
        }
        (Error::Again, Injected::Status(status)) => [
            Class::RND_NO_ENTROPY,
            Class::KEY_GENERATION_FAILED,
            Class::INTERRUPTED_RESUMABLE,
        ]
        .iter()
        .any(|class| class.with(0).get() == status),
        (got, Injected::Port(error)) => *got == error,
        _ => false,
    }
}

/// Takes the life to step `at`, makes the `nth` call of `leaf` fail there, and looks at all that
/// follows.
fn try_failure(at: usize, leaf: Leaf, nth: u64, failure: Failure) -> Outcome {
    let (name, step) = STEPS[at];
    let started = std::time::Instant::now();
    let context = || format!("{name}: {} #{nth}: {}", leaf.name(), failure.name());
    let mut life = Life::new();
    life.up_to(0, at);
    let (before, tdr) = (life.vm().step(), life.vm().tdr());
    life.host.fail(leaf, nth, failure.times, failure.answer);
    let result = step(&mut life);
    assert!(life.host.heal(), "{}: the call was not made", context());
    if let Err(error) = &result {
        let lie = failure.is_lie() && matches!(error, Error::Firmware(_));
        assert!(
            lie || names(error, failure.answer),
            "{}: {error}",
            context()
        );
    }
    let answered = match &result {
        Ok(()) => "done".to_string(),
        Err(error) => in_words(error),
    };
    let mut then = "goes on";
    if let Some(vm) = &life.vm {
        if result.is_err() {
            mirror_equals_secure_ept(&life.host, vm);
            if vm.step() == Step::Poisoned {
                then = "poisoned";
                if name == "mmu_release_hkid" {
                    abandon(at, leaf, nth, failure);
                    // Called again, it goes on where it failed.
                    step(&mut life).unwrap_or_else(|e| panic!("{}: again: {e}", context()));
                    then = "poisoned; called again, it succeeds";
                }
            } else {
                assert_eq!(vm.step(), before, "{}", context());
                step(&mut life).unwrap_or_else(|e| panic!("{}: again: {e}", context()));
                then = "as before; called again, it succeeds";
            }
        }
        if life
            .vm
            .as_ref()
            .is_some_and(|vm| vm.step() != Step::Poisoned)
        {
            life.up_to(at + 1, STEPS.len());
        }
    }
    let tdr = tdr.or_else(|| life.vm.as_ref().and_then(Vm::tdr));
    let report = life.end();
    all_accounted(&life.host, &report);
    for leak in &report.leaks {
        assert_eq!(leak.operation, leaf.name(), "{}: {leak}", context());
        assert!(
            names(&leak.error, failure.answer)
                || matches!(failure.answer, Injected::Status(status) if leak.error == Error::Firmware(status)),
            "{}: {leak}",
            context()
        );
    }
    if std::env::var_os("TIMES").is_some() {
        eprintln!("{:?} {}", started.elapsed(), context());
    }
    Outcome {
        answered,
        then,
        left: in_report(&report, tdr, failure),
    }
}

/// The same failure, after which the VM is given up: everything is listed with its reason.
fn abandon(at: usize, leaf: Leaf, nth: u64, failure: Failure) {
    let mut life = Life::new();
    life.up_to(0, at);
    life.host.fail(leaf, nth, failure.times, failure.answer);
    let error = STEPS[at].1(&mut life).expect_err("it fails again");
    life.host.heal();
    let out = life.host.taken().len();
    let report = life.vm.take().expect("the VM lives").vm_abandon(error);
    all_accounted(&life.host, &report);
    assert_eq!(report.leaks.len(), out + 1, "every page and the key");
    assert!(
        report
            .leaks
            .iter()
            .any(|leak| matches!(leak.what, Leaked::Key(_)))
    );
    for leak in &report.leaks {
        let expected = match failure.answer {
            Injected::Status(status) => Error::Firmware(status),
            Injected::Port(error) => error,
        };
        if !failure.is_lie() {
            assert_eq!((leak.operation, leak.error), (leaf.name(), expected));
        }
    }
}

/// The leaked pages, the TDR apart from the rest.
fn in_report(report: &FreeReport, tdr: Option<Hpa>, failure: Failure) -> String {
    let is_tdr = |leak: &Leak| matches!(leak.what, Leaked::Page(page) if Some(page) == tdr);
    let tdr_too = report.leaks.iter().any(is_tdr);
    let others = report.leaks.len() - usize::from(tdr_too);
    let others = match others {
        0 if tdr_too => return "the TDR".into(),
        0 => return "nothing".into(),
        _ if failure.times == FOR_EVER && tdr_too => "this page and all after it",
        1 => "the page",
        _ => return format!("{others} pages"),
    };
    match tdr_too {
        true => format!("{others}, the TDR"),
        false => others.into(),
    }
}

/// The calls that each step makes when nothing fails.
fn clean_calls() -> Vec<BTreeMap<Leaf, u64>> {
    let mut life = Life::new();
    let mut all = Vec::new();
    for at in 0..STEPS.len() {
        life.host.take_log();
        life.up_to(at, at + 1);
        let mut counts = BTreeMap::new();
        for (leaf, _) in life.host.take_log() {
            *counts.entry(leaf).or_insert(0) += 1;
        }
        all.push(counts);
    }
    let report = life.end();
    assert!(report.is_clean());
    all
}

/// `1, 2 and 3 of 6` as `1-3 of 6`.
fn which(nths: &[u64], of: u64) -> String {
    if nths.len() as u64 == of {
        return if of == 1 {
            "".into()
        } else {
            format!(" (each of {of})")
        };
    }
    let (first, last) = (nths[0], nths[nths.len() - 1]);
    if nths.len() == 1 {
        format!(" (no. {first} of {of})")
    } else if last - first + 1 == nths.len() as u64 {
        format!(" (no. {first} to {last} of {of})")
    } else {
        let list: Vec<String> = nths.iter().map(u64::to_string).collect();
        format!(" (no. {} of {of})", list.join(", "))
    }
}

fn table() -> String {
    let mut text = String::from(
        "| step | call | it answers | the step answers | the VM | leaked in the end |\n\
         |---|---|---|---|---|---|\n",
    );
    for (at, counts) in clean_calls().into_iter().enumerate() {
        for (leaf, of) in counts {
            for failure in failures(leaf) {
                let mut outcomes: Vec<(Outcome, Vec<u64>)> = Vec::new();
                for nth in 1..=of {
                    let outcome = try_failure(at, leaf, nth, failure);
                    match outcomes.iter_mut().find(|(o, _)| *o == outcome) {
                        Some((_, nths)) => nths.push(nth),
                        None => outcomes.push((outcome, vec![nth])),
                    }
                }
                for (outcome, nths) in outcomes {
                    let Outcome {
                        answered,
                        then,
                        left,
                    } = outcome;
                    let _ = writeln!(
                        text,
                        "| {} | {}{} | {} | {answered} | {then} | {left} |",
                        STEPS[at].0,
                        leaf.name(),
                        which(&nths, of),
                        failure.name(),
                    );
                }
            }
        }
    }
    text
}

const HEAD: &str = "# What each failure of each call leads to

A TD is built, runs and is torn down, and in each row exactly one SEAMCALL of that life fails as the row says. The test
that does so (`tdx/tests/failures.rs`) checks after every row, with the software TDX module's own tables, that the error
names the status, that the mirror equals the Secure-EPT, and that every page and the KeyID are free, in use, or reported
as leaked with leaf and status; it fails if this table differs. `BLESS=1 cargo test -p kvm-ops-tdx --test failures`
rewrites it.

\"once\" means that the next try of the call is answered by the module; \"for ever\", that it is not while the step lasts.
\"as before\" means that the failing step changed nothing that matters: called again, it succeeds, and the life goes on to
a clean end. A poisoned VM is torn down at once. After a failed `mmu_release_hkid` the VM may also be given up
(`vm_abandon`): then every page and the KeyID are leaked and listed.

";

/// A creation fails, and so does its undoing: the VM is poisoned, and its final report lists the
/// pages that the module kept.
#[test]
fn an_undoing_that_fails_is_told_when_the_vm_ends() {
    let odd = |detail| Injected::Status(Class::PAGE_METADATA_INCORRECT.with(detail).get());
    let causes = [
        (Leaf::MngKeyConfig, 1),
        (Leaf::MngKeyConfig, 2),
        (Leaf::MngAddcx, 1),
        (Leaf::MngAddcx, 4),
        (Leaf::MngInit, 1),
    ];
    let undoings = [
        (Leaf::MngVpflushdone, 1),
        (Leaf::PhymemCacheWb, 2),
        (Leaf::MngKeyFreeid, 1),
        (Leaf::PhymemPageReclaim, 1),
        (Leaf::PhymemPageReclaim, 2),
        (Leaf::PhymemPageWbinvd, 1),
    ];
    for (cause, nth) in causes {
        for (undoing, undo_nth) in undoings {
            let mut life = Life::new();
            life.host.fail(cause, nth, 1, odd(1));
            life.host.fail(undoing, undo_nth, 1, odd(2));
            let error = life.vm().vm_init().unwrap_err();
            let undone = !life.host.heal();
            let context = format!("{} #{nth}, {} #{undo_nth}", cause.name(), undoing.name());
            if undone {
                // Fewer pages were given to the module than would have to come back.
                assert_eq!(Injected::Status(odd_status(&error)), odd(1), "{context}");
                assert_eq!(life.vm().step(), Step::Created, "{context}");
                life.vm().vm_init().unwrap();
            } else {
                assert_eq!(Injected::Status(odd_status(&error)), odd(2), "{context}");
                assert_eq!(life.vm().step(), Step::Poisoned, "{context}");
            }
            let report = life.end();
            all_accounted(&life.host, &report);
            for leak in &report.leaks {
                assert_eq!(leak.operation, undoing.name(), "{context}");
            }
        }
    }
}

fn odd_status(error: &Error) -> u64 {
    match error {
        Error::Firmware(status) => *status,
        other => panic!("{other}"),
    }
}

#[test]
fn every_failure_leads_where_the_document_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tdx-failures.md");
    let expected = format!("{HEAD}{}", table());
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &expected).expect("docs is writable");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = written.lines().zip(expected.lines()).find(|(a, b)| a != b);
    assert_eq!(differs, None, "docs/tdx-failures.md is out of date");
    assert_eq!(written.len(), expected.len());
}
