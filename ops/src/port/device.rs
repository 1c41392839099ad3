//! The machine's operations for devices: interrupts into a VM, and notifications out of it, without an exit.

use alloc::boxed::Box;
use alloc::sync::Arc;

use crate::{Gpa, Result, VcpuId};

/// An interrupt message, as a PCI device writes it (SDM vol. 3, 11.11, "Message Signalled Interrupts").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Msi {
    /// The address, in which the destination is.
    pub address: u64,
    /// The data, in which the vector is.
    pub data: u32,
}

/// The range of addresses of interrupt messages: 0xfee00000 to 0xfeefffff.
const MSI_BASE: u64 = 0xfee0_0000;
/// Address bits 3:2: redirection hint and logical destination mode.
const REDIRECTED: u64 = 0b1100;
/// Data bits 10:8: another delivery mode than "fixed".
const NOT_FIXED: u32 = 0x700;

impl Msi {
    /// A fixed, edge-triggered interrupt to one vCPU. Bits 8 and up of the APIC id go into the upper
    /// half of the address, as `KVM_CAP_X2APIC_API` has it.
    ///
    /// ```
    /// use kvm_ops::{Msi, VcpuId};
    ///
    /// let msi = Msi::to(VcpuId(3), 0x41);
    /// assert_eq!(msi, Msi { address: 0xfee0_3000, data: 0x41 });
    /// assert_eq!(msi.target(), Some((VcpuId(3), 0x41)));
    /// ```
    pub const fn to(vcpu: VcpuId, vector: u8) -> Self {
        let id = vcpu.0 as u64;
        Self {
            address: (id >> 8) << 40 | MSI_BASE | (id & 0xff) << 12,
            data: vector as u32,
        }
    }

    /// The vCPU and the vector of a fixed interrupt to one vCPU; `None` for any other message.
    pub const fn target(&self) -> Option<(VcpuId, u8)> {
        let (high, low) = (self.address >> 32, self.address & 0xffff_ffff);
        let fixed = self.data & NOT_FIXED == 0 && low & REDIRECTED == 0;
        if low >> 20 != MSI_BASE >> 20 || high & 0xff != 0 || !fixed {
            return None;
        }
        let id = high | (low >> 12 & 0xff);
        Some((VcpuId(id as u32), self.data as u8))
    }
}

/// The place of a guest's write that signals an event (`KVM_IOEVENTFD`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoEvent {
    /// Writes to an I/O port.
    Port(u16),
    /// Writes to memory that no slot backs.
    Mmio(Gpa),
}

/// The writes that signal the event; others leave as exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoEventMatch {
    /// Every write, of any width and value.
    Any,
    /// Writes of one byte with this value.
    U8(u8),
    /// Writes of two bytes with this value.
    U16(u16),
    /// Writes of four bytes with this value.
    U32(u32),
    /// Writes of eight bytes with this value.
    U64(u64),
}

impl IoEventMatch {
    /// True if a write of these bytes signals the event.
    pub fn matches(self, written: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::U8(value) => written == value.to_le_bytes(),
            Self::U16(value) => written == value.to_le_bytes(),
            Self::U32(value) => written == value.to_le_bytes(),
            Self::U64(value) => written == value.to_le_bytes(),
        }
    }
}

/// An event that a guest's write signals and a device's thread waits for: a counter, as an eventfd is.
///
/// Signals may be spurious: look at what the event is about after each.
pub trait HostEvent: Send + Sync {
    /// Signals it, to wake who waits.
    ///
    /// # Errors
    /// The answer of the system.
    fn signal(&self) -> Result<()>;

    /// Waits until it is signalled. Returns the number of signals since the last call, 1 or more, and
    /// takes them.
    ///
    /// # Errors
    /// The answer of the system.
    fn wait(&self) -> Result<u64>;

    /// Takes the signals since the last call without waiting, 0 if there are none.
    ///
    /// # Errors
    /// The answer of the system.
    fn take(&self) -> Result<u64>;

    /// The file descriptor of the eventfd behind it, for epoll, or to hand it to vhost or another
    /// process. It stays open as long as this value. `None` where the event is no descriptor.
    fn raw_fd(&self) -> Option<i32> {
        None
    }
}

/// An event that raises and lowers an interrupt line when it is signalled (`KVM_IRQFD`).
pub trait IrqEvent: Send + Sync {
    /// Interrupts.
    ///
    /// # Errors
    /// The answer of the system.
    fn signal(&self) -> Result<()>;

    /// The file descriptor of the eventfd behind it; see [`HostEvent::raw_fd`].
    fn raw_fd(&self) -> Option<i32> {
        None
    }
}

/// The operations of the machine for devices. A machine without them is emulated by whoever runs the
/// vCPUs, as the crate `kvm-ops-machine` does.
pub trait DevicePort: Send + Sync {
    /// Raises or lowers an interrupt line of the platform's interrupt controllers.
    ///
    /// # Errors
    /// [`Error::NotOffered`](crate::Error::NotOffered) unless the platform has all of them
    /// ([`Irqchip::Full`](crate::Irqchip::Full)); the answer of the system.
    fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()>;

    /// Sends an interrupt message. `true` if an APIC took it, `false` if the guest has it disabled.
    ///
    /// # Errors
    /// [`Error::NotOffered`](crate::Error::NotOffered) without an irqchip in the platform; the answer
    /// of the system.
    fn signal_msi(&self, msi: Msi) -> Result<bool>;

    /// Makes an interrupt line send this message, as the vectors of MSI-X do.
    ///
    /// # Errors
    /// As [`signal_msi`](Self::signal_msi).
    fn set_gsi_route(&self, gsi: u32, msi: Msi) -> Result<()>;

    /// An event that raises and lowers an interrupt line. Dropping it removes it.
    ///
    /// # Errors
    /// As [`signal_msi`](Self::signal_msi).
    fn irq_event(&self, gsi: u32) -> Result<Box<dyn IrqEvent>>;

    /// An event that writes of the guest signal instead of leaving as exits. Dropping the last handle
    /// removes it.
    ///
    /// # Errors
    /// [`Error::Sys`](crate::Error::Sys) with `EEXIST` if there is one for the same writes.
    fn io_event(&self, at: IoEvent, matching: IoEventMatch) -> Result<Arc<dyn HostEvent>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_to_any_vcpu_names_it_and_its_vector() {
        for id in [0, 1, 0x7f, 0xfe, 0xff, 0x100, 0x1234, 0x00ff_ffff] {
            for vector in [16, 0x41, 255] {
                let msi = Msi::to(VcpuId(id), vector);
                assert_eq!(msi.target(), Some((VcpuId(id), vector)), "{msi:x?}");
            }
        }
    }

    #[test]
    fn other_messages_have_no_single_target() {
        let good = Msi::to(VcpuId(1), 0x30);
        for msi in [
            Msi {
                address: 0xfed0_1000,
                ..good
            },
            Msi {
                address: good.address | 1 << 32,
                ..good
            },
            Msi {
                address: good.address | 4,
                ..good
            }, // logical
            Msi {
                address: good.address | 8,
                ..good
            }, // redirected
            Msi {
                data: good.data | 0x400,
                ..good
            }, // NMI
            Msi {
                data: good.data | 0x100,
                ..good
            }, // lowest priority
        ] {
            assert_eq!(msi.target(), None, "{msi:x?}");
        }
    }

    #[test]
    fn a_write_matches_by_width_and_value() {
        assert!(IoEventMatch::Any.matches(&[1, 2, 3]));
        assert!(IoEventMatch::U16(0x201).matches(&[1, 2]));
        assert!(!IoEventMatch::U16(0x201).matches(&[1, 2, 0, 0]));
        assert!(!IoEventMatch::U32(1).matches(&[2, 0, 0, 0]));
        assert!(IoEventMatch::U8(7).matches(&[7]));
        assert!(IoEventMatch::U64(7).matches(&[7, 0, 0, 0, 0, 0, 0, 0]));
    }
}
