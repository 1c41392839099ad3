//! TDH.VP.ENTER and what comes back.
//!
//! What a turn of the loop does: a kick that came is answered ([`VcpuRecord::take_kick`]) after the
//! vCPU has said that it is inside; `Td::enter` passes the gate and gives an `Inside` that is
//! dropped as soon as TDH.VP.ENTER returns, before anything else is done about the exit.
//!
//! [`VcpuRecord::take_kick`]: crate::vcpu::VcpuRecord::take_kick

use kvm_ops::{Exit, Host, Result};

use crate::TdxVcpu;

impl<H: Host> TdxVcpu<H> {
    /// Runs the guest until something needs the embedder.
    pub(crate) fn run(&mut self) -> Result<Exit<'_>> {
        kvm_ops::unsupported!("vcpu_run")
    }
}
