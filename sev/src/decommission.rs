//! The end of a guest in firmware, and of its ASID. Each step that fails is listed as a leak.

use kvm_ops::{AsidLease, Error, Host, Leaked, Page, PspPort, Result};
use zerocopy::little_endian::{U32, U64};

use crate::command::{self, Command};
use crate::context::{Context, Guest, GuestState};
use crate::sp::{Held, Sp, operation};

impl<H: Host> Sp<'_, H> {
    /// Gives the guest back to firmware and the ASID to its pool. What firmware keeps is leaked. The
    /// pages of an SNP guest went before (`drain_private`).
    pub(crate) fn decommission(&self, context: &mut Context) {
        // Linux ignores these results, and the ASID's next guest pays for it.
        let kept = match context.guest.take() {
            Some(Guest::Handle(handle)) => self.end_legacy(handle).err(),
            Some(Guest::Gctx(gctx)) => self.destroy_gctx(gctx).err(),
            None => None,
        };
        context.state = GuestState::Uninit;
        // The account of a leaked ASID does not pay for ever.
        drop(context.charge.take());
        let Some(lease) = context.lease.take() else {
            return;
        };
        match kept {
            None => {
                self.retire(lease, context.soiled);
                self.account.key_freed();
            }
            Some(error) => self.leak_asid(lease, error),
        }
    }

    /// Leaves guest and ASID to firmware for good, and lists them.
    pub(crate) fn give_up(&self, context: &mut Context, error: Error) {
        match context.guest.take() {
            Some(Guest::Gctx(gctx)) => self.leak(gctx, error),
            Some(Guest::Handle(handle)) => self.leak_handle(handle, error),
            None => {}
        }
        if let Some(lease) = context.lease.take() {
            self.leak_asid(lease, error);
        }
    }

    /// DEACTIVATE, then DECOMMISSION: firmware does not forget an active guest.
    pub(crate) fn end_legacy(&self, handle: u32) -> Result<()> {
        self.deactivate(handle)
            .inspect_err(|error| self.leak_handle(handle, *error))?;
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
            self.leak_handle(handle, error);
        }
    }

    /// SNP_DECOMMISSION, and the context page back. A context that firmware keeps is leaked with its
    /// page.
    pub(crate) fn destroy_gctx(&self, gctx: Page) -> Result<()> {
        let mut buffer = command::Context {
            gctx: U64::new(gctx.hpa().get()),
        };
        let pools = self.psp.asid_pools();
        let gone = pools.deactivating(
            || self.psp.relax(),
            || self.run(Command::SnpDecommission, &mut buffer),
        );
        if let Err(error) = gone {
            self.leak(gctx, error);
            return Err(error);
        }
        // The page alone may leak: firmware has forgotten guest and ASID.
        let _ = self.release(gctx, Held::Immutable);
        Ok(())
    }

    /// Gives an ASID back. Once firmware was given it, it needs a flush before its next guest.
    pub(crate) fn retire(&self, lease: AsidLease, soiled: bool) {
        let pools = self.psp.asid_pools();
        let taken = match soiled {
            true => pools.retire(lease),
            false => pools.give_back(lease),
        };
        if let Err(lease) = taken {
            self.list_asid(
                &lease,
                Error::Invalid(kvm_ops::Field::Hkid, lease.asid().0.into()),
            );
        }
    }

    /// Counts an ASID as lost for good.
    pub(crate) fn leak_asid(&self, lease: AsidLease, error: Error) {
        self.list_asid(&lease, error);
        // A lease that is dropped is in use for ever too.
        let _ = self.psp.asid_pools().leak(lease);
    }

    fn list_asid(&self, lease: &AsidLease, error: Error) {
        let key = Leaked::Key(lease.asid().0);
        self.account.leak_other(key, operation(&error), error);
    }

    pub(crate) fn leak_handle(&self, handle: u32, error: Error) {
        let handle = Leaked::Handle(handle.into());
        self.account.leak_other(handle, operation(&error), error);
    }
}
