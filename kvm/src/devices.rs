//! The kernel's operations for devices: eventfds that it signals and reads itself, and routes of interrupt
//! lines.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ops::{
    Call, DevicePort, Error, Field, HostEvent, IoEvent, IoEventMatch, IrqEvent, Irqchip, Msi,
    Result,
};

use crate::error::{from_errno, sys};
use crate::irq::unregister_ioevent;
use crate::vm::{IOAPIC_PINS, VmInner};
use crate::{EventFd, KvmVm};

/// Pins of a PIC.
const PIC_PINS: u32 = 8;
/// Lines that the two PICs share with the IOAPIC.
const PIC_LINES: u32 = 2 * PIC_PINS;

/// The lines that send messages, by number.
#[derive(Default)]
pub(crate) struct Routes(Mutex<BTreeMap<u32, Msi>>);

impl DevicePort for KvmVm {
    fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()> {
        Self::set_irq_line(self, gsi, active)
    }

    fn signal_msi(&self, msi: Msi) -> Result<bool> {
        Self::signal_msi(self, msi.address, msi.data)
    }

    /// Replaces the whole table of the kernel: the routes made here, and with a full irqchip the pins of
    /// the PICs and the IOAPIC that have none. Routes that were set through the descriptor are gone.
    fn set_gsi_route(&self, gsi: u32, msi: Msi) -> Result<()> {
        self.irqchip()?;
        let inner = self.inner();
        let mut routes = inner
            .routes
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut changed = routes.clone();
        changed.insert(gsi, msi);
        let entries = entries(&changed, inner.params.irqchip);
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Invalid(Field::Gsi, gsi.into()))?;
        inner
            .fd
            .set_gsi_routing(&table)
            .map_err(sys(Call::SetGsiRouting))?;
        *routes = changed;
        Ok(())
    }

    fn irq_event(&self, gsi: u32) -> Result<Box<dyn IrqEvent>> {
        let event = new_event(Call::Irqfd)?;
        self.register_irqfd(&event, gsi)?;
        let vm = Arc::downgrade(self.inner());
        Ok(Box::new(Irqfd { vm, event, gsi }))
    }

    fn io_event(&self, at: IoEvent, matching: IoEventMatch) -> Result<Arc<dyn HostEvent>> {
        let event = new_event(Call::Ioeventfd)?;
        self.register_ioevent(&event, at, matching)?;
        Ok(Arc::new(Ioeventfd {
            vm: Arc::downgrade(self.inner()),
            event,
            at,
            matching,
        }))
    }
}

/// The kernel's table: messages first, then each pin that has none, as the kernel wires them at first.
fn entries(routes: &BTreeMap<u32, Msi>, irqchip: Irqchip) -> Vec<kvm_irq_routing_entry> {
    let mut entries: Vec<_> = routes
        .iter()
        .map(|(gsi, msi)| message(*gsi, *msi))
        .collect();
    if irqchip != Irqchip::Full {
        return entries;
    }
    for gsi in (0..IOAPIC_PINS as u32).filter(|gsi| !routes.contains_key(gsi)) {
        entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        match gsi {
            0..PIC_PINS => entries.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            PIC_PINS..PIC_LINES => {
                entries.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS));
            }
            _ => {}
        }
    }
    entries
}

fn message(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        ..Default::default()
    };
    entry
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

/// An eventfd whose reads do not block; who waits polls.
fn new_event(call: Call) -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed(call))
}

fn failed(call: Call) -> impl Fn(io::Error) -> Error {
    move |error| from_errno(call, error.raw_os_error().unwrap_or(libc::EIO))
}

/// An event that the kernel signals.
struct Ioeventfd {
    /// Weak: an event that is left does not keep the kernel's VM.
    vm: Weak<VmInner>,
    event: EventFd,
    at: IoEvent,
    matching: IoEventMatch,
}

impl HostEvent for Ioeventfd {
    fn signal(&self) -> Result<()> {
        self.event.write(1).map_err(failed(Call::Ioeventfd))
    }

    fn wait(&self) -> Result<u64> {
        loop {
            match self.take()? {
                0 => poll(&self.event)?,
                count => return Ok(count),
            }
        }
    }

    fn take(&self) -> Result<u64> {
        match self.event.read() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            read => read.map_err(failed(Call::Ioeventfd)),
        }
    }

    fn raw_fd(&self) -> Option<i32> {
        Some(self.event.as_raw_fd())
    }
}

/// Waits until there is something to read. A signal ends it too.
fn poll(event: &EventFd) -> Result<()> {
    let mut fds = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `fds` is one structure that lives during the call, and its descriptor is open.
    if unsafe { libc::poll(&mut fds, 1, -1) } >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(failed(Call::Ioeventfd)(error)),
    }
}

impl Drop for Ioeventfd {
    fn drop(&mut self) {
        if let Some(vm) = self.vm.upgrade() {
            let removed = unregister_ioevent(&vm.fd, &self.event, self.at, self.matching);
            log(removed);
        }
    }
}

/// An event that the kernel reads.
struct Irqfd {
    vm: Weak<VmInner>,
    event: EventFd,
    gsi: u32,
}

impl IrqEvent for Irqfd {
    fn signal(&self) -> Result<()> {
        self.event.write(1).map_err(failed(Call::Irqfd))
    }

    fn raw_fd(&self) -> Option<i32> {
        Some(self.event.as_raw_fd())
    }
}

impl Drop for Irqfd {
    fn drop(&mut self) {
        if let Some(vm) = self.vm.upgrade() {
            let removed = vm.fd.unregister_irqfd(&self.event, self.gsi);
            log(removed.map_err(sys(Call::Irqfd)));
        }
    }
}

fn log(removed: Result<()>) {
    if let Err(error) = removed {
        tracing::error!(%error, "an event of a device was not removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::VcpuId;

    #[test]
    fn a_route_takes_the_place_of_its_pins_and_no_others() {
        let routes = BTreeMap::from([
            (5, Msi::to(VcpuId(1), 0x41)),
            (40, Msi::to(VcpuId(0), 0x42)),
        ]);
        assert_eq!(entries(&routes, Irqchip::Split).len(), 2);
        let full = entries(&routes, Irqchip::Full);
        let of = |gsi: u32| full.iter().filter(|entry| entry.gsi == gsi).count();
        assert_eq!([4, 5, 12, 16, 23, 24, 40].map(of), [2, 1, 2, 1, 1, 0, 1]);
        let types = full
            .iter()
            .filter(|entry| entry.type_ == KVM_IRQ_ROUTING_MSI);
        assert_eq!(types.count(), 2);
    }
}
