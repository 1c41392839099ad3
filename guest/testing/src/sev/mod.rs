//! SEV, SEV-ES and SNP guests for tests, on the software AMD SP.

mod builder;
mod exit;
mod fault;
mod ghcb;
mod guest;
pub mod hosts;
mod hypervisor;
mod launch;
mod messages;
mod vcpu;

pub use builder::{BuildError, TestSevBuilder};
pub use exit::{Exit, Reply};
pub use fault::{Access, Fault, StopCause, Stopped};
pub use guest::TestSev;
pub use hosts::Host;
pub use hypervisor::{HostError, Hypervisor};
pub use launch::Technology;
pub use messages::{Ghcb, Mapping};
pub use soft_amd_sp as platform;
pub use vcpu::Vcpu;
