//! Frames of a SEV or SEV-ES guest whose contents lie in their slot.
//!
//! On the processor such a guest has one memory, and the C-bit of each access says whether its key is used. Here
//! what it uses with the key is in pages of the host's [`PagePort`](kvm_ops::PagePort), and the rest in slots. So the bytes of a
//! frame change places, as they lie in memory, when the guest uses the frame the other way than before, and when the host
//! uses it. The page is kept meanwhile: its address goes into the cipher.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use kvm_ops::{
    Error, Field, Gfn, Gpa, Host, Level, NestedFaultAnswer, PAGE_SIZE, Privacy, Result, Step,
};

use super::{Frame, Memory};
use crate::shared::Shared;
use crate::sp::Held;

/// By number of the frame; without a page where the guest never used its key.
pub(super) type Shown = BTreeMap<u64, Option<Frame>>;

type Contents = Box<[u8; PAGE_SIZE as usize]>;

impl Memory {
    pub(crate) fn is_shown(&self, gfn: Gfn) -> bool {
        self.shown.contains_key(&gfn.get())
    }
}

fn empty() -> Contents {
    Box::new([0; PAGE_SIZE as usize])
}

fn base(gfn: Gfn) -> Result<Gpa> {
    gfn.base().ok_or(Error::Invalid(Field::Gfn, gfn.get()))
}

impl<H: Host> Shared<H> {
    /// A guest touched a frame without the C-bit that it used with it before, or never.
    pub(crate) fn shared_fault(&self, gfn: Gfn) -> NestedFaultAnswer {
        match self.show(gfn) {
            Ok(true) => NestedFaultAnswer::Retry,
            Ok(false) => NestedFaultAnswer::Leave,
            Err(error) => NestedFaultAnswer::Fail(error),
        }
    }

    /// [`VmOps::show_to_host`](kvm_ops::VmOps::show_to_host).
    pub(crate) fn show_to_host(&self, gfn: Gfn) -> bool {
        match self.step() {
            Step::Runnable => self.show(gfn).unwrap_or(false),
            _ => self.privacy(gfn) == Privacy::Shared,
        }
    }

    /// Lets a frame's bytes lie in its slot. False for one that has no slot or stays private: those of SNP guests, and
    /// of mirrors, whose pages are another VM's.
    fn show(&self, gfn: Gfn) -> Result<bool> {
        let mut memory = self.memory();
        if memory.is_shared(gfn) {
            return Ok(true);
        }
        if self.is_snp() || self.mirrored_group().is_some() || !memory.has_slot(gfn, 1) {
            return Ok(false);
        }
        if memory.frame(gfn).is_some() {
            self.split(&mut memory, gfn)?;
            self.unmap_everywhere(&mut memory, gfn)?;
        }
        if let Some((_, frame)) = memory.frame(gfn) {
            let mut contents = empty();
            self.sp().read(&frame.page, &mut contents[..])?;
            self.sev()?.write_slot(base(gfn)?, &contents[..])?;
        }
        self.govern(gfn, 1, Privacy::Shared)?;
        memory.attributes.set(gfn, 1, Privacy::Shared)?;
        let kept = memory.remove(gfn);
        // A page that could not be mapped is here already.
        memory.shown.entry(gfn.get()).or_insert(kept);
        Ok(true)
    }

    /// Puts the bytes of a frame that is shown into its page, which the guest uses with its key from now on.
    pub(super) fn hide(&self, memory: &mut Memory, gfn: Gfn) -> Result<()> {
        let number = gfn.get();
        if let Some(none @ None) = memory.shown.get_mut(&number) {
            let page = self.sp().alloc(Level::Size4K)?;
            let held = Held::Host;
            *none = Some(Frame { page, held });
        }
        let Some(Some(frame)) = memory.shown.get(&number) else {
            return Ok(());
        };
        let mut contents = empty();
        self.sev()?.read_slot(base(gfn)?, &mut contents[..])?;
        self.sp().write(&frame.page, &contents[..])?;
        self.govern(gfn, 1, Privacy::Private)?;
        memory.attributes.set(gfn, 1, Privacy::Private)?;
        let Some(Frame { page, held }) = memory.shown.remove(&number).flatten() else {
            return Ok(());
        };
        self.map(memory, gfn, page).map_err(|(error, page)| {
            if let Some(page) = page {
                memory.shown.insert(number, Some(Frame { page, held }));
            }
            error
        })
    }

    /// What was shown of frames is the slots' alone, and the pages go: a conversion loses contents.
    pub(super) fn forget_shown(&self, memory: &mut Memory, first: Gfn, pages: u64) {
        let end = first.get().saturating_add(pages);
        let shown: Vec<u64> = memory
            .shown
            .range(first.get()..end)
            .map(|(gfn, _)| *gfn)
            .collect();
        for gfn in shown {
            if let Some(Frame { page, held }) = memory.shown.remove(&gfn).flatten() {
                // The account lists a page that leaks.
                let _ = self.sp().release(page, held);
            }
        }
    }
}
