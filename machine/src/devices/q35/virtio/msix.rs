//! MSI-X (PCI Local Bus Specification 3.0, 6.8.2): a table of messages, one for each vector.

use kvm_ops::Msi;

/// Bytes of an entry: address, data, and a word with the mask.
const ENTRY: usize = 16;
const MASKED: u32 = 1;
/// The table's word of an entry that holds the mask.
const CONTROL: usize = 3;

/// Bits of the capability's control word.
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// The bits that the guest can change.
pub(super) const CONTROL_BITS: u16 = ENABLE | MASK_ALL;

pub(super) struct Msix {
    control: u16,
    entries: Vec<[u32; 4]>,
    /// One bit a vector: its message waits for the mask to go.
    pending: u64,
}

impl Msix {
    /// A table of that many vectors, up to 64.
    pub(super) fn new(vectors: u16) -> Self {
        Self {
            control: 0,
            entries: vec![[0, 0, 0, MASKED]; vectors.into()],
            pending: 0,
        }
    }

    pub(super) const fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    pub(super) const fn vectors(&self) -> usize {
        self.entries.len()
    }

    /// Asks for the message of a vector: it is sent now, or when it is no more masked. Nothing happens for a vector that
    /// there is not.
    pub(super) fn ask(&mut self, vector: u16) -> Option<Msi> {
        if usize::from(vector) >= self.entries.len() {
            return None;
        }
        self.pending |= 1 << vector;
        self.due(vector.into())
    }

    /// The message of a vector that is pending and not masked.
    fn due(&mut self, vector: usize) -> Option<Msi> {
        let [low, high, data, control] = *self.entries.get(vector)?;
        let open = self.control & CONTROL_BITS == ENABLE && control & MASKED == 0;
        if !open || self.pending & 1 << vector == 0 {
            return None;
        }
        self.pending &= !(1 << vector);
        let address = u64::from(high) << 32 | u64::from(low);
        Some(Msi { address, data })
    }

    /// Sets the capability's control word. Returns the messages that waited for it.
    pub(super) fn set_control(&mut self, control: u16) -> Vec<Msi> {
        self.control = control & CONTROL_BITS;
        let vectors = 0..self.entries.len();
        vectors.filter_map(|vector| self.due(vector)).collect()
    }

    /// Reads the table.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        let bytes = self
            .entries
            .as_flattened()
            .iter()
            .flat_map(|word| word.to_le_bytes());
        copy(bytes.skip(offset), data);
    }

    /// Reads the array of pending bits.
    pub(super) fn read_pending(&self, offset: usize, data: &mut [u8]) {
        copy(self.pending.to_le_bytes().into_iter().skip(offset), data);
    }

    /// Writes words of the table, which are accessed whole. Returns the messages that waited for that.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Vec<Msi> {
        let (words, []) = data.as_chunks::<4>() else {
            return Vec::new();
        };
        if !offset.is_multiple_of(4) {
            return Vec::new();
        }
        let mut messages = Vec::new();
        for (at, word) in (offset..).step_by(4).zip(words) {
            let Some(entry) = self.entries.get_mut(at / ENTRY) else {
                break;
            };
            let value = u32::from_le_bytes(*word);
            let index = at % ENTRY / 4;
            entry[index] = match index {
                CONTROL => value & MASKED,
                _ => value,
            };
            messages.extend(self.due(at / ENTRY));
        }
        messages
    }
}

/// Fills `data` with the bytes, and with zeros behind them.
fn copy(bytes: impl Iterator<Item = u8>, data: &mut [u8]) {
    let bytes = bytes.chain(std::iter::repeat(0));
    data.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MSI: Msi = Msi {
        address: 0x1_fee0_1000,
        data: 0x41,
    };

    fn set(table: &mut Msix, vector: usize, control: u32) -> Vec<Msi> {
        let words = [0xfee0_1000, 1, 0x41, control];
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        table.write(vector * ENTRY, &bytes)
    }

    fn pending(table: &Msix) -> u8 {
        let mut data = [0];
        table.read_pending(0, &mut data);
        data[0]
    }

    #[test]
    fn a_message_is_sent_once_and_waits_for_each_mask_to_go() {
        let mut table = Msix::new(2);
        assert_eq!(table.ask(1), None, "not enabled");
        assert_eq!(table.set_control(ENABLE | MASK_ALL), []);
        assert_eq!(set(&mut table, 1, 0), []);
        assert_eq!(pending(&table), 2);
        assert_eq!(table.set_control(ENABLE), [MSI]);
        assert_eq!((table.ask(1), pending(&table)), (Some(MSI), 0));
        set(&mut table, 1, 1);
        assert_eq!((table.ask(1), table.ask(1)), (None, None));
        assert_eq!(set(&mut table, 1, 0), [MSI]);
        assert_eq!(set(&mut table, 1, 0), []);
    }

    #[test]
    fn accesses_beyond_the_table_or_to_parts_of_a_word_do_nothing() {
        let mut table = Msix::new(1);
        table.set_control(ENABLE);
        assert_eq!(table.ask(1), None);
        assert_eq!(table.ask(u16::MAX), None);
        assert_eq!(set(&mut table, 1, 0), []);
        table.write(1, &[1; 4]);
        table.write(0, &[1; 3]);
        let mut data = [0xff; 24];
        table.read(0, &mut data);
        let mut entry = [0; 24];
        entry[12] = 1;
        assert_eq!(data, entry);
        table.read_pending(4096, &mut data);
        assert_eq!(data, [0; 24]);
    }
}
