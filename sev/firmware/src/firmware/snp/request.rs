//! Answering the messages of a guest.

use super::super::{Firmware, Outcome};
use super::SnpGuest;
use crate::attestation::{Report, SigningKey};
use crate::builder::TcbVersion;
use crate::crypto::hmac_sha256;
use crate::machine::entry::PageSize;
use crate::machine::region::PAGE;
use crate::message::{self, Header, MessageError, MessageType};
use crate::status::Status;
use crate::wire::{copy_at, put, u32_at, u64_at};

/// Highest sequence number of a message key.
const MAX_SEQUENCE: u64 = u32::MAX as u64;
/// Lengths of requests.
const KEY_REQUEST: usize = 0x20;
const REPORT_REQUEST: usize = 0x60;
const TSC_REQUEST: usize = 0x80;
/// Header of a report response.
const REPORT_RESPONSE: usize = 0x20;

/// Fields a derived key can be mixed with, by bit.
mod mix {
    pub(super) const POLICY: u64 = 1 << 0;
    pub(super) const IMAGE_ID: u64 = 1 << 1;
    pub(super) const FAMILY_ID: u64 = 1 << 2;
    pub(super) const MEASUREMENT: u64 = 1 << 3;
    pub(super) const GUEST_SVN: u64 = 1 << 4;
    pub(super) const TCB_VERSION: u64 = 1 << 5;
    pub(super) const ALL: u64 = (1 << 6) - 1;
}

impl Firmware<'_> {
    pub(super) fn guest_request(&mut self, context: u64, request: u64, response: u64) -> Outcome {
        let request = self.aligned_page(request, PageSize::Size4K)?;
        let response = self.aligned_page(response, PageSize::Size4K)?;
        self.writable(response, PAGE as u64)?;
        let message = self.read_array::<PAGE>(request)?;
        let header = Header::parse(&message[..]).map_err(|_| Status::INVALID_PARAM)?;
        let vmpck = usize::from(header.vmpck);
        let guest = self.snp_guest(context)?;
        let (key, last) = (guest.vmpck[vmpck], guest.sequence[vmpck]);
        if last + 2 > MAX_SEQUENCE {
            return Err(Status::AEAD_OFLOW);
        }
        let (_, payload) = message::open(&key, &message[..]).map_err(|e| match e {
            MessageError::Authentication => Status::BAD_MEASUREMENT,
            _ => Status::INVALID_PARAM,
        })?;
        if header.sequence != last + 1 {
            return Err(Status::INVALID_PARAM);
        }
        let kind = MessageType::from_number(header.message_type);
        let kind = kind
            .filter(|k| k.response().is_some())
            .ok_or(Status::INVALID_PARAM)?;
        let vmpl = u32::from(header.vmpck);
        let answer = match kind {
            MessageType::ReportRequest => self.report(context, vmpl, &payload)?,
            MessageType::KeyRequest => self.derived_key(context, vmpl, &payload)?,
            _ => self.tsc_info(context, &payload)?,
        };
        let kind = kind.response().ok_or(Status::INVALID_PARAM)?;
        let sealed = message::seal(&key, header.vmpck, kind, header.sequence + 1, &answer)
            .map_err(|_| Status::INVALID_LEN)?;
        let mut page = [0; PAGE];
        page[..sealed.len()].copy_from_slice(&sealed);
        self.write(response, &page)?;
        self.snp_guest_mut(context)?.sequence[vmpck] = header.sequence + 1;
        Ok(())
    }

    /// A report request is 64 bytes of the guest's choice, a VMPL not above the key's, and which
    /// key shall sign.
    fn report(&mut self, context: u64, vmpck: u32, request: &[u8]) -> Outcome<Vec<u8>> {
        if request.len() != REPORT_REQUEST {
            return Err(Status::INVALID_LEN);
        }
        let (vmpl, key_sel) = (u32_at(request, 64), u32_at(request, 68));
        let guest = self.snp_guest(context)?;
        // Key selection: 0 any, 1 VCEK, 2 VLEK, which this firmware does not have.
        let refused = if vmpl < vmpck || vmpl > 3 || key_sel > 2 {
            Some(Status::INVALID_PARAM)
        } else if key_sel == 2 || guest.identity.vcek_disabled {
            Some(Status::INVALID_KEY)
        } else {
            None
        };
        let mut out = vec![0; REPORT_RESPONSE];
        if let Some(status) = refused {
            put(&mut out, 0, &u32::from(status.0).to_le_bytes());
            return Ok(out);
        }
        let report = self.signed_report(context, vmpl, copy_at(request, 0))?;
        put(&mut out, 4, &(Report::LEN as u32).to_le_bytes());
        out.extend_from_slice(&report);
        Ok(out)
    }

    fn signed_report(
        &mut self,
        context: u64,
        vmpl: u32,
        report_data: [u8; 64],
    ) -> Outcome<[u8; Report::LEN]> {
        const ONES: [u8; 32] = [0xff; 32];
        let guest = self.snp_guest(context)?;
        let (config, tcb) = (&self.machine.config, &self.sp.tcb);
        let block = guest.identity.block.as_ref();
        let options = self.sp.snp.unwrap_or_default();
        let report = Report {
            version: config.report_version,
            guest_svn: block.map_or(0, |b| b.guest_svn),
            policy: guest.policy,
            family_id: block.map_or([0; 16], |b| b.family_id),
            image_id: block.map_or([0; 16], |b| b.image_id),
            vmpl,
            current_tcb: config.tcb,
            platform_info: u64::from(config.smt)
                | u64::from(options.rapl_disabled) << 3
                | u64::from(options.max_snp_asid.is_some()) << 4,
            author_key_enabled: guest.identity.author_key_digest.is_some(),
            mask_chip_key: tcb.mask_chip_key,
            signing_key: if tcb.mask_chip_key {
                SigningKey::None
            } else {
                SigningKey::Vcek
            },
            report_data,
            measurement: guest.digest.value(),
            host_data: guest.identity.host_data,
            id_key_digest: guest.identity.id_key_digest.unwrap_or([0; 48]),
            author_key_digest: guest.identity.author_key_digest.unwrap_or([0; 48]),
            report_id: guest.report_id,
            report_id_ma: guest.launch.migration_agent.unwrap_or(ONES),
            reported_tcb: tcb.reported,
            cpuid_fms: (config.report_version >= 3).then_some(config.fms),
            chip_id: if tcb.mask_chip_id {
                [0; 64]
            } else {
                self.sp.identity.chip_id
            },
            committed_tcb: tcb.committed,
            current_version: config.api,
            committed_version: config.api,
            launch_tcb: guest.launch.tcb,
        };
        let mut bytes = report.to_bytes();
        if !tcb.mask_chip_key {
            let key = self.sp.identity.vcek(tcb.reported);
            let signature = key.sign(&bytes[..Report::SIGNED]);
            bytes[Report::SIGNED..].copy_from_slice(&signature);
        }
        Ok(bytes)
    }

    /// A key derived from the chip and from the fields of its identity that the guest selects.
    fn derived_key(&mut self, context: u64, vmpck: u32, request: &[u8]) -> Outcome<Vec<u8>> {
        if request.len() != KEY_REQUEST {
            return Err(Status::INVALID_LEN);
        }
        let guest = self.snp_guest(context)?;
        let fields = u64_at(request, 8);
        let (vmpl, svn) = (u32_at(request, 0x10), u32_at(request, 0x14));
        let tcb = TcbVersion(u64_at(request, 0x18));
        let own_svn = guest.identity.block.map_or(0, |b| b.guest_svn);
        let migratable_root = u32_at(request, 0) & 1 != 0;
        let mut out = vec![0; 0x40];
        let refused = u32_at(request, 0) & !1 != 0
            || u32_at(request, 4) != 0
            || fields & !mix::ALL != 0
            || vmpl < vmpck
            || vmpl > 3
            || (fields & mix::GUEST_SVN != 0 && svn > own_svn)
            || (fields & mix::TCB_VERSION != 0 && !tcb.is_at_most(self.sp.tcb.committed));
        if refused {
            put(
                &mut out,
                0,
                &u32::from(Status::INVALID_PARAM.0).to_le_bytes(),
            );
            return Ok(out);
        }
        // Without a migration agent the migratable root is one of this guest alone.
        let root = match migratable_root {
            true => self.sp.identity.chip_key(b"vmrk", &guest.report_id),
            false => self.sp.identity.chip_key(b"derived keys", &[]),
        };
        let key = hmac_sha256(&root, &[&mixed(guest, fields, vmpl, svn, tcb)]);
        put(&mut out, 0x20, &key);
        Ok(out)
    }

    /// Scale and offset of the guest's TSC; only for guests launched with a secure TSC.
    fn tsc_info(&mut self, context: u64, request: &[u8]) -> Outcome<Vec<u8>> {
        if request.len() != TSC_REQUEST {
            return Err(Status::INVALID_LEN);
        }
        let launch = &self.snp_guest(context)?.launch;
        let mut out = vec![0; TSC_REQUEST];
        if !launch.secure_tsc {
            put(
                &mut out,
                0,
                &u32::from(Status::INVALID_PARAM.0).to_le_bytes(),
            );
            return Ok(out);
        }
        let own = u64::from(self.machine.config.tsc_khz.max(1));
        let desired = match launch.desired_tsc_khz {
            0 => own,
            khz => khz.into(),
        };
        // An 8.32 fixed-point ratio, as the TSC ratio of SVM has it.
        let scale = (desired << 32) / own;
        put(&mut out, 8, &scale.to_le_bytes());
        Ok(out)
    }
}

/// Data mixed into a derived key; fields that were not selected are absent, not zero.
fn mixed(guest: &SnpGuest, fields: u64, vmpl: u32, svn: u32, tcb: TcbVersion) -> Vec<u8> {
    let block = guest.identity.block.as_ref();
    let mut out = fields.to_le_bytes().to_vec();
    out.extend(vmpl.to_le_bytes());
    let mut field = |bit: u64, bytes: &[u8]| {
        if fields & bit != 0 {
            out.extend_from_slice(bytes);
        }
    };
    field(mix::POLICY, &guest.policy.to_le_bytes());
    field(mix::IMAGE_ID, &block.map_or([0; 16], |b| b.image_id));
    field(mix::FAMILY_ID, &block.map_or([0; 16], |b| b.family_id));
    field(mix::MEASUREMENT, &guest.digest.value());
    field(mix::GUEST_SVN, &svn.to_le_bytes());
    field(mix::TCB_VERSION, &tcb.0.to_le_bytes());
    out
}
