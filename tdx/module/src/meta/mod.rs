//! Metadata fields: identifiers, who may access what, values.

pub(crate) mod list;
pub(crate) mod place;
pub(crate) mod sys;
pub(crate) mod table;
pub(crate) mod td;
pub(crate) mod td_write;
pub(crate) mod vcpu;
pub(crate) mod vcpu_initial;
pub(crate) mod vcpu_store;
pub(crate) mod vcpu_write;
pub(crate) mod vmcs;

use crate::call::Leaf;
use crate::status::Code;
use place::{Context, Place};
use table::{Agent, id};

pub(crate) const VENDOR_ID: u32 = 0x8086;
pub(crate) const BUILD_NUMBER: u16 = 0;
pub(crate) const MAJOR_VERSION: u16 = 1;
pub(crate) const MINOR_VERSION: u16 = 5;
pub(crate) const UPDATE_VERSION: u16 = 5;

pub(crate) fn unknown<T>() -> Leaf<T> {
    Err(Code::METADATA_FIELD_ID_INCORRECT.status())
}

pub(crate) fn not_readable<T>() -> Leaf<T> {
    Err(Code::METADATA_FIELD_NOT_READABLE.status())
}

pub(crate) fn not_writable<T>() -> Leaf<T> {
    Err(Code::METADATA_FIELD_NOT_WRITABLE.status())
}

pub(crate) fn not_valid<T>() -> Leaf<T> {
    Err(Code::METADATA_FIELD_VALUE_NOT_VALID.status())
}

/// The element that a leaf for single elements names.
pub(crate) fn locate(context: Context, id: u64) -> Leaf<Place> {
    let id = context.adopt(id);
    if id & id::RESERVED != 0 {
        return unknown();
    }
    context.find(id).map_or_else(unknown, Ok)
}

/// The identifier that the null identifier is answered with.
pub(crate) fn first_id(context: Context, agent: Agent) -> u64 {
    context
        .first(|f| f.read_mask(agent))
        .map_or(u64::MAX, |place| place.id())
}

/// An element that has been read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Read {
    pub(crate) value: u64,
    context: Context,
    agent: Agent,
    id: u64,
    place: Place,
}

impl Read {
    /// The identifier after it.
    pub(crate) fn next(&self) -> u64 {
        self.context.next_id(self.id, &self.place, self.agent)
    }
}

/// Reads an element for a leaf that reads single ones. `value` gives its value, however wide.
pub(crate) fn read(
    context: Context,
    agent: Agent,
    id: u64,
    value: impl FnOnce(&Place) -> Leaf<u64>,
) -> Leaf<Read> {
    let place = locate(context, id)?;
    let mask = place.field().read_mask(agent);
    if mask == 0 {
        return not_readable();
    }
    let value = value(&place)? & place.field().element_mask() & mask;
    Ok(Read {
        value,
        context,
        agent,
        id,
        place,
    })
}

/// A write of some bits of an element.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Write {
    pub(crate) id: u64,
    pub(crate) value: u64,
    /// Bits to write.
    pub(crate) mask: u64,
}

impl Write {
    /// The new value, if the agent may write these bits so; the others keep `old`.
    pub(crate) fn merge(&self, old: u64, allowed: u64) -> Leaf<u64> {
        let writable = allowed & self.mask;
        if writable == 0 {
            return not_writable();
        }
        if (old ^ self.value) & self.mask & !allowed != 0 {
            return not_valid();
        }
        Ok(old & !writable | self.value & writable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn write(value: u64, mask: u64) -> Write {
        Write { id: 0, value, mask }
    }

    #[test]
    fn bits_outside_the_mask_keep_their_value() {
        assert_eq!(write(0xFF, 0x0F).merge(0x30, 0xFF), Ok(0x3F));
        assert_eq!(write(0, 0x10).merge(0x30, 0x10), Ok(0x20));
    }

    #[test]
    fn a_selected_bit_the_agent_may_not_write_must_not_change() {
        let not_valid = Err(Code::METADATA_FIELD_VALUE_NOT_VALID.status());
        assert_eq!(write(0x1F, 0xFF).merge(0x10, 0x0F), Ok(0x1F));
        assert_eq!(write(0x0F, 0xFF).merge(0x10, 0x0F), not_valid);
        assert_eq!(write(1 << 8 | 1, u64::MAX).merge(0, 0xFF), not_valid);
    }

    #[test]
    fn a_write_of_no_writable_bit_is_refused_first() {
        let not_writable = Err(Code::METADATA_FIELD_NOT_WRITABLE.status());
        assert_eq!(write(1, 0).merge(0, u64::MAX), not_writable);
        assert_eq!(write(u64::MAX, 0xF0).merge(0, 0x0F), not_writable);
    }
}
