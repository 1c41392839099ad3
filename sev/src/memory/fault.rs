//! Nested page faults that the port hands up.

use kvm_ops::{Gfn, Host, Level, NestedFaultAnswer};

use crate::shared::Shared;

impl<H: Host> Shared<H> {
    /// A guest touched a frame with the C-bit, and nothing is mapped there.
    pub(crate) fn private_fault(&self, gfn: Gfn) -> NestedFaultAnswer {
        let mut memory = self.memory();
        let sev = match self.sev() {
            Ok(sev) => sev,
            Err(error) => return NestedFaultAnswer::Fail(error),
        };
        if let Some((first, frame)) = memory.frame(gfn) {
            let frames = frame.page.level().frames();
            memory.touched(first, frames);
        }
        // The page is there: another vCPU was first, the page came with the context of another VM,
        // its use is being recorded, or the port could not map it before and may now.
        if let Some(answer) = memory.map_into(sev, gfn) {
            return answer;
        }
        if let Some(group) = self.mirrored_group() {
            drop(memory);
            return self.mirror_fault(&group, gfn);
        }
        if memory.is_shown(gfn) {
            return match self.hide(&mut memory, gfn) {
                Ok(()) => NestedFaultAnswer::Retry,
                Err(error) => NestedFaultAnswer::Fail(error),
            };
        }
        // The embedder brings back what is out of memory.
        if !memory.has_slot(gfn, 1) || memory.is_shared(gfn) || memory.swap.at(gfn).is_some() {
            return NestedFaultAnswer::Leave;
        }
        match self.populate(&mut memory, gfn, Level::Size4K) {
            Ok(()) => NestedFaultAnswer::Retry,
            Err(error) => NestedFaultAnswer::Fail(error),
        }
    }

    /// A guest accepted 4 KiB of a frame that the RMP has as 2 MiB.
    pub(crate) fn split_fault(&self, gfn: Gfn) -> NestedFaultAnswer {
        let mut memory = self.memory();
        match memory.frame(gfn) {
            None => NestedFaultAnswer::Leave,
            Some((_, frame)) if frame.page.level() == Level::Size4K => NestedFaultAnswer::Leave,
            Some((first, _)) => match self.split(&mut memory, first) {
                Ok(()) => NestedFaultAnswer::Retry,
                Err(error) => NestedFaultAnswer::Fail(error),
            },
        }
    }
}
