//! Bytes as a record has them: addresses and descriptors, which differ from run to run, in a form that does not.

use super::fields::Field;
use super::places::{Bases, Place, long};

/// A descriptor that is not open, or an open file of somebody else's. Smaller numbers are those of the run's files.
pub(super) const CLOSED: u32 = u32::MAX;
pub(super) const FOREIGN: u32 = u32::MAX - 1;

fn word(bytes: &[u8], at: usize) -> u32 {
    long(bytes, at) as u32
}

/// What was read: an address is 0 or 1, a descriptor the number of its file, a time 0.
pub(super) fn read(
    bases: &Bases,
    place: &Place,
    bytes: &[u8],
    file: impl Fn(i32) -> u32,
) -> Vec<u8> {
    let mut canon = bytes.to_vec();
    for field in bases.fields_in(place, bytes.len()) {
        match field {
            Field::Address(at) => {
                let is_given = u64::from(long(bytes, at) != 0);
                canon[at..at + 8].copy_from_slice(&is_given.to_le_bytes());
            }
            Field::Descriptor(at) => {
                let number = file(word(bytes, at) as i32);
                canon[at..at + 4].copy_from_slice(&number.to_le_bytes());
            }
            Field::Time(at) => canon[at..at + 8].fill(0),
        }
    }
    canon
}

/// What was written: an address as its distance from the one that was read there. Descriptors and times are never changed.
pub(super) fn written(bases: &Bases, place: &Place, bytes: &[u8]) -> Vec<u8> {
    let mut canon = bytes.to_vec();
    for field in bases.fields_in(place, bytes.len()) {
        match field {
            Field::Address(at) => {
                let distance = long(bytes, at).wrapping_sub(bases.address(place, at));
                canon[at..at + 8].copy_from_slice(&distance.to_le_bytes());
            }
            Field::Descriptor(at) => canon[at..at + 4].fill(0),
            Field::Time(at) => canon[at..at + 8].fill(0),
        }
    }
    canon
}

/// The bytes to write in this run, over what is there.
pub(super) fn restored(bases: &Bases, place: &Place, canon: &[u8], there: &[u8]) -> Vec<u8> {
    let mut bytes = canon.to_vec();
    for field in bases.fields_in(place, canon.len()) {
        match field {
            Field::Address(at) => {
                let address = long(canon, at).wrapping_add(bases.address(place, at));
                bytes[at..at + 8].copy_from_slice(&address.to_le_bytes());
            }
            Field::Descriptor(at) => bytes[at..at + 4].copy_from_slice(&there[at..at + 4]),
            Field::Time(at) => bytes[at..at + 8].copy_from_slice(&there[at..at + 8]),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use kvm_ops_uapi::ioctl;

    use super::*;
    use crate::tape::format::Vendor;

    #[test]
    fn the_times_at_which_a_program_loaded_its_timers_counts_are_no_difference() {
        let number = ioctl::KVM_SET_PIT2.number();
        let bases = Bases::new(Vendor::Intel, number, 0x1000);
        let canon = |bytes: &[u8; 112]| read(&bases, &Place::default(), bytes, |_| FOREIGN);
        let first = [0x11; 112];
        for at in 0..first.len() {
            let mut second = first;
            second[at] = 0x22;
            let is_time = [16..24, 40..48, 64..72]
                .iter()
                .any(|time| time.contains(&at));
            assert_eq!(canon(&first) == canon(&second), is_time, "{at}");
        }
    }

    #[test]
    fn what_is_written_back_keeps_this_runs_addresses_and_descriptors() {
        let number = ioctl::KVM_MEMORY_ENCRYPT_OP.number();
        let command = |data: u64, fd: u32, error: u32| {
            let words = [101, 0, data as u32, (data >> 32) as u32, error, fd];
            words.map(u32::to_le_bytes).concat()
        };
        let at = Place::default();
        let learned = |bytes: &[u8]| {
            let mut bases = Bases::new(Vendor::Amd, number, 0x1000);
            bases.learn(&at, bytes);
            bases
        };
        let (one, two) = (command(0x5000, 7, 0), command(0x7fff_0000_1000, 9, 0));
        let (recorded, now) = (learned(&one), learned(&two));
        let file = |number: i32| {
            if number == 7 || number == 9 {
                3
            } else {
                FOREIGN
            }
        };
        let canon = read(&recorded, &at, &one, file);
        assert_eq!(canon, read(&now, &at, &two, file));
        assert_ne!(canon, read(&now, &at, &command(0, 9, 0), file));
        assert_ne!(canon, read(&now, &at, &command(0x5000, 8, 0), file));
        let canon = written(&recorded, &at, &command(0x5010, 7, 0x16));
        let restored = restored(&now, &at, &canon, &two);
        assert_eq!(restored, command(0x7fff_0000_1010, 9, 0x16));
    }
}
