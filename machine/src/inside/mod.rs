//! The parts of a machine that its devices use, from any thread.

mod events;
mod lines;

use std::sync::Arc;

use kvm_ops::{
    AnyVm, DevicePort, Diagnosis, Error, Field, Gfn, Gpa, Host, HostEvent, IoEvent, IoEventMatch,
    IrqEvent, Irqchip, MemSlot, Msi, PAGE_SIZE, Privacy, Result, SlotInfo, Tech, VcpuId, Vm, VmId,
    VmOps,
};

use crate::memory::SharedFrames;
use crate::run::Explains;
use crate::{DeviceMemory, GuestRam, Inside, MachineError, Stopper};

pub(crate) use events::Events;
use lines::Lines;

/// The state that a machine keeps for its devices.
#[derive(Default)]
pub(crate) struct Wiring {
    pub(crate) events: Events,
    lines: Lines,
}

/// A machine as its devices see it, from any thread, also while it runs: an [`Inside`] with the VM.
pub struct Parts<'a, H: Host> {
    pub(crate) vm: &'a Vm<AnyVm<H>>,
    pub(crate) ram: &'a GuestRam,
    pub(crate) slots: &'a [MemSlot],
    pub(crate) stopper: &'a Stopper,
    pub(crate) wiring: &'a Wiring,
    pub(crate) irqchip: Irqchip,
}

impl<H: Host> Clone for Parts<'_, H> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H: Host> Copy for Parts<'_, H> {}

impl<'a, H: Host> Parts<'a, H> {
    /// The VM.
    pub fn vm(&self) -> &'a Vm<AnyVm<H>> {
        self.vm
    }

    /// The machine's operations for devices, for a VM that has interrupt controllers in its platform.
    fn irq_port(&self) -> Result<Option<&'a dyn DevicePort>> {
        match self.irqchip {
            Irqchip::None => kvm_ops::not_offered!("interrupts without an irqchip in the platform"),
            Irqchip::Full | Irqchip::Split => Ok(self.vm.back_end().devices()),
        }
    }

    /// True if every page of the range lies in a slot. A guest that asks for more would make the host
    /// keep books of pages that do not exist.
    fn is_memory(&self, gpa: Gpa, pages: u64) -> bool {
        let Some(bytes) = pages.checked_mul(PAGE_SIZE) else {
            return false;
        };
        let (mut at, mut left) = (gpa.get(), bytes);
        while left != 0 {
            let holds = |slot: &SlotInfo| at.wrapping_sub(slot.gpa.get()) < slot.bytes;
            let Some(slot) = self.vm.slots().find(holds) else {
                return false;
            };
            let inside = slot.bytes - (at - slot.gpa.get());
            left = left.saturating_sub(inside);
            at = at.wrapping_add(inside);
        }
        true
    }

    /// The frames that the guest or a device wrote since the last call.
    pub(crate) fn written_frames(&self) -> Result<Vec<Gfn>, MachineError> {
        let mut frames = Vec::new();
        for slot in self.slots.iter().filter(|slot| !slot.flags.read_only) {
            let mut bitmap = vec![0; slot.dirty_words()];
            self.vm
                .dirty_log(slot.id, &mut bitmap)
                .map_err(|source| MachineError::Step {
                    step: "read the dirty log",
                    source: Box::new(self.vm.explain(source)),
                })?;
            self.ram.take_written(slot.gpa, &mut bitmap);
            let first = Gfn::containing(slot.gpa).get();
            for (base, word) in (first..).step_by(64).zip(bitmap) {
                let bits = (0..64).filter(|bit| word & (1 << bit) != 0);
                frames.extend(bits.map(|bit| Gfn::new(base + bit)));
            }
        }
        Ok(frames)
    }
}

impl<H: Host> Explains for Parts<'_, H> {
    fn tech(&self) -> Tech {
        self.vm.tech()
    }

    fn vm_id(&self) -> VmId {
        self.vm.id()
    }

    fn explain(&self, error: Error) -> Diagnosis {
        self.vm.explain(error)
    }
}

impl<H: Host> SharedFrames for Parts<'_, H> {
    fn is_shared(&self, gfn: Gfn) -> bool {
        self.vm.back_end().show_to_host(gfn)
    }
}

impl<H: Host> Inside for Parts<'_, H> {
    fn memory(&self) -> DeviceMemory<'_> {
        match self.vm.tech().is_confidential() {
            true => DeviceMemory::with_private(self.ram, self),
            false => DeviceMemory::new(self.ram),
        }
    }

    fn dirty_frames(&self) -> Result<Vec<Gfn>, MachineError> {
        self.written_frames()
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.vm.back_end().deliver_interrupt(vcpu, vector)
    }

    fn signal_msi(&self, msi: Msi) -> Result<bool> {
        if let Some(port) = self.irq_port()? {
            return port.signal_msi(msi);
        }
        let refused = Error::Invalid(Field::Msi, msi.address);
        let (vcpu, vector) = msi.target().ok_or(refused)?;
        self.deliver_interrupt(vcpu, vector).map(|()| true)
    }

    fn set_gsi_route(&self, gsi: u32, msi: Msi) -> Result<()> {
        if let Some(port) = self.irq_port()? {
            port.set_gsi_route(gsi, msi)?;
        }
        self.wiring.lines.set_route(gsi, msi);
        Ok(())
    }

    fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()> {
        let port = self.irq_port()?;
        // The I/O APIC of a split irqchip is the embedder's: here it is the routes.
        if let (Some(port), Irqchip::Full) = (port, self.irqchip) {
            return port.set_irq_line(gsi, active);
        }
        match self.wiring.lines.set(gsi, active)? {
            Some(msi) => self.signal_msi(msi).map(drop),
            None => Ok(()),
        }
    }

    fn irq_event(&self, gsi: u32) -> Result<Box<dyn IrqEvent + '_>> {
        if let Some(port) = self.irq_port()? {
            return port.irq_event(gsi);
        }
        self.wiring.lines.route(gsi)?;
        Ok(Box::new(Pulse {
            machine: *self,
            gsi,
        }))
    }

    fn io_event(&self, at: IoEvent, matching: IoEventMatch) -> Result<Arc<dyn HostEvent>> {
        let port = self.vm.back_end().devices();
        self.wiring.events.add(port, at, matching)
    }

    fn kick(&self, vcpu: VcpuId) {
        self.stopper.kick(vcpu);
    }

    fn convert(&self, gpa: Gpa, pages: u64, to: Privacy) -> Result<()> {
        if !self.is_memory(gpa, pages) {
            return Err(Error::Invalid(Field::Gpa, gpa.get()));
        }
        let (mut first, mut left) = (Gfn::containing(gpa), pages);
        loop {
            let done = self.vm.set_memory_attributes(first, left, to)?;
            left = left.saturating_sub(done);
            if left == 0 {
                return Ok(());
            }
            let overflow = Error::Invalid(Field::Gpa, gpa.get());
            first = first.checked_add(done).ok_or(overflow)?;
        }
    }

    fn is_ending(&self) -> bool {
        self.wiring.events.is_ending()
    }
}

/// An interrupt line as an event, where the kernel has none.
struct Pulse<'a, H: Host> {
    machine: Parts<'a, H>,
    gsi: u32,
}

impl<H: Host> IrqEvent for Pulse<'_, H> {
    fn signal(&self) -> Result<()> {
        self.machine.set_irq_line(self.gsi, true)?;
        self.machine.set_irq_line(self.gsi, false)
    }
}
