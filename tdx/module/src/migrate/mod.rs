//! TD migration: streams, bundles and the leaves that export and import a TD.
//!
//! A *migration TD*, bound as a service TD on either side, has put the same session keys into both TDs. The
//! exporter sends *bundles*, each headed by an MBMD with a MAC: the TD's immutable state, its memory in any number
//! of bundles on any number of streams, its mutable state, the states of its vCPUs, and *epoch tokens* between them
//! that order the contents of different streams. Pages that may still change are blocked for writing before they
//! are sent ([`export`]). The carrier of the bundles can neither read nor change them, nor use one twice: the
//! importer compares every counter ([`import`]).

mod bundle;
mod cipher;
mod entries;
pub(crate) mod export;
mod fields;
pub(crate) mod import;
mod interrupt;
mod lists;
mod mbmd;
mod operands;
mod session;
mod stream;
mod transfer;

pub(crate) use stream::Streams;

use crate::call::{Call, Leaf, free_page, tdr};
use crate::lock::LockMode;
use crate::pamt::{PageSize, PageType};
use crate::status::{Code, Operand};

/// TDH.MIG.STREAM.CREATE
pub(crate) fn stream_create(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let tdr = tdr(p, c.regs.rdx, LockMode::Shared, Operand::RDX)?;
    let td = tdr.td;
    let _op_state = c.td_state_in(td, Some(LockMode::Exclusive))?;
    let _mig = operands::lock_migration(td, LockMode::Exclusive)?;
    if usize::from(td.migration().num_migs) >= stream::MAX_STREAMS {
        return Err(Code::MAX_MIGS_NUM_EXCEEDED.status());
    }
    let page = free_page(p, c.regs.rcx, PageSize::Size4K, Operand::RCX)?;
    page.entry.set(PageType::Tdcx, td.pa());
    td.add_children(1);
    td.streams.add_page(c.regs.rcx);
    td.migration().num_migs += 1;
    Ok(())
}
