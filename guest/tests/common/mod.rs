//! Short forms for the tests. No interface: each test uses a part.
#![allow(dead_code, unreachable_pub)]

use kvm_ops_guest::tdx::TdGuest;
use kvm_ops_guest::{Flush, GpaRange};
use kvm_ops_guest_test::tdx::Vcpu;

pub const SHARED: u64 = 1 << 47;
pub const LARGE: u64 = 2 << 20;

pub fn range(start: u64, bytes: u64) -> GpaRange {
    GpaRange::new(start, bytes).expect("a range")
}

pub fn no_flush(_: Flush) {}

/// A kernel in front of a vCPU of a TD.
pub fn kernel(cpu: &mut Vcpu) -> TdGuest<&mut Vcpu> {
    TdGuest::new(cpu).expect("TDG.VP.INFO")
}
