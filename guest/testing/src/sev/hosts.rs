//! Hosts: an honest one, and some that a guest has to survive.

use super::{Exit, Hypervisor, Reply};
use kvm_ops_guest::sev::MsrRequest;

/// The host of an SEV guest: a function that answers each exit. It leaves to
/// [`Hypervisor::honestly`] what it does not want to play.
pub trait Host: FnMut(&Hypervisor<'_>, &Exit) -> Reply + Send {}

impl<F: FnMut(&Hypervisor<'_>, &Exit) -> Reply + Send> Host for F {}

/// Does what the guest asks for: [`Hypervisor::honestly`].
pub fn honest() -> impl Host {
    |hypervisor: &Hypervisor<'_>, exit: &Exit| hypervisor.honestly(exit)
}

/// Answers page state changes with `response` in the GHCB MSR, and does nothing: 0x015 says success, and
/// is a lie. Honest otherwise.
pub fn page_state_answers(response: u64) -> impl Host {
    move |hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
        Exit::Msr(msr) if is_page_state(msr) => Reply::Value(response),
        _ => hypervisor.honestly(exit),
    }
}

/// Assigns 2 MiB where the guest asks for a private page of 4 KiB and nothing is there yet. Honest
/// otherwise.
pub fn large_pages() -> impl Host {
    |hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
        Exit::Msr(msr) if is_page_state(msr) => hypervisor.page_state_large(msr),
        _ => hypervisor.honestly(exit),
    }
}

/// Answers the request of this code (bits 11 to 0) with `response` in the GHCB MSR. Honest otherwise.
pub fn msr_answers(code: u64, response: u64) -> impl Host {
    move |hypervisor: &Hypervisor<'_>, exit: &Exit| match *exit {
        Exit::Msr(msr) if msr & 0xFFF == code => Reply::Value(response),
        _ => hypervisor.honestly(exit),
    }
}

fn is_page_state(msr: u64) -> bool {
    matches!(
        MsrRequest::from_msr(msr),
        Some(MsrRequest::PageState { .. })
    )
}
