//! The parts of configuration space that functions with memory and capabilities have (PCI Local Bus Specification 3.0, 6.2).

use super::{COMMAND, Function, HEADER};

const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BASE_ADDRESS: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_PIN: usize = 0x3d;

/// Bits of the command register.
const MEMORY: u8 = 1 << 1;
const BUS_MASTER: u8 = 1 << 2;
/// In the second byte: INTx is not to be used.
const NO_INTX: u8 = 1 << 2;
/// Bits of the status register.
const INTERRUPT: u8 = 1 << 3;
const HAS_CAPABILITIES: u8 = 1 << 4;
const INTA: u8 = 1;

/// One capability of a function.
pub(in super::super) struct Capability {
    pub(in super::super) id: u8,
    /// The bytes behind the link to the next one.
    pub(in super::super) body: Vec<u8>,
    /// The bits of the body that the guest can change.
    pub(in super::super) writable: Vec<u8>,
}

impl Function {
    /// A function of a card, whose registers behind the header are those of its capabilities.
    pub(in super::super) fn of_card([vendor, device]: [u16; 2], class: u32, revision: u8) -> Self {
        let mut function = Self::new(vendor, device, class);
        function.writable[HEADER..].fill(0);
        function.bytes[REVISION] = revision;
        function.bytes[INTERRUPT_PIN] = INTA;
        function
    }

    pub(in super::super) fn with_subsystem(mut self, vendor: u16, id: u16) -> Self {
        self.put(SUBSYSTEM_VENDOR, &vendor.to_le_bytes());
        self.put(SUBSYSTEM, &id.to_le_bytes());
        self
    }

    /// The same with a first base address register, for memory below 4 GiB of `bytes`: a power of two, 16 at least.
    pub(in super::super) fn with_memory(mut self, bytes: u32) -> Self {
        let mask = (bytes - 1) ^ u32::MAX;
        self.writable[BASE_ADDRESS..BASE_ADDRESS + 4].copy_from_slice(&mask.to_le_bytes());
        self
    }

    /// The same with a list of capabilities, and the place of each. They need room for all.
    pub(in super::super) fn with_capabilities<const N: usize>(
        mut self,
        list: [Capability; N],
    ) -> (Self, [usize; N]) {
        self.bytes[STATUS] |= HAS_CAPABILITIES;
        let (mut link, mut end) = (CAPABILITIES, HEADER);
        let places = list.map(|Capability { id, body, writable }| {
            let at = end;
            self.bytes[link] = at as u8;
            self.bytes[at] = id;
            self.put(at + 2, &body);
            self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(&writable);
            (link, end) = (at + 1, (at + 2 + body.len()).next_multiple_of(4));
            at
        });
        (self, places)
    }

    /// The address of the memory, where it answers.
    pub(in super::super) fn memory_base(&self) -> Option<u32> {
        let mut base = [0; 4];
        self.read(BASE_ADDRESS, &mut base);
        (self.bytes[COMMAND] & MEMORY != 0).then_some(u32::from_le_bytes(base))
    }

    /// True if the function may read and write the guest's memory.
    pub(in super::super) const fn is_bus_master(&self) -> bool {
        self.bytes[COMMAND] & BUS_MASTER != 0
    }

    /// True if the function may use its interrupt line.
    pub(in super::super) const fn has_intx(&self) -> bool {
        self.bytes[COMMAND + 1] & NO_INTX == 0
    }

    /// Shows in the status register if an interrupt of the line is pending.
    pub(in super::super) const fn set_interrupt_status(&mut self, pending: bool) {
        match pending {
            true => self.bytes[STATUS] |= INTERRUPT,
            false => self.bytes[STATUS] &= !INTERRUPT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::SIZE;
    use super::*;

    fn dword(function: &Function, at: usize) -> u32 {
        let mut data = [0; 4];
        function.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_base_address_tells_its_size_and_answers_while_memory_is_enabled() {
        let mut function = Function::of_card([1, 2], 0x01_8000, 1).with_memory(0x8000);
        function.write(BASE_ADDRESS, &[0xff; 4]);
        assert_eq!(dword(&function, BASE_ADDRESS), 0xffff_8000);
        function.write(BASE_ADDRESS, &0xc123_4567_u32.to_le_bytes());
        assert_eq!(function.memory_base(), None);
        function.write(COMMAND, &[MEMORY]);
        assert_eq!(function.memory_base(), Some(0xc123_0000));
        // There is one register only.
        function.write(BASE_ADDRESS + 4, &[0xff; 20]);
        assert_eq!(dword(&function, BASE_ADDRESS + 4), 0);
    }

    #[test]
    fn capabilities_are_a_list_of_which_the_stated_bits_can_be_changed() {
        let function = Function::of_card([1, 2], 0x01_8000, 1);
        assert_eq!(dword(&function, STATUS - 2) >> 16, 0);
        let capability = |id, body: &[u8], writable: &[u8]| Capability {
            id,
            body: body.to_vec(),
            writable: writable.to_vec(),
        };
        let (mut function, places) = function.with_capabilities([
            capability(9, &[5, 6, 7], &[]),
            capability(0x11, &[0, 0], &[0, 0x80]),
        ]);
        assert_eq!(places, [0x40, 0x48]);
        assert_eq!(dword(&function, STATUS - 2) >> 16, 0x10);
        assert_eq!(dword(&function, CAPABILITIES) & 0xff, 0x40);
        assert_eq!(dword(&function, 0x40), 0x0605_4809);
        function.write(HEADER, &[0xff; SIZE - HEADER]);
        assert_eq!(dword(&function, 0x40), 0x0605_4809);
        assert_eq!(dword(&function, 0x48), 0x8000_0011);
        assert_eq!(dword(&function, 0x4c), 0);
    }
}
