//! PCI configuration space, by ports (PCI Local Bus Specification 3.0, 3.2.2.3.2) and by memory (PCI Express Base
//! Specification, "ECAM"): one bus, with the two functions by which firmware and kernels know a Q35.
//!
//! The memory window is where firmware puts it: 0xb0000000 for OVMF up to 2022, 0xe0000000 for later ones.

use std::collections::BTreeMap;

use kvm_ops::Gpa;

use super::function::Function;

/// The address register, and the window of four bytes that it points to.
pub(super) const ADDRESS: u16 = 0xcf8;
pub(super) const DATA: u16 = 0xcfc;
pub(super) const DATA_LAST: u16 = DATA + 3;
/// True if a port is one of the window's.
pub(super) const fn shows(port: u16) -> bool {
    DATA <= port && port <= DATA_LAST
}

/// The address register's bit that opens the window.
const ENABLE: u32 = 1 << 31;

/// The memory controller's register for the memory window (Intel 3 Series Express Chipset datasheet, PCIEXBAR).
const PCIEXBAR: usize = 0x60;
const WINDOW_OPEN: u64 = 1 << 0;
/// The number of buses in the window: 256, 128 or 64.
const WINDOW_LENGTH: u64 = 0b11 << 1;
/// The window's address, of which a shorter window uses more bits.
const WINDOW_ADDRESS: u64 = 0xf_f000_0000;
/// Bytes of a bus in the window: 4 KiB a function.
const BUS_BYTES: u64 = 1 << 20;

/// The memory window of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) at: u64,
    pub(super) buses: u16,
}

impl Window {
    /// The window that PCIEXBAR describes; `None` if it is closed, or its length reserved.
    fn new(register: u64) -> Option<Self> {
        let buses = match (register & WINDOW_LENGTH) >> 1 {
            0 => 256,
            1 => 128,
            2 => 64,
            _ => return None,
        };
        // Bits 27 and 26 count in windows of 128 and 64 MiB.
        let address = WINDOW_ADDRESS | (0x1000_0000 - u64::from(buses) * BUS_BYTES);
        (register & WINDOW_OPEN != 0).then_some(Self {
            at: register & address,
            buses,
        })
    }

    pub(super) const fn bytes(self) -> u64 {
        self.buses as u64 * BUS_BYTES
    }

    /// The address behind it.
    pub(super) const fn end(self) -> u64 {
        self.at + self.bytes()
    }

    /// The function and the offset that an address shows.
    fn shows(self, gpa: Gpa) -> Option<(u16, usize)> {
        let at = gpa.get().checked_sub(self.at)?;
        (at < self.bytes()).then_some(((at >> 12) as u16, (at & 0xfff) as usize))
    }
}

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

    /// Opens the memory window of all buses there, as firmware would.
    pub(super) fn open(&mut self, at: u64) {
        let register = at | WINDOW_OPEN;
        self.write(MEMORY_CONTROLLER, PCIEXBAR, &register.to_le_bytes());
    }

    pub(super) const fn address(&self) -> u32 {
        self.address
    }

    pub(super) const fn set_address(&mut self, address: u32) {
        self.address = address;
    }

    /// The function and the offset that a port shows; `None` for a port outside of the window, too.
    pub(super) fn selected(&self, port: u16) -> Option<(u16, usize)> {
        let within = shows(port) && self.address & ENABLE != 0;
        let offset = (self.address & 0xfc) as usize + usize::from(port.wrapping_sub(DATA));
        within.then_some(((self.address >> 8) as u16, offset))
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

    /// The memory window, where it is open.
    pub(super) fn window(&self) -> Option<Window> {
        let mut register = [0; 8];
        self.read(MEMORY_CONTROLLER, PCIEXBAR, &mut register);
        Window::new(u64::from_le_bytes(register))
    }

    /// The function and the offset of an address in the memory window.
    pub(super) fn in_window(&self, gpa: Gpa) -> Option<(u16, usize)> {
        self.window()?.shows(gpa)
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

    /// Sets PCIEXBAR as firmware does, the high half first.
    fn open(pci: &mut Pci, register: u64) {
        for (address, half) in [(0x8000_0064, register >> 32), (0x8000_0060, register)] {
            pci.set_address(address);
            pci.port_write(DATA, &(half as u32).to_le_bytes());
        }
    }

    #[test]
    fn ports_and_memory_show_the_same_registers() {
        let mut pci = Pci::new();
        assert_eq!(by_port(&mut pci, 0x8000_0000), 0x29c0_8086);
        assert_eq!(by_port(&mut pci, 0x8000_f800), 0x2918_8086);
        pci.set_address(0x8000_f840);
        pci.port_write(DATA + 1, &[0x06]);
        for base in [0xb000_0000, 0xe000_0000, 0x8_0000_0000] {
            open(&mut pci, base | 1);
            let (function, at) = pci.in_window(Gpa::new(base + 0xf_8040)).unwrap();
            let mut data = [0; 2];
            pci.read(function, at, &mut data);
            assert_eq!(data, [0, 6]);
        }
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
    fn the_window_is_where_the_register_says_and_as_long() {
        let mut pci = Pci::new();
        assert_eq!(pci.window(), None);
        for (register, at, buses) in [
            (0xb000_0001, 0xb000_0000, 256_u16),
            (0xb800_0001, 0xb000_0000, 256),
            (0xb800_0003, 0xb800_0000, 128),
            (0xbc00_0003, 0xb800_0000, 128),
            (0xbc00_0005, 0xbc00_0000, 64),
            (0xffff_ffff_ffff_fff9, 0xf_f000_0000, 256),
        ] {
            open(&mut pci, register);
            assert_eq!(pci.window(), Some(Window { at, buses }), "{register:#x}");
            let end = at + u64::from(buses) * 0x10_0000;
            for outside in [at - 1, end] {
                assert_eq!(pci.in_window(Gpa::new(outside)), None, "{register:#x}");
            }
            let last = Some(((u32::from(buses) * 256 - 1) as u16, 0xfff));
            assert_eq!(pci.in_window(Gpa::new(end - 1)), last, "{register:#x}");
        }
        // Closed, or of a reserved length.
        for register in [0xb000_0000, 0xb000_0007] {
            open(&mut pci, register);
            assert_eq!(pci.window(), None, "{register:#x}");
        }
    }
}
