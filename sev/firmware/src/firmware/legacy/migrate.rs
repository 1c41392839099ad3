//! SEND and RECEIVE.

use super::super::rules::GuestState;
use super::super::{Firmware, Outcome};
use crate::command::{Command, ReceiveStart, SendStart, SendUpdateData, SevPolicy};
use crate::crypto::{
    CERT_LEN, CertUsage, Certificate, PACKET_HEADER_LEN, PacketContext, PacketHeader, SESSION_LEN,
    Session,
};
use crate::status::Status;

/// Longest data of one packet, as KVM limits it.
pub(super) const MAX_PACKET: u32 = 16 << 10;

impl Firmware<'_> {
    pub(super) fn send_start(&mut self, handle: u32, buffer: &mut SendStart) -> Outcome {
        let guest_policy = self.guest(handle)?.policy;
        buffer.policy = guest_policy;
        let session_len = buffer.session_len.get() as usize;
        buffer.session_len = (SESSION_LEN as u32).into();
        if session_len < SESSION_LEN {
            return Err(Status::INVALID_LEN);
        }
        if guest_policy.contains(SevPolicy::NOSEND) {
            return Err(Status::POLICY_FAILURE);
        }
        let session_address = buffer.session_paddr.get();
        self.writable(session_address, SESSION_LEN as u64)?;

        let (pdh, pdh_len) = (buffer.pdh_cert_paddr.get(), buffer.pdh_cert_len.get());
        let pdh = self.read_cert(pdh, pdh_len, CertUsage::Pdh)?;
        self.check_target(buffer, guest_policy, &pdh)?;
        let peer = pdh.key().ok_or(Status::INVALID_CERTIFICATE)?;

        let keys = self.random_transport();
        let z = self.sp.identity.keys().pdh.ecdh(&peer);
        let (nonce, iv) = (self.sp.random(), self.sp.random());
        let session = Session::seal(&z, nonce, iv, &keys, guest_policy.bits());
        self.write(session_address, &session.to_bytes())?;
        self.guest_mut(handle)?.transport = keys;
        Ok(())
    }

    /// Checks that the guest's policy lets it go to the platform with these certificates.
    fn check_target(
        &mut self,
        buffer: &SendStart,
        guest_policy: SevPolicy,
        pdh: &Certificate,
    ) -> Outcome {
        let [pek, oca, cek] = self.read_chain(
            buffer.plat_cert_paddr.get(),
            buffer.plat_cert_len.get(),
            [CertUsage::Pek, CertUsage::Oca, CertUsage::Cek],
        )?;
        if !pdh.is_signed_by(&pek) || !pek.is_signed_by(&oca) || !oca.is_signed_by(&oca) {
            return Err(Status::BAD_SIGNATURE);
        }
        if guest_policy.contains(SevPolicy::SEV) {
            let (address, len) = (buffer.amd_cert_paddr.get(), buffer.amd_cert_len.get());
            let [ask, ark] = self.read_chain(address, len, [CertUsage::Ask, CertUsage::Ark])?;
            // The vendor's root is fused into the chip: any other is not genuine.
            let [_, own_root] = self.sp.identity.root_certs();
            if ark.key() != own_root.key() {
                return Err(Status::INVALID_CERTIFICATE);
            }
            let genuine =
                ask.is_signed_by(&ark) && cek.is_signed_by(&ask) && pek.is_signed_by(&cek);
            if !genuine {
                return Err(Status::BAD_SIGNATURE);
            }
        }
        let own_domain = oca.key() == self.sp.identity.oca_cert().key();
        if (guest_policy.contains(SevPolicy::DOMAIN) && !own_domain)
            || guest_policy.api() > pdh.api_version()
        {
            return Err(Status::POLICY_FAILURE);
        }
        Ok(())
    }

    fn read_chain<const N: usize>(
        &self,
        address: u64,
        len: u32,
        usages: [CertUsage; N],
    ) -> Outcome<[Certificate; N]> {
        if len as usize != N * CERT_LEN {
            return Err(Status::INVALID_LEN);
        }
        self.range(address, len.into())?;
        let mut certs = Vec::with_capacity(N);
        for (i, usage) in usages.into_iter().enumerate() {
            certs.push(self.read_cert(address + (i * CERT_LEN) as u64, CERT_LEN as u32, usage)?);
        }
        certs.try_into().map_err(|_| Status::INVALID_CERTIFICATE)
    }

    pub(super) fn send_update(
        &mut self,
        command: Command,
        handle: u32,
        buffer: &mut SendUpdateData,
    ) -> Outcome {
        let context = self.packet_context(command, handle)?;
        let (header_len, data_len) = (buffer.hdr_len.get(), buffer.trans_len.get());
        let guest_len = buffer.guest_len.get();
        buffer.hdr_len = (PACKET_HEADER_LEN as u32).into();
        buffer.trans_len = guest_len.into();
        if (header_len as usize) < PACKET_HEADER_LEN
            || data_len < guest_len
            || guest_len > MAX_PACKET
        {
            return Err(Status::INVALID_LEN);
        }
        let guest_address = self.guest_range(buffer.guest_paddr.get(), guest_len)?;
        let (header_address, data_address) = (buffer.hdr_paddr.get(), buffer.trans_paddr.get());
        self.writable(header_address, PACKET_HEADER_LEN as u64)?;
        self.writable(data_address, guest_len.into())?;

        let key = self.memory_key(handle)?;
        let mut data = vec![0; guest_len as usize];
        self.guest_read(&key, guest_address, &mut data)?;
        let iv = self.sp.random();
        let keys = self.guest(handle)?.transport;
        let header = PacketHeader::seal(context, &keys, 0, iv, &mut data, &[]);
        self.write(header_address, &header.to_bytes())?;
        self.write(data_address, &data)
    }

    /// VMSA packets are for SEV-ES guests only, one page each.
    pub(super) fn packet_context(&self, command: Command, handle: u32) -> Outcome<PacketContext> {
        match command {
            Command::SEND_UPDATE_VMSA | Command::RECEIVE_UPDATE_VMSA => {
                if self.guest(handle)?.is_es() {
                    Ok(PacketContext::UpdateVmsa)
                } else {
                    Err(Status::POLICY_FAILURE)
                }
            }
            _ => Ok(PacketContext::UpdateData),
        }
    }

    pub(super) fn receive_start(&mut self, buffer: &mut ReceiveStart) -> Outcome {
        let policy = buffer.policy;
        let key = self.admit(buffer.handle.get(), policy)?;
        let cert = (buffer.pdh_cert_paddr.get(), buffer.pdh_cert_len.get());
        let session = (buffer.session_paddr.get(), buffer.session_len.get());
        let transport = self.open_session(cert, session, policy)?;
        let handle = self.add_guest(GuestState::ReceiveUpdate, policy, key, transport);
        buffer.handle = handle.into();
        Ok(())
    }
}
