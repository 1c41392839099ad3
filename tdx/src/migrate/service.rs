//! The migration TD, a service TD that holds the session's keys, and the contexts of streams.

use core::sync::atomic::Ordering;

use kvm_ops::{Error, Field, Host, Result};

use super::MAX_STREAMS;
use crate::TdxVm;
use crate::td::Td;

/// A TD's binding to its migration TD, as that one names it in TDG.SERVTD.RD and TDG.SERVTD.WR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The binding handle, RCX.
    pub handle: u64,
    /// The bound TD's UUID, R10 to R13.
    pub uuid: [u64; 4],
}

impl<H: Host> TdxVm<H> {
    /// Binds `service` as the migration TD of this TD (TDH.SERVTD.BIND). Done before the TD is
    /// finalised, its measurement has the migration TD's; later only a TD that fits what was
    /// [prebound](kvm_ops::TdParams::migration_td), or that was bound before, is taken.
    ///
    /// `attributes` are SERVTD_ATTR: bits 42:32 leave parts of the migration TD's TDINFO out of
    /// its hash, 0 none.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a TD that is not created yet; [`Error::Firmware`] with the module's
    /// refusal, [`Error::Busy`].
    pub fn bind_migration_td(&self, service: &Self, attributes: u64) -> Result<Binding> {
        let (td, service) = (self.td(), service.td());
        td.require_live()?;
        td.calls()?
            .servtd_bind(td.tdr()?, service.tdr()?, attributes)
            .map_err(|failed| td.failed(&failed))
    }
}

impl<H: Host> Td<H> {
    /// Gives the module contexts for the backward stream and `wanted` forward streams, as far as it
    /// has none. They stay for the TD's life.
    pub(super) fn create_streams(&self, wanted: u16) -> Result<()> {
        if wanted == 0 || wanted > MAX_STREAMS {
            return Err(Error::Invalid(Field::Stream, wanted.into()));
        }
        let (calls, tdr) = (self.calls()?, self.tdr()?);
        let streams = &self.journey.streams;
        // The first context is the backward stream's.
        while streams.load(Ordering::Acquire) <= wanted {
            self.give(|page| calls.mig_stream_create(page, tdr))?;
            streams.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }
}
