//! Metadata fields: the identifiers of SYS.RD, MNG.RD/WR, VP.RD/WR and VM.RD/WR.
//!
//! Identifier: field code 23:0, element size code 33:32, increment size and write-mask-valid bits 51:50,
//! context 54:52, class 61:56, non-architectural flag 63. A look-up uses class and code; context follows from
//! the leaf. The other bits are reserved.

pub(crate) mod sys;
pub(crate) mod td;
pub(crate) mod vcpu;

use crate::call::Leaf;
use crate::status::Code;

pub(crate) const VENDOR_ID: u32 = 0x8086;
pub(crate) const BUILD_DATE: u32 = 20_240_129;
pub(crate) const BUILD_NUMBER: u16 = 0;
pub(crate) const MAJOR_VERSION: u16 = 1;
pub(crate) const MINOR_VERSION: u16 = 5;
pub(crate) const UPDATE_VERSION: u16 = 5;

pub(crate) const FIRST_SYS_HOST: u64 = 0x0000_0002_0000_0000;
pub(crate) const FIRST_SYS_GUEST: u64 = 0x0800_0002_0000_0000;
pub(crate) const FIRST_TD_HOST: u64 = 0x8010_0000_0000_0001;
pub(crate) const FIRST_TD_GUEST: u64 = 0x8010_0003_0000_0020;
pub(crate) const FIRST_VCPU_HOST: u64 = 0x0024_0001_0000_0002;

/// Bits 31:24, 37:34, 46:38, 49:47, 55 and 62.
const RESERVED: u64 = 0xFF << 24 | 0xF << 34 | 0x1FF << 38 | 7 << 47 | 1 << 55 | 1 << 62;
const CONTEXT: u64 = 7 << 52;

/// All ones, whatever the context bits: "which is the first field?".
pub(crate) fn is_first_id_request(id: u64) -> bool {
    id | CONTEXT == u64::MAX
}

/// Class and code of a well-formed identifier.
pub(crate) fn key(id: u64) -> Leaf<Key> {
    if id & RESERVED != 0 {
        return Err(Code::METADATA_FIELD_ID_INCORRECT.status());
    }
    Ok(key_of(id))
}

/// Class and code.
pub(crate) type Key = (u8, u32);

pub(crate) const fn key_of(id: u64) -> Key {
    ((id >> 56) as u8 & 0x3F, id as u32 & 0x00FF_FFFF)
}

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

/// The value a masked write leaves in a field with the given writable bits.
pub(crate) fn masked_write(old: u64, value: u64, mask: u64, writable: u64) -> Leaf<u64> {
    if mask & writable == 0 {
        return not_writable();
    }
    if (old ^ value) & mask & !writable != 0 {
        return not_valid();
    }
    Ok(old & !mask | value & mask)
}
