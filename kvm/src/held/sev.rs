//! SEV, SEV-ES and SNP guests: the launch in the kernel's order.
//!
//! | | SEV, SEV-ES | SNP |
//! |---|---|---|
//! | `init` | INIT2, or for guests that can move INIT or ES_INIT; EXIT_HYPERCALL | INIT2, EXIT_HYPERCALL |
//! | start | LAUNCH_START | SNP_LAUNCH_START |
//! | each page | LAUNCH_UPDATE_DATA, in place | SNP_LAUNCH_UPDATE |
//! | `finalize` | ES: LAUNCH_UPDATE_VMSA; LAUNCH_MEASURE, LAUNCH_FINISH | SNP_LAUNCH_FINISH |
//!
//! The start is taken by the first operation that needs it, or by its command.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_enc_region;
use kvm_ops::{
    Call, EncCmd, EncParams, EncRegion, Error, Field, HeldFailure, InitialPage, InitialPageKind,
    Measurement, Result, SevParams, SharedMask, Step, Tech, VmParams, volatile,
};
use kvm_ops_uapi::sev::{self as uapi, SevCmd, page_type};
use kvm_ops_uapi::{U16, U32, U64};

use super::blobs::{Pages, Patched};
use super::forms::{Form, form_of, own_form};
use super::refused::refused;
use super::{Technology, enable_map_gpa, not_passed_on};
use crate::error::{from_errno, host_lacks};
use crate::{KvmHost, KvmVm};

/// Policy bit of SEV: the guest needs SEV-ES.
const POLICY_ES: u64 = 1 << 2;
/// Policy bits of SNP: one that is always set, and SMT, which is the host's to switch off.
const POLICY_SNP: u64 = 1 << 17 | 1 << 16;
/// AMD's leaf of memory encryption (APM vol. 3, Fn8000_001F): EBX\[5:0\] is the C-bit.
const ENCRYPTION: u32 = 0x8000_001f;
/// Bytes of MEASURE and MNONCE.
const MEASUREMENT: usize = 48;
/// The commands by which firmware comes to know a guest, and the kernel `/dev/sev`.
const STARTS: [u32; 3] = [
    uapi::LAUNCH_START,
    uapi::SNP_LAUNCH_START,
    uapi::RECEIVE_START,
];
/// More tries than signals that a launch meets.
const TRIES: u32 = 64;

/// The launch of an SEV, SEV-ES or SNP guest.
pub(super) struct SevGuest {
    tech: Tech,
    params: SevParams,
    mask: SharedMask,
    pub(super) launch: Mutex<Launch>,
}

/// The steps that were taken, by operations or commands.
#[derive(Default)]
pub(super) struct Launch {
    /// `/dev/sev`. The kernel remembers it by its number, so it stays open.
    device: Option<File>,
    pub(super) started: bool,
    vmsas: bool,
    measurement: Option<[u8; MEASUREMENT]>,
    finished: bool,
    pub(super) context: Context,
}

/// The place of a VM's encryption context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Context {
    /// It is this VM's.
    #[default]
    Own,
    /// There is none, until one arrives from another VM.
    Awaited,
    /// It is that of the VM of which this one is a mirror.
    Lent,
    /// It moved to another VM, and the kernel answers EIO to every call.
    Gone,
}

/// True if the VM is one of type 0 that becomes a SEV or SEV-ES guest later, by a command or by the arrival of a guest.
pub(crate) fn is_late(params: &VmParams) -> bool {
    matches!(&params.enc, EncParams::Sev(sev) if sev.movable || sev.arrives)
}

impl SevGuest {
    pub(super) fn new(host: &KvmHost, tech: Tech, params: &VmParams) -> Result<Self> {
        let params = match &params.enc {
            EncParams::Default => SevParams::default(),
            EncParams::Sev(sev) => (**sev).clone(),
            _ => return Err(Error::Invalid(Field::Policy, 0)),
        };
        if params.migration_agent.is_some() {
            return host_lacks!("migration agents of SNP guests");
        }
        match tech {
            Tech::SevSnp if params.movable || params.arrives => {
                return host_lacks!("moves of SNP guests");
            }
            _ if params.movable => check_late(tech, &params)?,
            _ => {}
        }
        let entries = host.supported_cpuid().as_slice();
        let leaf = entries.iter().find(|entry| entry.function == ENCRYPTION);
        let Some(mask) = leaf.and_then(|leaf| SharedMask::private_bit(leaf.ebx & 0x3f)) else {
            return host_lacks!("CPUID leaf 0x8000001f with the C-bit");
        };
        let context = match params.arrives {
            true => Context::Awaited,
            false => Context::Own,
        };
        Ok(Self {
            tech,
            params,
            mask,
            launch: Mutex::new(Launch {
                context,
                ..Launch::default()
            }),
        })
    }

    fn launch(&self) -> MutexGuard<'_, Launch> {
        self.launch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the memory of slots is pinned for this VM. That of a mirror is pinned by the owner of its context.
    pub(super) fn pins(&self) -> bool {
        self.launch().context == Context::Own
    }

    fn is_snp(&self) -> bool {
        self.tech == Tech::SevSnp
    }

    fn policy(&self) -> u64 {
        self.params.policy.unwrap_or(match self.tech {
            Tech::SevEs => POLICY_ES,
            Tech::SevSnp => POLICY_SNP,
            _ => 0,
        })
    }

    /// A launch that has started.
    fn launching(&self, vm: &KvmVm) -> Result<MutexGuard<'_, Launch>, HeldFailure> {
        let mut launch = self.launch();
        if launch.context != Context::Own {
            return Err(Error::WrongState(Step::Initialized).into());
        }
        if !launch.started {
            launch.open_device()?;
            match self.tech {
                Tech::SevSnp => self.start_snp(vm, &mut launch)?,
                _ => self.start(vm, &mut launch)?,
            }
            launch.started = true;
        }
        Ok(launch)
    }

    fn start(&self, vm: &KvmVm, launch: &mut Launch) -> Result<(), HeldFailure> {
        let policy = self.policy();
        let policy = u32::try_from(policy).map_err(|_| Error::Invalid(Field::Policy, policy))?;
        let mut args = uapi::SevLaunchStart {
            policy: U32::new(policy),
            ..Default::default()
        };
        let (mut cert, mut session) = (Pages::of(&[]), Pages::of(&[]));
        if let Some((given_cert, given_session)) = &self.params.session {
            (cert, session) = (Pages::of(given_cert), Pages::of(given_session));
            args.dh = U64::new(cert.address());
            args.dh_len = length(given_cert)?;
            args.session = U64::new(session.address());
            args.session_len = length(given_session)?;
        }
        let started = command(vm, launch, uapi::LAUNCH_START, args).map(drop);
        // The kernel read them until here.
        drop((cert, session));
        started
    }

    fn start_snp(&self, vm: &KvmVm, launch: &mut Launch) -> Result<(), HeldFailure> {
        let args = uapi::SnpLaunchStart {
            policy: U64::new(self.policy()),
            gosvw: self.params.gosvw,
            ..Default::default()
        };
        command(vm, launch, uapi::SNP_LAUNCH_START, args).map(drop)
    }

    fn finish_snp(&self, vm: &KvmVm, launch: &mut Launch) -> Result<(), HeldFailure> {
        let mut args = uapi::SnpLaunchFinish {
            host_data: self.params.host_data,
            ..Default::default()
        };
        let mut blobs = None;
        if let Some((block, auth)) = &self.params.id_block {
            for (blob, bytes) in [(block, 96), (auth, 4096)] {
                if blob.len() != bytes {
                    return Err(Error::Invalid(Field::BufferLength, blob.len() as u64).into());
                }
            }
            let (block, auth) = blobs.insert((Pages::of(block), Pages::of(auth)));
            args.id_block = U64::new(block.address());
            args.id_auth = U64::new(auth.address());
            args.id_block_en = 1;
        }
        let finished = command(vm, launch, uapi::SNP_LAUNCH_FINISH, args).map(drop);
        drop(blobs);
        finished
    }
}

impl Technology for SevGuest {
    fn init(&self, vm: &KvmVm) -> Result<SharedMask, HeldFailure> {
        let mut launch = self.launch();
        if self.params.arrives {
            drop(launch);
            enable_map_gpa(vm)?;
            return Ok(self.mask);
        }
        let init = uapi::SevInit {
            vmsa_features: U64::new(self.params.vmsa_features),
            ghcb_version: U16::new(match self.tech {
                Tech::Sev => 0,
                _ => self.params.ghcb_version,
            }),
            ..Default::default()
        };
        match self.tech {
            Tech::Sev if self.params.movable => command(vm, &mut launch, uapi::INIT, ())?,
            Tech::SevEs if self.params.movable => command(vm, &mut launch, uapi::ES_INIT, ())?,
            _ => command(vm, &mut launch, uapi::INIT2, init).map(drop)?,
        }
        drop(launch);
        enable_map_gpa(vm)?;
        Ok(self.mask)
    }

    fn add_page(&self, vm: &KvmVm, page: &InitialPage<'_>) -> Result<(), HeldFailure> {
        let mut launch = self.launching(vm)?;
        match self.tech {
            Tech::SevSnp => add_snp_page(vm, &mut launch, page),
            _ => update_data(vm, &mut launch, page),
        }
    }

    fn finalize(&self, vm: &KvmVm) -> Result<(), HeldFailure> {
        let mut launch = self.launching(vm)?;
        if self.is_snp() {
            return self.finish_snp(vm, &mut launch);
        }
        if self.tech == Tech::SevEs && !launch.vmsas {
            command(vm, &mut launch, uapi::LAUNCH_UPDATE_VMSA, ())?;
        }
        if launch.measurement.is_none() {
            let mut answer = Pages::of(&[0; MEASUREMENT]);
            let args = uapi::SevRange {
                uaddr: U64::new(answer.address()),
                len: U32::new(MEASUREMENT as u32),
                ..Default::default()
            };
            command(vm, &mut launch, uapi::LAUNCH_MEASURE, args)?;
            launch.measured(&answer);
        }
        command(vm, &mut launch, uapi::LAUNCH_FINISH, ()).map(drop)
    }

    fn awaits_guest(&self) -> bool {
        self.launch().context == Context::Awaited
    }

    fn can_move(&self) -> bool {
        self.params.movable || self.params.arrives
    }

    /// A mirror's guest was launched in the other VM.
    fn is_final(&self) -> bool {
        let launch = self.launch();
        launch.finished || launch.context == Context::Lent
    }

    fn as_sev(&self) -> Option<&SevGuest> {
        Some(self)
    }

    fn is_protected(&self) -> bool {
        let launch = self.launch();
        match self.tech {
            Tech::Sev => false,
            Tech::SevEs => launch.vmsas,
            _ => launch.finished,
        }
    }

    fn measurement(&self) -> Result<Option<Measurement>> {
        if self.is_snp() {
            return kvm_ops::not_offered!("measurement, which an SNP guest asks firmware for,");
        }
        Ok(self.launch().measurement.map(Measurement::new))
    }

    /// Passes a command on, with the blobs that stand behind its structure.
    fn command(&self, vm: &KvmVm, cmd: &mut EncCmd<'_>) -> Result<(), HeldFailure> {
        cmd.firmware_status = 0;
        let Some(form) = form_of(cmd.id) else {
            return Err(not_passed_on().into());
        };
        let mut patched = Patched::new(form, cmd.data)?;
        if let Some((address, bytes)) = patched.guest(form)
            && !vm.slots().lends(address, bytes)
        {
            // As the kernel says of memory that it cannot pin. It would take any of this process's.
            return Err(Error::NoMemory.into());
        }
        let mut launch = self.launch();
        if STARTS.contains(&cmd.id) {
            launch.open_device()?;
        }
        // SAFETY: the form says how long the structure is and where it has addresses. Those of blobs are of
        // memory in `patched` with the length beside them; that of guest memory was just found in a slot, which
        // no Rust reference covers.
        let done = unsafe { issue(vm, &mut launch, form, patched.head.as_mut_ptr()) };
        cmd.firmware_status = match &done {
            Err(HeldFailure {
                call: Some(call), ..
            }) => call.status,
            _ => 0,
        };
        patched.write_back(cmd.data);
        if done.is_ok() && cmd.id == uapi::LAUNCH_MEASURE {
            launch.note_measurement(cmd.data);
        }
        done
    }
}

/// Checks what KVM_SEV_INIT and KVM_SEV_ES_INIT, which take no parameters, would not do.
fn check_late(tech: Tech, params: &SevParams) -> Result<()> {
    match params {
        SevParams {
            vmsa_features: features @ 1..,
            ..
        } => Err(Error::Invalid(Field::Flags, *features)),
        // Linux speaks version 1 with the guest of ES_INIT, and no GHCB with one of plain SEV.
        SevParams {
            ghcb_version: version @ 2..,
            ..
        } if tech == Tech::SevEs => Err(Error::Invalid(Field::Flags, (*version).into())),
        _ => Ok(()),
    }
}

fn length(blob: &[u8]) -> Result<U32> {
    let len = blob.len();
    let len = u32::try_from(len).map_err(|_| Error::Invalid(Field::BufferLength, len as u64))?;
    Ok(U32::new(len))
}

impl Launch {
    fn open_device(&mut self) -> Result<()> {
        if self.device.is_none() {
            let opened = OpenOptions::new().read(true).write(true).open("/dev/sev");
            self.device =
                Some(opened.map_err(|error| {
                    from_errno(Call::OpenSev, error.raw_os_error().unwrap_or(0))
                })?);
        }
        Ok(())
    }

    fn measured(&mut self, answer: &Pages) {
        let mut measurement = [0; MEASUREMENT];
        answer.copy_to(&mut measurement);
        self.measurement = Some(measurement);
    }

    /// Keeps the answer of a LAUNCH_MEASURE that came as a command.
    fn note_measurement(&mut self, data: &[u8]) {
        let offset = data.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let start = offset.and_then(|offset| usize::try_from(offset).ok());
        let answer = start.and_then(|start| data.get(start..)?.first_chunk());
        self.measurement = answer.copied().or(self.measurement);
    }

    /// Remembers the steps that a command took.
    fn took(&mut self, id: u32) {
        match id {
            start if STARTS.contains(&start) => self.started = true,
            uapi::LAUNCH_UPDATE_VMSA => self.vmsas = true,
            uapi::LAUNCH_FINISH | uapi::SNP_LAUNCH_FINISH | uapi::RECEIVE_FINISH => {
                self.finished = true;
            }
            _ => {}
        }
    }
}

/// Issues a command whose addresses are of memory that lives until this returns, and returns its structure.
fn command<T>(vm: &KvmVm, launch: &mut Launch, id: u32, mut args: T) -> Result<T, HeldFailure> {
    let form = own_form(id).ok_or_else(not_passed_on)?;
    assert_eq!(size_of::<T>(), form.bytes);
    // SAFETY: the structure is the command's; every caller in this file puts addresses into it of pages that
    // it owns, or of a slot's memory, with the right length.
    unsafe { issue(vm, launch, form, (&raw mut args).cast()) }?;
    Ok(args)
}

/// Issues a command.
///
/// # Safety
/// `data` points to the command's structure. Addresses in it are of memory that the kernel may read and write for
/// as many bytes as the structure says.
unsafe fn issue(
    vm: &KvmVm,
    launch: &mut Launch,
    form: &Form,
    data: *mut u8,
) -> Result<(), HeldFailure> {
    let fd = launch
        .device
        .as_ref()
        .map_or(0, |device| device.as_raw_fd());
    let mut tries = TRIES;
    loop {
        let mut cmd = SevCmd {
            id: U32::new(form.id),
            data: U64::new(match form.bytes {
                0 => 0,
                _ => data.expose_provenance() as u64,
            }),
            sev_fd: U32::new(fd as u32),
            ..Default::default()
        };
        // SAFETY: `cmd` is the structure of the ioctl; the caller answers for what it points to.
        let done = unsafe { vm.fd().encrypt_op(&raw mut cmd) };
        tracing::trace!(command = %form.call, ok = done.is_ok(), "KVM_MEMORY_ENCRYPT_OP");
        match done {
            Ok(()) => {
                launch.took(form.id);
                return Ok(());
            }
            // A signal came before the command began.
            Err(error) if error.errno() == libc::EINTR && tries > 0 => tries -= 1,
            Err(error) => return Err(refused(form.call, error.errno(), cmd.error.get())),
        }
    }
}

/// LAUNCH_UPDATE_DATA: the contents go into the slot's memory, and are encrypted there.
fn update_data(vm: &KvmVm, launch: &mut Launch, page: &InitialPage<'_>) -> Result<(), HeldFailure> {
    if page.kind != InitialPageKind::Measured {
        let refused = kvm_ops::not_offered!("add_initial_page of a kind that SEV does not know");
        return refused.map_err(HeldFailure::from);
    }
    let gpa = page.gpa;
    let covering = vm.slots().covering(gpa);
    let Some((slot, offset)) = covering.filter(|(slot, _)| !slot.flags.read_only) else {
        return Err(Error::NotFound(Field::Gpa, gpa.get()).into());
    };
    let address = slot.host.address() + offset;
    let place = std::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: the page lies in a writable slot, whose memory is mapped without Rust references.
    unsafe { volatile::copy_to(place, page.contents) };
    let args = uapi::SevRange {
        uaddr: U64::new(address),
        len: U32::new(4096),
        ..Default::default()
    };
    command(vm, launch, uapi::LAUNCH_UPDATE_DATA, args).map(drop)
}

fn snp_page_type(kind: InitialPageKind) -> Result<u8> {
    Ok(match kind {
        InitialPageKind::Measured => page_type::NORMAL,
        InitialPageKind::Unmeasured => page_type::UNMEASURED,
        InitialPageKind::Zero => page_type::ZERO,
        InitialPageKind::Secrets => page_type::SECRETS,
        InitialPageKind::Cpuid => page_type::CPUID,
        _ => return kvm_ops::not_offered!("add_initial_page of a kind that SNP does not know"),
    })
}

/// SNP_LAUNCH_UPDATE: the kernel copies the page into the guest_memfd.
fn add_snp_page(
    vm: &KvmVm,
    launch: &mut Launch,
    page: &InitialPage<'_>,
) -> Result<(), HeldFailure> {
    let kind = snp_page_type(page.kind)?;
    let mut source = Pages::of(page.contents);
    let args = uapi::SnpLaunchUpdate {
        gfn_start: U64::new(page.gpa.get() / kvm_ops::PAGE_SIZE),
        uaddr: U64::new(match kind {
            page_type::ZERO => 0,
            _ => source.address(),
        }),
        len: U64::new(kvm_ops::PAGE_SIZE),
        kind,
        ..Default::default()
    };
    let added = command(vm, launch, uapi::SNP_LAUNCH_UPDATE, args).map(drop);
    let mut proposed = [0; 4096];
    source.copy_to(&mut proposed);
    match added {
        Err(failure) if kind == page_type::CPUID && &proposed != page.contents => {
            Err(HeldFailure {
                cause: "the CPUID page has values that firmware does not take",
                ..failure
            })
        }
        added => added,
    }
}

/// A call about a region.
#[derive(Clone, Copy)]
pub(super) enum Region {
    Register,
    Unregister,
}

/// Declares memory that will hold encrypted data, which pins it, or takes that back.
pub(super) fn region(vm: &KvmVm, region: EncRegion, call: Region) -> Result<(), HeldFailure> {
    let range = kvm_enc_region {
        addr: region.address,
        size: region.bytes,
    };
    let (call, done) = match call {
        Region::Register => (
            Call::RegisterRegion,
            vm.fd().register_enc_memory_region(&range),
        ),
        Region::Unregister => (
            Call::UnregisterRegion,
            vm.fd().unregister_enc_memory_region(&range),
        ),
    };
    done.map_err(|error| refused(call, error.errno(), 0))
}
