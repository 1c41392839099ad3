//! Interrupt messages between the processors of a VM.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_ops::Msi;
use kvm_ops_cpu::ApicAddress;

use crate::irq::Wake;
use crate::processor::bus::send;

/// The kind of a message (SDM vol. 3, 11.6.1, "Delivery Mode").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Fixed,
    /// To one of the processors that are meant.
    Lowest,
    Nmi,
    Init,
    Start,
}

impl Kind {
    /// The kind of this delivery mode; `None` for SMI, ExtINT and reserved modes.
    pub(crate) fn from_mode(mode: u64) -> Option<Self> {
        Some(match mode & 7 {
            0 => Self::Fixed,
            1 => Self::Lowest,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Start,
            _ => return None,
        })
    }
}

/// The processors that a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    Named { destination: u32, logical: bool },
    Everyone,
    Others,
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) kind: Option<Kind>,
    pub(crate) vector: u8,
    /// From a level-triggered pin.
    pub(crate) level: bool,
    pub(crate) to: To,
}

impl Command {
    /// Reads an interrupt command in the format of x2APIC.
    pub(crate) fn from_icr(icr: u64) -> Self {
        let level_assert = icr >> 14 & 1 != 0;
        // "INIT level de-assert" does nothing since the Pentium 4.
        let kind = Kind::from_mode(icr >> 8)
            .filter(|kind| *kind != Kind::Init || level_assert || icr >> 15 & 1 == 0);
        let to = match icr >> 18 & 3 {
            0 => To::Named {
                destination: (icr >> 32) as u32,
                logical: icr >> 11 & 1 != 0,
            },
            2 => To::Everyone,
            _ => To::Others,
        };
        Self {
            kind,
            vector: icr as u8,
            level: false,
            to,
        }
    }
}

impl Command {
    /// Reads an interrupt message of a device. `None` for an address that is none of a message.
    pub(crate) fn from_msi(msi: Msi) -> Option<Self> {
        // Bits 39:32 are reserved, and 63:40 are bits 31:8 of the destination.
        if msi.address >> 20 & 0xf_ffff != 0xfee {
            return None;
        }
        let destination = msi.address >> 12 & 0xff | msi.address >> 32 & 0xffff_ff00;
        Some(Self {
            kind: Kind::from_mode(u64::from(msi.data) >> 8),
            vector: msi.data as u8,
            level: msi.data >> 15 & 1 != 0,
            to: To::Named {
                destination: destination as u32,
                logical: msi.address >> 2 & 1 != 0,
            },
        })
    }
}

/// A processor as others reach it.
#[derive(Debug)]
struct Peer {
    address: ApicAddress,
    wake: Arc<Wake>,
}

/// The processors of a VM that have a local APIC, by their number.
#[derive(Debug, Default)]
pub(crate) struct Processors(BTreeMap<u32, Peer>);

impl Processors {
    pub(crate) fn set(&mut self, id: u32, address: ApicAddress, wake: &Arc<Wake>) {
        match self.0.get_mut(&id) {
            Some(peer) => peer.address = address,
            None => {
                let wake = Arc::clone(wake);
                self.0.insert(id, Peer { address, wake });
            }
        }
    }

    /// Forgets a processor.
    #[cfg(feature = "tdx")]
    pub(crate) fn remove(&mut self, id: u32) {
        self.0.remove(&id);
    }

    /// Makes a processor look at its lines, if it sleeps.
    pub(crate) fn nudge(&self, id: u32) {
        if let Some(peer) = self.0.get(&id) {
            peer.wake.nudge();
        }
    }

    /// Sends a message. The processor `from` sent it, and has seen to itself already. Returns true if
    /// there is a processor that the message is for.
    pub(crate) fn deliver(&self, command: &Command, from: Option<u32>) -> bool {
        let Some(kind) = command.kind else {
            return false;
        };
        let meant = self.0.iter().filter(|(id, peer)| match command.to {
            To::Named {
                destination,
                logical,
            } => peer.address.accepts(destination, logical),
            To::Everyone => true,
            To::Others => Some(**id) != from,
        });
        // The sender's local APIC takes its own fixed interrupts directly.
        let seen_to = matches!(kind, Kind::Fixed | Kind::Nmi);
        let not_again = meant.filter(|(id, _)| !seen_to || Some(**id) != from);
        let most = match kind {
            Kind::Lowest => 1,
            _ => usize::MAX,
        };
        let mut sent = false;
        for (_, peer) in not_again.take(most) {
            send(&peer.wake, kind, command.vector, command.level);
            sent = true;
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::VcpuId;

    fn icr(mode: u64, shorthand: u64, destination: u64) -> u64 {
        0x41 | mode << 8 | 1 << 14 | shorthand << 18 | destination << 32
    }

    #[test]
    fn commands_name_kind_and_processors() {
        let named = |destination, logical| To::Named {
            destination,
            logical,
        };
        for (value, kind, to) in [
            (icr(0, 0, 3), Some(Kind::Fixed), named(3, false)),
            (icr(8, 0, 3), Some(Kind::Fixed), named(3, true)),
            (icr(1, 2, 0), Some(Kind::Lowest), To::Everyone),
            (icr(4, 3, 0), Some(Kind::Nmi), To::Others),
            (icr(5, 3, 0), Some(Kind::Init), To::Others),
            (icr(6, 3, 0), Some(Kind::Start), To::Others),
            (icr(2, 3, 0), None, To::Others),
            // INIT level de-assert.
            (5 << 8 | 1 << 15, None, named(0, false)),
        ] {
            let command = Command::from_icr(value);
            assert_eq!((command.kind, command.to), (kind, to), "{value:#x}");
        }
        assert_eq!(Command::from_icr(icr(0, 0, 0)).vector, 0x41);
    }

    #[test]
    fn a_device_s_message_names_its_processor_in_all_32_bits() {
        for id in [0, 1, 0xff, 0x100, 0x1234_5678] {
            let command = Command::from_msi(Msi::to(VcpuId(id), 0x41)).unwrap();
            let to = To::Named {
                destination: id,
                logical: false,
            };
            assert_eq!((command.to, command.vector), (to, 0x41));
            assert_eq!(command.kind, Some(Kind::Fixed));
            assert!(!command.level);
        }
        for (bits, data, kind, logical) in [
            (4, 0x400, Some(Kind::Nmi), true),
            (0, 0x100, Some(Kind::Lowest), false),
            (0, 0x200, None, false),
        ] {
            let address = 0xfee0_1000 | bits;
            let command = Command::from_msi(Msi { address, data }).unwrap();
            let destination = 1;
            let to = To::Named {
                destination,
                logical,
            };
            assert_eq!((command.kind, command.to), (kind, to));
        }
        for address in [0, 0xfed0_1000, 0x1_fee0_1000] {
            assert_eq!(
                Command::from_msi(Msi {
                    address,
                    data: 0x41
                }),
                None
            );
        }
    }
}
