//! The measured start of a confidential VM.

use std::fmt;

use kvm_ops::{Gpa, InitialPage, InitialPageKind};

use crate::layout::{FOUR_GIB, RAM_HOLE};

/// A page that a confidential VM starts with.
#[derive(Clone, PartialEq, Eq)]
pub struct LaunchPage {
    /// The guest-physical address, without mask bits.
    pub gpa: Gpa,
    /// Its contents.
    pub contents: Box<[u8; 4096]>,
    /// The kind of contents.
    pub kind: InitialPageKind,
}

impl LaunchPage {
    /// A page whose contents are measured.
    pub fn measured(gpa: Gpa, contents: Box<[u8; 4096]>) -> Self {
        Self {
            gpa,
            contents,
            kind: InitialPageKind::Measured,
        }
    }

    /// The page as the VM takes it.
    pub fn as_initial(&self) -> InitialPage<'_> {
        InitialPage {
            gpa: self.gpa,
            contents: &self.contents,
            kind: self.kind,
        }
    }
}

impl fmt::Debug for LaunchPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaunchPage")
            .field("gpa", &self.gpa)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// One step of a measured start. Steps are taken in their order, and the measurement depends on it.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchStep {
    /// Adds a page.
    Add(LaunchPage),
    /// Measures the contents of a page that an earlier step added unmeasured. TDs only.
    Measure(Gpa),
}

impl From<LaunchPage> for LaunchStep {
    fn from(page: LaunchPage) -> Self {
        Self::Add(page)
    }
}

/// The bytes of memory that must end at 4 GiB, so that all pages in the hole below lie in them.
pub(crate) fn bytes_below_4_gib(steps: &[LaunchStep]) -> u64 {
    let lowest = steps
        .iter()
        .filter_map(|step| match step {
            LaunchStep::Add(page) => Some(page.gpa.get()),
            LaunchStep::Measure(_) => None,
        })
        .filter(|gpa| (RAM_HOLE..FOUR_GIB).contains(gpa))
        .min();
    lowest.map_or(0, |gpa| FOUR_GIB - gpa)
}
