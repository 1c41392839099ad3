//! SEND and RECEIVE.

use super::super::rules::GuestState;
use super::super::{Firmware, Outcome};
use super::policy;
use crate::command::Command;
use crate::crypto::{
    CERT_LEN, CertUsage, Certificate, PACKET_HEADER_LEN, PacketContext, PacketHeader, SESSION_LEN,
    Session,
};
use crate::status::Status;
use crate::wire::{put, u32_at, u64_at};

/// Longest data of one packet, as KVM limits it.
pub(super) const MAX_PACKET: u32 = 16 << 10;

impl Firmware<'_> {
    pub(super) fn send_start(&mut self, handle: u32, buffer: &mut [u8]) -> Outcome {
        let guest_policy = self.guest(handle)?.policy;
        put(buffer, 4, &guest_policy.to_le_bytes());
        let session_len = u32_at(buffer, 0x40) as usize;
        put(buffer, 0x40, &(SESSION_LEN as u32).to_le_bytes());
        if session_len < SESSION_LEN {
            return Err(Status::INVALID_LEN);
        }
        if guest_policy & policy::NOSEND != 0 {
            return Err(Status::POLICY_FAILURE);
        }
        let session_address = u64_at(buffer, 0x38);
        self.writable(session_address, SESSION_LEN as u64)?;

        let pdh = self.read_cert(u64_at(buffer, 8), u32_at(buffer, 0x10), CertUsage::Pdh)?;
        self.check_target(buffer, guest_policy, &pdh)?;
        let peer = pdh.key().ok_or(Status::INVALID_CERTIFICATE)?;

        let keys = self.random_transport();
        let z = self.sp.identity.keys().pdh.ecdh(&peer);
        let (nonce, iv) = (self.sp.random(), self.sp.random());
        let session = Session::seal(&z, nonce, iv, &keys, guest_policy);
        self.write(session_address, &session.to_bytes())?;
        self.guest_mut(handle)?.transport = keys;
        Ok(())
    }

    /// Checks that the guest's policy lets it go to the platform with these certificates.
    fn check_target(&mut self, buffer: &[u8], guest_policy: u32, pdh: &Certificate) -> Outcome {
        let (address, len) = (u64_at(buffer, 0x18), u32_at(buffer, 0x20));
        let [pek, oca, cek] = self.read_chain(
            address,
            len,
            [CertUsage::Pek, CertUsage::Oca, CertUsage::Cek],
        )?;
        if !pdh.is_signed_by(&pek) || !pek.is_signed_by(&oca) || !oca.is_signed_by(&oca) {
            return Err(Status::BAD_SIGNATURE);
        }
        if guest_policy & policy::SEV != 0 {
            let (address, len) = (u64_at(buffer, 0x28), u32_at(buffer, 0x30));
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
        if (guest_policy & policy::DOMAIN != 0 && !own_domain)
            || policy::api(guest_policy) > pdh.api_version()
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
        buffer: &mut [u8],
    ) -> Outcome {
        let context = self.packet_context(command, handle)?;
        let (header_address, header_len) = (u64_at(buffer, 8), u32_at(buffer, 0x10));
        let (guest_address, guest_len) = (u64_at(buffer, 0x18), u32_at(buffer, 0x20));
        let (data_address, data_len) = (u64_at(buffer, 0x28), u32_at(buffer, 0x30));
        put(buffer, 0x10, &(PACKET_HEADER_LEN as u32).to_le_bytes());
        put(buffer, 0x30, &guest_len.to_le_bytes());
        if (header_len as usize) < PACKET_HEADER_LEN
            || data_len < guest_len
            || guest_len > MAX_PACKET
        {
            return Err(Status::INVALID_LEN);
        }
        let guest_address = self.guest_range(guest_address, guest_len)?;
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
    fn packet_context(&self, command: Command, handle: u32) -> Outcome<PacketContext> {
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

    pub(super) fn receive_start(&mut self, buffer: &mut [u8]) -> Outcome {
        let (share, policy) = (u32_at(buffer, 0), u32_at(buffer, 4));
        let key = self.admit(share, policy)?;
        let transport = self.open_session(buffer, policy)?;
        let handle = self.add_guest(GuestState::ReceiveUpdate, policy, key, transport);
        put(buffer, 0, &handle.to_le_bytes());
        Ok(())
    }

    pub(super) fn receive_update(
        &mut self,
        command: Command,
        handle: u32,
        buffer: &[u8],
    ) -> Outcome {
        let context = self.packet_context(command, handle)?;
        self.open_packet(handle, buffer, context, &[])
    }
}
