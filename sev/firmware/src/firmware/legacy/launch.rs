//! Launching a guest: START, UPDATE, MEASURE, SECRET, and the attestation report.

use super::super::rules::GuestState;
use super::super::{Firmware, Outcome};
use super::migrate::MAX_PACKET;
use crate::attestation::LegacyReport;
use crate::crypto::{PACKET_HEADER_LEN, PacketContext, PacketHeader};
use crate::measure::{ApiVersion, LaunchMeasure, SevDigest};
use crate::status::Status;
use crate::wire::{copy_at, put, u32_at, u64_at};
use std::sync::Arc;

const VMSA_LEN: u32 = 0x1000;
/// Packet flag: the data is compressed.
const COMPRESSED: u32 = 1;

impl Firmware<'_> {
    pub(super) fn launch_start(&mut self, buffer: &mut [u8]) -> Outcome {
        let (share, policy) = (u32_at(buffer, 0), u32_at(buffer, 4));
        let key = self.admit(share, policy)?;
        let without_owner = u64_at(buffer, 8) == 0 && u64_at(buffer, 0x18) == 0;
        let transport = if without_owner {
            self.random_transport()
        } else {
            self.open_session(buffer, policy)?
        };
        let handle = self.add_guest(GuestState::LaunchUpdate, policy, key, transport);
        put(buffer, 0, &handle.to_le_bytes());
        Ok(())
    }

    pub(super) fn launch_update_data(&mut self, handle: u32, buffer: &[u8]) -> Outcome {
        let (address, len) = (u64_at(buffer, 8), u32_at(buffer, 0x10));
        self.launch_update(handle, address, len)
    }

    pub(super) fn launch_update_vmsa(&mut self, handle: u32, buffer: &[u8]) -> Outcome {
        let (address, len) = (u64_at(buffer, 8), u32_at(buffer, 0x10));
        if !self.guest(handle)?.is_es() {
            return Err(Status::POLICY_FAILURE);
        }
        if len != VMSA_LEN {
            return Err(Status::INVALID_LEN);
        }
        if address % u64::from(VMSA_LEN) != 0 {
            return Err(Status::INVALID_ADDRESS);
        }
        self.launch_update(handle, address, len)
    }

    /// Everything is checked before the first byte is encrypted.
    fn launch_update(&mut self, handle: u32, address: u64, len: u32) -> Outcome {
        let address = self.guest_range(address, len)?;
        self.writable(address, len.into())?;
        let guest = self.guest(handle)?;
        let mut digest: SevDigest = guest.digest.clone();
        self.encrypt_in_place(&guest.key, address, len, |plain| digest.update(plain))?;
        self.guest_mut(handle)?.digest = digest;
        Ok(())
    }

    pub(super) fn launch_measure(&mut self, handle: u32, buffer: &mut [u8]) -> Outcome {
        let guest = self.guest(handle)?;
        let (digest, policy, tik) = (guest.digest.value(), guest.policy, guest.transport.tik);
        let (major, minor, build) = self.machine.config.api;
        let version = ApiVersion {
            major,
            minor,
            build,
        };
        let mnonce = self.sp.random();
        let measure = LaunchMeasure::compute(&tik, version, policy, &digest, mnonce);
        self.export(buffer, 8, &measure.to_bytes())?;
        let guest = self.guest_mut(handle)?;
        (guest.launch_digest, guest.measure) = (digest, measure.measure);
        Ok(())
    }

    pub(super) fn launch_secret(&mut self, handle: u32, buffer: &[u8]) -> Outcome {
        let guest = self.guest(handle)?;
        let measure = guest.measure;
        self.open_packet(handle, buffer, PacketContext::LaunchSecret, &measure)
    }

    /// Checks a packet and puts its data into guest memory. Nothing is written unless the whole
    /// packet is authentic.
    pub(super) fn open_packet(
        &mut self,
        handle: u32,
        buffer: &[u8],
        context: PacketContext,
        measure: &[u8],
    ) -> Outcome {
        let (header, header_len) = (u64_at(buffer, 8), u32_at(buffer, 0x10));
        let (guest_address, guest_len) = (u64_at(buffer, 0x18), u32_at(buffer, 0x20));
        let (data, data_len) = (u64_at(buffer, 0x28), u32_at(buffer, 0x30));
        if header_len as usize != PACKET_HEADER_LEN
            || data_len != guest_len
            || data_len > MAX_PACKET
        {
            return Err(Status::INVALID_LEN);
        }
        let guest_address = self.guest_range(guest_address, guest_len)?;
        self.writable(guest_address, guest_len.into())?;
        let header = PacketHeader::from_bytes(&*self.read_array(header)?);
        if header.flags & COMPRESSED != 0 {
            return Err(Status::UNSUPPORTED);
        }
        let mut bytes = vec![0; data_len as usize];
        self.read(data, &mut bytes)?;
        let guest = self.guest(handle)?;
        header
            .open(context, &guest.transport, &mut bytes, measure)
            .map_err(|_| Status::BAD_MEASUREMENT)?;
        self.guest_write(&guest.key, guest_address, &bytes)
    }

    pub(super) fn attestation(&mut self, handle: u32, buffer: &mut [u8]) -> Outcome {
        let guest = self.guest(handle)?;
        let mut report = LegacyReport {
            mnonce: copy_at(buffer, 0x10),
            launch_digest: guest.launch_digest,
            policy: guest.policy,
            signature: [0; 144],
        };
        let address = u64_at(buffer, 8);
        let mut len = u32_at(buffer, 0x20);
        // A query does not cost a signature.
        if len as usize >= LegacyReport::LEN {
            let signature = self.sp.identity.keys().pek.sign(&report.signed_bytes());
            report.signature = copy_at(&signature, 0);
        }
        let result = self.write_sized(address, &mut len, &report.to_bytes());
        put(buffer, 0x20, &len.to_le_bytes());
        result
    }

    /// The key of a guest, so that it can be used while the guest is borrowed.
    pub(super) fn memory_key(&self, handle: u32) -> Outcome<Arc<crate::cipher::MemoryKey>> {
        Ok(Arc::clone(&self.guest(handle)?.key))
    }
}
