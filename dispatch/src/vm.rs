//! A VM and the account of what it was given: the owner that embedders hold.

mod passing;

pub use passing::{copy_enc_context, move_enc_context};
#[cfg(feature = "std")]
pub use passing::{copy_enc_context_between, move_enc_context_between};

use alloc::collections::BTreeMap;
use core::fmt;
use core::mem::{self, ManuallyDrop};

use crate::{
    Backend, Error, Field, FreeReport, Gfn, Gpa, InitialPage, KeyReleased, MemSlot, Privacy,
    Result, SharedMask, SlotFlags, SlotId, Step, Tech, VcpuId, VmId,
};

/// A slot as [`Vm::slots`] tells it.
///
/// It is no [`MemSlot`], because that could be put into another VM, which may outlive the memory.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// Its number.
    pub id: SlotId,
    /// The guest-physical address of its first byte.
    pub gpa: Gpa,
    /// Bytes.
    pub bytes: u64,
    /// The host address of its first byte.
    pub host_address: u64,
    /// How the guest may use it.
    pub flags: SlotFlags,
}

impl SlotInfo {
    /// What a slot tells of itself.
    pub const fn of(slot: &MemSlot) -> Self {
        Self {
            id: slot.id,
            gpa: slot.gpa,
            bytes: slot.host.bytes(),
            host_address: slot.host.address(),
            flags: slot.flags,
        }
    }
}

/// A VM of one back end, or of an enum of back ends.
///
/// It keeps the slots, checks what every technology demands alike (overlaps, numbers), and takes
/// the steps of the teardown in order: [`destroy`](Self::destroy) reports them; dropping takes
/// them too, and logs what leaked.
pub struct Vm<B: Backend> {
    /// Taken out by `destroy` and `drop` only, each of which ends the value.
    back_end: ManuallyDrop<B>,
    slots: BTreeMap<SlotId, MemSlot>,
    mask: SharedMask,
}

impl<B: Backend> Vm<B> {
    /// Initialises a back end's VM and takes it into care.
    ///
    /// # Errors
    /// What `vm_init` answers; the VM is torn down then.
    pub fn init(mut back_end: B) -> Result<Self> {
        let initialised = back_end.vm_init();
        let mask = back_end.shared_mask();
        let vm = Self {
            back_end: ManuallyDrop::new(back_end),
            slots: BTreeMap::new(),
            mask,
        };
        match initialised {
            Ok(()) => {
                tracing::debug!(vm = vm.id().0, tech = %vm.tech(), "vm_init");
                Ok(vm)
            }
            Err(error) => {
                let report = vm.destroy();
                for leak in &report.leaks {
                    tracing::error!(vm = report.vm.0, %leak, "leaked by vm_init");
                }
                Err(error)
            }
        }
    }

    /// The back end, for operations that this type does not wrap.
    #[inline]
    pub fn back_end(&self) -> &B {
        &self.back_end
    }

    /// The back end, for operations that this type does not wrap.
    #[inline]
    pub fn back_end_mut(&mut self) -> &mut B {
        &mut self.back_end
    }

    /// The technology that holds it.
    #[inline]
    pub fn tech(&self) -> Tech {
        self.back_end().tech()
    }

    /// Its number.
    #[inline]
    pub fn id(&self) -> VmId {
        self.back_end().id()
    }

    /// Where it is in its life.
    #[inline]
    pub fn step(&self) -> Step {
        self.back_end().step()
    }

    /// How its addresses tell private from shared. A field: no call is dispatched.
    #[inline]
    pub fn shared_mask(&self) -> SharedMask {
        self.mask
    }

    /// The slots, by number.
    pub fn slots(&self) -> impl Iterator<Item = SlotInfo> + '_ {
        self.slots.values().map(SlotInfo::of)
    }

    /// Creates a slot, or changes the flags of the slot that has its number, place and memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] with [`Field::OverlappedSlot`] names the slot that it would overlap;
    /// [`Error::Exists`] if the number is taken by a slot of another place or memory;
    /// [`Error::Invalid`] for a slot that wraps, is not page-aligned or reaches into the shared
    /// bit; else what the platform answers.
    pub fn set_memory_slot(&mut self, slot: MemSlot) -> Result<()> {
        let last = slot.last()?;
        if (slot.gpa.get() | last.get()) & self.mask.bits() != 0 {
            return Err(Error::Invalid(Field::Gpa, last.get()));
        }
        if let Some(old) = self.slots.get(&slot.id) {
            if (old.gpa, old.host, old.private) != (slot.gpa, slot.host, slot.private) {
                return Err(Error::Exists(Field::Slot, slot.id.0.into()));
            }
        }
        if let Some(other) = self
            .slots
            .values()
            .find(|o| o.id != slot.id && o.overlaps(&slot))
        {
            return Err(Error::Invalid(Field::OverlappedSlot, other.id.0.into()));
        }
        self.back_end().set_memory_slot(&slot)?;
        self.slots.insert(slot.id, slot);
        Ok(())
    }

    /// Deletes a slot: from now on no vCPU sees its memory.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what the platform answers; the slot stays then.
    pub fn delete_memory_slot(&mut self, id: SlotId) -> Result<()> {
        let slot = *self.slot(id)?;
        self.back_end().delete_memory_slot(&slot)?;
        self.slots.remove(&id);
        Ok(())
    }

    /// Fetches and clears the dirty bitmap of a slot: [`MemSlot::dirty_words`] words, bit 0 of
    /// word 0 for its first page.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a slot that does not exist or has no dirty log;
    /// [`Error::Invalid`] for a bitmap of the wrong length; unsupported for a confidential VM.
    pub fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<()> {
        self.back_end().dirty_log(self.slot(id)?, bitmap)
    }

    fn slot(&self, id: SlotId) -> Result<&MemSlot> {
        self.slots
            .get(&id)
            .ok_or(Error::NotFound(Field::Slot, id.0.into()))
    }

    /// Creates a vCPU.
    ///
    /// # Errors
    /// [`Error::Exists`] or [`Error::Invalid`] for the number; what the platform answers.
    pub fn create_vcpu(&self, id: VcpuId) -> Result<B::Vcpu> {
        self.back_end().create_vcpu(id)
    }

    /// Adds a page to the VM's measured start.
    ///
    /// # Errors
    /// Unsupported for a normal VM, whose memory the host writes itself.
    pub fn add_initial_page(&mut self, page: &InitialPage<'_>) -> Result<()> {
        self.back_end_mut().add_initial_page(page)
    }

    /// Measures a page that was added unmeasured.
    ///
    /// # Errors
    /// Unsupported where firmware measures a page as it is added, always or never;
    /// [`Error::NotFound`] where no such page is.
    pub fn measure_initial_page(&mut self, gpa: Gpa) -> Result<()> {
        self.back_end_mut().measure_initial_page(gpa)
    }

    /// Closes the VM's initial contents; vCPUs may run.
    ///
    /// # Errors
    /// [`Error::WrongState`] the second time; what firmware answers.
    pub fn finalize(&mut self) -> Result<()> {
        self.back_end_mut().vm_finalize()?;
        tracing::debug!(vm = self.id().0, "vm_finalize");
        Ok(())
    }

    /// Makes a range of frames private or shared. What mapped it otherwise, and its contents, are
    /// gone. Answers how many pages were done; go on from there when fewer than asked for.
    ///
    /// # Errors
    /// Unsupported for a normal VM; [`Error::Invalid`] for a range that is empty, wraps or leaves
    /// the guest's address space.
    pub fn set_memory_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        self.back_end().set_memory_attributes(first, pages, to)
    }

    /// Maps private memory before the guest touches it. Answers how many pages were done.
    ///
    /// # Errors
    /// Unsupported for a normal VM; [`Error::NotFound`] where no private memory is.
    pub fn pre_fault_memory(&self, first: Gfn, pages: u64) -> Result<u64> {
        self.back_end().pre_fault_memory(first, pages)
    }

    /// Tears the VM down: key, private pages, then the VM itself.
    ///
    /// The report holds all that could not be freed. If the key could not be released that is
    /// everything, for firmware owns it then.
    pub fn destroy(self) -> FreeReport {
        let mut this = ManuallyDrop::new(self);
        drop(mem::take(&mut this.slots));
        // SAFETY: `this` is never dropped nor used after this line, so nothing sees the moved-out
        // back end again.
        let back_end = unsafe { ManuallyDrop::take(&mut this.back_end) };
        tear_down(back_end)
    }
}

fn tear_down<B: Backend>(mut back_end: B) -> FreeReport {
    let (vm, tech) = (back_end.id().0, back_end.tech());
    let drained = release_key(&mut back_end)
        .and_then(|key| back_end.drain_private(key).map_err(|(error, _key)| error));
    let report = match drained {
        Ok(drained) => back_end.vm_free(drained),
        Err(error) => {
            tracing::error!(vm, %tech, %error, "the VM's key could not be released");
            back_end.vm_abandon(error)
        }
    };
    tracing::debug!(vm, %tech, leaks = report.leaks.len(), "torn down");
    report
}

/// How often a key that is busy is asked for again. Each try waits for what is in its way, as the
/// back end does, so this is no short time.
const RELEASE_TRIES: u32 = 16;

/// Releases the key, patiently: giving up leaks the whole VM.
fn release_key<B: Backend>(back_end: &mut B) -> Result<KeyReleased> {
    let mut tries = 1;
    loop {
        match back_end.mmu_release_hkid() {
            Err(error) if error.is_transient() && tries < RELEASE_TRIES => tries += 1,
            done => return done,
        }
    }
}

impl<B: Backend> Drop for Vm<B> {
    fn drop(&mut self) {
        // SAFETY: the value ends with this call; `destroy` never lets it come here.
        let back_end = unsafe { ManuallyDrop::take(&mut self.back_end) };
        let report = tear_down(back_end);
        for leak in &report.leaks {
            tracing::error!(vm = report.vm.0, %leak, "leaked by drop");
        }
    }
}

impl<B: Backend> fmt::Debug for Vm<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("id", &self.id())
            .field("tech", &self.tech())
            .field("step", &self.step())
            .field("slots", &self.slots)
            .finish()
    }
}
