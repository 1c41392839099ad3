//! The back end's part of slots, attributes and guest_memfds.
//!
//! Only an SNP guest has private frames by their attribute, where the slot's file is open: their contents are
//! the RMP's to guard, and the file is a name for them. A SEV or SEV-ES guest chooses with each access.

use kvm_ops::Gfn;
use kvm_ops_mmu::Attributes;

use super::Sev;
use super::engine::Engine;
use crate::Process;
use crate::refusal::Result;
use crate::vm::{Gmem, Slot, Slots, lent};

const PAGE: u64 = 4096;

impl Sev {
    fn snp(&self) -> Option<&Engine> {
        self.engine.as_ref().filter(|_| self.is_snp())
    }

    /// The back end's part of a slot that is new, moved or changed.
    pub(crate) fn set_slot(
        &mut self,
        process: &dyn Process,
        number: u32,
        slot: &Slot,
        attributes: &Attributes,
    ) -> Result<()> {
        if let Some(engine) = &mut self.engine {
            engine.set_slot(process, number, slot)?;
        }
        self.convert((number, slot), attributes, (slot.gpa, slot.size))
    }

    pub(crate) fn delete_slot(&mut self, number: u32) -> Result<()> {
        match &mut self.engine {
            Some(engine) => engine.delete_slot(number),
            None => Ok(()),
        }
    }

    /// Takes a new back end, which learns the slots that there are.
    pub(super) fn adopt(
        &mut self,
        engine: Engine,
        process: &dyn Process,
        slots: &Slots,
        attributes: &Attributes,
    ) -> Result<()> {
        self.engine = Some(engine);
        for (number, slot) in slots.iter() {
            let learned = self.set_slot(process, number, slot, attributes);
            learned.inspect_err(|_| self.engine = None)?;
        }
        Ok(())
    }

    /// Brings the back end's frames into line with attributes that changed.
    pub(crate) fn set_attributes(
        &self,
        slots: &Slots,
        attributes: &Attributes,
        range: (u64, u64),
    ) -> Result<()> {
        for slot in slots.iter() {
            self.convert(slot, attributes, range)?;
        }
        Ok(())
    }

    fn convert(
        &self,
        slot: (u32, &Slot),
        attributes: &Attributes,
        range: (u64, u64),
    ) -> Result<()> {
        match self.snp() {
            Some(engine) => lent::convert(&engine.vm, slot, attributes, range),
            None => Ok(()),
        }
    }

    /// Frees the private pages behind a range of a file, whose contents are gone.
    pub(crate) fn zap(
        &self,
        slots: &Slots,
        attributes: &Attributes,
        file: &Gmem,
        range: (u64, u64),
    ) -> Result<()> {
        match self.snp() {
            Some(engine) => lent::zap(&engine.vm, slots, attributes, file, range),
            None => Ok(()),
        }
    }

    /// The back end's part of a pre-fault of a private page.
    pub(crate) fn pre_fault(&self, private: bool, gpa: u64) -> Result<()> {
        if let Some(engine) = self.snp().filter(|_| private) {
            engine.vm.pre_fault_memory(Gfn::new(gpa / PAGE), 1)?;
        }
        Ok(())
    }
}
