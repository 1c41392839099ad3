//! The back end's part of slots, attributes and guest_memfds.
//!
//! A frame is private in the back end where its attribute says so and the slot's file is open. The
//! contents of private pages are the TDX module's: the file is a name for them.

use kvm_ops::Gfn;
use kvm_ops_mmu::Attributes;

use super::Td;
use crate::Process;
use crate::refusal::Result;
use crate::vm::{Gmem, Slot, Slots, lent};

const PAGE: u64 = 4096;

impl Td {
    /// The back end's part of a slot that is new, moved or changed.
    pub(crate) fn set_slot(
        &mut self,
        process: &dyn Process,
        number: u32,
        slot: &Slot,
        attributes: &Attributes,
    ) -> Result<()> {
        let Some(engine) = &mut self.engine else {
            return Ok(());
        };
        lent::set_slot(&mut engine.vm, process, number, slot)?;
        lent::convert(
            &engine.vm,
            (number, slot),
            attributes,
            (slot.gpa, slot.size),
        )
    }

    pub(crate) fn delete_slot(&mut self, number: u32) -> Result<()> {
        match &mut self.engine {
            Some(engine) => lent::delete_slot(&mut engine.vm, number),
            None => Ok(()),
        }
    }

    /// Brings the back end's frames into line with attributes that changed.
    pub(crate) fn set_attributes(
        &self,
        slots: &Slots,
        attributes: &Attributes,
        range: (u64, u64),
    ) -> Result<()> {
        if let Some(engine) = &self.engine {
            for slot in slots.iter() {
                lent::convert(&engine.vm, slot, attributes, range)?;
            }
        }
        Ok(())
    }

    /// Frees the private pages behind a range of a file, whose contents are gone.
    pub(crate) fn zap(
        &self,
        slots: &Slots,
        attributes: &Attributes,
        file: &Gmem,
        range: (u64, u64),
    ) -> Result<()> {
        match &self.engine {
            Some(engine) => lent::zap(&engine.vm, slots, attributes, file, range),
            None => Ok(()),
        }
    }

    /// The back end's part of a pre-fault of a private page.
    pub(crate) fn pre_fault(&self, private: bool, gpa: u64) -> Result<()> {
        if let Some(engine) = self.engine.as_ref().filter(|_| private) {
            engine.vm.pre_fault_memory(Gfn::new(gpa / PAGE), 1)?;
        }
        Ok(())
    }
}
