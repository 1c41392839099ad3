//! The back-end test kit: what any back end must do, as checks that it can run on itself.
//!
//! Implement [`Subject`] for whatever creates your VMs, and call [`run`] from a test:
//!
//! ```
//! use kvm_ops_core::kit::{self, NullVm, Subject};
//! use kvm_ops_core::{Result, VmId};
//!
//! struct Nulls(u64);
//!
//! impl Subject for Nulls {
//!     type Vm = NullVm;
//!
//!     fn create(&mut self) -> Result<NullVm> {
//!         self.0 += 1;
//!         Ok(NullVm::new(VmId(self.0)))
//!     }
//! }
//!
//! let report = kit::run(&mut Nulls(0));
//! assert!(report.passed(), "{report}");
//! ```
//!
//! A check that cannot run on the subject (no memory to lend, no way to count what lives) is
//! reported as skipped, with the reason.

mod checks;
mod null;
mod report;

pub use null::{NullVcpu, NullVm};
pub use report::{Outcome, Report};

use crate::{Backend, HostRange, Result};

/// The subject of the kit: a source of VMs of one back end.
pub trait Subject {
    /// The back end's VM, or an enum of them.
    type Vm: Backend;

    /// Creates a VM that is not yet initialised, and that may have at least two vCPUs.
    ///
    /// # Errors
    /// The error of the back end; the check fails then.
    fn create(&mut self) -> Result<Self::Vm>;

    /// Creates a VM to which the guest of another may move. Not initialised, with as many vCPUs.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    fn create_receiver(&mut self) -> Result<Self::Vm> {
        self.create()
    }

    /// Two pages of memory that stay mapped, and unreferenced, as long as the subject lives.
    /// `None` where there is none to lend: slot checks are skipped.
    fn memory(&mut self) -> Option<HostRange> {
        None
    }

    /// The number of living things that a VM may leak: VMs, pages, keys, descriptors, in all. `None`
    /// where it cannot be counted: leak checks are skipped.
    fn live(&mut self) -> Option<u64> {
        None
    }
}

/// Runs every check.
pub fn run<S: Subject>(subject: &mut S) -> Report {
    let mut report = Report::default();
    for (name, check) in checks::all::<S>() {
        let before = subject.live();
        let outcome = check(subject);
        let outcome = match (outcome, before, subject.live()) {
            (Outcome::Passed, Some(before), Some(after)) if before != after => Outcome::Failed(
                alloc::format!("{before} things lived before the check and {after} after it"),
            ),
            (outcome, ..) => outcome,
        };
        report.add(name, outcome);
    }
    report.add(
        "what lives can be counted",
        match subject.live() {
            Some(_) => Outcome::Passed,
            None => Outcome::Skipped("the subject does not count; leaks were not looked for"),
        },
    );
    report
}
