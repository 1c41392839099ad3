//! SEND_* and RECEIVE_*: the way of a SEV guest between two hosts, command by command.
//!
//! Which pages are encrypted or were written since, shared memory and registers are the caller's to follow.
//! [`crate::migrate`] does it for an embedder.

use alloc::vec;

use kvm_ops::{Host, Result};
use zerocopy::little_endian::U32;

use super::blob::{blob, blob_mut, read, write};
use super::layout::{SevReceiveStart, SevSendStart, SevUpdateData};
use super::legacy::with_guest;
use crate::SevVm;
use crate::context::GuestState;
use crate::memory::Part;
use crate::migrate::{Mailbox, SessionStart};

/// The longest session, packet header or packet that firmware is given room for, in bytes.
const ROOM: u32 = kvm_ops_uapi::sev::BLOB_MAX;

fn mailbox<H: Host>(vm: &SevVm<H>) -> Result<Mailbox<'_, H>> {
    Mailbox::of_vm(&vm.shared.host, &vm.shared.account)
}

/// The handle of the VM's guest, as other commands demand it.
fn handle<H: Host>(vm: &SevVm<H>) -> Result<u32> {
    with_guest(vm, |_| Ok(()))?;
    vm.shared.handle()
}

/// Without room for the session it is a query. Policy and length of the session are told in any case.
pub(super) fn send_start<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let mut args: SevSendStart = read(data)?;
    let handle = handle(vm)?;
    let certs = [
        blob(data, args.pdh_cert.get(), args.pdh_cert_len.get().into())?,
        blob(
            data,
            args.plat_certs.get(),
            args.plat_certs_len.get().into(),
        )?,
        blob(data, args.amd_certs.get(), args.amd_certs_len.get().into())?,
    ];
    let mut session = vec![0; args.session_len.get().min(ROOM) as usize];
    let (told, done) = mailbox(vm)?.start_sending(handle, certs, &mut session)?;
    if done.is_ok() {
        blob_mut(data, args.session.get(), session.len() as u64)?.copy_from_slice(&session);
        vm.shared.set_guest_state(GuestState::SendUpdate);
    }
    (args.policy, args.session_len) = (told.policy, told.session_len);
    write(data, &args)?;
    done
}

/// Without room for the header or the packet it is a query of both lengths.
pub(super) fn send_update_data<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let mut args: SevUpdateData = read(data)?;
    let handle = handle(vm)?;
    let mailbox = mailbox(vm)?;
    let (hdr_len, trans_len) = (args.hdr_len.get(), args.trans_len.get());
    if hdr_len == 0 || trans_len == 0 {
        let (told, done) = mailbox.packet_lengths(handle);
        (args.hdr_len, args.trans_len) = (told.hdr_len, told.trans_len);
        write(data, &args)?;
        return done;
    }
    let part = Part::whole(args.guest.get(), args.guest_len.get().into())?;
    let mut header = vec![0; hdr_len.min(ROOM) as usize];
    let mut packet = vec![0; trans_len.min(ROOM) as usize];
    vm.shared
        .send_part(&mailbox, handle, part, (&mut header, &mut packet))?;
    blob_mut(data, args.trans.get(), packet.len() as u64)?.copy_from_slice(&packet);
    blob_mut(data, args.hdr.get(), header.len() as u64)?.copy_from_slice(&header);
    Ok(())
}

/// The guest is another host's now. As in the kernel nothing keeps its vCPUs from running here, because its key stays in the
/// ASID until the VM ends: who sends a guest does not run it any more.
pub(super) fn send_finish<H: Host>(vm: &mut SevVm<H>) -> Result<()> {
    let handle = handle(vm)?;
    mailbox(vm)?.send_finish(handle)?;
    vm.shared.set_guest_state(GuestState::Sent);
    Ok(())
}

/// The guest runs on.
pub(super) fn send_cancel<H: Host>(vm: &mut SevVm<H>) -> Result<()> {
    let handle = handle(vm)?;
    mailbox(vm)?.send_cancel(handle)?;
    vm.shared.set_guest_state(GuestState::Running);
    Ok(())
}

pub(super) fn receive_start<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let mut args: SevReceiveStart = read(data)?;
    let start = SessionStart {
        policy: args.policy.get(),
        pdh: blob(data, args.pdh.get(), args.pdh_len.get().into())?.to_vec(),
        session: blob(data, args.session.get(), args.session_len.get().into())?.to_vec(),
    };
    let share = args.handle.get();
    let handle = vm.shared.receive_start(&mailbox(vm)?, share, &start)?;
    args.handle = U32::new(handle);
    write(data, &args)
}

pub(super) fn receive_update_data<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SevUpdateData = read(data)?;
    let handle = handle(vm)?;
    let part = Part::whole(args.guest.get(), args.guest_len.get().into())?;
    let header = blob(data, args.hdr.get(), args.hdr_len.get().into())?;
    let packet = blob(data, args.trans.get(), args.trans_len.get().into())?;
    vm.shared
        .receive_part(&mailbox(vm)?, handle, part, (header, packet))
}

pub(super) fn receive_finish<H: Host>(vm: &mut SevVm<H>) -> Result<()> {
    let handle = handle(vm)?;
    mailbox(vm)?.receive_finish(handle)?;
    vm.shared.set_guest_state(GuestState::Running);
    vm.shared.advance_to(kvm_ops::Step::Runnable);
    Ok(())
}
