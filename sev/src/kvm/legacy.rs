//! The launch of SEV and SEV-ES guests, command by command. What the guest's state does not allow
//! is for firmware to refuse: INVALID_GUEST_STATE, EIO.

use kvm_ops::{Error, Field, Host, PAGE_SIZE, Result, Step};
use zerocopy::little_endian::U32;

use super::blob::{blob, blob_mut, read, write};
use super::layout::{SevAttestation, SevGuestStatus, SevLaunchSecret, SevLaunchStart, SevRange};
use crate::SevVm;
use crate::context::Context;
use crate::launch::Start;
use crate::memory::Part;
use crate::rules::{EINVAL, errno};
use crate::shared::Shared;

/// Bytes of LAUNCH_MEASURE's answer, and of an attestation report.
const MEASUREMENT: u32 = 48;
const REPORT: u32 = 0xd0;

/// A guest that firmware knows: nothing is started on the way.
pub(super) fn with_guest<H: Host, T>(
    vm: &SevVm<H>,
    body: impl FnOnce(&mut Context) -> Result<T>,
) -> Result<T> {
    of_guest(&vm.shared, body)
}

pub(super) fn of_guest<H: Host, T>(
    shared: &Shared<H>,
    body: impl FnOnce(&mut Context) -> Result<T>,
) -> Result<T> {
    let mut context = shared.context();
    match context.as_mut() {
        Some(context) if context.guest.is_some() => body(context),
        _ => Err(Error::WrongState(shared.step())),
    }
}

pub(super) fn launch_start<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let mut args: SevLaunchStart = read(data)?;
    let cert = blob(data, args.dh.get(), args.dh_len.get().into())?;
    let session = blob(data, args.session.get(), args.session_len.get().into())?;
    let start = Start {
        policy: args.policy.get().into(),
        session: (!cert.is_empty() || !session.is_empty()).then(|| (cert.into(), session.into())),
        share: args.handle.get(),
        ..Start::default()
    };
    let handle = {
        let mut context = vm.shared.context();
        let context = context.as_mut().ok_or(errno(EINVAL))?;
        match context.guest {
            None => vm.shared.start(context, &start)?,
            Some(_) => vm.shared.start_again(context, &start)?,
        }
        context.handle().unwrap_or(0)
    };
    args.handle = U32::new(handle);
    write(data, &args)
}

/// Page by page. What precedes a failure stays done.
///
/// Contents that follow the structure are those of the pages that the range touches. They are taken in the place of the slot's,
/// and the range in them is ciphertext afterwards, as the caller's memory is in Linux. Their memory need not be in a slot.
pub(super) fn update_data<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SevRange = read(data)?;
    let (address, len) = (args.uaddr.get(), u64::from(args.len.get()));
    let end = address.checked_add(len).filter(|_| len != 0);
    let end = end.ok_or(Error::Invalid(Field::Size, len))?;
    let given = match data.len() == size_of::<SevRange>() {
        true => &mut [][..],
        false => {
            let pages = end.div_ceil(PAGE_SIZE) - address / PAGE_SIZE;
            blob_mut(data, size_of::<SevRange>() as u64, pages * PAGE_SIZE)?
        }
    };
    let (given, _) = given.as_chunks_mut();
    let mut given = given.iter_mut();
    with_guest(vm, |context| {
        let mut at = address;
        while at < end {
            let part = Part::first(at, end - at);
            update_part(&vm.shared, context, part, given.next())?;
            at += part.len;
        }
        Ok(())
    })
}

/// LAUNCH_UPDATE_DATA of a part of the page at a host address.
fn update_part<H: Host>(
    shared: &Shared<H>,
    context: &Context,
    part: Part,
    given: Option<&mut [u8; PAGE_SIZE as usize]>,
) -> Result<()> {
    if let Some(contents) = given {
        return shared.update_part(context, part, contents);
    }
    // The kernel answers ENOMEM for memory that cannot be pinned.
    let gpa = shared.memory().gpa_of(part.host).ok_or(Error::NoMemory)?;
    let mut contents = [0; PAGE_SIZE as usize];
    shared.sev()?.read_slot(gpa, &mut contents)?;
    shared.update_part(context, part, &mut contents)
}

pub(super) fn update_vmsa<H: Host>(vm: &mut SevVm<H>) -> Result<()> {
    if vm.shared.all_cells().iter().any(|c| c.is_protected()) {
        return Err(errno(EINVAL));
    }
    with_guest(vm, |context| vm.shared.update_vmsas(context))
}

pub(super) fn measure<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let mut args: SevRange = read(data)?;
    if args.len.get() < MEASUREMENT {
        let (told, done) = with_guest(vm, |context| Ok(vm.shared.measurement_len(context)))?;
        args.len = U32::new(told);
        write(data, &args)?;
        return done;
    }
    args.len = U32::new(MEASUREMENT);
    // Room for the answer first: what firmware has measured cannot be measured again.
    blob(data, args.uaddr.get(), MEASUREMENT.into())?;
    let measurement = with_guest(vm, |context| vm.shared.measure(context))?;
    blob_mut(data, args.uaddr.get(), MEASUREMENT.into())?.copy_from_slice(&measurement);
    write(data, &args)
}

pub(super) fn secret<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SevLaunchSecret = read(data)?;
    let header = blob(data, args.hdr.get(), args.hdr_len.get().into())?;
    let secret = blob(data, args.trans.get(), args.trans_len.get().into())?;
    let guest = (args.guest.get(), args.guest_len.get());
    with_guest(vm, |context| {
        vm.shared.secret(context, header, guest, secret)
    })
}

pub(super) fn finish<H: Host>(vm: &mut SevVm<H>) -> Result<()> {
    with_guest(vm, |context| vm.shared.launch_finish(context))?;
    if vm.shared.step() == Step::Initialized {
        vm.shared.life.advance(Step::Runnable)?;
    }
    Ok(())
}

pub(super) fn guest_status<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let handle = with_guest(vm, |context| Ok(context.handle().unwrap_or(0)))?;
    let status = vm.shared.legacy_status(handle)?;
    let answer = SevGuestStatus {
        handle: U32::new(handle),
        policy: U32::new(status.policy as u32),
        state: U32::new(status.state.into()),
    };
    write(data, &answer)
}

pub(super) fn attestation<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let mut args: SevAttestation = read(data)?;
    if args.len.get() < REPORT {
        let (told, done) = with_guest(vm, |context| Ok(vm.shared.report_len(context)))?;
        args.len = U32::new(told);
        write(data, &args)?;
        return done;
    }
    args.len = U32::new(REPORT);
    let place = blob_mut(data, args.uaddr.get(), REPORT.into())?;
    let report = with_guest(vm, |context| vm.shared.attestation(context, args.mnonce))?;
    place.copy_from_slice(&report);
    write(data, &args)
}
