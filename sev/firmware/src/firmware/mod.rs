//! The firmware: one command at a time, each checked in the same order.
//!
//! 1. the command exists and the buffer is long enough,
//! 2. the platform's state allows it,
//! 3. the guest exists,
//! 4. the guest's state allows it,
//! 5. the parameters, reserved bytes first.
//!
//! A guest's state changes here and nowhere else, after its command succeeded.

pub(crate) mod asid;
pub(crate) mod legacy;
mod memory;
pub(crate) mod rules;
pub(crate) mod snp;

use crate::command::{Command, CommandStruct, Length};
use crate::identity::Identity;
use crate::machine::Machine;
use crate::status::Status;
use crate::vlek::VlekSeed;
use crate::wire::{u32_at, u64_at};
use asid::{Asids, GuestId};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use rules::{Change, PlatformState};
use std::collections::BTreeMap;

pub(crate) use legacy::Guest;
pub(crate) use snp::SnpGuest;

pub(crate) type Outcome<T = ()> = Result<T, Status>;

/// Options of SNP_INIT_EX.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SnpOptions {
    /// Highest ASID of SNP guests if ciphertext hiding is on.
    pub(crate) max_snp_asid: Option<u32>,
    pub(crate) rapl_disabled: bool,
}

/// Security version settings.
pub(crate) struct Tcb {
    pub(crate) committed: crate::builder::TcbVersion,
    pub(crate) reported: crate::builder::TcbVersion,
    pub(crate) mask_chip_id: bool,
    pub(crate) mask_chip_key: bool,
}

/// Everything the AMD SP remembers.
pub(crate) struct Sp {
    pub(crate) initialised: bool,
    pub(crate) es: bool,
    pub(crate) snp: Option<SnpOptions>,
    pub(crate) rmp_initialised: bool,
    pub(crate) guests: BTreeMap<u32, Guest>,
    pub(crate) contexts: BTreeMap<u64, SnpGuest>,
    pub(crate) asids: Asids,
    pub(crate) identity: Identity,
    pub(crate) tcb: Tcb,
    /// Loaded until SNP ends.
    pub(crate) vlek: Option<VlekSeed>,
    pub(crate) max_guests: usize,
    next_handle: u32,
    nv_address: Option<u64>,
    rng: ChaCha20Rng,
}

impl Sp {
    pub(crate) fn new(config: &crate::builder::Config, seed: [u8; 32]) -> Self {
        let mut rng = ChaCha20Rng::from_seed(seed);
        let api = (config.api.0, config.api.1);
        Self {
            initialised: false,
            es: false,
            snp: None,
            rmp_initialised: false,
            guests: BTreeMap::new(),
            contexts: BTreeMap::new(),
            asids: Asids::new(config.max_asid),
            identity: Identity::new(config.root.clone(), api, config.chip_id_len(), &mut rng),
            tcb: Tcb {
                committed: config.tcb,
                reported: config.tcb,
                mask_chip_id: false,
                mask_chip_key: false,
            },
            vlek: None,
            max_guests: config.max_guests,
            next_handle: 0,
            nv_address: None,
            rng,
        }
    }

    /// WORKING as soon as there is a guest.
    pub(crate) fn platform_state(&self) -> PlatformState {
        match (self.initialised, self.guests.is_empty()) {
            (false, _) => PlatformState::Uninit,
            (true, true) => PlatformState::Init,
            (true, false) => PlatformState::Working,
        }
    }

    pub(crate) fn random<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        self.rng.fill_bytes(&mut out);
        out
    }
}

/// One command being carried out.
pub(crate) struct Firmware<'a> {
    pub(crate) sp: &'a mut Sp,
    pub(crate) machine: &'a Machine,
}

impl Firmware<'_> {
    /// Carries out a command whose buffer has the right length.
    pub(crate) fn execute(&mut self, command: Command, buffer: &mut [u8]) -> Outcome {
        self.check_platform(command)?;
        if command.is_snp() {
            self.execute_snp(command, buffer)
        } else {
            self.execute_legacy(command, buffer)
        }
    }

    fn check_platform(&self, command: Command) -> Outcome {
        if rules::is_unsupported(command) {
            return Err(Status::UNSUPPORTED);
        }
        let allowed = if command.is_snp() {
            rules::snp_platform_allows(command, self.sp.snp.is_some())
        } else {
            rules::platform_allows(command, self.sp.platform_state())
        };
        if allowed {
            Ok(())
        } else {
            Err(Status::INVALID_PLATFORM_STATE)
        }
    }

    fn execute_legacy(&mut self, command: Command, buffer: &mut [u8]) -> Outcome {
        let Some(field) = rules::handle(command) else {
            check_reserved(command, buffer)?;
            return self.platform_command(command, buffer);
        };
        let handle = u32_at(buffer, field.offset);
        let guest = self.sp.guests.get(&handle).ok_or(Status::INVALID_GUEST)?;
        let change =
            rules::guest_change(command, guest.state).ok_or(Status::INVALID_GUEST_STATE)?;
        check_reserved(command, buffer)?;
        if rules::needs_activation(command) && guest.asid.is_none() {
            return Err(Status::INACTIVE);
        }
        self.guest_command(command, handle, buffer)?;
        if let (Change::To(state), Some(guest)) = (change, self.sp.guests.get_mut(&handle)) {
            guest.state = state;
        }
        Ok(())
    }

    fn execute_snp(&mut self, command: Command, buffer: &mut [u8]) -> Outcome {
        let Some(field) = rules::context(command) else {
            check_reserved(command, buffer)?;
            return self.snp_platform_command(command, buffer);
        };
        let context = self.address(u64_at(buffer, field.offset));
        if !context.is_multiple_of(0x1000) || !self.machine.memory.contains(context, 0x1000) {
            return Err(Status::INVALID_ADDRESS);
        }
        let guest = self
            .sp
            .contexts
            .get(&context)
            .ok_or(Status::INVALID_GUEST)?;
        let change = rules::snp_change(command, guest.state).ok_or(Status::INVALID_GUEST_STATE)?;
        check_reserved(command, buffer)?;
        if rules::needs_activation(command) && guest.asid.is_none() {
            return Err(Status::INACTIVE);
        }
        self.snp_guest_command(command, context, buffer)?;
        if let (Change::To(state), Some(guest)) = (change, self.sp.contexts.get_mut(&context)) {
            guest.state = state;
        }
        Ok(())
    }

    fn df_flush(&mut self) -> Outcome {
        if !self.machine.all_flushed() {
            return Err(Status::WBINVD_REQUIRED);
        }
        self.sp.asids.clean();
        Ok(())
    }

    /// Unbinds a guest from its ASID, if it has one.
    fn release_asid(&mut self, asid: Option<u32>, guest: GuestId) {
        if let Some(asid) = asid {
            if self.sp.asids.release(asid, guest) {
                self.machine.set_slot(asid, None);
            }
            self.machine.forget_wbinvd();
        }
    }

    fn guest_count(&self) -> usize {
        self.sp.guests.len() + self.sp.contexts.len()
    }
}

/// The structure of a command's buffer.
fn view<C: CommandStruct>(buffer: &mut [u8]) -> Outcome<&mut C> {
    C::mut_from_bytes(buffer).map_err(|_| Status::INVALID_LEN)
}

/// A length that a structure names must be its own.
fn check_length<const N: u32>(length: Length<N>) -> Outcome {
    if length.is_right() {
        Ok(())
    } else {
        Err(Status::INVALID_LEN)
    }
}

fn check_reserved(command: Command, buffer: &[u8]) -> Outcome {
    if command.reserved_is_zero(buffer) {
        Ok(())
    } else {
        Err(Status::INVALID_PARAM)
    }
}
