//! Service TDs: the rules for binding them, and the handles by which they name their targets.
//!
//! A *service TD* works for others, its *targets*: a migration TD puts session keys into them. The host binds it to
//! a target, by the hash of its identity ([`info_hash`]); before the service TD exists, the hash alone can be
//! bound. The service TD then names the target by a *handle* that only it can make.

mod bind;

pub(crate) use bind::{bind, prebind};

use crate::measure::{Digest384, Mr};
use crate::td::Td;
use crate::tdinfo;
use sha2::{Digest, Sha384};

/// Service TDs a TD can have.
pub(crate) const SLOTS: u64 = 1;
/// The one type of service TD there is: migration TD.
const MIGRATION_TD: u64 = 0;

/// State of a binding.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub(crate) enum State {
    #[default]
    NotBound = 0,
    /// The hash is fixed, the TD is not.
    PreBound = 1,
    Bound = 2,
}

/// A slot of the bindings table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Binding {
    pub(crate) state: State,
    pub(crate) kind: u16,
    pub(crate) attributes: u64,
    pub(crate) info_hash: Mr,
    pub(crate) uuid: [u64; 4],
}

/// The bindings of a TD, and their digest in TDINFO.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Bindings {
    pub(crate) slot: Binding,
    /// SERVTD_NUM
    pub(crate) num: u16,
    /// SERVTD_HASH
    pub(crate) hash: Mr,
}

impl Bindings {
    /// The bindings table as metadata shows it.
    pub(crate) fn words(&self) -> [u64; 16] {
        let b = &self.slot;
        let mut words = [0; 16];
        words[0] = b.state as u64 | u64::from(b.kind) << 16;
        words[1] = b.attributes;
        words[2..6].copy_from_slice(&b.uuid);
        for (word, bytes) in words[6..12].iter_mut().zip(b.info_hash.0.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
        }
        words
    }

    /// Computes SERVTD_HASH anew: 0 if nothing is bound.
    pub(crate) fn measure(&mut self) {
        let b = &self.slot;
        self.hash = match b.state {
            State::NotBound => Mr::default(),
            State::PreBound | State::Bound => {
                let mut hash = Sha384::new();
                hash.update(b.info_hash.0);
                hash.update(b.kind.to_le_bytes());
                hash.update(b.attributes.to_le_bytes());
                Mr(hash.finalize().into())
            }
        };
    }
}

/// The hash a binding compares: of TDINFO, in which the attributes of the binding blank some fields.
pub(crate) fn info_hash(td: &Td, attributes: u64) -> Mr {
    let mut info = tdinfo::td_info(td);
    for (n, field) in tdinfo::FIELDS.into_iter().enumerate() {
        if attributes >> (IGNORE_SHIFT + n as u32) & 1 != 0 {
            info[field].fill(0);
        }
    }
    let hash: Digest384 = Sha384::digest(info).into();
    Mr(hash)
}

/// Bit of the attributes that blanks the first field of TDINFO.
const IGNORE_SHIFT: u32 = 32;
/// Bit 0, and a bit for each field of TDINFO.
const ATTRIBUTES: u64 = 1 | ((1 << tdinfo::FIELDS.len()) - 1) << IGNORE_SHIFT;

/// The number by which a service TD names a target.
pub(crate) fn handle(slot: u64, target: u64, service_uuid: &[u64; 4]) -> u64 {
    (slot | target).wrapping_add(service_uuid[0])
}

/// Slot and PA of the target's TDR behind a handle of this service TD.
pub(crate) fn open_handle(handle: u64, service_uuid: &[u64; 4]) -> (u64, u64) {
    let opened = handle.wrapping_sub(service_uuid[0]);
    const PA: u64 = 0x000F_FFFF_FFFF_F000;
    (opened & 0xFFF, opened & PA)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_handle_opens_only_for_the_service_td_it_was_made_for(page in 0..1u64 << 40, uuid: [u64; 4], other: u64) {
            let handle = handle(0, page << 12, &uuid);
            prop_assert_eq!(open_handle(handle, &uuid), (0, page << 12));
            prop_assume!(other.wrapping_sub(uuid[0]) << 12 != 0);
            prop_assert_ne!(open_handle(handle, &[other, 0, 0, 0]), (0, page << 12));
        }
    }

    #[test]
    fn the_table_shows_state_attributes_uuid_and_hash() {
        let bindings = Bindings {
            slot: Binding {
                state: State::Bound,
                kind: 0,
                attributes: 1,
                info_hash: Mr(core::array::from_fn(|n| n as u8)),
                uuid: [5, 6, 7, 8],
            },
            ..Bindings::default()
        };
        let words = bindings.words();
        assert_eq!(words[..6], [2, 1, 5, 6, 7, 8]);
        assert_eq!(words[6], 0x0706_0504_0302_0100);
        assert_eq!(words[12..], [0; 4]);
    }

    #[test]
    fn nothing_bound_measures_as_zero() {
        let mut bindings = Bindings::default();
        bindings.measure();
        assert_eq!(bindings.hash, Mr::default());
        bindings.slot.state = State::PreBound;
        bindings.measure();
        assert_ne!(bindings.hash, Mr::default());
    }
}
