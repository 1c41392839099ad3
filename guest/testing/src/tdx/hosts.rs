//! Hosts: an honest one, and some that a guest has to survive.

use super::{Exit, Hypervisor, Reply};
use kvm_ops_guest::tdx::VmcallStatus;

/// The host of a TD: a function that answers each exit of each vCPU.
///
/// It does what it wants to the machine, and leaves to [`Hypervisor::honestly`] what it does not want to
/// play:
///
/// ```
/// use kvm_ops_guest_test::tdx::{Exit, Reply, TestTd};
/// let td = TestTd::builder().host(|hypervisor, exit| match exit {
///     Exit::MapGpa { gpa, .. } => Reply::retry(*gpa),
///     other => hypervisor.honestly(other),
/// });
/// ```
///
/// It runs on the thread of the vCPU that exits. While it runs, other vCPUs run on; their exits wait.
pub trait Host: FnMut(&Hypervisor<'_>, &Exit) -> Reply + Send {}

impl<F: FnMut(&Hypervisor<'_>, &Exit) -> Reply + Send> Host for F {}

/// Does what the guest asks for: [`Hypervisor::honestly`].
pub fn honest() -> impl Host {
    |hypervisor: &Hypervisor<'_>, exit: &Exit| hypervisor.honestly(exit)
}

/// Converts at most `bytes` in a MapGPA and answers RETRY with the address where it stopped, as KVM does
/// when an interrupt comes. Honest otherwise. `bytes` is rounded up to whole pages.
pub fn partial_map_gpa(bytes: u64) -> impl Host {
    let most = bytes.clamp(1, 1 << 40).next_multiple_of(4096);
    move |hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
        Exit::MapGpa { gpa, bytes } if bytes > most => match hypervisor.map_gpa(gpa, most) {
            VmcallStatus::SUCCESS => Reply::retry(gpa.saturating_add(most)),
            refused => Reply::Status(refused, gpa),
        },
        _ => hypervisor.honestly(exit),
    }
}

/// Answers MapGPA with RETRY at the same address, for ever. Honest otherwise.
pub fn stalled_map_gpa() -> impl Host {
    |hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
        Exit::MapGpa { gpa, .. } => Reply::retry(gpa),
        _ => hypervisor.honestly(exit),
    }
}

/// Answers MapGPA with `status`, and does nothing: SUCCESS is a lie. Honest otherwise.
pub fn map_gpa_answers(status: VmcallStatus) -> impl Host {
    move |hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
        Exit::MapGpa { gpa, .. } => Reply::Status(status, gpa),
        _ => hypervisor.honestly(exit),
    }
}

/// Never enters the guest again.
pub fn denies_service() -> impl Host {
    |_: &Hypervisor<'_>, _: &Exit| Reply::Stop
}
