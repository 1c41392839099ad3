//! The CPU as a TD sees it: CPUID values, MSRs, its clock and the layout of its extended state.

pub(crate) mod answer;
pub(crate) mod cpuid;
pub(crate) mod msr;
pub(crate) mod tables;
pub(crate) mod tsc;
pub(crate) mod xsave;
