//! The place of the software TDX module in a build without the feature `tdx`: no machine has one.

use std::sync::Arc;

use kvm_ops::TdPort;

pub(crate) use kvm_ops::NoPort as SoftSeam;

use crate::vm::VmInner;
use crate::{BuildError, SimVm, SoftPages};

#[derive(Debug)]
pub(crate) enum Setup {}

#[derive(Debug)]
pub(crate) enum Tdx {}

/// No vCPU has one.
#[derive(Debug)]
pub(crate) enum HostApic {}

impl Tdx {
    pub(crate) fn up(setup: Setup) -> Result<Self, BuildError> {
        match setup {}
    }

    pub(crate) fn up_or_log(setup: Setup) -> Option<Self> {
        match setup {}
    }

    pub(crate) fn up_default() -> Option<Self> {
        None
    }

    pub(crate) fn seam(&self) -> &SoftSeam {
        match *self {}
    }

    pub(crate) fn pages(&self) -> &SoftPages {
        match *self {}
    }
}

pub(crate) fn port(_: &SimVm) -> Option<&dyn TdPort> {
    None
}

pub(crate) fn vm_closed(_: &VmInner) {}

pub(crate) fn hand_over(_: &Arc<VmInner>, _: &VmInner) {}
