//! DBG_DECRYPT and DBG_ENCRYPT, where the policy allows them.

use kvm_ops::{Error, Field, Host, Result};

use super::blob::{blob, blob_mut, read};
use super::layout::SevDbg;
use super::legacy::of_guest;
use crate::SevVm;
use crate::memory::Part;

/// The unit of encryption.
const BLOCK: u64 = 16;

/// Whole blocks in one page, at a host address.
fn blocks(host: u64, len: u64) -> Result<Part> {
    match len != 0 && (host | len).is_multiple_of(BLOCK) {
        true => Part::whole(host, len),
        false => Err(Error::Invalid(Field::Size, len)),
    }
}

pub(super) fn decrypt<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SevDbg = read(data)?;
    let len = u64::from(args.len.get());
    let shared = vm.debuggee()?;
    let part = blocks(args.src.get(), len)?;
    let out = blob_mut(data, args.dst.get(), len)?;
    let plain = of_guest(&shared, |context| shared.debug_decrypt(context, part))?;
    out.copy_from_slice(&plain);
    Ok(())
}

pub(super) fn encrypt<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SevDbg = read(data)?;
    let len = u64::from(args.len.get());
    let shared = vm.debuggee()?;
    let part = blocks(args.dst.get(), len)?;
    let plain = blob(data, args.src.get(), len)?;
    of_guest(&shared, |context| {
        shared.debug_encrypt(context, part, plain)
    })
}
