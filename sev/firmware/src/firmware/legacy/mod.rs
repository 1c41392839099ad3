//! SEV and SEV-ES.

mod debug;
mod keys;
mod launch;
mod migrate;
mod platform;

use super::asid::{AsidKind, GuestId};
use super::rules::GuestState;
use super::{Firmware, Outcome, check_length, view};
use crate::cipher::MemoryKey;
use crate::command::{Activate, ActivateEx, Command, GuestStatus, LaunchSecret, SevPolicy};
use crate::crypto::{CERT_LEN, Certificate, Session, TransportKeys};
use crate::measure::SevDigest;
use crate::status::Status;
use std::sync::Arc;

/// Context of an SEV or SEV-ES guest.
pub(crate) struct Guest {
    pub(crate) state: GuestState,
    pub(crate) policy: SevPolicy,
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
        self.policy.contains(SevPolicy::ES)
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
            ACTIVATE => self.activate(handle, view::<Activate>(buffer)?.asid.get()),
            ACTIVATE_EX => self.activate_ex(handle, view(buffer)?),
            DEACTIVATE => self.deactivate(handle),
            GUEST_STATUS => self.guest_status(handle, view(buffer)?),
            COPY => self.copy(handle, view(buffer)?),
            LAUNCH_UPDATE_DATA => self.launch_update_data(handle, view(buffer)?),
            LAUNCH_UPDATE_VMSA => self.launch_update_vmsa(handle, view(buffer)?),
            LAUNCH_MEASURE => self.launch_measure(handle, view(buffer)?),
            LAUNCH_UPDATE_SECRET => self.launch_secret(handle, view(buffer)?),
            ATTESTATION => self.attestation(handle, view(buffer)?),
            SEND_START => self.send_start(handle, view(buffer)?),
            // The commands of packets have one layout.
            SEND_UPDATE_DATA | SEND_UPDATE_VMSA => self.send_update(command, handle, view(buffer)?),
            RECEIVE_UPDATE_DATA | RECEIVE_UPDATE_VMSA => {
                let context = self.packet_context(command, handle)?;
                self.open_packet(handle, view::<LaunchSecret>(buffer)?, context, &[])
            }
            DBG_DECRYPT => self.dbg_decrypt(handle, view(buffer)?),
            DBG_ENCRYPT => self.dbg_encrypt(handle, view(buffer)?),
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
    fn admit(&mut self, share: u32, wanted: SevPolicy) -> Outcome<Arc<MemoryKey>> {
        let shared = match share {
            0 => None,
            handle => {
                let guest = self.guest(handle)?;
                Some((guest.policy, Arc::clone(&guest.key)))
            }
        };
        let (major, minor, _) = self.machine.config.api;
        if wanted.reserved() != 0
            || wanted.api() > (major, minor)
            || (wanted.contains(SevPolicy::ES) && !self.sp.es)
        {
            return Err(Status::POLICY_FAILURE);
        }
        if let Some((policy, _)) = shared
            && (policy != wanted || policy.contains(SevPolicy::NOKS))
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
        policy: SevPolicy,
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
    fn open_session(
        &mut self,
        (cert, cert_len): (u64, u32),
        (session, session_len): (u64, u32),
        policy: SevPolicy,
    ) -> Outcome<TransportKeys> {
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
            .open(&z, policy.bits())
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

    fn activate_ex(&mut self, handle: u32, buffer: &ActivateEx) -> Outcome {
        check_length(buffer.ex_len)?;
        self.check_core_list(buffer.numids.get(), buffer.ids_paddr.get())?;
        self.activate(handle, buffer.asid.get())
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

    fn guest_status(&self, handle: u32, buffer: &mut GuestStatus) -> Outcome {
        let guest = self.guest(handle)?;
        buffer.policy = guest.policy;
        buffer.asid = guest.asid.unwrap_or(0).into();
        buffer.state = guest.state as u8;
        Ok(())
    }
}
