//! The outcome of a guest program's last action, kept until the program is asked again.

use kvm_ops::guest::{GuestFault, Outcome};
use kvm_ops::{SharedMask, VcpuId};

/// An [`Outcome`] without its borrow: data lies in the buffer of the vCPU.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reported {
    Start,
    Done,
    Data(usize),
    Value(u64),
    #[allow(dead_code)] // Only a TD has calls with that many answers.
    Values([u64; 6]),
    Fault(GuestFault),
    Interrupt(u8),
}

impl Reported {
    pub(crate) fn outcome(self, vcpu: VcpuId, mask: SharedMask, buffer: &[u8]) -> Outcome<'_> {
        match self {
            Self::Start => Outcome::Start { vcpu, mask },
            Self::Done => Outcome::Done,
            Self::Data(len) => Outcome::Data(&buffer[..len]),
            Self::Value(value) => Outcome::Value(value),
            Self::Values(values) => Outcome::Values(values),
            Self::Fault(fault) => Outcome::Fault(fault),
            Self::Interrupt(vector) => Outcome::Interrupt(vector),
        }
    }
}
