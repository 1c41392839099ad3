//! Identity and persistent keys.

use super::super::{Firmware, Outcome};
use crate::command::{GetId, PdhCertExport, PekCertImport, PekCsr, U32, U64};
use crate::crypto::{
    CERT_LEN, CertUsage, Certificate, PrivateKey, aes128_ctr, hmac_sha256, same_mac,
};
use crate::identity::{ExternalOwner, OwnedKeys};
use crate::status::Status;
use crate::wire::{copy_at, put};

/// Length of the buffer with persistent data.
const NV_LEN: usize = 32 << 10;
const MAGIC: &[u8; 16] = b"soft-amd-sp nv 1";
/// Layout of the persistent data: magic, IV, authentication code, then the encrypted part.
const IV: usize = 0x10;
const MAC: usize = 0x20;
const BODY: usize = 0x40;
/// Inside the encrypted part: three scalars, whether there is an owner, and its certificates.
const SCALAR: usize = 48;
const OWNED: usize = 3 * SCALAR;
const CERTS: usize = OWNED + 16;

impl Firmware<'_> {
    /// Reads the keys from the buffer of INIT_EX. A buffer of 0xff bytes is new and is filled;
    /// damaged data is replaced by new keys and reported once.
    pub(super) fn load_nv(&mut self, address: u64, len: u32) -> Outcome {
        if len as usize != NV_LEN {
            return Err(Status::INVALID_LEN);
        }
        if self.writable(address, NV_LEN as u64)? % 0x1000 != 0 {
            return Err(Status::INVALID_ADDRESS);
        }
        let data = self.read_array::<NV_LEN>(address)?;
        let fresh = data.iter().all(|b| *b == 0xff);
        let keys = if fresh { None } else { self.unpack(&data[..]) };
        match keys {
            Some(keys) => {
                self.sp.identity.set_keys(keys);
                self.sp.nv_address = Some(address);
                Ok(())
            }
            None => {
                let keys = OwnedKeys::random(&mut self.sp.rng);
                self.sp.identity.set_keys(keys);
                self.save_nv(address)?;
                if !fresh {
                    return Err(Status::SECURE_DATA_INVALID);
                }
                self.sp.nv_address = Some(address);
                Ok(())
            }
        }
    }

    /// Writes the keys to the buffer of INIT_EX, if there is one.
    fn persist(&mut self) -> Outcome {
        self.sp
            .nv_address
            .map_or(Ok(()), |address| self.save_nv(address))
    }

    fn save_nv(&mut self, address: u64) -> Outcome {
        let mut data = vec![0; NV_LEN];
        data[..IV].copy_from_slice(MAGIC);
        let iv: [u8; 16] = self.sp.random();
        data[IV..MAC].copy_from_slice(&iv);
        let keys = self.sp.identity.keys();
        let body = &mut data[BODY..];
        for (i, key) in [&keys.oca, &keys.pek, &keys.pdh].into_iter().enumerate() {
            put(body, i * SCALAR, &key.scalar());
        }
        if let Some(owner) = &keys.owner {
            body[OWNED] = 1;
            put(body, CERTS, owner.pek.as_bytes());
            put(body, CERTS + CERT_LEN, owner.oca.as_bytes());
        }
        aes128_ctr(&self.nv_key(), &iv, &mut data[BODY..]);
        let mac = self.nv_mac(&data);
        data[MAC..BODY].copy_from_slice(&mac);
        self.write(address, &data)
    }

    fn unpack(&self, data: &[u8]) -> Option<OwnedKeys> {
        let mac: [u8; 32] = copy_at(data, MAC);
        if &data[..IV] != MAGIC || !same_mac(&self.nv_mac(data), &mac) {
            return None;
        }
        let mut body = data[BODY..].to_vec();
        aes128_ctr(&self.nv_key(), &copy_at(data, IV), &mut body);
        let key = |i: usize| PrivateKey::from_scalar(&body[i * SCALAR..][..SCALAR]);
        let owner = match body[OWNED] {
            0 => None,
            _ => Some(ExternalOwner {
                pek: Certificate::from_bytes(&copy_at(&body, CERTS))?,
                oca: Certificate::from_bytes(&copy_at(&body, CERTS + CERT_LEN))?,
            }),
        };
        Some(OwnedKeys {
            oca: key(0)?,
            pek: key(1)?,
            pdh: key(2)?,
            owner,
        })
    }

    fn nv_key(&self) -> [u8; 16] {
        copy_at(&self.sp.identity.chip_key(b"nv encryption", &[]), 0)
    }

    fn nv_mac(&self, data: &[u8]) -> [u8; 32] {
        let key = self.sp.identity.chip_key(b"nv integrity", &[]);
        hmac_sha256(&key, &[&data[..MAC], &data[BODY..]])
    }

    pub(super) fn factory_reset(&mut self) -> Outcome {
        let keys = OwnedKeys::random(&mut self.sp.rng);
        self.sp.identity.set_keys(keys);
        Ok(())
    }

    /// A new PEK makes the platform its own owner and needs a new PDH too.
    pub(super) fn pek_gen(&mut self) -> Outcome {
        let keys = OwnedKeys::random(&mut self.sp.rng);
        self.sp.identity.set_keys(keys);
        self.persist()
    }

    pub(super) fn pdh_gen(&mut self) -> Outcome {
        let mut keys = self.sp.identity.keys().clone();
        keys.pdh = PrivateKey::random(&mut self.sp.rng);
        self.sp.identity.set_keys(keys);
        self.persist()
    }

    pub(super) fn pek_csr(&mut self, buffer: &mut PekCsr) -> Outcome {
        let request = self.sp.identity.pek_request();
        let address = buffer.csr_paddr.get();
        self.write_sized(address, &mut buffer.csr_length, request.as_bytes())
    }

    pub(super) fn pek_cert_import(&mut self, buffer: &PekCertImport) -> Outcome {
        if self.sp.identity.keys().owner.is_some() {
            return Err(Status::ALREADY_OWNED);
        }
        let cert = |address: U64, len: U32, usage| self.read_cert(address.get(), len.get(), usage);
        let pek = cert(
            buffer.pek_cert_paddr,
            buffer.pek_cert_length,
            CertUsage::Pek,
        )?;
        let oca = cert(
            buffer.oca_cert_paddr,
            buffer.oca_cert_length,
            CertUsage::Oca,
        )?;
        let mut keys = self.sp.identity.keys().clone();
        if pek.key() != Some(keys.pek.public()) {
            return Err(Status::INVALID_CERTIFICATE);
        }
        if !oca.is_signed_by(&oca) || !pek.is_signed_by(&oca) {
            return Err(Status::BAD_SIGNATURE);
        }
        keys.owner = Some(ExternalOwner { pek, oca });
        self.sp.identity.set_keys(keys);
        self.persist()
    }

    /// Reads a certificate of a given use.
    pub(super) fn read_cert(
        &self,
        address: u64,
        len: u32,
        usage: CertUsage,
    ) -> Outcome<Certificate> {
        if len as usize != CERT_LEN {
            return Err(Status::INVALID_LEN);
        }
        Certificate::from_bytes(&*self.read_array(address)?)
            .filter(|c| c.usage() == Some(usage))
            .ok_or(Status::INVALID_CERTIFICATE)
    }

    pub(super) fn pdh_cert_export(&mut self, buffer: &mut PdhCertExport) -> Outcome {
        let identity = &mut self.sp.identity;
        let pdh = identity.pdh_cert();
        let chain = [
            identity.pek_cert(),
            identity.oca_cert(),
            identity.cek_cert(),
        ];
        let chain: Vec<u8> = chain.iter().flat_map(|c| *c.as_bytes()).collect();
        // Both lengths are written before either is refused.
        let (pdh_len, chain_len) = (CERT_LEN as u32, chain.len() as u32);
        if buffer.pdh_cert_length.get() < pdh_len || buffer.certs_length.get() < chain_len {
            buffer.pdh_cert_length = pdh_len.into();
            buffer.certs_length = chain_len.into();
            return Err(Status::INVALID_LEN);
        }
        let (pdh_at, chain_at) = (buffer.pdh_cert_paddr.get(), buffer.certs_paddr.get());
        self.writable(chain_at, chain_len.into())?;
        self.write_sized(pdh_at, &mut buffer.pdh_cert_length, pdh.as_bytes())?;
        self.write_sized(chain_at, &mut buffer.certs_length, &chain)
    }

    pub(super) fn get_id(&mut self, buffer: &mut GetId) -> Outcome {
        let id = self.sp.identity.chip_id;
        self.write_sized(buffer.id_paddr.get(), &mut buffer.id_length, &id)
    }
}
