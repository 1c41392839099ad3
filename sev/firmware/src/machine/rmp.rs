//! The RMP instructions: RMPUPDATE, PSMASH and RMPREAD of the host, PVALIDATE and RMPADJUST of
//! guests. Rules: AMD APM volume 3 and Linux `arch/x86/virt/svm/sev.c`.

use super::access::{AccessFault, GuestPage, active_snp, rmp_fault};
use super::entry::{PageSize, PageState, RmpEntry, permission};
use super::rmp_types::{GuestRmpError, RmpAdjust, RmpError, RmpUpdate};
use super::{Instruction, Machine};
use crate::observe::Operation;

impl Machine {
    fn instruction<T>(
        &self,
        instruction: Instruction,
        operands: [u64; 2],
        run: impl FnOnce() -> Result<T, RmpError>,
    ) -> Result<T, RmpError> {
        let operation = Operation::Instruction(instruction);
        // A separate statement, so that the monitor is free while the instruction runs.
        let injected = self.monitor.lock().injected(operation);
        let result = match injected {
            Some(code) => Err(RmpError::from_code(code)),
            None => run(),
        };
        let code = result
            .as_ref()
            .err()
            .map_or(0, |e| e.code().unwrap_or(u32::from(u16::MAX)));
        self.monitor.lock().record(operation, operands, code);
        result
    }

    /// RMPUPDATE.
    pub(crate) fn rmpupdate(&self, spa: u64, new: &RmpUpdate) -> Result<(), RmpError> {
        self.instruction(Instruction::RmpUpdate, [spa, new.asid.into()], || {
            self.rmpupdate_inner(spa, new)
        })
    }

    fn rmpupdate_inner(&self, spa: u64, new: &RmpUpdate) -> Result<(), RmpError> {
        if !self.snp_enabled() {
            return Err(RmpError::NotEnabled);
        }
        let place = self.memory.place(spa).ok_or(RmpError::Input)?;
        let entry = self.wanted_entry(spa, new)?;
        let mut region = place.lock_size(new.size);
        let old = region.entry(place.index);
        if old.state.is_immutable() || old.state == PageState::HvFixed {
            return Err(RmpError::Permission);
        }
        // Fixing a page of a guest without any other change keeps what the guest accepted: this
        // is how a page gets into Pre-Swap.
        let only_fixes = entry.state == PageState::PreGuest
            && old.state == PageState::GuestValid
            && (old.asid, old.gpa, old.size) == (entry.asid, entry.gpa, entry.size);
        let entry = if only_fixes {
            old.with_state(PageState::PreSwap)
        } else {
            entry
        };
        match (new.size, region.is_large()) {
            (PageSize::Size4K, true) => return Err(RmpError::Overlap),
            (PageSize::Size4K, false) => region.set_small(place.index, entry),
            (PageSize::Size2M, true) => region.set_large(entry),
            (PageSize::Size2M, false) if region.is_hypervisor() => region.set_large(entry),
            (PageSize::Size2M, false) => return Err(RmpError::Overlap),
        }
        Ok(())
    }

    /// The entry an RMPUPDATE asks for, always without "validated" and "VMSA".
    fn wanted_entry(&self, spa: u64, new: &RmpUpdate) -> Result<RmpEntry, RmpError> {
        let aligned = new.size.aligns(spa) && new.size.aligns(new.gpa);
        let gpa_fits = new.gpa < 1 << 52;
        let belongs = new.asid != 0 || new.gpa == 0;
        if !aligned || !gpa_fits || !belongs || new.asid > self.config.max_asid {
            return Err(RmpError::Input);
        }
        let state = match (new.assigned, new.asid, new.immutable) {
            (false, 0, false) => PageState::Hypervisor,
            (false, ..) => return Err(RmpError::Input),
            (true, 0, true) => PageState::Firmware,
            (true, 0, false) => PageState::Reclaim,
            (true, _, true) => PageState::PreGuest,
            (true, _, false) => PageState::GuestInvalid,
        };
        Ok(RmpEntry {
            size: new.size,
            asid: new.asid,
            gpa: new.gpa,
            ..RmpEntry::of(state)
        })
    }

    /// PSMASH.
    pub(crate) fn psmash(&self, spa: u64) -> Result<(), RmpError> {
        self.instruction(Instruction::Psmash, [spa, 0], || {
            if !self.snp_enabled() {
                return Err(RmpError::NotEnabled);
            }
            if !PageSize::Size2M.aligns(spa) {
                return Err(RmpError::Input);
            }
            let place = self.memory.place(spa).ok_or(RmpError::BadAddress)?;
            let mut region = place.lock_all();
            if !region.is_large() {
                return Err(RmpError::Input);
            }
            if region.entry(0).state.is_immutable() {
                return Err(RmpError::Permission);
            }
            region.smash();
            Ok(())
        })
    }

    /// RMPREAD; `None` beyond the end of memory.
    pub(crate) fn rmpread(&self, spa: u64) -> Option<RmpEntry> {
        let place = self.memory.place(spa)?;
        let region = place.peek();
        Some(region.entry(place.index))
    }

    /// PVALIDATE: `Ok(true)` if the entry changed, `Ok(false)` for the carry flag.
    pub(crate) fn pvalidate(
        &self,
        page: &GuestPage,
        size: PageSize,
        validate: bool,
    ) -> Result<bool, GuestRmpError> {
        let operation = Operation::Instruction(Instruction::Pvalidate);
        if let Some(code) = self.injected(operation, [page.spa, page.gpa]) {
            return Err(RmpError::from_code(code).into());
        }
        let result = self.pvalidate_inner(page, size, validate);
        self.record_guest(operation, page, &result);
        result
    }

    fn pvalidate_inner(
        &self,
        page: &GuestPage,
        size: PageSize,
        validate: bool,
    ) -> Result<bool, GuestRmpError> {
        let slot = self.guest_slot(page)?;
        active_snp(&slot, page)?;
        if page.vmpl != 0 {
            return Err(AccessFault::GeneralProtection.into());
        }
        if !size.aligns(page.gpa) {
            return Err(RmpError::Input.into());
        }
        let place = self
            .memory
            .place(page.spa)
            .ok_or(AccessFault::NoMemory(page.spa))?;
        let mut region = place.lock_size(size);
        let entry = region.entry(place.index);
        check_owner(&entry, page)?;
        if entry.state.is_immutable() {
            return Err(rmp_fault(page, false).into());
        }
        match (size, entry.size) {
            (PageSize::Size4K, PageSize::Size2M) => return Err(rmp_fault(page, true).into()),
            (PageSize::Size2M, PageSize::Size4K) => return Err(RmpError::SizeMismatch.into()),
            _ => {}
        }
        let state = if validate {
            PageState::GuestValid
        } else {
            PageState::GuestInvalid
        };
        if entry.state == state {
            return Ok(false);
        }
        region.update(place.index, |entry| {
            entry.state = state;
            // Permissions granted to lower VMPLs end with the page.
            entry.permissions = [permission::ALL, 0, 0, 0];
            entry.vmsa = false;
        });
        Ok(true)
    }

    /// RMPADJUST.
    pub(crate) fn rmpadjust(
        &self,
        page: &GuestPage,
        size: PageSize,
        adjust: &RmpAdjust,
    ) -> Result<(), GuestRmpError> {
        let operation = Operation::Instruction(Instruction::RmpAdjust);
        if let Some(code) = self.injected(operation, [page.spa, page.gpa]) {
            return Err(RmpError::from_code(code).into());
        }
        let result = self.rmpadjust_inner(page, size, adjust);
        self.record_guest(operation, page, &result);
        result
    }

    fn rmpadjust_inner(
        &self,
        page: &GuestPage,
        size: PageSize,
        adjust: &RmpAdjust,
    ) -> Result<(), GuestRmpError> {
        let slot = self.guest_slot(page)?;
        active_snp(&slot, page)?;
        let RmpAdjust {
            target_vmpl,
            permissions,
            vmsa,
        } = *adjust;
        if !size.aligns(page.gpa) || target_vmpl > 3 || permissions > permission::ALL {
            return Err(RmpError::Input.into());
        }
        if target_vmpl <= page.vmpl || (vmsa && page.vmpl != 0) {
            return Err(RmpError::Permission.into());
        }
        let place = self
            .memory
            .place(page.spa)
            .ok_or(AccessFault::NoMemory(page.spa))?;
        let mut region = place.lock_size(size);
        let entry = region.entry(place.index);
        check_owner(&entry, page)?;
        match (size, entry.size) {
            (PageSize::Size4K, PageSize::Size2M) => return Err(rmp_fault(page, true).into()),
            (PageSize::Size2M, PageSize::Size4K) => return Err(RmpError::SizeMismatch.into()),
            _ => {}
        }
        if entry.state != PageState::GuestValid {
            return Err(AccessFault::NotValidated { gpa: page.gpa }.into());
        }
        let own = entry.permissions[usize::from(page.vmpl & 3)];
        if permissions & !own != 0 {
            return Err(RmpError::Permission.into());
        }
        region.update(place.index, |entry| {
            entry.permissions[usize::from(target_vmpl)] = permissions;
            // Only VMPL0 decides what is a VMSA; for others the bit stays as it is.
            if page.vmpl == 0 {
                entry.vmsa = vmsa;
            }
        });
        Ok(())
    }

    fn injected(&self, operation: Operation, operands: [u64; 2]) -> Option<u32> {
        let mut monitor = self.monitor.lock();
        let code = monitor.injected(operation)?;
        monitor.record(operation, operands, code);
        Some(code)
    }

    fn record_guest<T>(
        &self,
        operation: Operation,
        page: &GuestPage,
        result: &Result<T, GuestRmpError>,
    ) {
        let code = match result {
            Ok(_) => 0,
            Err(GuestRmpError::Code(e)) => e.code().unwrap_or(u32::from(u16::MAX)),
            Err(GuestRmpError::Fault(_)) => u32::from(u16::MAX),
        };
        self.monitor
            .lock()
            .record(operation, [page.spa, page.gpa], code);
    }
}

/// A nested page fault unless the entry assigns the page to this guest at this address.
pub(super) fn check_owner(entry: &RmpEntry, page: &GuestPage) -> Result<(), AccessFault> {
    let gpa = page.gpa & !0xfff;
    if entry.state.is_guest() && entry.asid == page.asid && entry.gpa == gpa {
        Ok(())
    } else {
        Err(rmp_fault(page, false))
    }
}
