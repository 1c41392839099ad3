//! Accesses and page validation of a SEV guest.

use kvm_ops::guest::GuestFault;
use kvm_ops::{Error, Field, Gfn, Gpa, NestedFaultAnswer, PAGE_SIZE, Privacy, Tech};
use soft_amd_sp::{AccessFault, GuestPage, GuestRmpError, PageSize, Platform, RmpError};

use crate::access::{Copy, Piece, Touch, first_piece};
use crate::vm::VmInner;

/// The code of Linux guests for a PVALIDATE that changed nothing: the page was accepted before, and
/// may be another page now (`PVALIDATE_FAIL_NOUPDATE`).
pub(crate) const NO_UPDATE: u64 = 255;

/// The result of a PVALIDATE.
pub(crate) enum Validated {
    Done,
    Fault(GuestFault),
    Leave,
    Fail(Error),
}

/// The machine below, which a VM with an ASID has.
pub(super) fn platform(vm: &VmInner) -> Result<&Platform, Error> {
    match vm.machine.sev() {
        Some(sev) => Ok(&sev.platform),
        None => kvm_ops::not_offered!("encrypted memory on this machine"),
    }
}

impl VmInner {
    /// True if a guest reaches its slots without the C-bit wherever it has some.
    pub(crate) fn shows_slots(&self) -> bool {
        matches!(self.tech, Tech::Sev | Tech::SevEs) && self.sev.shows_slots()
    }
}

/// Does the first piece of an access at `gpa`, which carries the C-bit or not.
pub(crate) fn first_touch(vm: &VmInner, gpa: Gpa, mut copy: Copy<'_>) -> Touch {
    let (gfn, privacy) = vm.sev.mask().split(gpa);
    let offset = gpa.get() % PAGE_SIZE;
    let len = copy.len().min((PAGE_SIZE - offset) as usize);
    loop {
        let state = vm.sev.read();
        let page = state.page(gfn, offset);
        let slots = privacy == Privacy::Shared && vm.shows_slots();
        let answer = match (page.filter(|_| !slots), privacy) {
            (None, Privacy::Shared) => {
                drop(state);
                let gpa = Gpa::new(gfn.get() * PAGE_SIZE + offset);
                match first_piece(vm, gpa, &mut copy) {
                    Piece::Memory(bytes) => return Touch::Memory(bytes),
                    Piece::Mmio(bytes) => return Touch::Mmio(bytes),
                    Piece::NotShared => vm.sev.ask(|back_end| back_end.shared_fault(gfn)),
                }
            }
            (Some(_), Privacy::Shared) => {
                drop(state);
                vm.sev.ask(|back_end| back_end.shared_fault(gfn))
            }
            (None, Privacy::Private) => {
                drop(state);
                vm.sev.ask(|back_end| back_end.private_fault(gfn))
            }
            (Some(page), Privacy::Private) => {
                let platform = match platform(vm) {
                    Ok(platform) => platform,
                    Err(error) => return Touch::Fail(error),
                };
                let done = match &mut copy {
                    Copy::FromGuest(buffer) => platform.guest_read(&page, &mut buffer[..len]),
                    Copy::ToGuest(buffer) => platform.guest_write(&page, &buffer[..len]),
                };
                drop(state);
                match done {
                    Ok(()) => {
                        if matches!(copy, Copy::ToGuest(_)) && vm.read().logs(gfn) {
                            vm.write().log_write(gfn);
                        }
                        return Touch::Memory(len);
                    }
                    Err(fault) if fault.is_size_mismatch() => {
                        vm.sev.ask(|back_end| back_end.size_mismatch(gfn))
                    }
                    Err(AccessFault::NotValidated { .. }) => {
                        return Touch::Fault(GuestFault::NotAccepted(gpa));
                    }
                    Err(AccessFault::NotActive(asid)) => {
                        return Touch::Fail(Error::Invalid(Field::Hkid, asid.into()));
                    }
                    // The RMP assigns the page elsewhere: the embedder decides.
                    Err(_) => NestedFaultAnswer::Leave,
                }
            }
        };
        match answer {
            NestedFaultAnswer::Retry => {}
            NestedFaultAnswer::Leave => return Touch::Leave(privacy),
            NestedFaultAnswer::Fail(error) => return Touch::Fail(error),
        }
    }
}

/// The result of an RMP instruction of the guest.
pub(super) enum Attempt<T> {
    Done(T),
    /// It completed with this code.
    Code(RmpError),
    /// The guest's fault.
    Fault(AccessFault),
    Leave,
    Fail(Error),
}

/// Does an RMP instruction of the guest on the page of a frame, which the back end is asked for.
pub(super) fn on_page<T>(
    vm: &VmInner,
    gfn: Gfn,
    instruction: impl Fn(&Platform, GuestPage) -> Result<T, GuestRmpError>,
) -> Attempt<T> {
    let platform = match platform(vm) {
        Ok(platform) => platform,
        Err(error) => return Attempt::Fail(error),
    };
    loop {
        let page = vm.sev.read().page(gfn, 0);
        let answer = match page {
            None => vm.sev.ask(|back_end| back_end.private_fault(gfn)),
            Some(page) => match instruction(platform, page) {
                Ok(done) => return Attempt::Done(done),
                Err(GuestRmpError::Fault(fault)) if fault.is_size_mismatch() => {
                    vm.sev.ask(|back_end| back_end.size_mismatch(gfn))
                }
                Err(GuestRmpError::Code(code)) => return Attempt::Code(code),
                Err(GuestRmpError::Fault(
                    fault @ (AccessFault::GeneralProtection | AccessFault::NotValidated { .. }),
                )) => return Attempt::Fault(fault),
                Err(_) => NestedFaultAnswer::Leave,
            },
        };
        match answer {
            NestedFaultAnswer::Retry => {}
            NestedFaultAnswer::Leave => return Attempt::Leave,
            NestedFaultAnswer::Fail(error) => return Attempt::Fail(error),
        }
    }
}

/// PVALIDATE of one page.
pub(crate) fn validate(vm: &VmInner, gfn: Gfn, size: PageSize, valid: bool) -> Validated {
    // There is no page to give up.
    if !valid && vm.sev.read().page(gfn, 0).is_none() {
        return Validated::Done;
    }
    match on_page(vm, gfn, |platform, page| {
        platform.pvalidate(&page, size, valid)
    }) {
        Attempt::Done(changed) if changed || !valid => Validated::Done,
        Attempt::Done(_) => Validated::Fault(GuestFault::Refused(NO_UPDATE)),
        Attempt::Code(code) => Validated::Fault(refused(code)),
        Attempt::Fault(_) | Attempt::Leave => Validated::Leave,
        Attempt::Fail(error) => Validated::Fail(error),
    }
}

/// EAX of a PVALIDATE that failed.
fn refused(code: RmpError) -> GuestFault {
    GuestFault::Refused(code.code().unwrap_or(u32::MAX).into())
}
