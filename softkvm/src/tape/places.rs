//! Places in a program's memory, named by how a call leads to them, so that a record holds wherever the program is loaded.

use std::fmt;

use super::fields::Field::{Address, Descriptor, Time};
use super::fields::{Field, of_argument, of_command};
use super::format::Vendor;

/// A place: the offsets of the fields whose addresses lead to it, from the call's argument on, and the distance from there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) path: Vec<usize>,
    pub(super) distance: i64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("arg")?;
        for offset in &self.path {
            write!(f, "*{offset}")?;
        }
        let sign = if self.distance < 0 { '-' } else { '+' };
        write!(f, "{sign}{:x}", self.distance.unsigned_abs())
    }
}

impl Place {
    /// The path to what the address at an offset behind the place leads to.
    pub(super) fn behind(&self, at: usize) -> Vec<usize> {
        let mut path = self.path.clone();
        path.push((self.distance as usize).saturating_add(at));
        path
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("arg")?;
        let at = rest.find(['+', '-'])?;
        let (path, distance) = rest.split_at(at);
        let mut offsets = path.split('*');
        offsets.next().filter(|first| first.is_empty())?;
        let size = i64::from_str_radix(&distance[1..], 16).ok()?;
        Some(Self {
            path: offsets
                .map(|offset| offset.parse().ok())
                .collect::<Option<_>>()?,
            distance: match distance.starts_with('-') {
                true => size.checked_neg()?,
                false => size,
            },
        })
    }
}

/// The addresses that a call has led to so far.
pub(super) struct Bases {
    vendor: Vendor,
    number: u32,
    /// The first four bytes of the argument's structure.
    id: u32,
    known: Vec<(Vec<usize>, u64)>,
}

/// The farthest that a place lies behind an address that leads to it.
const FARTHEST: u64 = 64 << 20;
const PAGE: u64 = 4096;

impl Bases {
    pub(super) fn new(vendor: Vendor, number: u32, argument: u64) -> Self {
        Self {
            vendor,
            number,
            id: 0,
            known: vec![(Vec::new(), argument)],
        }
    }

    /// The address that a path leads to, if the call has led to it.
    fn base(&self, path: &[usize]) -> Option<u64> {
        let found = self.known.iter().find(|(other, _)| other == path)?;
        Some(found.1)
    }

    /// The address that the field at an offset behind a place had when it was read; 0 if it was not.
    pub(super) fn address(&self, place: &Place, at: usize) -> u64 {
        self.base(&place.behind(at)).unwrap_or(0)
    }

    /// The address of a place, if the call has led to it.
    pub(super) fn resolve(&self, place: &Place) -> Option<u64> {
        let base = self.base(&place.path)?;
        Some(base.wrapping_add(place.distance as u64))
    }

    /// True if the place is no more than a page from an address that leads to it.
    pub(super) fn is_near(place: &Place) -> bool {
        place.distance.unsigned_abs() < PAGE
    }

    /// The place of an address: from the nearest address that leads to it.
    pub(super) fn place(&self, address: u64) -> Option<Place> {
        let own = u64::from(self.number >> 16 & 0x3fff);
        let (_, argument) = self.known.first()?;
        let mut nearest: Option<(u64, Place)> = None;
        for (path, base) in &self.known {
            let behind = address.wrapping_sub(*base);
            let in_front = base.wrapping_sub(address);
            let (rank, distance) = match () {
                () if path.is_empty() && behind < own => (0, behind as i64),
                () if behind < PAGE => (1 + behind, behind as i64),
                // The kernel rounds the addresses of pages down.
                () if in_front < PAGE && base != argument => {
                    (1 + PAGE + in_front, -(in_front as i64))
                }
                () if behind < FARTHEST => (1 + 2 * PAGE + behind, behind as i64),
                () => continue,
            };
            if nearest.as_ref().is_none_or(|(best, _)| rank < *best) {
                let path = path.clone();
                nearest = Some((rank, Place { path, distance }));
            }
        }
        nearest.map(|(_, place)| place)
    }

    /// The fields of the structure at the end of a path.
    fn fields(&self, path: &[usize]) -> Vec<Field> {
        match path {
            [] => of_argument(self.vendor, self.number, self.id),
            [_] => of_command(self.vendor, self.number, self.id),
            _ => Vec::new(),
        }
    }

    /// The fields that lie in `bytes` bytes at a place, from there on.
    pub(super) fn fields_in(&self, place: &Place, bytes: usize) -> Vec<Field> {
        let start = usize::try_from(place.distance).ok();
        let inside = |at: usize, len: usize| {
            let at = at.checked_sub(start?)?;
            (at + len <= bytes).then_some(at)
        };
        let fields = self.fields(&place.path).into_iter();
        let found = fields.filter_map(|field| match field {
            Address(at) => inside(at, 8).map(Address),
            Descriptor(at) => inside(at, 4).map(Descriptor),
            Time(at) => inside(at, 8).map(Time),
        });
        found.collect()
    }

    /// Learns the addresses in bytes that were read at a place.
    pub(super) fn learn(&mut self, place: &Place, bytes: &[u8]) {
        if place.path.is_empty()
            && place.distance == 0
            && let Some(id) = bytes.first_chunk()
        {
            self.id = u32::from_le_bytes(*id);
        }
        for field in self.fields_in(place, bytes.len()) {
            let Address(at) = field else { continue };
            let value = long(bytes, at);
            if value != 0 {
                self.known.push((place.behind(at), value));
            }
        }
    }
}

/// Eight bytes as a number; those that are missing are 0.
pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    for (to, from) in value.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use kvm_ops_uapi::{ioctl, sev};

    use super::*;

    #[test]
    fn places_are_read_back_as_they_were_written() {
        for (path, distance) in [(vec![], 0), (vec![8], -16), (vec![8, 56], 0x1234)] {
            let place = Place { path, distance };
            assert_eq!(Place::parse(&place.to_string()), Some(place));
        }
        for wrong in [
            "",
            "arg",
            "arg*+0",
            "arg*x+0",
            "arg8+0",
            "arg+g",
            "arg-",
            "arg+8000000000000000",
        ] {
            assert_eq!(Place::parse(wrong), None, "{wrong}");
        }
    }

    /// The number of a slot, here that of DBG_DECRYPT, is no command.
    #[test]
    fn a_call_without_commands_leads_no_further_than_its_argument() {
        let clear = ioctl::KVM_CLEAR_DIRTY_LOG.number();
        let mut bases = Bases::new(Vendor::Amd, clear, 0x1000);
        let mut log = [0; 24];
        log[0] = sev::DBG_DECRYPT as u8;
        log[16..].copy_from_slice(&0x5000_u64.to_le_bytes());
        bases.learn(&Place::default(), &log);
        let bitmap = bases.place(0x5000).unwrap();
        assert_eq!(bitmap.to_string(), "arg*16+0");
        assert_eq!(bases.fields_in(&bitmap, 64), []);
    }

    #[test]
    fn a_place_is_named_from_the_nearest_address_and_found_elsewhere() {
        let number = ioctl::KVM_MEMORY_ENCRYPT_OP.number();
        let lead = |argument: u64, data: u64, blob: u64| {
            let mut bases = Bases::new(Vendor::Amd, number, argument);
            let mut cmd = [0; 24];
            cmd[0] = sev::LAUNCH_MEASURE as u8;
            cmd[8..16].copy_from_slice(&data.to_le_bytes());
            let at = bases.place(argument).unwrap();
            bases.learn(&at, &cmd);
            let at = bases.place(data).unwrap();
            bases.learn(&at, &[&blob.to_le_bytes()[..], &[0; 8]].concat());
            bases
        };
        let recorded = lead(0x1000, 0x1018, 0x9000);
        let elsewhere = lead(0x7000_0000, 0x5000, 0x6000_0010);
        for (address, text, there) in [
            (0x1008, "arg+8", 0x7000_0008),
            (0x101c, "arg*8+4", 0x5004),
            (0x9010, "arg*8*0+10", 0x6000_0020),
            (0x8ff0, "arg*8*0-10", 0x6000_0000),
        ] {
            let place = recorded.place(address).unwrap();
            assert_eq!(place.to_string(), text);
            assert_eq!(elsewhere.resolve(&place), Some(there));
        }
        assert_eq!(recorded.place(0x7fff_0000_0000), None);
    }
}
