//! The launch of SEV and SEV-ES guests, command by command. What the guest's state does not allow
//! is for firmware to refuse: INVALID_GUEST_STATE, EIO.

use kvm_ops::{Error, Field, Gfn, Host, PAGE_SIZE, PagePort, Result, Step};
use zerocopy::little_endian::U32;

use super::blob::{blob, blob_mut, read, too_short, write};
use super::layout::{SevAttestation, SevGuestStatus, SevLaunchSecret, SevLaunchStart, SevRange};
use crate::SevVm;
use crate::command::Command;
use crate::context::Context;
use crate::launch::Start;
use crate::rules::{EINVAL, errno};
use crate::shared::Shared;
use crate::sp::base;

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
        vm.shared.start(context, &start)?;
        context.handle().unwrap_or(0)
    };
    args.handle = U32::new(handle);
    write(data, &args)
}

/// Whole pages only: encryption takes a page out of its slot. What precedes a failure stays done.
///
/// Contents that follow the structure are taken in the place of the slot's, and are ciphertext afterwards, as the caller's memory
/// is in Linux. Their memory need not be in a slot yet.
pub(super) fn update_data<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let args: SevRange = read(data)?;
    let (address, len) = (args.uaddr.get(), u64::from(args.len.get()));
    if len == 0 || len % PAGE_SIZE != 0 || address.checked_add(len).is_none() {
        return Err(Error::Invalid(Field::Size, len));
    }
    if address % PAGE_SIZE != 0 {
        return Err(Error::Invalid(Field::HostAddress, address));
    }
    let given = match data.len() == size_of::<SevRange>() {
        true => &mut [][..],
        false => blob_mut(data, size_of::<SevRange>() as u64, len)?,
    };
    let (given, _) = given.as_chunks_mut();
    let mut given = given.iter_mut();
    with_guest(vm, |context| {
        let mut pages = (address..address + len).step_by(PAGE_SIZE as usize);
        pages.try_for_each(|at| update_page(&vm.shared, context, at, given.next()))
    })
}

/// LAUNCH_UPDATE_DATA of the page at a host address.
fn update_page<H: Host>(
    shared: &Shared<H>,
    context: &mut Context,
    at: u64,
    given: Option<&mut [u8; PAGE_SIZE as usize]>,
) -> Result<()> {
    let gpa = shared.memory().gpa_of(at);
    let Some(contents) = given else {
        // The kernel answers ENOMEM for memory that cannot be pinned.
        let gpa = gpa.ok_or(Error::NoMemory)?;
        let mut contents = [0; PAGE_SIZE as usize];
        shared.sev()?.read_slot(gpa, &mut contents)?;
        shared.update_data(context, Gfn::containing(gpa), &contents)?;
        return Ok(());
    };
    let page = match gpa {
        Some(gpa) => shared.update_data(context, Gfn::containing(gpa), contents)?,
        None => shared.update_parked(context, at, contents)?,
    };
    shared.sp().pages.read(base(page)?, contents)
}

pub(super) fn update_vmsa<H: Host>(vm: &mut SevVm<H>) -> Result<()> {
    if vm.shared.all_cells().iter().any(|c| c.is_protected()) {
        return Err(errno(EINVAL));
    }
    with_guest(vm, |context| vm.shared.update_vmsas(context))
}

pub(super) fn measure<H: Host>(vm: &mut SevVm<H>, data: &mut [u8]) -> Result<()> {
    let mut args: SevRange = read(data)?;
    let given = args.len.get();
    args.len = U32::new(MEASUREMENT);
    if given < MEASUREMENT {
        with_guest(vm, |_| Ok(()))?;
        write(data, &args)?;
        return Err(too_short(Command::LaunchMeasure));
    }
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
    if args.guest_len.get() != args.trans_len.get() {
        return Err(Error::Invalid(Field::Size, args.guest_len.get().into()));
    }
    let guest = args.guest.get();
    let gpa = vm.shared.memory().gpa_of(guest).ok_or(Error::NoMemory)?;
    with_guest(vm, |context| {
        let offset = gpa.get() % PAGE_SIZE;
        vm.shared
            .secret(context, header, Gfn::containing(gpa), offset, secret)
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
    let given = args.len.get();
    args.len = U32::new(REPORT);
    if given < REPORT {
        with_guest(vm, |_| Ok(()))?;
        write(data, &args)?;
        return Err(too_short(Command::Attestation));
    }
    let place = blob_mut(data, args.uaddr.get(), REPORT.into())?;
    let report = with_guest(vm, |context| vm.shared.attestation(context, args.mnonce))?;
    place.copy_from_slice(&report);
    write(data, &args)
}
