//! The end of a guest in firmware, and of its ASID. Each step that fails is listed as a leak.

use kvm_ops::{Asid, Error, Host, Level, Pfn, PspPort, Result};
use zerocopy::little_endian::{U32, U64};

use crate::command::{self, Command};
use crate::context::{Context, GuestState, Identity};
use crate::sp::{Held, Sp, base};

impl<H: Host> Sp<'_, H> {
    /// Gives the guest back to firmware and the ASID to its pool. What firmware keeps is leaked. The
    /// pages of an SNP guest went before (`drain_private`).
    pub(crate) fn decommission(&self, context: &mut Context) {
        // Linux ignores these results, and the ASID's next guest pays for it.
        let kept = match context.identity.take() {
            Some(Identity::Handle(handle)) => self.end_legacy(handle).err(),
            Some(Identity::Gctx(gctx)) => self.destroy_gctx(gctx).err(),
            None => None,
        };
        context.state = GuestState::Uninit;
        // The account of a leaked ASID does not pay for ever.
        drop(context.charge.take());
        let Some(asid) = context.asid.take() else {
            return;
        };
        match kept {
            None => {
                self.retire(asid, context.soiled);
                self.books.key_freed();
            }
            Some(error) => self.leak_asid(asid, error),
        }
    }

    /// Leaves guest and ASID to firmware for good, and lists them.
    pub(crate) fn give_up(&self, context: &mut Context, error: Error) {
        match context.identity.take() {
            Some(Identity::Gctx(gctx)) => self.books.leak_page(gctx, Level::Size4K, error),
            Some(Identity::Handle(handle)) => self.books.leak_handle(handle, error),
            None => {}
        }
        if let Some(asid) = context.asid.take() {
            self.leak_asid(asid, error);
        }
    }

    /// DEACTIVATE, then DECOMMISSION: firmware does not forget an active guest.
    fn end_legacy(&self, handle: u32) -> Result<()> {
        self.deactivate(handle)
            .inspect_err(|error| self.books.leak_handle(handle, *error))?;
        self.forget_guest(handle);
        Ok(())
    }

    pub(crate) fn deactivate(&self, handle: u32) -> Result<()> {
        let mut buffer = command::Handle {
            handle: U32::new(handle),
        };
        let pools = self.psp.asid_pools();
        pools.deactivating(
            || self.psp.relax(),
            || self.run(Command::Deactivate, &mut buffer),
        )
    }

    /// DECOMMISSION of a guest that is not active. A handle that firmware keeps is leaked.
    pub(crate) fn forget_guest(&self, handle: u32) {
        let mut buffer = command::Handle {
            handle: U32::new(handle),
        };
        if let Err(error) = self.run(Command::Decommission, &mut buffer) {
            self.books.leak_handle(handle, error);
        }
    }

    /// SNP_DECOMMISSION, and the context page back. A context that firmware keeps is leaked with its
    /// page.
    pub(crate) fn destroy_gctx(&self, gctx: Pfn) -> Result<()> {
        let mut buffer = command::Context {
            gctx: U64::new(base(gctx)?.get()),
        };
        let pools = self.psp.asid_pools();
        let gone = pools.deactivating(
            || self.psp.relax(),
            || self.run(Command::SnpDecommission, &mut buffer),
        );
        if let Err(error) = gone {
            self.books.leak_page(gctx, Level::Size4K, error);
            return Err(error);
        }
        // The page alone may leak: firmware has forgotten guest and ASID.
        let _ = self.release(gctx, Level::Size4K, Held::Immutable);
        Ok(())
    }

    /// Gives an ASID back. Once firmware was given it, it needs a flush before its next guest.
    pub(crate) fn retire(&self, asid: Asid, soiled: bool) {
        let pools = self.psp.asid_pools();
        if soiled {
            pools.retire(asid);
        } else {
            pools.give_back(asid);
        }
    }

    /// Counts an ASID as lost for good.
    pub(crate) fn leak_asid(&self, asid: Asid, error: Error) {
        self.psp.asid_pools().leak(asid);
        self.books.leak_key(asid, error);
    }
}
