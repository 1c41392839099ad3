//! Fields of the module and platform (SYS.RD, SYS.RDALL).

use super::list::{self, Element};
use super::place::{Context, Place, is_null};
use super::table::{Agent, Field, id};
use super::{BUILD_NUMBER, MAJOR_VERSION, MINOR_VERSION, Read, UPDATE_VERSION, VENDOR_ID};
use crate::call::Leaf;
use crate::config::{
    MAX_TDMRS, PlatformConfig, TDCS_BASE_PAGES, TDVPS_BASE_PAGES, TDVPS_PAGES_PER_L2,
};
use crate::status::Code;

const PAGE: u64 = 4096;
/// Entries of the list of CMRs.
const CMRS: u64 = 32;
const PAMT_ENTRY_SIZE: u64 = 16;
/// Pages of a migration bundle.
const IMMUTABLE_STATE_PAGES: u64 = 4;
const TD_STATE_PAGES: u64 = 2;
const VCPU_STATE_PAGES: u64 = 5;
const HANDOFF_PAGES: u64 = 15;
/// Streams a TD may have.
pub(crate) const MAX_MIGS: u64 = 512;
/// Attributes a service TD may be bound with.
pub(crate) const SERVTD_ATTR_FIXED0: u64 = 0x7FF_0000_0001;
/// Attributes of an L2 VM's page that a guest may set: R, W, Xs, Xu, VGP, PWA, SSS and "valid".
pub(crate) const GUEST_L2_GPA_ATTR_MASK: u64 = 0x807F;

/// Reads an element.
pub(crate) fn read(cfg: &PlatformConfig, agent: Agent, id: u64) -> Leaf<Read> {
    super::read(Context::Sys, agent, id, |place| Ok(value(cfg, place)))
}

/// The value of an element.
pub(crate) fn value(cfg: &PlatformConfig, place: &Place) -> u64 {
    let (class, code) = place.row_key();
    let i = place.element as usize;
    match (class, code) {
        (0x00, 0) => cfg.packages as u64,
        (0x00, 1) if i < cfg.packages => u64::from(cfg.fms),
        (0x08, 0) => u64::from(VENDOR_ID),
        (0x08, 1) => u64::from(cfg.build_date),
        (0x08, 2) => u64::from(BUILD_NUMBER),
        (0x08, 3) => u64::from(MINOR_VERSION),
        (0x08, 4) => u64::from(MAJOR_VERSION),
        (0x08, 5) => u64::from(UPDATE_VERSION),
        (0x09, 3) => HANDOFF_PAGES,
        (0x0A, 1) => 1,
        (0x0A, 8) => 0x001F_0FBF,
        (0x10, 0) => CMRS,
        (0x10, 0x80) => cfg.cmrs.get(i).map_or(0, |c| c.base),
        (0x10, 0x100) => cfg.cmrs.get(i).map_or(0, |c| c.size),
        (0x11, 0x08) => MAX_TDMRS,
        (0x11, 0x09) => crate::config::MAX_RESERVED_AREAS as u64,
        (0x11, 0x10..=0x12) => PAMT_ENTRY_SIZE,
        (0x18, 0) | (0x18, 0x101) => PAGE,
        (0x18, 0x100) => u64::from(TDCS_BASE_PAGES) * PAGE,
        (0x18, 0x200) => u64::from(TDVPS_BASE_PAGES) * PAGE,
        (0x18, 0x201) => u64::from(TDVPS_PAGES_PER_L2) * PAGE,
        (0x19, 0) => cfg.attributes_fixed0,
        (0x19, 1) => cfg.attributes_fixed1,
        (0x19, 2) => cfg.xfam_fixed0,
        (0x19, 3) => cfg.xfam_fixed1,
        (0x19, 4) => cfg.cpuid_configs.len() as u64,
        (0x19, 6) => cfg.config_flags_fixed0,
        (0x19, 8) => u64::from(cfg.max_vcpus),
        (0x19, 0x400) => cfg
            .cpuid_configs
            .get(i)
            .map_or(u64::MAX, |r| u64::from(r.leaf) | u64::from(r.subleaf) << 32),
        (0x19, 0x500) => cfg.cpuid_configs.get(i / 2).map_or(0, |r| {
            let values = cfg.reported_cpuid(r.leaf, r.subleaf);
            let half = i % 2 * 2;
            u64::from(values[half]) | u64::from(values[half + 1]) << 32
        }),
        (0x19, 0x600) => cfg.arch_capabilities_config_mask,
        (0x19, 0x800) => 1,
        (0x19, 0x810) if i == 0 => u64::from(cfg.fms),
        (0x20, 0x10) => MAX_MIGS,
        (0x20, 0x20) => IMMUTABLE_STATE_PAGES,
        (0x20, 0x21) => TD_STATE_PAGES,
        (0x20, 0x22) => VCPU_STATE_PAGES,
        (0x21, 0) => 1,
        (0x21, 1) => SERVTD_ATTR_FIXED0,
        (0x22, 0) => GUEST_L2_GPA_ATTR_MASK,
        (0x22, 1) => 1,
        (0x22, 3) => 3,
        (0x22, 5) => 7,
        _ => 0,
    }
}

/// Size of the buffer of SYS.RDALL.
pub(crate) const LIST_SIZE: usize = 4096;

/// Result of SYS.RDALL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Dump {
    /// Identifier to go on with, −1 after the last.
    pub(crate) next: u64,
    pub(crate) result: Leaf,
}

/// Writes the fields from `id` on as a list.
///
/// # Errors
/// The identifier is not that of a field.
pub(crate) fn dump(cfg: &PlatformConfig, agent: Agent, id: u64, list: &mut [u8]) -> Leaf<Dump> {
    let mask = |f: &Field| f.read_mask(agent);
    let from = if is_null(id) {
        Context::Sys.first(mask)
    } else {
        Context::Sys.find(id).filter(|place| is_field(id, place))
    };
    let Some(from) = from else {
        return super::unknown();
    };
    let next = list::write(Context::Sys, from, list, mask, |place| element(cfg, place));
    Ok(match next {
        None => Dump {
            next: u64::MAX,
            result: Ok(()),
        },
        Some(place) => Dump {
            next: place.id(),
            result: Err(Code::METADATA_LIST_OVERFLOW.status()),
        },
    })
}

/// The identifier names the first element of a field, in the field's size.
fn is_field(id: u64, place: &Place) -> bool {
    let field = place.field();
    place.element.is_multiple_of(field.elements) && (id ^ field.id) >> id::SIZE_SHIFT & 3 == 0
}

fn element(cfg: &PlatformConfig, place: &Place) -> Element {
    const CPUID_CONFIG_VALUES: (u8, u32) = (0x19, 0x500);
    let row = place.element as usize / 2;
    let unused = place.row_key() == CPUID_CONFIG_VALUES && row >= cfg.cpuid_configs.len();
    // Of a row without sub-leaf the module fills in the first word only.
    if unused && place.element % 2 == 1 {
        return Element::Unwritten;
    }
    Element::Value(value(cfg, place))
}
