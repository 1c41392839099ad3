//! A confidential guest passes from one VM to another of its machine.

use core::mem;

use super::Vm;
use crate::{Backend, EncTransfer, Error, Field, Result};

/// Moves the encryption context of `source` to `destination`, with the guest's pages and, where it
/// is encrypted, its register state (`KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM`). Nothing is copied: the
/// cost does not depend on the guest's size.
///
/// The destination is a VM of the same technology and machine whose launch has not begun. Where it
/// has no slots it takes the source's over; else its own stay, which then must show the same
/// memory. The guest runs on at the destination; the source is dead: every operation but its
/// teardown answers [`Error::Poisoned`]. Memory that the source's slots lend is in use until both
/// VMs are gone.
///
/// Host-visible registers (plain SEV) are the embedder's to carry over.
///
/// # Errors
/// [`Error::Invalid`] with [`Field::Vm`] names the VM that is not fit: of another technology or
/// machine, not confidential, SNP, a destination that is launched or has regions;
/// [`Field::VcpuCount`] if a SEV-ES guest's vCPUs are not as many there or not all encrypted;
/// [`Error::Busy`] while either context moves already, or the destination's account cannot pay;
/// [`Error::Poisoned`] for a source that is dead. The source goes on as before.
pub fn move_enc_context<B: Backend>(source: &mut Vm<B>, destination: &mut Vm<B>) -> Result<()> {
    transfer(source, destination, EncTransfer::Move)
}

/// Makes `mirror` a mirror of `owner`: both use the owner's encryption context
/// (`KVM_CAP_VM_COPY_ENC_CONTEXT_FROM`). The context lives as long as either of them.
///
/// # Errors
/// [`Error::Invalid`] as in [`move_enc_context`], and for an owner that is itself a mirror or a
/// mirror that has vCPUs.
pub fn copy_enc_context<B: Backend>(owner: &mut Vm<B>, mirror: &mut Vm<B>) -> Result<()> {
    transfer(owner, mirror, EncTransfer::Copy)
}

fn transfer<B: Backend>(from: &mut Vm<B>, to: &mut Vm<B>, how: EncTransfer) -> Result<()> {
    if !from.tech().is_confidential() {
        return Err(Error::Invalid(Field::Vm, from.id().0));
    }
    if to.tech() != from.tech() {
        return Err(Error::Invalid(Field::Vm, to.id().0));
    }
    let context = from.back_end_mut().release_enc_context(how)?;
    let carry = how == EncTransfer::Move && to.slots.is_empty();
    let lent = if carry { lend_slots(from, to) } else { Ok(()) };
    let adopted = match lent {
        Ok(()) => to.back_end_mut().adopt_enc_context(context),
        Err(error) => Err((error, context)),
    };
    let Err((error, context)) = adopted else {
        tracing::debug!(
            from = from.id().0,
            to = to.id().0,
            ?how,
            "context passed on"
        );
        return Ok(());
    };
    if carry {
        for slot in mem::take(&mut to.slots).values() {
            // A VM that keeps one keeps it until its end, as it would any other.
            let _ = to.back_end().delete_memory_slot(slot);
        }
    }
    if how == EncTransfer::Move {
        // Refused only by a source that is dead already.
        let _ = from.back_end_mut().adopt_enc_context(context);
    }
    Err(error)
}

fn lend_slots<B: Backend>(from: &Vm<B>, to: &mut Vm<B>) -> Result<()> {
    for slot in from.slots.values() {
        to.back_end().set_memory_slot(slot)?;
        to.slots.insert(slot.id, *slot);
    }
    Ok(())
}

/// [`move_enc_context`] between VMs that threads share. It waits for neither: two moves in opposite
/// directions cannot deadlock, in whatever order they come.
///
/// # Errors
/// [`Error::Busy`] while another thread holds either VM; [`Error::Invalid`] for one VM with itself;
/// else as [`move_enc_context`].
#[cfg(feature = "std")]
pub fn move_enc_context_between<B: Backend>(
    source: &std::sync::Mutex<Vm<B>>,
    destination: &std::sync::Mutex<Vm<B>>,
) -> Result<()> {
    both(source, destination, move_enc_context)
}

/// [`copy_enc_context`] between VMs that threads share.
///
/// # Errors
/// As [`move_enc_context_between`].
#[cfg(feature = "std")]
pub fn copy_enc_context_between<B: Backend>(
    owner: &std::sync::Mutex<Vm<B>>,
    mirror: &std::sync::Mutex<Vm<B>>,
) -> Result<()> {
    both(owner, mirror, copy_enc_context)
}

#[cfg(feature = "std")]
fn both<B: Backend>(
    from: &std::sync::Mutex<Vm<B>>,
    to: &std::sync::Mutex<Vm<B>>,
    pass: fn(&mut Vm<B>, &mut Vm<B>) -> Result<()>,
) -> Result<()> {
    if core::ptr::eq(from, to) {
        return Err(Error::Invalid(Field::Vm, 0));
    }
    let mut to = to.try_lock().map_err(|_| Error::Busy)?;
    let mut from = from.try_lock().map_err(|_| Error::Busy)?;
    pass(&mut from, &mut to)
}
