//! SEV and SEV-ES.

mod debug;
mod keys;
mod launch;
mod migrate;
mod platform;

use super::asid::{AsidKind, GuestId};
use super::rules::GuestState;
use super::{Firmware, Outcome};
use crate::cipher::MemoryKey;
use crate::command::Command;
use crate::crypto::{CERT_LEN, Certificate, Session, TransportKeys};
use crate::measure::SevDigest;
use crate::status::Status;
use crate::wire::{put, u32_at, u64_at};
use std::sync::Arc;

/// Bits of the policy of an SEV or SEV-ES guest.
pub mod policy {
    /// Debugging is not allowed.
    pub const NODBG: u32 = 1 << 0;
    /// Sharing the key with other guests is not allowed.
    pub const NOKS: u32 = 1 << 1;
    /// SEV-ES is required.
    pub const ES: u32 = 1 << 2;
    /// Sending to another platform is not allowed.
    pub const NOSEND: u32 = 1 << 3;
    /// Sending is allowed inside the owner's domain only.
    pub const DOMAIN: u32 = 1 << 4;
    /// Sending is allowed to genuine SEV platforms only.
    pub const SEV: u32 = 1 << 5;
    /// Must be 0.
    pub const RESERVED: u32 = 0xffc0;

    /// Lowest firmware version, as major and minor.
    pub(crate) fn api(policy: u32) -> (u8, u8) {
        ((policy >> 16) as u8, (policy >> 24) as u8)
    }
}

/// Context of an SEV or SEV-ES guest.
pub(crate) struct Guest {
    pub(crate) state: GuestState,
    pub(crate) policy: u32,
    pub(crate) asid: Option<u32>,
    pub(crate) key: Arc<MemoryKey>,
    /// Running digest of the launch.
    digest: SevDigest,
    /// Digest and keyed hash once measured; zeros for a guest that was received.
    launch_digest: [u8; 32],
    measure: [u8; 32],
    /// Keys of the launch, of receiving, or of the latest sending.
    transport: TransportKeys,
}

impl Guest {
    pub(crate) fn is_es(&self) -> bool {
        self.policy & policy::ES != 0
    }
}

impl Firmware<'_> {
    /// A command of a guest that exists and whose state allows it.
    pub(super) fn guest_command(
        &mut self,
        command: Command,
        handle: u32,
        buffer: &mut [u8],
    ) -> Outcome {
        use Command::*;
        match command {
            DECOMMISSION => self.decommission(handle),
            ACTIVATE => self.activate(handle, u32_at(buffer, 4)),
            ACTIVATE_EX => self.activate_ex(handle, buffer),
            DEACTIVATE => self.deactivate(handle),
            GUEST_STATUS => self.guest_status(handle, buffer),
            COPY => self.copy(handle, buffer),
            LAUNCH_UPDATE_DATA => self.launch_update_data(handle, buffer),
            LAUNCH_UPDATE_VMSA => self.launch_update_vmsa(handle, buffer),
            LAUNCH_MEASURE => self.launch_measure(handle, buffer),
            LAUNCH_UPDATE_SECRET => self.launch_secret(handle, buffer),
            ATTESTATION => self.attestation(handle, buffer),
            SEND_START => self.send_start(handle, buffer),
            SEND_UPDATE_DATA | SEND_UPDATE_VMSA => self.send_update(command, handle, buffer),
            RECEIVE_UPDATE_DATA | RECEIVE_UPDATE_VMSA => {
                self.receive_update(command, handle, buffer)
            }
            DBG_DECRYPT => self.dbg_decrypt(handle, buffer),
            DBG_ENCRYPT => self.dbg_encrypt(handle, buffer),
            // Only the state changes.
            LAUNCH_FINISH | SEND_FINISH | SEND_CANCEL | RECEIVE_FINISH => Ok(()),
            _ => Err(Status::INVALID_COMMAND),
        }
    }

    fn guest(&self, handle: u32) -> Outcome<&Guest> {
        self.sp.guests.get(&handle).ok_or(Status::INVALID_GUEST)
    }

    fn guest_mut(&mut self, handle: u32) -> Outcome<&mut Guest> {
        self.sp.guests.get_mut(&handle).ok_or(Status::INVALID_GUEST)
    }

    /// The policy rules that LAUNCH_START and RECEIVE_START share, and the memory key: a fresh one
    /// for handle 0, otherwise that of the named guest.
    fn admit(&mut self, share: u32, wanted: u32) -> Outcome<Arc<MemoryKey>> {
        let shared = match share {
            0 => None,
            handle => {
                let guest = self.guest(handle)?;
                Some((guest.policy, Arc::clone(&guest.key)))
            }
        };
        let (major, minor, _) = self.machine.config.api;
        if wanted & policy::RESERVED != 0
            || policy::api(wanted) > (major, minor)
            || (wanted & policy::ES != 0 && !self.sp.es)
        {
            return Err(Status::POLICY_FAILURE);
        }
        if let Some((policy, _)) = shared
            && (policy != wanted || policy & policy::NOKS != 0)
        {
            return Err(Status::POLICY_FAILURE);
        }
        if self.guest_count() >= self.sp.max_guests {
            return Err(Status::RESOURCE_LIMIT);
        }
        Ok(match shared {
            Some((_, key)) => key,
            None => Arc::new(MemoryKey::new(&self.sp.random())),
        })
    }

    fn add_guest(
        &mut self,
        state: GuestState,
        policy: u32,
        key: Arc<MemoryKey>,
        transport: TransportKeys,
    ) -> u32 {
        // Handles are not used again before the counter has gone round.
        loop {
            self.sp.next_handle = self.sp.next_handle.wrapping_add(1).max(1);
            if !self.sp.guests.contains_key(&self.sp.next_handle) {
                break;
            }
        }
        let guest = Guest {
            state,
            policy,
            asid: None,
            key,
            digest: SevDigest::new(),
            launch_digest: [0; 32],
            measure: [0; 32],
            transport,
        };
        self.sp.guests.insert(self.sp.next_handle, guest);
        self.sp.next_handle
    }

    fn random_transport(&mut self) -> TransportKeys {
        TransportKeys {
            tek: self.sp.random(),
            tik: self.sp.random(),
        }
    }

    /// Unwraps the transport keys that came with a Diffie-Hellman certificate and a session.
    fn open_session(&mut self, buffer: &[u8], policy: u32) -> Outcome<TransportKeys> {
        let (cert, cert_len) = (u64_at(buffer, 8), u32_at(buffer, 0x10));
        let (session, session_len) = (u64_at(buffer, 0x18), u32_at(buffer, 0x20));
        if cert == 0 || session == 0 {
            return Err(Status::INVALID_ADDRESS);
        }
        if cert_len as usize != CERT_LEN || session_len as usize != crate::crypto::SESSION_LEN {
            return Err(Status::INVALID_LEN);
        }
        let cert = Certificate::from_bytes(&*self.read_array(cert)?);
        let peer = cert
            .and_then(|c| c.key())
            .ok_or(Status::INVALID_CERTIFICATE)?;
        let session = Session::from_bytes(&*self.read_array(session)?);
        let z = self.sp.identity.keys().pdh.ecdh(&peer);
        session
            .open(&z, policy)
            .map_err(|_| Status::BAD_MEASUREMENT)
    }

    fn activate(&mut self, handle: u32, asid: u32) -> Outcome {
        let guest = self.guest(handle)?;
        let kind = if guest.is_es() {
            AsidKind::SevEs
        } else {
            AsidKind::Sev
        };
        let (current, key) = (guest.asid, Arc::clone(&guest.key));
        self.bind_asid(asid, kind, GuestId::Handle(handle), current, key)?;
        self.guest_mut(handle)?.asid = Some(asid);
        Ok(())
    }

    fn activate_ex(&mut self, handle: u32, buffer: &[u8]) -> Outcome {
        if u32_at(buffer, 0) as usize != Command::ACTIVATE_EX.buffer_len() {
            return Err(Status::INVALID_LEN);
        }
        self.check_core_list(u32_at(buffer, 0xc), u64_at(buffer, 0x10))?;
        self.activate(handle, u32_at(buffer, 8))
    }

    fn deactivate(&mut self, handle: u32) -> Outcome {
        let asid = self
            .guest_mut(handle)?
            .asid
            .take()
            .ok_or(Status::INACTIVE)?;
        self.release_asid(Some(asid), GuestId::Handle(handle));
        Ok(())
    }

    fn decommission(&mut self, handle: u32) -> Outcome {
        if self.guest(handle)?.asid.is_some() {
            return Err(Status::ACTIVE);
        }
        self.sp.guests.remove(&handle);
        Ok(())
    }

    fn guest_status(&self, handle: u32, buffer: &mut [u8]) -> Outcome {
        let guest = self.guest(handle)?;
        put(buffer, 4, &guest.policy.to_le_bytes());
        put(buffer, 8, &guest.asid.unwrap_or(0).to_le_bytes());
        put(buffer, 0xc, &[guest.state as u8]);
        Ok(())
    }
}
