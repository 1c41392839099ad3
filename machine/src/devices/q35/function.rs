//! One function of a PCI device: its configuration space of 256 bytes (PCI Local Bus Specification 3.0, 6.1).

#[cfg(feature = "virtio")]
mod card;
#[cfg(feature = "virtio")]
pub(super) use card::Capability;

/// Offsets in the header.
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const CLASS: usize = 0x09;
const HEADER_TYPE: usize = 0x0e;
const INTERRUPT_LINE: usize = 0x3c;
/// The end of the header; registers behind it are the device's.
const HEADER: usize = 0x40;
pub(super) const SIZE: usize = 0x100;

/// Bits of the command register that can be set: ports, memory, bus master, INTx disabled.
const COMMAND_BITS: u16 = 0x0407;
const MULTI_FUNCTION: u8 = 0x80;

pub(super) struct Function {
    bytes: [u8; SIZE],
    /// The bits that the guest can change.
    writable: [u8; SIZE],
}

impl Function {
    /// A function without base addresses, whose own registers all keep what is written. `class` is class, subclass and
    /// programming interface.
    pub(super) fn new(vendor: u16, device: u16, class: u32) -> Self {
        let mut function = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
        };
        function.put(VENDOR, &vendor.to_le_bytes());
        function.put(DEVICE, &device.to_le_bytes());
        function.put(CLASS, &class.to_le_bytes()[..3]);
        function.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_BITS.to_le_bytes());
        function.writable[INTERRUPT_LINE] = 0xff;
        function.writable[HEADER..].fill(0xff);
        function
    }

    /// The same as a function of a device that has others.
    pub(super) fn multi_function(mut self) -> Self {
        self.bytes[HEADER_TYPE] |= MULTI_FUNCTION;
        self
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Bytes beyond the space read as ones.
    pub(super) fn read(&self, at: usize, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(at..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    pub(super) fn write(&mut self, at: usize, data: &[u8]) {
        for (byte, at) in data.iter().zip(at..) {
            if let (Some(now), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *now = *now & !mask | byte & mask;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_fixed_and_registers_behind_it_keep_what_is_written() {
        let mut function = Function::new(0x8086, 0x29c0, 0x06_0000);
        let before = function.bytes;
        function.write(0, &[0xff; SIZE]);
        let changed = |range: std::ops::Range<usize>| {
            let both = before[range.clone()].iter().zip(&function.bytes[range]);
            both.filter(|(a, b)| a != b).count()
        };
        // Two bytes of the command register, and the interrupt line.
        assert_eq!((changed(0..HEADER), changed(HEADER..SIZE)), (3, 0xc0));
        let mut command = [0; 2];
        function.read(COMMAND, &mut command);
        assert_eq!(u16::from_le_bytes(command), COMMAND_BITS);
    }

    #[test]
    fn accesses_over_the_end_stay_inside() {
        let mut function = Function::new(1, 2, 3);
        function.write(0xfe, &[1, 2, 3, 4]);
        let mut data = [0; 4];
        function.read(0xfe, &mut data);
        assert_eq!(data, [1, 2, 0xff, 0xff]);
    }
}
