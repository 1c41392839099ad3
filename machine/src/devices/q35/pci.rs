//! PCI configuration space, by ports (PCI Local Bus Specification 3.0, 3.2.2.3.2) and by memory (PCI Express Base
//! Specification, "ECAM"): one bus, with the two functions by which firmware and kernels know a Q35.

use std::collections::BTreeMap;

use kvm_ops::Gpa;

use super::function::Function;

/// The address register, and the window of four bytes that it points to.
pub(super) const ADDRESS: u16 = 0xcf8;
pub(super) const DATA: u16 = 0xcfc;
pub(super) const DATA_LAST: u16 = DATA + 3;
/// The address register's bit that opens the window.
const ENABLE: u32 = 1 << 31;

/// The memory window, where OVMF puts it (PcdPciExpressBaseAddress): 4 KiB a function, 256 buses.
pub(super) const ECAM: u64 = 0xe000_0000;
pub(super) const ECAM_BYTES: u64 = 0x1000_0000;

/// Memory controller and LPC bridge, as a bus, device and function number.
const MEMORY_CONTROLLER: u16 = 0;
const LPC_BRIDGE: u16 = 0x1f << 3;

const INTEL: u16 = 0x8086;
const CLASS_HOST_BRIDGE: u32 = 0x06_0000;
const CLASS_ISA_BRIDGE: u32 = 0x06_0100;

pub(super) struct Pci {
    address: u32,
    functions: BTreeMap<u16, Function>,
}

impl Pci {
    pub(super) fn new() -> Self {
        let controller = Function::new(INTEL, 0x29c0, CLASS_HOST_BRIDGE);
        let bridge = Function::new(INTEL, 0x2918, CLASS_ISA_BRIDGE).multi_function();
        Self {
            address: 0,
            functions: [(MEMORY_CONTROLLER, controller), (LPC_BRIDGE, bridge)].into(),
        }
    }

    pub(super) const fn address(&self) -> u32 {
        self.address
    }

    pub(super) const fn set_address(&mut self, address: u32) {
        self.address = address;
    }

    /// The function and the offset that a port of the window shows.
    fn selected(&self, port: u16) -> Option<(u16, usize)> {
        let offset = (self.address & 0xfc) as usize + usize::from(port - DATA);
        (self.address & ENABLE != 0).then_some(((self.address >> 8) as u16, offset))
    }

    pub(super) fn port_read(&self, port: u16, data: &mut [u8]) {
        match self.selected(port) {
            Some((function, at)) => self.read(function, at, data),
            None => data.fill(0xff),
        }
    }

    pub(super) fn port_write(&mut self, port: u16, data: &[u8]) {
        if let Some((function, at)) = self.selected(port) {
            self.write(function, at, data);
        }
    }

    /// The function and the offset of an address in the memory window.
    pub(super) fn in_window(gpa: Gpa) -> Option<(u16, usize)> {
        let at = gpa.get().checked_sub(ECAM).filter(|at| *at < ECAM_BYTES)?;
        Some(((at >> 12) as u16, (at & 0xfff) as usize))
    }

    pub(super) fn read(&self, function: u16, at: usize, data: &mut [u8]) {
        match self.functions.get(&function) {
            Some(function) => function.read(at, data),
            None => data.fill(0xff),
        }
    }

    pub(super) fn write(&mut self, function: u16, at: usize, data: &[u8]) {
        if let Some(function) = self.functions.get_mut(&function) {
            function.write(at, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_port(pci: &mut Pci, address: u32) -> u32 {
        pci.set_address(address);
        let mut data = [0; 4];
        pci.port_read(DATA, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn ports_and_memory_show_the_same_registers() {
        let mut pci = Pci::new();
        assert_eq!(by_port(&mut pci, 0x8000_0000), 0x29c0_8086);
        assert_eq!(by_port(&mut pci, 0x8000_f800), 0x2918_8086);
        pci.set_address(0x8000_f840);
        pci.port_write(DATA + 1, &[0x06]);
        let (function, at) = Pci::in_window(Gpa::new(ECAM + 0xf_8040)).unwrap();
        let mut data = [0; 2];
        pci.read(function, at, &mut data);
        assert_eq!(data, [0, 6]);
    }

    #[test]
    fn without_a_function_or_the_enable_bit_reads_are_ones_and_writes_vanish() {
        let mut pci = Pci::new();
        for address in [0, 0x8000_0100, 0x80ff_0000, 0x8000_f900] {
            assert_eq!(by_port(&mut pci, address), u32::MAX, "{address:#x}");
            pci.port_write(DATA, &[0; 4]);
            assert_eq!(by_port(&mut pci, address), u32::MAX, "{address:#x}");
        }
    }

    #[test]
    fn the_window_has_an_end() {
        assert_eq!(Pci::in_window(Gpa::new(ECAM - 1)), None);
        assert_eq!(Pci::in_window(Gpa::new(ECAM + ECAM_BYTES)), None);
        let last = Pci::in_window(Gpa::new(ECAM + ECAM_BYTES - 1));
        assert_eq!(last, Some((0xffff, 0xfff)));
    }
}
