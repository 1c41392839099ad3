//! The place of the software AMD SP in a build without the feature `sev`: no machine has one, so no
//! guest is a SEV guest.

use kvm_ops::guest::GuestFault;
use kvm_ops::{Gpa, Level, Privacy, SevPort, SharedMask, Tech};

pub(crate) use kvm_ops::NoPort as SoftPsp;

use crate::access::{Copy, Touch};
use crate::vcpu::{Core, Flow};
use crate::vm::VmInner;
use crate::{BuildError, SimVm, SoftPages};

#[derive(Debug)]
pub(crate) enum Setup {}

#[derive(Debug)]
pub(crate) enum Sev {}

impl Sev {
    pub(crate) fn up(setup: Setup) -> Result<Self, BuildError> {
        match setup {}
    }

    pub(crate) fn up_default() -> Option<Self> {
        None
    }

    pub(crate) fn offers(&self, _: Tech) -> bool {
        match *self {}
    }

    pub(crate) fn psp(&self) -> &SoftPsp {
        match *self {}
    }

    pub(crate) fn pages(&self) -> &SoftPages {
        match *self {}
    }
}

pub(crate) fn port(_: &SimVm) -> Option<&dyn SevPort> {
    None
}

#[derive(Default)]
pub(crate) struct Guest {}

impl Guest {
    pub(crate) fn mask(&self) -> SharedMask {
        SharedMask::NONE
    }

    pub(crate) fn close(&self) {}
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Converting {}

impl Converting {
    pub(crate) fn asks(&self) -> bool {
        match *self {}
    }
}

pub(crate) fn first_touch(_: &VmInner, gpa: Gpa, _: Copy<'_>) -> Touch {
    Touch::Fault(GuestFault::Integrity(gpa))
}

impl Core {
    pub(crate) fn convert(&mut self, _: Gpa, _: u64, _: Privacy) -> Flow {
        Flow::fault(GuestFault::NotOffered)
    }

    pub(crate) fn accept(&mut self, _: Gpa, _: Level) -> Flow {
        Flow::fault(GuestFault::NotOffered)
    }

    pub(crate) fn ghcb_msr(&mut self, _: u64) -> Flow {
        Flow::fault(GuestFault::NotOffered)
    }

    pub(crate) fn go_on_converting(&mut self, now: Converting) -> Flow {
        match now {}
    }
}
