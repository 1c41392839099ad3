//! QEMU's configuration device, by ports and by DMA (QEMU docs/specs/fw_cfg.rst): how firmware gets what the machine knows,
//! and a kernel to start.

mod dma;
mod items;

use std::collections::BTreeSet;

use kvm_ops::Gpa;

use crate::DeviceMemory;

pub(super) use items::Items;

/// The selector, the data, and the eight bytes of the DMA address, high byte first.
pub(super) const SELECTOR: u16 = 0x510;
pub(super) const DATA: u16 = 0x511;
pub(super) const DMA: u16 = 0x514;
pub(super) const DMA_LAST: u16 = DMA + 7;

/// The DMA address register reads as this.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

pub(super) struct FwCfg {
    items: Items,
    selected: u16,
    /// The keys that were ever selected.
    seen: BTreeSet<u16>,
    offset: usize,
    dma_address: [u8; 8],
}

impl FwCfg {
    pub(super) fn new(items: Items) -> Self {
        Self {
            items,
            selected: 0,
            seen: BTreeSet::new(),
            offset: 0,
            dma_address: [0; 8],
        }
    }

    /// True if the guest has selected the file, whose bytes it may keep.
    pub(super) fn has_shown(&self, file: &str) -> bool {
        self.items
            .key(file)
            .is_some_and(|key| self.seen.contains(&key))
    }

    /// The items, to replace some.
    pub(super) const fn items_mut(&mut self) -> &mut Items {
        &mut self.items
    }

    /// Selects an item, from its first byte on.
    pub(super) fn select(&mut self, key: u16) {
        tracing::trace!(
            key = format_args!("{key:#x}"),
            "item of the configuration device"
        );
        self.selected = key;
        self.seen.insert(key);
        self.offset = 0;
    }

    /// Reads on in the selected item; what is behind its end is zeros.
    pub(super) fn read(&mut self, data: &mut [u8]) {
        let item = self.items.get(self.selected);
        let rest = item.get(self.offset..).unwrap_or_default();
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
        data[len..].fill(0);
        self.skip(data.len());
    }

    fn skip(&mut self, bytes: usize) {
        self.offset = self.offset.saturating_add(bytes);
    }

    pub(super) fn dma_read(port: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(port - DMA)..) {
            *byte = DMA_SIGNATURE.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes a part of the address. Its low half starts the transfer.
    pub(super) fn dma_write(&mut self, port: u16, data: &[u8], memory: &DeviceMemory<'_>) {
        let at = usize::from(port - DMA);
        for (byte, now) in data.iter().zip(self.dma_address.iter_mut().skip(at)) {
            *now = *byte;
        }
        if at + data.len() >= self.dma_address.len() {
            let address = std::mem::take(&mut self.dma_address);
            dma::transfer(self, Gpa::new(u64::from_be_bytes(address)), memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestRam;

    fn device() -> FwCfg {
        let mut items = Items::new(1);
        items.put_file("opt/a", vec![1, 2, 3]);
        items.put_file("opt/b", vec![9; 5000]);
        FwCfg::new(items)
    }

    const FIRST_FILE: u16 = 0x20;

    #[test]
    fn an_item_is_read_byte_by_byte_and_zeros_follow() {
        let mut device = device();
        device.select(FIRST_FILE);
        let mut data = [0xff; 5];
        data.chunks_mut(1).for_each(|byte| device.read(byte));
        assert_eq!(data, [1, 2, 3, 0, 0]);
        device.select(0);
        device.read(&mut data[..4]);
        assert_eq!(data[..4], *b"QEMU");
        // A key without an item.
        device.select(0x7fff);
        device.read(&mut data);
        assert_eq!(data, [0; 5]);
    }

    #[test]
    fn the_address_register_tells_that_there_is_dma() {
        let mut data = [0; 4];
        FwCfg::dma_read(DMA + 4, &mut data);
        assert_eq!(data, *b" CFG");
    }

    /// Starts a transfer of these words: control, length and address.
    fn transfer(device: &mut FwCfg, ram: &GuestRam, control: u32, len: u32, to: u64) -> u32 {
        let at = Gpa::new(0x1000);
        let words = [control, len].map(u32::to_be_bytes);
        ram.write(at, words.as_flattened()).unwrap();
        ram.write(Gpa::new(0x1008), &to.to_be_bytes()).unwrap();
        let memory = DeviceMemory::new(ram);
        device.dma_write(DMA, &[0; 4], &memory);
        device.dma_write(DMA + 4, &0x1000_u32.to_be_bytes(), &memory);
        let mut answer = [0; 4];
        ram.read(at, &mut answer).unwrap();
        u32::from_be_bytes(answer)
    }

    const ERROR: u32 = 1;
    const READ: u32 = 2;
    const SKIP: u32 = 4;
    const SELECT: u32 = 8;
    const WRITE: u32 = 16;

    #[test]
    fn dma_selects_skips_and_reads_across_pages() {
        let (mut device, ram) = (device(), GuestRam::new(1 << 20, 0, false).unwrap());
        let key = u32::from(FIRST_FILE + 1) << 16;
        assert_eq!(transfer(&mut device, &ram, key | SELECT | SKIP, 10, 0), 0);
        ram.write(Gpa::new(0x2ff0), &[7; 0x2000]).unwrap();
        assert_eq!(transfer(&mut device, &ram, READ, 5000, 0x2ff0), 0);
        let mut data = [0; 5001];
        ram.read(Gpa::new(0x2ff0), &mut data).unwrap();
        assert!(data[..4990].iter().all(|byte| *byte == 9));
        assert!(data[4990..5000].iter().all(|byte| *byte == 0));
        assert_eq!(data[5000], 7);
    }

    #[test]
    fn dma_refuses_to_write_items_and_to_leave_the_memory() {
        let (mut device, ram) = (device(), GuestRam::new(1 << 20, 0, false).unwrap());
        let key = u32::from(FIRST_FILE) << 16 | SELECT;
        assert_eq!(transfer(&mut device, &ram, key | WRITE, 3, 0x2000), ERROR);
        for (len, to) in [(2, (1 << 20) - 1), (1, u64::MAX), (u32::MAX, 0x2000)] {
            let answer = transfer(&mut device, &ram, key | READ, len, to);
            assert_eq!(answer, ERROR, "{len:#x} bytes to {to:#x}");
        }
        // A request outside of the memory has no place for an answer.
        let memory = DeviceMemory::new(&ram);
        device.dma_write(DMA, &[0xff; 8], &memory);
    }
}
