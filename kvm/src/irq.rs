//! Interrupts into a VM, and events out of it, without an exit.

use kvm_bindings::kvm_msi;
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use kvm_ops::{Call, Error, Field, IoEvent, IoEventMatch, Irqchip, Msi, Result, VcpuId};

use crate::error::{host_lacks, sys};
use crate::{EventFd, KvmVm};

impl KvmVm {
    /// From now on, writing to `event` raises and lowers the interrupt line `gsi`
    /// (`KVM_IRQFD`). The kernel keeps the event; it may be closed here. With the split irqchip a
    /// line has no destination until it has a route ([`DevicePort::set_gsi_route`](kvm_ops::DevicePort)).
    ///
    /// # Errors
    /// Unsupported without an irqchip in the platform; otherwise the answer of the kernel
    /// (`EBUSY` where the event is bound already).
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.irqchip()?;
        self.fd()
            .register_irqfd(event, gsi)
            .map_err(sys(Call::Irqfd))
    }

    /// As [`register_irqfd`](Self::register_irqfd) for a level-triggered line: writing to `event`
    /// raises it; when the guest ends the interrupt the line falls and `resample` is signalled.
    ///
    /// # Errors
    /// As for `register_irqfd`; [`Error::HostLacks`] if the host has no resampling.
    pub fn register_irqfd_with_resample(
        &self,
        event: &EventFd,
        resample: &EventFd,
        gsi: u32,
    ) -> Result<()> {
        self.irqchip()?;
        if !self.fd().check_extension(Cap::IrqfdResample) {
            return host_lacks!("KVM_CAP_IRQFD_RESAMPLE");
        }
        self.fd()
            .register_irqfd_with_resample(event, resample, gsi)
            .map_err(sys(Call::Irqfd))
    }

    /// Removes the binding. Linux does not report if there was none.
    ///
    /// # Errors
    /// The answer of the kernel.
    pub fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.irqchip()?;
        self.fd()
            .unregister_irqfd(event, gsi)
            .map_err(sys(Call::Irqfd))
    }

    /// From now on, a guest's write there signals `event`, and no exit happens.
    ///
    /// # Errors
    /// [`Error::Sys`] with `EEXIST` if an event is registered for the same writes already.
    pub fn register_ioevent(
        &self,
        event: &EventFd,
        at: IoEvent,
        matching: IoEventMatch,
    ) -> Result<()> {
        let (fd, at) = (self.fd(), &address(at));
        match matching {
            IoEventMatch::Any => fd.register_ioevent(event, at, NoDatamatch),
            IoEventMatch::U8(value) => fd.register_ioevent(event, at, value),
            IoEventMatch::U16(value) => fd.register_ioevent(event, at, value),
            IoEventMatch::U32(value) => fd.register_ioevent(event, at, value),
            IoEventMatch::U64(value) => fd.register_ioevent(event, at, value),
        }
        .map_err(sys(Call::Ioeventfd))
    }

    /// Removes a registration; the arguments are those that made it.
    ///
    /// # Errors
    /// [`Error::Sys`] with `ENOENT` if there is none.
    pub fn unregister_ioevent(
        &self,
        event: &EventFd,
        at: IoEvent,
        matching: IoEventMatch,
    ) -> Result<()> {
        unregister_ioevent(self.fd(), event, at, matching)
    }

    /// Raises or lowers an interrupt line of the platform's PIC and IOAPIC.
    ///
    /// # Errors
    /// Unsupported unless the VM has the full irqchip.
    pub fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()> {
        if self.params().irqchip != Irqchip::Full {
            return kvm_ops::not_offered!("set_irq_line without a full irqchip in the platform");
        }
        self.fd()
            .set_irq_line(gsi, active)
            .map_err(sys(Call::IrqLine))
    }

    /// Sends an interrupt message, as a PCI device writes it. `true` if an APIC took it, `false`
    /// if the guest has it disabled.
    ///
    /// # Errors
    /// Unsupported without an irqchip in the platform; otherwise the answer of the kernel.
    pub fn signal_msi(&self, address: u64, data: u32) -> Result<bool> {
        self.irqchip()?;
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        let taken = self.fd().signal_msi(msi).map_err(sys(Call::SignalMsi))?;
        Ok(taken > 0)
    }

    pub(crate) fn irqchip(&self) -> Result<()> {
        match self.params().irqchip {
            Irqchip::None => kvm_ops::not_offered!("interrupts without an irqchip in the platform"),
            Irqchip::Full | Irqchip::Split => Ok(()),
        }
    }
}

pub(crate) fn unregister_ioevent(
    fd: &VmFd,
    event: &EventFd,
    at: IoEvent,
    matching: IoEventMatch,
) -> Result<()> {
    let at = &address(at);
    match matching {
        IoEventMatch::Any => fd.unregister_ioevent(event, at, NoDatamatch),
        IoEventMatch::U8(value) => fd.unregister_ioevent(event, at, value),
        IoEventMatch::U16(value) => fd.unregister_ioevent(event, at, value),
        IoEventMatch::U32(value) => fd.unregister_ioevent(event, at, value),
        IoEventMatch::U64(value) => fd.unregister_ioevent(event, at, value),
    }
    .map_err(sys(Call::Ioeventfd))
}

fn address(at: IoEvent) -> IoEventAddress {
    match at {
        IoEvent::Port(port) => IoEventAddress::Pio(port.into()),
        IoEvent::Mmio(gpa) => IoEventAddress::Mmio(gpa.get()),
    }
}

/// A fixed, edge-triggered interrupt to one vCPU.
pub(crate) fn deliver(vm: &KvmVm, vcpu: VcpuId, vector: u8) -> Result<()> {
    if !vm.has_vcpu(vcpu) {
        // KVM drops a message that no APIC matches, without an error.
        return Err(Error::NotFound(Field::Vcpu, vcpu.0.into()));
    }
    let Msi { address, data } = Msi::to(vcpu, vector);
    vm.signal_msi(address, data).map(drop)
}
