//! The launch of SNP guests.

use kvm_ops_uapi::U64;
use kvm_ops_uapi::checks::{
    snp_enable_req_certs, snp_launch_finish, snp_launch_start, snp_launch_update,
};
use kvm_ops_uapi::sev::{
    self as uapi, SnpLaunchFinish, SnpLaunchStart, SnpLaunchUpdate, page_type,
};
use zerocopy::IntoBytes;

use super::blobs::Blobs;
use super::command::{Answer, Call, Sent};
use super::engine::Failed;
use super::{POLICY_BITS, require_fd};
use crate::arg;
use crate::refusal::{Result, ensure};
use crate::vm::State;

const PAGE: u64 = 4096;
/// The policy bit that is always set.
const RESERVED_ONE: u64 = 1 << 17;
/// Bytes of an ID block and of its authentication.
const ID_BLOCK: usize = 96;
const ID_AUTH: usize = 4096;

pub(super) fn start(state: &mut State, call: &Call<'_>) -> Answer {
    use snp_launch_start::{COPY, FLAGS, ONCE, POLICY, RESERVED, SEV_FD, SNP};
    ensure(state.sev.is_snp(), SNP)?;
    let mut args: SnpLaunchStart = call.read(COPY)?;
    ensure(!state.sev.snp_started, ONCE)?;
    ensure(args.flags.get() == 0, FLAGS)?;
    ensure(args.policy.get() & !POLICY_BITS == 0, POLICY)?;
    ensure(args.policy.get() & RESERVED_ONE != 0, RESERVED)?;
    require_fd(call.process, call.sev_fd, SEV_FD)?;
    let engine = state.sev.engine(SNP)?;
    engine.command(uapi::SNP_LAUNCH_START, args.as_mut_bytes())?;
    state.sev.snp_started = true;
    state.sev.sev_fd = call.sev_fd;
    Ok(Sent::Yes)
}

/// Checks 3 and 4 of SNP_LAUNCH_UPDATE.
fn check_update(args: &SnpLaunchUpdate) -> Result<()> {
    use snp_launch_update::{FLAGS, LEN, SOURCE, TYPE};
    let (len, source) = (args.len.get(), args.uaddr.get());
    ensure(len != 0 && len.is_multiple_of(PAGE), LEN)?;
    ensure(args.flags.get() == 0, FLAGS)?;
    let known = matches!(
        args.kind,
        page_type::NORMAL | page_type::ZERO..=page_type::CPUID
    );
    ensure(known, TYPE)?;
    let has_source = source != 0 && source.is_multiple_of(PAGE);
    ensure(args.kind == page_type::ZERO || has_source, SOURCE)
}

pub(super) fn update(state: &mut State, call: &Call<'_>) -> Answer {
    use snp_launch_update::{COPY, COPY_BACK, SLOT, SNP};
    ensure(state.sev.is_snp() && state.sev.snp_started, SNP)?;
    let mut args: SnpLaunchUpdate = call.read(COPY)?;
    check_update(&args)?;
    let first = args.gfn_start.get();
    let gpa = first.checked_mul(PAGE).ok_or(SLOT)?;
    let slot = state.slots.at(0, gpa).filter(|slot| slot.file.is_some());
    let slot = slot.ok_or(SLOT)?;
    // Never beyond the end of the slot: the caller asks again for the rest.
    let room = slot.pages() - (gpa - slot.gpa) / PAGE;
    let mut failed = None;
    for _ in 0..room.min(args.len.get() / PAGE) {
        if let Err(failure) = add_page(state, call, &args) {
            failed = Some(failure);
            break;
        }
        args.gfn_start = U64::new(args.gfn_start.get() + 1);
        args.len = U64::new(args.len.get() - PAGE);
        if args.kind != page_type::ZERO {
            args.uaddr = U64::new(args.uaddr.get().wrapping_add(PAGE));
        }
    }
    call.write(&args, COPY_BACK)?;
    match failed {
        Some(Failed { status, .. }) if args.gfn_start.get() == first => Err(Failed {
            refusal: snp_launch_update::FIRST_PAGE.into(),
            status,
        }),
        _ => Ok(Sent::Yes),
    }
}

/// Adds the first page of what is left.
fn add_page(state: &mut State, call: &Call<'_>, left: &SnpLaunchUpdate) -> Result<(), Failed> {
    use snp_launch_update::{FIRST_PAGE, SNP};
    ensure(!call.process.signal_pending(), FIRST_PAGE)?;
    ensure(state.is_private(left.gfn_start.get()), FIRST_PAGE)?;
    let mut page = Blobs::new(SnpLaunchUpdate {
        len: U64::new(PAGE),
        ..*left
    });
    if left.kind != page_type::ZERO {
        let source = left.uaddr.get();
        let contents = arg::read_bytes(call.process, source, PAGE as usize, FIRST_PAGE)?;
        page.head.uaddr = page.push(&contents);
    }
    state.sev.require_fd(call.process, FIRST_PAGE)?;
    let mut data = page.to_bytes();
    let added = state
        .sev
        .engine(SNP)?
        .command(uapi::SNP_LAUNCH_UPDATE, &mut data);
    if added.is_err() && left.kind == page_type::CPUID {
        // With the values that firmware would take. The source was read, so it is there.
        let proposed = &data[size_of::<SnpLaunchUpdate>()..];
        let _ = call.process.write(left.uaddr.get(), proposed);
    }
    added
}

pub(super) fn finish(state: &mut State, call: &Call<'_>) -> Answer {
    use snp_launch_finish::{
        COPY, DEBUGGED, DR7, FLAGS, ID_BLOCK as BLOCK, PROTECTED, SEV_FD, SIGNAL, SNP, STARTED,
    };
    ensure(state.sev.is_snp(), SNP)?;
    ensure(state.sev.snp_started, STARTED)?;
    let given: SnpLaunchFinish = call.read(COPY)?;
    ensure(given.flags.get() == 0, FLAGS)?;
    ensure(!call.process.signal_pending(), SIGNAL)?;
    let fresh = state.vcpus.keys().all(|id| !state.sev.is_protected(*id));
    ensure(fresh, PROTECTED)?;
    call.check_debugging((DEBUGGED, DR7))?;
    let mut args = Blobs::new(given);
    if given.id_block_en != 0 {
        let mut copy = |address: U64, len| {
            let bytes = arg::read_bytes(call.process, address.get(), len, BLOCK)?;
            Ok::<_, crate::Refusal>(args.push(&bytes))
        };
        let (block, auth) = (
            copy(given.id_block, ID_BLOCK)?,
            copy(given.id_auth, ID_AUTH)?,
        );
        (args.head.id_block, args.head.id_auth) = (block, auth);
    }
    state.sev.require_fd(call.process, SEV_FD)?;
    let engine = state.sev.engine(SNP)?;
    engine.command(uapi::SNP_LAUNCH_FINISH, &mut args.to_bytes())?;
    state.sev.protected.extend(state.vcpus.keys());
    state.sev.launched = true;
    Ok(Sent::Yes)
}

/// SNP_ENABLE_REQ_CERTS: requests for a report with certificates leave to user space.
pub(super) fn enable_req_certs(state: &mut State, _: &Call<'_>) -> Answer {
    use snp_enable_req_certs::{NO_VCPU, SNP};
    ensure(state.vcpus.is_empty(), NO_VCPU)?;
    ensure(state.sev.is_snp(), SNP)?;
    state.sev.engine(SNP)?.ask_for_certificates();
    Ok(Sent::No)
}
