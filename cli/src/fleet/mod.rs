//! Fleets: reading their files, placing their VMs on hosts, running them and reporting.

pub(crate) mod expect;
pub(crate) mod launch;
pub(crate) mod parse;
pub(crate) mod plan;
pub(crate) mod print;
mod problem;
pub(crate) mod progress;
pub(crate) mod report;
pub(crate) mod resources;
pub(crate) mod source;
pub(crate) mod spec;
mod table;
#[cfg(test)]
mod tests;
