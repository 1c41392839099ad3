//! Reads and writes of memory by the host and by guests.

use super::entry::{PageSize, PageState, permission};
use super::region::{PAGE, Region, pieces};
use super::{Machine, Owner, Slot, rmp};
use crate::sync::SharedGuard;
use std::fmt;

/// A page of a guest as its nested page table maps it, and who touches it. The host chooses this
/// mapping; the RMP decides whether it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPage {
    /// ASID the guest runs with.
    pub asid: u32,
    /// Privilege level of the vCPU, 0 to 3; 0 for guests without SNP.
    pub vmpl: u8,
    /// Guest physical address, without the C-bit.
    pub gpa: u64,
    /// System physical address it is mapped to.
    pub spa: u64,
    /// Size of the mapping in the nested page table.
    pub mapping: PageSize,
}

impl GuestPage {
    /// A 4 KiB mapping used at VMPL0.
    pub fn new(asid: u32, gpa: u64, spa: u64) -> Self {
        Self {
            asid,
            vmpl: 0,
            gpa,
            spa,
            mapping: PageSize::Size4K,
        }
    }

    /// The same at another VMPL.
    pub fn vmpl(mut self, vmpl: u8) -> Self {
        self.vmpl = vmpl;
        self
    }

    /// The same through a larger mapping.
    pub fn mapping(mut self, size: PageSize) -> Self {
        self.mapping = size;
        self
    }
}

/// Faults of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AccessFault {
    /// There is no memory at this system physical address.
    NoMemory(u64),
    /// The host wrote to a page it does not own: #PF with the RMP bit.
    HostWrite {
        /// System physical address.
        spa: u64,
        /// State of the page.
        state: PageState,
    },
    /// The guest's page is not what the nested page table says: #NPF.
    NestedPage {
        /// Guest physical address.
        gpa: u64,
        /// Error code bits: 31 RMP, 35 page size mismatch, 36 VMPL.
        error_code: u64,
    },
    /// The guest has not accepted the page: #VC, error code 0x404.
    NotValidated {
        /// Guest physical address.
        gpa: u64,
    },
    /// PVALIDATE above VMPL0: #GP.
    GeneralProtection,
    /// No guest is active with this ASID, or not one of the kind that can do this.
    NotActive(u32),
    /// The access crosses a page boundary; it must be split as a processor splits it.
    CrossesPage,
    /// VMRUN finds no register state of the guest's vCPU at this system physical address:
    /// VMEXIT_INVALID.
    NotVmsa(u64),
    /// A processor of another guest uses the page at this system physical address now.
    InUse(u64),
}

/// Bits of [`AccessFault::NestedPage::error_code`] (Linux `PFERR_GUEST_*`).
const RMP: u64 = 1 << 31;
const SIZEM: u64 = 1 << 35;
const VMPL: u64 = 1 << 36;

impl AccessFault {
    /// Returns true if the fault says that the page sizes of RMP and mapping differ.
    pub fn is_size_mismatch(&self) -> bool {
        matches!(self, AccessFault::NestedPage { error_code, .. } if error_code & SIZEM != 0)
    }
}

impl fmt::Display for AccessFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AccessFault::NoMemory(spa) => write!(f, "no memory at {spa:#x}"),
            AccessFault::HostWrite { spa, state } => {
                write!(f, "host write to {spa:#x}, which is in state {state}")
            }
            AccessFault::NestedPage { gpa, error_code } => {
                write!(
                    f,
                    "nested page fault at gpa {gpa:#x}, error code {error_code:#x}"
                )
            }
            AccessFault::NotValidated { gpa } => write!(f, "gpa {gpa:#x} is not validated"),
            AccessFault::GeneralProtection => f.write_str("general protection fault"),
            AccessFault::NotActive(asid) => write!(f, "no such guest with asid {asid:#x}"),
            AccessFault::CrossesPage => f.write_str("the access crosses a page boundary"),
            AccessFault::NotVmsa(spa) => write!(f, "no register state of the guest at {spa:#x}"),
            AccessFault::InUse(spa) => {
                write!(
                    f,
                    "the page at {spa:#x} is in use by another guest's processor"
                )
            }
        }
    }
}

impl std::error::Error for AccessFault {}

pub(super) fn rmp_fault(page: &GuestPage, size_mismatch: bool) -> AccessFault {
    AccessFault::NestedPage {
        gpa: page.gpa,
        error_code: RMP | if size_mismatch { SIZEM } else { 0 },
    }
}

/// Start of an access.
struct At {
    /// The page's system physical address.
    spa: u64,
    /// The page in its region.
    index: usize,
    /// The byte in the page.
    offset: usize,
}

impl Machine {
    /// Reads memory as it is stored: cipher text where a guest's key was used.
    pub(crate) fn host_read(&self, spa: u64, out: &mut [u8]) -> Result<(), AccessFault> {
        if !self.memory.contains(spa, out.len() as u64) {
            return Err(AccessFault::NoMemory(spa));
        }
        for (at, offset, range) in pieces(spa, out.len()) {
            let place = self.memory.place(at).ok_or(AccessFault::NoMemory(at))?;
            place.lock().read(place.index, offset, &mut out[range]);
        }
        Ok(())
    }

    /// A write by the host. Under SNP it stops at the first page that the host does not own.
    pub(crate) fn host_write(&self, spa: u64, data: &[u8]) -> Result<(), AccessFault> {
        if !self.memory.contains(spa, data.len() as u64) {
            return Err(AccessFault::NoMemory(spa));
        }
        for (at, offset, range) in pieces(spa, data.len()) {
            let place = self.memory.place(at).ok_or(AccessFault::NoMemory(at))?;
            let mut region = place.lock();
            let state = region.entry(place.index).state;
            if !state.host_may_write() {
                return Err(AccessFault::HostWrite { spa: at, state });
            }
            region.write(place.index, offset, &data[range]);
        }
        Ok(())
    }

    /// A private (C-bit set) read by a guest.
    pub(crate) fn guest_read(&self, page: &GuestPage, out: &mut [u8]) -> Result<(), AccessFault> {
        self.in_page(page, out.len(), |slot, region, at| {
            let entry = region.entry(at.index);
            check_private(&entry, slot.owner, page, permission::READ)?;
            region.read_with(&slot.key, at.spa, at.index, at.offset, out);
            Ok(())
        })
    }

    /// A private (C-bit set) write by a guest.
    pub(crate) fn guest_write(&self, page: &GuestPage, data: &[u8]) -> Result<(), AccessFault> {
        self.in_page(page, data.len(), |slot, region, at| {
            let entry = region.entry(at.index);
            check_private(&entry, slot.owner, page, permission::WRITE)?;
            region.write_with(&slot.key, at.spa, at.index, at.offset, data);
            Ok(())
        })
    }

    /// A shared (C-bit clear) read by a guest.
    pub(crate) fn guest_read_shared(
        &self,
        page: &GuestPage,
        out: &mut [u8],
    ) -> Result<(), AccessFault> {
        self.in_page(page, out.len(), |slot, region, at| {
            if slot.owner == Owner::Snp && !region.entry(at.index).state.host_may_write() {
                return Err(rmp_fault(page, false));
            }
            region.read(at.index, at.offset, out);
            Ok(())
        })
    }

    /// A shared (C-bit clear) write by a guest.
    pub(crate) fn guest_write_shared(
        &self,
        page: &GuestPage,
        data: &[u8],
    ) -> Result<(), AccessFault> {
        self.in_page(page, data.len(), |_, region, at| {
            if !region.entry(at.index).state.host_may_write() {
                return Err(rmp_fault(page, false));
            }
            region.write(at.index, at.offset, data);
            Ok(())
        })
    }

    /// Finds the guest's key and the memory behind its page, and holds both for the access.
    fn in_page(
        &self,
        page: &GuestPage,
        len: usize,
        access: impl FnOnce(&Slot, &mut Region, At) -> Result<(), AccessFault>,
    ) -> Result<(), AccessFault> {
        let guard = self.guest_slot(page)?;
        let slot = active(&guard, page)?;
        let offset = offset_in_page(page, len)?;
        let place = self
            .memory
            .place(page.spa)
            .ok_or(AccessFault::NoMemory(page.spa))?;
        let at = At {
            spa: place.spa,
            index: place.index,
            offset,
        };
        access(slot, &mut place.lock(), at)
    }

    /// The key slot of the ASID, held for the length of the access.
    pub(super) fn guest_slot(
        &self,
        page: &GuestPage,
    ) -> Result<SharedGuard<'_, Option<Slot>>, AccessFault> {
        self.slot(page.asid)
            .ok_or(AccessFault::NotActive(page.asid))
    }
}

fn active<'a>(slot: &'a Option<Slot>, page: &GuestPage) -> Result<&'a Slot, AccessFault> {
    match slot {
        Some(slot) if page.vmpl < 4 => Ok(slot),
        _ => Err(AccessFault::NotActive(page.asid)),
    }
}

/// A guest that may use PVALIDATE and RMPADJUST.
pub(super) fn active_snp(slot: &Option<Slot>, page: &GuestPage) -> Result<(), AccessFault> {
    match active(slot, page)?.owner {
        Owner::Snp => Ok(()),
        Owner::Legacy => Err(AccessFault::NotActive(page.asid)),
    }
}

fn offset_in_page(page: &GuestPage, len: usize) -> Result<usize, AccessFault> {
    let offset = page.spa as usize % PAGE;
    if page.gpa as usize % PAGE != offset || len > PAGE - offset {
        return Err(AccessFault::CrossesPage);
    }
    Ok(offset)
}

pub(super) fn check_private(
    entry: &super::RmpEntry,
    owner: Owner,
    page: &GuestPage,
    need: u8,
) -> Result<(), AccessFault> {
    if owner == Owner::Legacy {
        // Without SNP the guest's pages stay with the hypervisor, and nothing checks the mapping;
        // but a write to a page that was assigned to a guest or the firmware faults for everyone.
        return if entry.state.host_may_write() || need == permission::READ {
            Ok(())
        } else {
            Err(rmp_fault(page, false))
        };
    }
    rmp::check_owner(entry, page)?;
    if entry.size != page.mapping {
        return Err(rmp_fault(page, entry.size == PageSize::Size2M));
    }
    if !entry.state.is_validated() {
        return match entry.state {
            PageState::GuestInvalid => Err(AccessFault::NotValidated { gpa: page.gpa }),
            _ => Err(rmp_fault(page, false)),
        };
    }
    if entry.permissions[usize::from(page.vmpl & 3)] & need != need {
        return Err(AccessFault::NestedPage {
            gpa: page.gpa,
            error_code: RMP | VMPL,
        });
    }
    // A page being moved is not written until the move is over.
    if entry.state == PageState::PreSwap && need == permission::WRITE {
        return Err(rmp_fault(page, false));
    }
    Ok(())
}
