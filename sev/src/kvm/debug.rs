//! DBG_DECRYPT and DBG_ENCRYPT, where the policy allows them.

use kvm_ops::{Error, Field, Gfn, Gpa, Host, PAGE_SIZE, Result};

use super::blob::{blob, blob_mut, read};
use super::layout::SevDbg;
use super::legacy::of_guest;
use crate::SevVm;
use crate::shared::Shared;

/// The unit of encryption.
const BLOCK: u64 = 16;

/// The guest address of the memory that a slot lends at this host address: whole blocks in one page.
pub(super) fn place<H: Host>(shared: &Shared<H>, host: u64, len: u64) -> Result<(Gfn, u64)> {
    let gpa: Gpa = shared.memory().gpa_of(host).ok_or(Error::NoMemory)?;
    let offset = gpa.get() % PAGE_SIZE;
    if len == 0
        || !len.is_multiple_of(BLOCK)
        || !offset.is_multiple_of(BLOCK)
        || offset + len > PAGE_SIZE
    {
        return Err(Error::Invalid(Field::Size, len));
    }
    Ok((Gfn::containing(gpa), offset))
}

pub(super) fn decrypt<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SevDbg = read(data)?;
    let len = u64::from(args.len.get());
    let shared = vm.debuggee()?;
    let (gfn, offset) = place(&shared, args.src.get(), len)?;
    let out = blob_mut(data, args.dst.get(), len)?;
    let plain = of_guest(&shared, |context| {
        shared.debug_decrypt(context, gfn, offset, out.len())
    })?;
    out.copy_from_slice(&plain);
    Ok(())
}

pub(super) fn encrypt<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SevDbg = read(data)?;
    let len = u64::from(args.len.get());
    let shared = vm.debuggee()?;
    let (gfn, offset) = place(&shared, args.dst.get(), len)?;
    let plain = blob(data, args.src.get(), len)?;
    of_guest(&shared, |context| {
        shared.debug_encrypt(context, gfn, offset, plain)
    })
}
