//! LOCAL_SEND and LOCAL_RECEIVE: a guest moves to another VM of the host by a one-time token.
//!
//! They were proposed for Linux in 2021, which took an ioctl on the receiver (MOVE) instead. Here they are commands of
//! numbers that the kernel does not use. From LOCAL_SEND on the source's guest does not run, and its owner can only
//! debug it. A token that is unknown, used, or of a VM that is gone is ENOENT, where the proposal had EFAULT.

use kvm_ops::moves::{GuestName, MoveToken};
use kvm_ops::{Error, Field};
use kvm_ops_uapi::U32;
use kvm_ops_uapi::checks::{local_receive, local_send};
use kvm_ops_uapi::sev::{self as uapi, SevLocalReceive, SevLocalSend};

use super::command::{Answer, Call, Sent};
use crate::Refusal;
use crate::refusal::{Result, ensure};
use crate::vm::State;

/// The commands of a guest that is staged.
const DEBUG: [u32; 2] = [uapi::DBG_DECRYPT, uapi::DBG_ENCRYPT];

/// The part of the order of checks that comes before the command's.
pub(super) fn check_staged(state: &State, id: u32) -> Result<()> {
    let allowed = !state.sev.staged || DEBUG.contains(&id);
    ensure(allowed, local_send::STAGED)
}

/// Keeps why a structure could not be written, which an error of the back end cannot carry.
#[derive(Default)]
struct Delivery(Option<Refusal>);

impl Delivery {
    fn note(&mut self, written: Result<()>) -> Result<(), Error> {
        written.map_err(|refusal| {
            self.0 = Some(refusal);
            Error::Again
        })
    }

    /// The reason of a failure: its own, or that of the back end.
    fn or(self, error: Error, explain: impl FnOnce(Error) -> Refusal) -> Refusal {
        self.0.unwrap_or_else(|| explain(error))
    }
}

pub(super) fn send(state: &mut State, call: &Call<'_>) -> Answer {
    use local_send::{COPY_BACK, IDLE, LAUNCHED, RANDOM, SEV};
    ensure(state.sev.is_active() && !state.sev.is_snp(), SEV)?;
    let engine = state.sev.engine(SEV)?;
    ensure(engine.knows_guest(), LAUNCHED)?;
    let mut delivery = Delivery::default();
    let mut random = |bytes: &mut [u8]| getrandom::fill(bytes).map_err(|_| Error::Again);
    let mut deliver = |token: &MoveToken| {
        let answer = SevLocalSend {
            token: token.to_bytes(),
        };
        delivery.note(call.write(&answer, COPY_BACK))
    };
    let staged = engine
        .vm
        .local_send(call.vm.kernel().staging(), &mut random, &mut deliver);
    staged.map_err(|error| {
        delivery.or(error, |error| match error {
            Error::Busy => IDLE.into(),
            Error::Again => RANDOM.into(),
            error => error.into(),
        })
    })?;
    state.sev.staged = true;
    Ok(Sent::No)
}

pub(super) fn receive(state: &mut State, call: &Call<'_>) -> Answer {
    use local_receive::{COPY, COPY_BACK, FITS, FRESH, SEV, TOKEN};
    ensure(state.sev.is_active() && !state.sev.is_snp(), SEV)?;
    let engine = state.sev.engine(SEV)?;
    ensure(!engine.knows_guest(), FRESH)?;
    let given: SevLocalReceive = call.read(COPY)?;
    let token = MoveToken::from_bytes(given.token);
    let mut delivery = Delivery::default();
    let mut deliver = |name| {
        let handle = match name {
            GuestName::Handle(handle) => U32::new(handle),
            GuestName::Page(_) => U32::ZERO,
        };
        let answer = SevLocalReceive { handle, ..given };
        delivery.note(call.write(&answer, COPY_BACK))
    };
    let received = engine
        .vm
        .local_receive(call.vm.kernel().staging(), &token, &mut deliver);
    received.map_err(|error| {
        delivery.or(error, |error| match error {
            Error::NotFound(Field::Token, _) => TOKEN.into(),
            Error::Invalid(Field::Vm | Field::VcpuCount, _) => FITS.into(),
            error => error.into(),
        })
    })?;
    // The kernel remembers a descriptor by its number.
    state.sev.sev_fd = call.sev_fd;
    if state.sev.is_es() {
        state.sev.protected.extend(state.vcpus.keys());
    }
    Ok(Sent::No)
}
