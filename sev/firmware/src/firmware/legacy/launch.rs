//! Launching a guest: START, UPDATE, MEASURE, SECRET, and the attestation report.

use super::super::rules::GuestState;
use super::super::{Firmware, Outcome};
use super::migrate::MAX_PACKET;
use crate::attestation::LegacyReport;
use crate::command::{
    Attestation, LaunchMeasure, LaunchSecret, LaunchStart, LaunchUpdateData, LaunchUpdateVmsa,
};
use crate::crypto::{PACKET_HEADER_LEN, PacketContext, PacketHeader};
use crate::measure::{self, ApiVersion, SevDigest};
use crate::status::Status;
use crate::wire::copy_at;
use std::sync::Arc;

const VMSA_LEN: u32 = 0x1000;
/// Packet flag: the data is compressed.
const COMPRESSED: u32 = 1;

impl Firmware<'_> {
    pub(super) fn launch_start(&mut self, buffer: &mut LaunchStart) -> Outcome {
        let policy = buffer.policy;
        let key = self.admit(buffer.handle.get(), policy)?;
        let transport = if buffer.dh_cert_paddr == 0 && buffer.session_paddr == 0 {
            self.random_transport()
        } else {
            let cert = (buffer.dh_cert_paddr.get(), buffer.dh_cert_len.get());
            let session = (buffer.session_paddr.get(), buffer.session_len.get());
            self.open_session(cert, session, policy)?
        };
        let handle = self.add_guest(GuestState::LaunchUpdate, policy, key, transport);
        buffer.handle = handle.into();
        Ok(())
    }

    pub(super) fn launch_update_data(&mut self, handle: u32, buffer: &LaunchUpdateData) -> Outcome {
        self.launch_update(handle, buffer.data_paddr.get(), buffer.data_len.get())
    }

    pub(super) fn launch_update_vmsa(&mut self, handle: u32, buffer: &LaunchUpdateVmsa) -> Outcome {
        let (address, len) = (buffer.vmsa_paddr.get(), buffer.vmsa_len.get());
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

    pub(super) fn launch_measure(&mut self, handle: u32, buffer: &mut LaunchMeasure) -> Outcome {
        let guest = self.guest(handle)?;
        let (digest, policy, tik) = (guest.digest.value(), guest.policy, guest.transport.tik);
        let (major, minor, build) = self.machine.config.api;
        let version = ApiVersion {
            major,
            minor,
            build,
        };
        let mnonce = self.sp.random();
        let measure =
            measure::LaunchMeasure::compute(&tik, version, policy.bits(), &digest, mnonce);
        let address = buffer.measure_paddr.get();
        self.write_sized(address, &mut buffer.measure_len, &measure.to_bytes())?;
        let guest = self.guest_mut(handle)?;
        (guest.launch_digest, guest.measure) = (digest, measure.measure);
        Ok(())
    }

    pub(super) fn launch_secret(&mut self, handle: u32, buffer: &LaunchSecret) -> Outcome {
        let guest = self.guest(handle)?;
        let measure = guest.measure;
        self.open_packet(handle, buffer, PacketContext::LaunchSecret, &measure)
    }

    /// Checks a packet and puts its data into guest memory. Nothing is written unless the whole
    /// packet is authentic.
    pub(super) fn open_packet(
        &mut self,
        handle: u32,
        buffer: &LaunchSecret,
        context: PacketContext,
        measure: &[u8],
    ) -> Outcome {
        let (guest_len, data_len) = (buffer.guest_len.get(), buffer.trans_len.get());
        if buffer.hdr_len.get() as usize != PACKET_HEADER_LEN
            || data_len != guest_len
            || data_len > MAX_PACKET
        {
            return Err(Status::INVALID_LEN);
        }
        let guest_address = self.guest_range(buffer.guest_paddr.get(), guest_len)?;
        self.writable(guest_address, guest_len.into())?;
        let header = PacketHeader::from_bytes(&*self.read_array(buffer.hdr_paddr.get())?);
        if header.flags & COMPRESSED != 0 {
            return Err(Status::UNSUPPORTED);
        }
        let mut bytes = vec![0; data_len as usize];
        self.read(buffer.trans_paddr.get(), &mut bytes)?;
        let guest = self.guest(handle)?;
        header
            .open(context, &guest.transport, &mut bytes, measure)
            .map_err(|_| Status::BAD_MEASUREMENT)?;
        self.guest_write(&guest.key, guest_address, &bytes)
    }

    pub(super) fn attestation(&mut self, handle: u32, buffer: &mut Attestation) -> Outcome {
        let guest = self.guest(handle)?;
        let mut report = LegacyReport {
            mnonce: buffer.mnonce,
            launch_digest: guest.launch_digest,
            policy: guest.policy.bits(),
            signature: [0; 144],
        };
        // A query does not cost a signature.
        if buffer.length.get() as usize >= LegacyReport::LEN {
            let signature = self.sp.identity.keys().pek.sign(&report.signed_bytes());
            report.signature = copy_at(&signature, 0);
        }
        self.write_sized(buffer.paddr.get(), &mut buffer.length, &report.to_bytes())
    }

    /// The key of a guest, so that it can be used while the guest is borrowed.
    pub(super) fn memory_key(&self, handle: u32) -> Outcome<Arc<crate::cipher::MemoryKey>> {
        Ok(Arc::clone(&self.guest(handle)?.key))
    }
}
