//! The operations of a VM for devices: the lines of the interrupt controllers in the platform, and
//! messages.

use std::sync::{Arc, MutexGuard, Weak};

use kvm_ops::{DevicePort, Error, Field, HostEvent, IoEvent, IoEventMatch, IrqEvent, Msi, Result};

use crate::SimVm;
use crate::chips::Chips;
use crate::processor::Command;
use crate::vm::VmInner;

impl SimVm {
    /// Sets the level of an interrupt line (GSI): 0 to 23 are inputs of the irqchip in the platform, and
    /// a line with a message ([`DevicePort::set_gsi_route`]) sends it when it rises.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without a full irqchip in the platform; [`Error::NotFound`] for a line that
    /// leads nowhere.
    pub fn set_irq_line(&self, line: u32, high: bool) -> Result<()> {
        self.inner.set_line(line, high)
    }
}

impl VmInner {
    pub(crate) fn require_chips(&self) -> Result<MutexGuard<'_, Chips>> {
        match self.chips() {
            Some(chips) => Ok(chips),
            None => kvm_ops::not_offered!("interrupt lines without a full irqchip in the platform"),
        }
    }

    /// Sends a message of a device. `true` if it names a vCPU.
    pub(crate) fn signal_msi(&self, msi: Msi) -> Result<bool> {
        Ok(self.send(&command(msi)?, None))
    }

    /// The chips, if the line leads anywhere.
    fn chips_of(&self, line: u32) -> Result<MutexGuard<'_, Chips>> {
        let chips = self.require_chips()?;
        match chips.leads(line) {
            true => Ok(chips),
            false => Err(Error::NotFound(Field::Gsi, line.into())),
        }
    }

    fn set_line(&self, line: u32, high: bool) -> Result<()> {
        let mut chips = self.chips_of(line)?;
        chips.set_line(line, high);
        self.send_from(chips);
        Ok(())
    }
}

/// The command of a message.
fn command(msi: Msi) -> Result<Command> {
    Command::from_msi(msi).ok_or(Error::Invalid(Field::Msi, msi.address))
}

impl DevicePort for SimVm {
    fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()> {
        Self::set_irq_line(self, gsi, active)
    }

    /// `true` if the message names a vCPU, also if its guest has the local APIC disabled.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that is none of a message.
    fn signal_msi(&self, msi: Msi) -> Result<bool> {
        self.inner.signal_msi(msi)
    }

    /// # Errors
    /// As [`signal_msi`](Self::signal_msi).
    fn set_gsi_route(&self, gsi: u32, msi: Msi) -> Result<()> {
        self.inner.require_chips()?.set_route(gsi, command(msi)?);
        Ok(())
    }

    fn irq_event(&self, gsi: u32) -> Result<Box<dyn IrqEvent>> {
        drop(self.inner.chips_of(gsi)?);
        let vm = Arc::downgrade(&self.inner);
        Ok(Box::new(Pulse { vm, gsi }))
    }

    /// # Errors
    /// [`Error::NotOffered`]: each write leaves as an exit, and whoever runs the vCPU signals.
    fn io_event(&self, _: IoEvent, _: IoEventMatch) -> Result<Arc<dyn HostEvent>> {
        kvm_ops::not_offered!("io_event")
    }
}

/// Raises and lowers a line.
struct Pulse {
    /// Weak: an event that is left does not keep the VM.
    vm: Weak<VmInner>,
    gsi: u32,
}

impl IrqEvent for Pulse {
    /// Does nothing once the VM is gone.
    fn signal(&self) -> Result<()> {
        let Some(vm) = self.vm.upgrade() else {
            return Ok(());
        };
        [true, false]
            .into_iter()
            .try_for_each(|high| vm.set_line(self.gsi, high))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SimHost;
    use crate::irq::{self, Wake};
    use crate::processor::Sleeper;
    use kvm_ops::{Host, Irqchip, Tech, VcpuId, Vendor, VmParams, VmPort};
    use kvm_ops_cpu::ApicAddress;

    #[test]
    fn a_message_of_a_device_wakes_a_sleeper_before_its_thread_comes() {
        let mut params = VmParams::new(2);
        params.irqchip = Irqchip::Full;
        let vm = SimHost::new(Vendor::Intel)
            .create_vm(Tech::Vmx, &params)
            .unwrap();
        let turns = &vm.inner.turns;
        [0, 1].into_iter().for_each(|id| turns.join(id));
        let wake = Arc::<Wake>::default();
        vm.inner
            .processors()
            .set(1, ApicAddress::after_reset(1), &wake);
        let sleeper = Sleeper {
            until: None,
            wake,
            hears: irq::State::has_mail,
        };
        turns.sleep(1, sleeper);
        let share = turns.share(0).unwrap();
        let port = vm.devices().unwrap();
        assert_eq!(port.signal_msi(Msi::to(VcpuId(1), 0x41)), Ok(true));
        turns.spend(0, share, false);
        assert_eq!(turns.share(0), None, "it is the other one's share");
        assert_eq!(turns.share(1), Some(share));
    }
}
